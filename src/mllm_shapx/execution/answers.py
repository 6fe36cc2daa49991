"""The study's answers on disk: which file of the coalition store belongs to a unit, and what goes in."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

from mllm_shapx.execution.messages import Answers
from mllm_shapx.explaining.coalitions import StoredAnswer
from mllm_shapx.models.base import Answer
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.planning.units import WorkUnit
from mllm_shapx.records.storage import Storage
from mllm_shapx.records.store import AnswerRow, CoalitionStore, StoreHeader


class AnswerFiles:
    """Reads and writes the answers of a study's units.

    A unit's file is named by its row and by a key over everything that decides an answer: the generation
    settings, the model's commit and the dtype of its weights.
    """

    def __init__(self, storage: Storage, runs: Sequence[RunSpec], model_commit: str, dtype: str) -> None:
        self._store = CoalitionStore(storage)
        self._headers = {
            run.generation_key: StoreHeader(
                {**run.generation_settings, "model_commit": model_commit, "dtype": dtype}
            )
            for run in runs
        }
        self._keys = {key: store_key(header) for key, header in self._headers.items()}
        self._under_way: dict[tuple[int, str], StoreHeader] = {}

    @property
    def keys(self) -> frozenset[str]:
        """Return the store keys of the study's runs."""
        return frozenset(self._keys.values())

    def read(self, unit: WorkUnit) -> tuple[Answers, tuple[str, ...]]:
        """Return the stored answers of a unit, and notes about files that were damaged."""
        key = unit.generation_key
        found = self._store.read(unit.row_index, self._keys[key], self._headers[key])
        by_mask = {mask: _stored(row) for mask, row in found.answers.items()}
        return Answers(by_mask, found.snapshot_id), found.notes

    def add(self, unit: WorkUnit, answers: Answers) -> None:
        """Write new answers of a unit."""
        key = unit.generation_key
        rows = {mask: _row(stored) for mask, stored in answers.by_mask.items()}
        header = replace(self._headers[key], snapshot_id=answers.snapshot_id, num_players=answers.num_players)
        self._store.append(unit.row_index, self._keys[key], header, rows)
        self._under_way[unit.row_index, key] = header

    def close(self, unit: WorkUnit) -> tuple[str, ...]:
        """Pack the answers of a unit that is done into one file; return notes about damaged ones."""
        key = unit.generation_key
        header = self._under_way.pop((unit.row_index, key), None)
        return () if header is None else self._store.merge(unit.row_index, self._keys[key], header)


def store_key(header: StoreHeader) -> str:
    """Return the hash, 16 hex digits, of everything that decides an answer."""
    text = json.dumps(header.settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stored(row: AnswerRow) -> StoredAnswer:
    return StoredAnswer(Answer(row.text, row.token_ids, row.logprobs, row.audio_frames), row.asked_by)


def _row(stored: StoredAnswer) -> AnswerRow:
    answer = stored.answer
    return AnswerRow(answer.text, answer.token_ids, answer.logprobs, answer.audio_frames, stored.asked_by)

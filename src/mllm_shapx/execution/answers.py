"""The study's answers: those of a unit under way, and the coalition store's files of each unit."""

import asyncio
import hashlib
import json
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mllm_shap import ConversationSnapshot

from mllm_shapx.data.conversations import load_row
from mllm_shapx.data.table import Table
from mllm_shapx.errors import RowError
from mllm_shapx.execution.messages import Answers, Lease
from mllm_shapx.explaining.forcing import KeepLikelihood
from mllm_shapx.explaining.similarity import Embedder, Vector
from mllm_shapx.explaining.unit import RowExplainer
from mllm_shapx.models.base import Answer
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.planning.units import WorkUnit
from mllm_shapx.records.storage import Storage
from mllm_shapx.records.store import CoalitionStore, StoreEntry, StoreHeader


class AnswerFiles:
    """Reads and writes the answers of a study's units.

    A unit's file is named by its row and by a hash of everything that decides an answer: the generation
    settings, the model's commit and the dtype of its weights.
    """

    def __init__(
        self,
        storage: Storage,
        runs: Sequence[RunSpec],
        model_commit: str,
        dtype: str,
        *,
        reads_only: bool = False,
    ) -> None:
        self.dtype = dtype
        self._store = CoalitionStore(storage, reads_only=reads_only)
        self._headers = {
            run.generation_key: StoreHeader(answer_settings(run, model_commit, dtype)) for run in runs
        }
        self._keys = {key: store_key(header) for key, header in self._headers.items()}

    def held(self, units: Iterable[WorkUnit]) -> list[WorkUnit]:
        """Return the units of which answers are stored."""
        places = self._store.places()
        return [unit for unit in units if (unit.row_index, self._keys[unit.generation_key]) in places]

    def read(self, unit: WorkUnit) -> tuple[Answers, tuple[str, ...]]:
        """Return the stored answers of a unit, and notes about damaged files."""
        row_index, key, header = self._place(unit)
        found = self._store.read(row_index, key, header)
        header = replace(header, snapshot_id=found.snapshot_id, num_players=found.num_players)
        likelihoods, written, notes = self._store.read_likelihoods(row_index, key, header)
        known = header if found.snapshot_id or written is None else written
        answers = Answers(found.answers, known.snapshot_id, known.num_players, likelihoods=likelihoods)
        return answers, (*found.notes, *notes)

    def write(self, unit: WorkUnit, answers: Answers, *, is_last: bool) -> tuple[str, ...]:
        """Write new answers of a unit, the last ones into one file with the stored ones.

        Returns:
            Notes about damaged files.
        """
        place = self._place(unit, answers)
        notes: tuple[str, ...] = ()
        if is_last:
            notes += self._store.merge(*place, answers.by_mask)
        elif answers.by_mask:
            self._store.append(*place, answers.by_mask)
        if answers.likelihoods:
            notes += self._store.merge_likelihoods(*place, answers.likelihoods)
        for kind, vectors in answers.vectors.items():
            notes += self._store.merge_embeddings(*self._place(unit), kind, vectors)
        return notes

    def embedder(self, unit: WorkUnit, kind: str, known: Mapping[int, Answer]) -> Embedder:
        """Return an embedder with the stored vectors of one kind; `known` are the unit's answers."""

        async def embed(answers: Sequence[Answer]) -> list[Vector]:
            vectors = self._store.read_embeddings(*self._place(unit), kind)[0]
            missing = [answer.content_id for answer in answers if answer.content_id not in vectors]
            if missing:
                ids = set(missing)
                masks = [mask for mask, answer in known.items() if answer.content_id in ids]
                raise NotStoredError("vector(s)", masks, len(missing))
            return [vectors[answer.content_id] for answer in answers]

        return embed

    def _place(self, unit: WorkUnit, answers: Answers | None = None) -> tuple[int, str, StoreHeader]:
        """Return row, key and header of a unit's files; with `answers`, the header names their row."""
        header = self._headers[unit.generation_key]
        if answers is not None:
            header = replace(header, snapshot_id=answers.snapshot_id, num_players=answers.num_players)
        return unit.row_index, self._keys[unit.generation_key], header


class HeldUnit:
    """A unit that a worker is explaining, and its unwritten answers."""

    def __init__(self, lease: Lease) -> None:
        self.unit = lease.unit
        self.known = lease.known
        """Stored answers of the unit."""
        self.explainer: RowExplainer | None = None
        self.vectors: dict[str, dict[bytes, Vector]] = {}
        self.flushed_at = time.monotonic()
        self.task: asyncio.Task[None] | None = None

    @property
    def answers(self) -> int:
        """Return the number of answers and likelihoods of its row."""
        if self.explainer is None:
            return 0
        row = self.explainer.coalitions
        return len(row.stored) + len(row.likelihoods.stored)

    def take_new(self) -> Answers:
        """Return the answers, vectors and likelihoods since the last call."""
        if self.explainer is None:
            return Answers()
        coalitions = self.explainer.coalitions
        vectors, self.vectors = self.vectors, {}
        return Answers(
            coalitions.take_fresh(),
            coalitions.snapshot.snapshot_id,
            self.explainer.num_players,
            vectors,
            coalitions.likelihoods.take_fresh(),
        )


class NotStoredError(Exception):
    """Something that a run needs of some coalitions is not stored: answers, vectors or likelihoods."""

    def __init__(self, what: str, masks: Collection[int], count: int | None = None) -> None:
        super().__init__(what, masks)
        self.what = what
        self.masks = frozenset(masks)
        self.count = len(masks) if count is None else count


async def refuse_likelihoods(
    prompts: Sequence[tuple[int, ConversationSnapshot]], _forced: object, _top_k: int, _keep: KeepLikelihood
) -> None:
    """Take the place of a model's likelihoods where only stored ones may be used."""
    raise NotStoredError("likelihood(s)", [mask for mask, _ in prompts])


def stored_row(table: Table, row_index: int, run: RunSpec, stored: Answers) -> RowExplainer | None:
    """Return a row with its stored answers; None if it has changed since, or cannot be explained."""
    if row_index >= table.num_rows:
        return None
    try:
        row = RowExplainer(load_row(table, row_index, run.dataset, run.modality), run)
    except RowError:
        return None
    if not stored.belong_to(row.coalitions):
        return None
    stored.give_to(row.coalitions)
    return row


def stored_files(
    storage: Storage, runs: Sequence[RunSpec], model_commit: str, *, reads_only: bool = False
) -> AnswerFiles | None:
    """Return the files of these runs' stored answers, in the dtype of the first ones; None without any."""
    for entry in _usable(storage, runs, model_commit):
        return AnswerFiles(storage, runs, model_commit, entry.settings["dtype"], reads_only=reads_only)
    return None


def keys_in_use(storage: Storage, runs: Sequence[RunSpec], model_commit: str) -> frozenset[str]:
    """Return the keys of the stored answers that any run may use, in any dtype."""
    return frozenset(entry.key for entry in _usable(storage, runs, model_commit))


def _usable(storage: Storage, runs: Sequence[RunSpec], model_commit: str) -> Iterator[StoreEntry]:
    wanted = [answer_settings(run, model_commit, "") for run in runs]
    for entry in CoalitionStore(storage).info():
        if "dtype" in entry.settings and {**entry.settings, "dtype": ""} in wanted:
            yield entry


def answer_settings(run: RunSpec, model_commit: str, dtype: str) -> dict[str, Any]:
    """Return everything that decides an answer; `dtype` is the one in memory, not the config's."""
    return {**run.generation_settings, "model_commit": model_commit, "dtype": dtype}


def vector_kind(run: RunSpec, encoder_commit: str | None) -> str:
    """Return the name of the run's kind of embedding: its encoder and its pooling.

    `encoder_commit` is the hub commit of the external encoder, or the digest of its directory.
    """
    if run.embedding is None:
        return f"own/{run.shap.mode}/{run.shap.reducer}"
    encoder = run.embedding
    return (
        f"{encoder.model_id}@{encoder_commit}/{encoder.max_length}/"
        f"{'unit' if encoder.l2_normalize else 'raw'}/{run.shap.reducer}"
    )


def store_key(header: StoreHeader) -> str:
    """Return the hash, 16 hex digits, of everything that decides an answer."""
    text = json.dumps(header.settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

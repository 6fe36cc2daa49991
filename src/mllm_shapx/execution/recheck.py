"""Generates stored answers again, one at a time, and compares them: `verify --again`."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from mllm_shapx.config.loading import load_config
from mllm_shapx.data.sources import Table, open_table
from mllm_shapx.errors import ModelError, OutputError
from mllm_shapx.execution.answers import answer_settings, stored_row
from mllm_shapx.execution.messages import Answers, Study
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.preparation import prepare, study_config
from mllm_shapx.explaining.settings import decoding
from mllm_shapx.explaining.unit import seeds
from mllm_shapx.models.base import Model, OutOfMemory
from mllm_shapx.models.registry import load_model
from mllm_shapx.planning.precision import ROUNDED
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.records.runs import find_runs
from mllm_shapx.records.storage import open_storage
from mllm_shapx.records.store import CoalitionStore, StoreEntry

_SAY_S = 10.0
"""Seconds between two progress lines."""
_SHOWN = 3
"""Differences shown per generation key."""


@dataclass(frozen=True, slots=True)
class Difference:
    """An answer that differs."""

    row_index: int
    coalition: int
    """Bit i is set when player i is present."""
    stored: str
    now: str

    def __str__(self) -> str:
        return (
            f"row {self.row_index}, coalition {self.coalition:#x}: stored {self.stored!r}, now {self.now!r}"
        )


@dataclass(frozen=True, slots=True)
class KeyAgreement:
    """The comparison for one generation key."""

    runs: tuple[str, ...]
    """Runs that use these answers."""
    dtype: str
    """Dtype of the weights, for both the stored and the new answers."""
    device: str
    """Device of the new answers."""
    answers: int
    """Answers compared."""
    differences: tuple[Difference, ...]

    @property
    def agree(self) -> int:
        """Return the number of equal answers."""
        return self.answers - len(self.differences)

    @property
    def ok(self) -> bool:
        """Return whether they agree as well as the dtype allows; float32 is independent of the batch."""
        return not self.differences or self.dtype in ROUNDED

    def to_json(self) -> dict[str, Any]:
        """Return the same as JSON data."""
        return {**asdict(self), "agree": self.agree}

    def to_text(self) -> str:
        """Return one line, and the first differences."""
        share = f"{self.agree} of {self.answers} answers agree ({self.agree / self.answers:.1%})"
        lines = [f"{', '.join(self.runs)} ({self.dtype} on {self.device}): {share}"]
        lines += [f"  {each}" for each in self.differences[:_SHOWN]]
        if len(self.differences) > _SHOWN:
            lines.append(f"  and {len(self.differences) - _SHOWN} more")
        if self.differences and self.ok:
            lines.append(f"  in {self.dtype} an answer may change with the batch that it is generated in")
        elif self.differences:
            lines.append(
                "  in float32 answers do not depend on the batch: they were generated on another kind of "
                "device or with other libraries, or batching is wrong for this model (set batch_size to 1)"
            )
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Recheck:
    """The comparison for one directory."""

    directory: str
    agreements: tuple[KeyAgreement, ...]
    changed: int
    """Drawn answers that were not compared, because their row has changed."""

    @property
    def ok(self) -> bool:
        """Return whether all comparisons are ok."""
        return all(each.ok for each in self.agreements)

    def to_json(self) -> dict[str, Any]:
        """Return the same as JSON data."""
        return {
            "directory": self.directory,
            "ok": self.ok,
            "generation_keys": [each.to_json() for each in self.agreements],
            "answers_of_changed_rows": self.changed,
        }

    def to_text(self) -> str:
        """Return lines for the terminal."""
        lines = [f"{self.directory}, asked again: {each.to_text()}" for each in self.agreements]
        if self.changed:
            lines.append(
                f"{self.directory}: {self.changed} answer(s) could not be compared, because the text or the "
                "players of their rows have changed"
            )
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Stored answers of one row and generation key, to be generated again."""

    entry: StoreEntry
    run: RunSpec
    numbers: tuple[int, ...]
    """Their positions among the coalitions of the entry, ascending."""


def recheck(directory: str, number: int, seed: int, say: Callable[[str], None]) -> Recheck:
    """Answer `number` random stored coalitions of a study or a run again, each alone, and compare the texts.

    The same `seed` draws the same coalitions. Sampled answers get their original seeds. Nothing is written.

    Raises:
        OutputError: When no answers are stored, or they come from another model than the config's.
        ModelError: When the model cannot be loaded.
    """
    config = study_config(directory)
    study, _ = prepare(load_config(config), RunOptions())
    storage = open_storage(str(config.parent))
    names = set(find_runs(directory)[1])
    runs = [run for run in study.runs if run.name in names]
    store = CoalitionStore(storage)
    drawn = _draw(_usable(store, study, runs, directory), number, seed)
    table = open_table(study.dataset, study.config_path)
    wanted = sum(len(each.numbers) for each in drawn)
    asker = _Asker(study, store, table, wanted, say)
    drawn.sort(key=lambda each: (_dtype(each), each.run.generation_key, each.entry.row_index))
    agreements: list[KeyAgreement] = []
    for dtype, of_dtype in groupby(drawn, key=_dtype):
        agreements += asker.compare(dtype, list(of_dtype), runs)
    return Recheck(directory, tuple(agreements), asker.changed)


def _dtype(drawn: _Drawn) -> str:
    return str(drawn.entry.settings["dtype"])


def _usable(
    store: CoalitionStore, study: Study, runs: Sequence[RunSpec], directory: str
) -> list[tuple[StoreEntry, RunSpec]]:
    """Return the entries of the store that belong to `runs`; refuse a store without any."""
    found, others = [], set()
    for entry in store.info():
        settings = {**entry.settings, "dtype": "", "model_commit": ""}
        run = next((run for run in runs if answer_settings(run, "", "") == settings), None)
        if run is None or not entry.answers:
            continue
        commit = entry.settings.get("model_commit")
        if commit == study.model_commit:
            found.append((entry, run))
        else:
            others.add(str(commit))
    if not found and others:
        raise OutputError(
            f"{directory}: its answers were given by another model: {runs[0].model_id!r} was "
            f"{', '.join(sorted(others))} then and is {study.model_commit} now. Put that model back, or run "
            "the study again"
        )
    if not found:
        raise OutputError(f"{directory} holds no stored answers of its runs that could be asked for again")
    return found


def _draw(stored: Sequence[tuple[StoreEntry, RunSpec]], number: int, seed: int) -> list[_Drawn]:
    """Draw answers uniformly."""
    total = sum(entry.answers for entry, _ in stored)
    places = sorted(random.Random(seed).sample(range(total), min(number, total)))
    drawn, start = [], 0
    for entry, run in stored:
        end = start + entry.answers
        numbers = tuple(place - start for place in places if start <= place < end)
        if numbers:
            drawn.append(_Drawn(entry, run, numbers))
        start = end
    return drawn


class _Asker:
    """Generates answers again, prompt by prompt, and says every `_SAY_S` seconds how many are done."""

    def __init__(
        self, study: Study, store: CoalitionStore, table: Table, wanted: int, say: Callable[[str], None]
    ) -> None:
        self.changed = 0
        self._study = study
        self._store = store
        self._table = table
        self._wanted, self._done = wanted, 0
        self._say = say
        self._said = time.monotonic()

    def compare(self, dtype: str, drawn: Sequence[_Drawn], runs: Sequence[RunSpec]) -> Iterator[KeyAgreement]:
        """Yield the comparison of each generation key, with the model loaded in `dtype`."""
        kwargs = drawn[0].run.connector_kwargs.model_copy(update={"dtype": dtype})
        loaded = replace(drawn[0].run, connector_kwargs=kwargs)
        model = load_model(loaded.model_settings, self._study.model_path, self._study.model_commit)
        try:
            for key, of_key in groupby(drawn, key=lambda each: each.run.generation_key):
                found = [difference for each in of_key for difference in self._of_row(model, each)]
                if found:
                    names = tuple(run.name for run in runs if run.generation_key == key)
                    differences = tuple(each for each in found if each is not None)
                    yield KeyAgreement(names, dtype, model.identity.device, len(found), differences)
        finally:
            model.close()

    def _of_row(self, model: Model, drawn: _Drawn) -> Iterator[Difference | None]:
        """Yield the difference of each comparable answer of a row, None if they are equal."""
        row_index = drawn.entry.row_index
        stored = self._store.peek(row_index, drawn.entry.key)
        belonging = Answers({}, stored.snapshot_id, stored.num_players)
        row = stored_row(self._table, row_index, drawn.run, belonging)
        masks = sorted(stored.answers)
        if row is None or drawn.numbers[-1] >= len(masks):
            self.changed += len(drawn.numbers)
            return
        how = decoding(drawn.run)
        for mask in (masks[number] for number in drawn.numbers):
            before = stored.answers[mask]
            try:
                (now,) = model.answer(
                    [model.encode(row.coalitions.render(mask), how)], how, seeds(drawn.run, row_index, [mask])
                )
            except OutOfMemory as error:
                raise ModelError(f"one prompt alone does not fit in the device's memory ({error})") from error
            self._done += 1
            if time.monotonic() - self._said > _SAY_S:
                self._said = time.monotonic()
                self._say(f"{self._done} of {self._wanted} answers asked for again")
            is_equal = (before.text, before.audio_frames) == (now.text, now.audio_frames)
            yield None if is_equal else Difference(row_index, mask, before.text, now.text)

"""Shards: parts of a set, written by separate jobs to `shards/I-of-N/`, each with a set's layout."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mllm_shapx.errors import OutputError
from mllm_shapx.records.environments import ENVIRONMENTS, MODEL, history
from mllm_shapx.records.layout import GENERATIONS, SHARDS, RunLayout, row_and_key
from mllm_shapx.records.run_reader import RunReader
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.spec import RESULT_SETTINGS, differences
from mllm_shapx.records.storage import Storage, join_uri, numbered, open_storage

_NAME = re.compile(r"(\d+)-of-(\d+)")
_SHOWN = 5
_MADE_ANEW = frozenset({"config.json", "pace.json", "progress.json", ".lock"})
_MOVED = frozenset({"spec.json", "checkpoint.json", "summary", "samples", "failures", "audio"})
"""Names in a run's directory that a merge empties, or that the merged directory rewrites."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Every `count`-th selected row, starting at `index` (0 to `count` - 1)."""

    index: int
    count: int

    @property
    def folder(self) -> str:
        """Return the shard's directory, relative to the set's."""
        return f"{SHARDS}/{self.index}-of-{self.count}"

    def rows(self, rows: Sequence[int]) -> tuple[int, ...]:
        """Return the shard's part of the selected rows, in their order."""
        return tuple(rows[self.index :: self.count])


def found_shards(storage: Storage) -> list[Shard]:
    """Return the shards below a set's directory, by index."""
    names = map(_NAME.fullmatch, storage.list(SHARDS))
    found = (Shard(int(match[1]), int(match[2])) for match in names if match is not None)
    return sorted(found, key=lambda shard: (shard.count, shard.index))


def all_shards(storage: Storage) -> list[Shard]:
    """Return the shards of a set.

    Raises:
        OutputError: When there are none, some are missing, or their counts differ.
    """
    where = storage.locate(SHARDS)
    found = found_shards(storage)
    if not found:
        raise OutputError(f"{where}: there are no shards to merge; `run --shard I/N` makes them")
    counts = sorted({shard.count for shard in found})
    if len(counts) > 1:
        raise OutputError(
            f"{where} holds shards of different divisions ({', '.join(f'of {count}' for count in counts)}), "
            "whose rows overlap; move those of all but one elsewhere"
        )
    missing = sorted(set(range(counts[0])) - {shard.index for shard in found})
    if missing:
        shown = ", ".join(f"{index}/{counts[0]}" for index in missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise OutputError(f"{where} lacks the shard(s) {shown}{more}; run them with `run --shard I/N` first")
    return found


class ShardMerger:
    """Moves the results of shards to the plain layout of their set.

    Files are moved one by one; the next merge completes an interrupted one. A shard's other files (files set
    aside, W&B's offline runs) stay in `shards/merged-I-of-N.1/`.

    Args:
        storage: The set's directory.
        shards: All of its shards.
        runs: Names of the set's runs.
    """

    def __init__(self, storage: Storage, shards: Sequence[Shard], runs: Sequence[str]) -> None:
        self._storage = storage
        self._shards = shards
        self._runs = runs

    def check(self) -> dict[str, dict[str, Any]]:
        """Return run -> its `spec.json` with the environments of all shards; changes nothing.

        Raises:
            OutputError: When shards have different settings, or two files of one name differ.
        """
        specs = {name: self._spec(name) for name in self._runs}
        for source, target in self._moves():
            if self._storage.exists(target) and not self._is_same(source, target):
                raise OutputError(
                    f"{self._storage.locate(source)} and {self._storage.locate(target)} differ; move one of "
                    "them elsewhere and merge again"
                )
        return {name: spec for name, spec in specs.items() if spec is not None}

    def move(self) -> int:
        """Move the results and remove the shards' emptied directories; return the number of files."""
        for storage, name in itertools.product(self._storages(), self._runs):
            RunRecords(storage, name).heal_spec()
        moves = self._moves()
        for source, target in moves:
            if self._storage.exists(target):
                self._storage.remove(source)  # equal, as checked by `check`
            else:
                self._storage.move(source, target)
        for shard in self._shards:
            self._remove_derived(shard.folder)
        return len(moves)

    def _spec(self, name: str) -> dict[str, Any] | None:
        """Return the spec of a run, combined from the plain layout and all shards."""
        merged: dict[str, Any] | None = None
        for storage in self._storages():
            try:
                spec = RunReader(storage, name).read_usable_spec()
            except ValueError:
                spec = None  # `move` sets it aside
            if spec is None:
                continue
            if merged is None:
                merged = spec
                continue
            keys = differences(merged[RESULT_SETTINGS], spec[RESULT_SETTINGS])
            if keys:
                raise OutputError(
                    f"{storage.locate(name)} was made with other settings than the shards before it: "
                    f"{', '.join(keys)}; run that shard again with the same config and --overwrite"
                )
            known = history(merged)
            ids = {entry.get("id") for entry in known}
            merged = {
                **merged,
                ENVIRONMENTS: [*known, *(entry for entry in history(spec) if entry.get("id") not in ids)],
                MODEL: merged.get(MODEL) or spec.get(MODEL),
            }
        return merged

    def _storages(self) -> list[Storage]:
        """Return the plain layout's directory and those of all shards."""
        folders = [open_storage(join_uri(self._storage.uri, shard.folder)) for shard in self._shards]
        return [self._storage, *folders]

    def _moves(self) -> list[tuple[str, str]]:
        """Return the files and folders to move; samples come after their recordings and failures."""
        moves = []
        for shard in self._shards:
            inside = [
                f"{GENERATIONS}/{name}"
                for name in self._storage.list(f"{shard.folder}/{GENERATIONS}")
                if row_and_key(name) is not None
            ]
            for run in map(RunLayout, self._runs):
                for folder in (run.audio, run.failures, run.samples):
                    inside += [f"{folder}/{name}" for name in self._storage.list(f"{shard.folder}/{folder}")]
            moves += [(f"{shard.folder}/{path}", path) for path in inside]
        return moves

    def _is_same(self, source: str, target: str) -> bool:
        try:
            return self._storage.read_bytes(source) == self._storage.read_bytes(target)
        except OSError:
            return False  # a folder

    def _remove_derived(self, folder: str) -> None:
        """Remove a shard's directory; rename it if it contains other files."""
        names = set(self._storage.list(folder)) - {GENERATIONS, *_MADE_ANEW}
        kept = names.difference(self._runs) | set(self._storage.list(f"{folder}/{GENERATIONS}"))
        for name in names.intersection(self._runs):
            kept |= set(self._storage.list(f"{folder}/{name}")) - _MOVED
        if kept:
            parent, _, name = folder.rpartition("/")
            self._storage.move(folder, numbered(self._storage, f"{parent}/merged-{name}"))
        else:
            self._storage.remove(folder)
        if not self._storage.list(SHARDS):
            self._storage.remove(SHARDS)

"""The coalition store's files: all answers of a study, by row and generation key (`generations/`)."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mllm_shapx.records.answer import Answer
from mllm_shapx.records.layout import GENERATIONS, GenerationLayout, row_and_key
from mllm_shapx.records.likelihood import Likelihood, LikelihoodKey
from mllm_shapx.records.storage import Storage, numbered, unfinished
from mllm_shapx.records.store_codec import (
    StoreHeader,
    check_bytes,
    decode_answers,
    decode_embeddings,
    decode_likelihoods,
    decode_table,
    decode_texts,
    encode_answers,
    encode_embeddings,
    encode_likelihoods,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CoalitionStore", "PruneResult", "StoreEntry", "StoreHeader", "StoredAnswers"]

_DAMAGED = f"{GENERATIONS}/damaged"
_SET_ASIDE = f"{GENERATIONS}/set_aside"
"""Answers to rows that have changed in the dataset."""


@dataclass(frozen=True, slots=True)
class StoredAnswers:
    """The stored answers of one row under one generation key."""

    answers: dict[int, Answer] = field(default_factory=dict)
    """Coalition (bit i is set when player i is present) -> its answer."""
    notes: tuple[str, ...] = ()
    """Notes on damaged and conflicting files that were moved to `damaged/`."""
    snapshot_id: str = ""
    """Id of their conversation; empty if no writer knew it."""
    num_players: int = 0
    """Players of the row, 0 if no writer knew them."""


@dataclass(frozen=True, slots=True)
class StoreEntry:
    """Counts of the store's data for one row under one generation key."""

    row_index: int
    key: str
    answers: int
    embeddings: int
    """Vectors of its answers."""
    num_bytes: int
    num_players: int
    """Players of the row, 0 if the writer did not know them."""
    settings: Mapping[str, Any]
    """Generation settings, model commit and dtype."""
    problem: str | None = None
    """Why one of its files cannot be read, None when all can."""
    likelihoods: int = 0
    """Likelihoods of given texts, each after one coalition's prompt."""


@dataclass(frozen=True, slots=True)
class PruneResult:
    """The removed answers of a pruning."""

    entries: int
    num_bytes: int


class CoalitionStore:
    """Reads and writes `generations/`: one file per row and key, and parts of incomplete rows.

    New answers of a row are flushed as parts, `ROW-KEY.parts/000001.parquet` and so on; `merge` packs them
    into `ROW-KEY.parquet` when the row is done. `read` reads both, so a crash loses only answers that were
    not flushed. One process writes; any process may read.
    """

    def __init__(self, storage: Storage, *, reads_only: bool = False) -> None:
        """Bind the place; with `reads_only`, files that are damaged or do not fit are left where they are."""
        self._storage = storage
        self._reads_only = reads_only

    def read(self, row_index: int, key: str, header: StoreHeader) -> StoredAnswers:
        """Return the stored answers; damaged files and files that contradict `header` move to `damaged/`."""
        place = GenerationLayout(row_index, key)
        answers: dict[int, Answer] = {}
        notes: list[str] = []
        parts = self._parts(place)
        if parts and not header.snapshot_id:
            # The row may have changed between two starts: the last part has the current row.
            _, newest = self._read_file(parts[-1], header, decode_answers, notes)
            header = header if newest is None else replace(header, snapshot_id=newest.snapshot_id)
        for path in (place.answers, *parts):
            content, found = self._read_file(path, header, decode_answers, notes)
            for mask, answer in content:
                answers.setdefault(mask, answer)
            # Further files must belong to the same conversation and players.
            if found is not None:
                header = header.completed(found.snapshot_id, found.num_players)
        if not answers:
            return StoredAnswers({}, tuple(notes))
        return StoredAnswers(answers, tuple(notes), header.snapshot_id, header.num_players)

    def peek(self, row_index: int, key: str) -> StoredAnswers:
        """Return the stored answers as `read` does, but move no files."""

        def decode(data: bytes) -> tuple[dict[int, Answer], StoreHeader]:
            table, header = decode_table(data)
            return dict(decode_answers(table)), header

        found, header = self._consistent(row_index, key, decode)
        return StoredAnswers(_first_wins(found), (), header.snapshot_id, header.num_players)

    def texts(self, row_index: int, key: str, masks: Collection[int]) -> tuple[dict[int, str], int]:
        """Return the stored texts of some coalitions, and the row's players (0 if no writer knew them).

        Faster than `peek`; changes nothing.
        """
        found, header = self._consistent(row_index, key, lambda data: decode_texts(data, masks))
        return _first_wins(found), header.num_players

    def settings(self, row_index: int, key: str) -> Mapping[str, Any] | None:
        """Return the settings of a row's stored answers, None without a readable file."""
        place = GenerationLayout(row_index, key)
        for path in (place.answers, *self._parts(place)):
            with contextlib.suppress(FileNotFoundError, ValueError):
                return decode_table(self._storage.read_bytes(path))[1].settings
        return None

    def _consistent[T](
        self, row_index: int, key: str, decode: Callable[[bytes], tuple[T, StoreHeader]]
    ) -> tuple[list[T], StoreHeader]:
        """Return the contents of a row's readable files of answers that fit the first, and its header."""
        place = GenerationLayout(row_index, key)
        contents: list[T] = []
        first = StoreHeader({})
        for path in (place.answers, *self._parts(place)):
            try:
                content, header = decode(self._storage.read_bytes(path))
            except (FileNotFoundError, ValueError):
                continue
            first = first if contents else header
            if first.conflict(header) is None:
                contents.append(content)
        return contents, first

    def append(self, row_index: int, key: str, header: StoreHeader, answers: Mapping[int, Answer]) -> None:
        """Write new answers of an incomplete row as one more part. The cost is O(new answers)."""
        if not answers:
            return
        place = GenerationLayout(row_index, key)
        numbers = [int(path.rpartition("/")[2].partition(".")[0]) for path in self._parts(place)]
        path = f"{place.parts}/{max(numbers, default=0) + 1:06d}.parquet"
        self._storage.write_bytes(path, encode_answers(header, answers))

    def merge(
        self, row_index: int, key: str, header: StoreHeader, answers: Mapping[int, Answer] | None = None
    ) -> tuple[str, ...]:
        """Pack a row's stored answers and `answers` into its one file; return notes as `read` does.

        Stored answers win. Without new answers and parts, nothing is written.
        """
        place = GenerationLayout(row_index, key)
        stored = self.read(row_index, key, header)
        together = {**(answers or {}), **stored.answers}
        has_parts = self._storage.exists(place.parts)
        if together and (has_parts or len(together) > len(stored.answers)):
            # A writer without new answers may not know the row.
            header = header.completed(stored.snapshot_id, stored.num_players)
            self._storage.write_bytes(place.answers, encode_answers(header, together))
        if has_parts:
            self._storage.remove(place.parts)
        return stored.notes

    def read_embeddings(
        self, row_index: int, key: str, header: StoreHeader, kind: str
    ) -> tuple[dict[bytes, "NDArray[np.float64]"], tuple[str, ...]]:
        """Return the stored vectors of one kind by `Answer.content_id`, and notes as `read` does."""
        notes: list[str] = []
        path = GenerationLayout(row_index, key).embeddings
        found, _ = self._read_file(path, header, decode_embeddings, notes)
        return {answer: vector for (of_kind, answer), vector in found if of_kind == kind}, tuple(notes)

    def merge_embeddings(
        self,
        row_index: int,
        key: str,
        header: StoreHeader,
        kind: str,
        vectors: Mapping[bytes, "NDArray[np.float64]"],
    ) -> tuple[str, ...]:
        """Add vectors of answers, each by its `Answer.content_id`.

        `kind` names encoder, mode and reducer, such as `own/CONTEXTUAL/MeanReducer`. An answer shared by
        several coalitions is stored once. Vectors may differ in length and are stored exactly, as float64.
        """
        notes: list[str] = []
        path = GenerationLayout(row_index, key).embeddings
        stored = dict(self._read_file(path, header, decode_embeddings, notes)[0])
        fresh = {(kind, answer): vector for answer, vector in vectors.items()}
        if fresh.keys() - stored.keys():
            self._storage.write_bytes(path, encode_embeddings(header, fresh | stored))
        return tuple(notes)

    def read_likelihoods(
        self, row_index: int, key: str, header: StoreHeader
    ) -> tuple[dict[LikelihoodKey, Likelihood], StoreHeader | None, tuple[str, ...]]:
        """Return the stored likelihoods, the header of their file, and notes as `read` does."""
        notes: list[str] = []
        path = GenerationLayout(row_index, key).likelihoods
        found, written = self._read_file(path, header, decode_likelihoods, notes)
        return dict(found), written, tuple(notes)

    def merge_likelihoods(
        self, row_index: int, key: str, header: StoreHeader, likelihoods: Mapping[LikelihoodKey, Likelihood]
    ) -> tuple[str, ...]:
        """Add likelihoods; a stored one is replaced only by one with more of the most probable tokens."""
        stored, _, notes = self.read_likelihoods(row_index, key, header)
        fresh = {
            place: each
            for place, each in likelihoods.items()
            if place not in stored or stored[place].top_k < each.top_k
        }
        if fresh:
            path = GenerationLayout(row_index, key).likelihoods
            self._storage.write_bytes(path, encode_likelihoods(header, stored | fresh))
        return notes

    def places(self) -> set[tuple[int, str]]:
        """Return the rows and keys with answers, by file names only."""
        names = self._storage.list(GENERATIONS)
        return {place for name in names if (place := row_and_key(name)) is not None}

    def set_aside(self, rows: Collection[int]) -> int:
        """Move all files of `rows` to `generations/set_aside/`; return the number of files."""
        places = [GenerationLayout(row, key) for row, key in sorted(self.places()) if row in rows]
        paths = [path for place in places for path in (*place.files, place.parts)]
        found = [path for path in paths if self._storage.exists(path)]
        for path in found:
            self._move_aside(path, _SET_ASIDE)
        return len(found)

    def remove_leftovers(self) -> int:
        """Remove files left by interrupted writes; return their number."""
        names = self._storage.list(GENERATIONS)
        parts = [f"{GENERATIONS}/{name}" for name in names if name.endswith(".parts")]
        leftovers = unfinished(self._storage, [GENERATIONS, *parts])
        for path in leftovers:
            self._storage.remove(path)
        return len(leftovers)

    def info(self) -> Iterator[StoreEntry]:
        """Yield an entry per row and key; changes nothing."""
        for row, key, paths in self._entries():
            yield self._entry(row, key, paths)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield path and problem of every file whose bytes have changed since writing; changes nothing."""
        paths = [path for _, _, paths in self._entries() for path in paths]
        for path, content in self._storage.read_many(paths):
            if isinstance(content, OSError):
                yield path, f"it cannot be read ({content.strerror or content})"
                continue
            try:
                check_bytes(content)
            except ValueError as error:
                yield path, str(error)

    def prune(self, keys_in_use: Collection[str], rows_in_use: Collection[int] | None = None) -> PruneResult:
        """Remove answers of other generation keys and, if `rows_in_use` is given, of other rows."""
        entries = num_bytes = 0
        for row, key, paths in list(self._entries()):
            if key in keys_in_use and (rows_in_use is None or row in rows_in_use):
                continue
            entries += 1
            num_bytes += sum(self._storage.size(path) for path in paths)
            place = GenerationLayout(row, key)
            for path in (*place.files, place.parts):
                self._storage.remove(path)
        return PruneResult(entries, num_bytes)

    def _entries(self) -> Iterator[tuple[int, str, list[str]]]:
        """Yield every row and key with the paths of its files."""
        listed = self._storage.list(GENERATIONS)  # once: a running driver adds files
        names = {f"{GENERATIONS}/{name}" for name in listed}
        for row, key in sorted({found for name in listed if (found := row_and_key(name)) is not None}):
            place = GenerationLayout(row, key)
            files = [path for path in place.files if path in names]
            yield row, key, files + (self._parts(place) if place.parts in names else [])

    def _entry(self, row: int, key: str, paths: Sequence[str]) -> StoreEntry:
        place = GenerationLayout(row, key)
        masks: set[bytes] = set()
        embeddings = likelihoods = num_bytes = 0
        header = StoreHeader({})
        problem: str | None = None
        for path in paths:
            try:
                data = self._storage.read_bytes(path)
                num_bytes += len(data)
                table, header = decode_table(data)
            except FileNotFoundError:
                continue  # the writer packed or removed it meanwhile
            except ValueError as error:
                problem = f"{self._storage.locate(path)}: {error}"
                continue
            if path == place.embeddings:
                embeddings += table.num_rows
            elif path == place.likelihoods:
                likelihoods += table.num_rows
            else:
                # Masks of different widths may mean the same coalition.
                masks.update(mask.rstrip(b"\0") for mask in table.column("mask").to_pylist())
        return StoreEntry(
            row_index=row,
            key=key,
            answers=len(masks),
            embeddings=embeddings,
            num_bytes=num_bytes,
            num_players=header.num_players,
            settings=header.settings,
            problem=problem,
            likelihoods=likelihoods,
        )

    def _parts(self, place: GenerationLayout) -> list[str]:
        names = self._storage.list(place.parts)
        return [
            f"{place.parts}/{name}"
            for name in names
            if name.endswith(".parquet") and name.partition(".")[0].isdigit()
        ]

    def _read_file[T](
        self, path: str, header: StoreHeader, decode: Callable[[Any], Iterable[T]], notes: list[str]
    ) -> tuple[list[T], StoreHeader | None]:
        """Return a file's content and header; empty if the file is missing or was moved to `damaged/`."""
        try:
            table, found = decode_table(self._storage.read_bytes(path))
            problem = header.conflict(found)
            if problem is None:
                return list(decode(table)), found
        except FileNotFoundError:
            return [], None
        except ValueError as error:
            problem = str(error)
        if self._reads_only:
            notes.append(f"{self._storage.locate(path)}: {problem}")
            return [], None
        kept = self._move_aside(path)
        notes.append(f"{self._storage.locate(path)}: {problem}; moved to {kept}, its answers are asked again")
        return [], None

    def _move_aside(self, path: str, folder: str = _DAMAGED) -> str:
        name = path.removeprefix(f"{GENERATIONS}/").replace("/", "_")
        target = numbered(self._storage, f"{folder}/{name}")
        self._storage.move(path, target)
        return target


def _first_wins[T](found: Sequence[dict[int, T]]) -> dict[int, T]:
    together: dict[int, T] = {}
    for each in found:
        together = each | together
    return together

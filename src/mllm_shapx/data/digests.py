"""Digests of a dataset's rows, for finding rows that changed since they were explained."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mllm_shapx.config.models import DatasetConfig, ModalityConfig
from mllm_shapx.data.columns import resolve_columns
from mllm_shapx.data.conversations import Row, read_content
from mllm_shapx.data.table import Table
from mllm_shapx.errors import RowError
from mllm_shapx.records.results import texts_digest
from mllm_shapx.records.spec import ranges

_SHOWN = 5
_MOST_SEARCHED = 200_000
"""Most rows searched for moved texts."""
_UNREADABLE = ""
"""Digest of an unreadable row; it equals no recorded one."""


@dataclass(frozen=True, slots=True)
class RowDigests:
    """The digests that tie a sample to its row."""

    full: str
    """Over all data of the row: texts, the recordings' bytes and the languages."""
    texts: str
    """Over the texts alone, for samples of versions that recorded no digest."""

    def fits(self, recorded: str) -> bool:
        """Return whether a sample's recorded digest belongs to this row."""
        return recorded in {self.full, self.texts}


def row_digest(row: Row) -> str:
    """Return the digest of a row, 32 hex digits. It does not depend on the row's index."""
    return _digest(row.texts, row.recordings, row.language, row.original_language)


def digests_of(
    table: Table, dataset: DatasetConfig, modality: ModalityConfig, rows: Iterable[int]
) -> dict[int, RowDigests]:
    """Return the current digests of `rows`; missing rows are left out.

    Each part of a file is read once. Texts cost little; recordings are read but not decoded: about a second
    per gigabyte.
    """
    columns = resolve_columns(table, dataset, modality)
    wanted = sorted(row for row in set(rows) if 0 <= row < table.num_rows)
    return {
        index: _now(table, dataset, modality, values)
        for index, values in table.some_rows(wanted, columns.names)
    }


def _now(
    table: Table, dataset: DatasetConfig, modality: ModalityConfig, values: Mapping[str, object] | RowError
) -> RowDigests:
    try:
        if isinstance(values, RowError):
            raise values
        said, languages = read_content(values, table, dataset, modality)
    except RowError:
        return RowDigests(_UNREADABLE, _UNREADABLE)
    texts = [text for text, _ in said]
    return RowDigests(_digest(texts, [data for _, data in said], *languages), texts_digest(texts))


def _digest(
    texts: Sequence[str], recordings: Sequence[bytes | None], language: str, original_language: str
) -> str:
    sounds = [
        None if data is None else hashlib.blake2b(data, digest_size=16).hexdigest() for data in recordings
    ]
    content = json.dumps([list(texts), sounds, language, original_language])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Changes:
    """Rows that changed since their samples were made."""

    edited: tuple[int, ...]
    """Rows whose content is no longer in the dataset."""
    moved: Mapping[int, int]
    """Row -> the present index of its content."""

    @property
    def rows(self) -> tuple[int, ...]:
        """All rows that differ, ascending."""
        return tuple(sorted((*self.edited, *self.moved)))

    def in_words(self) -> str:
        """Return the number of changed rows, their indices, and the likely change of the dataset."""
        count = len(self.rows)
        said = [f"{count} row(s) differ from what the samples were made from: {_listed(self.rows)}"]
        shifts = {now - before for before, now in self.moved.items()}
        if len(shifts) == 1:
            (shift,) = shifts
            what = f"{shift} row(s) were inserted" if shift > 0 else f"{-shift} row(s) were removed"
            places = _listed(sorted(self.moved.values()))
            said.append(f"{_listed(sorted(self.moved))} now stand at {places}: {what} above")
        elif shifts:
            said.append(f"{_listed(sorted(self.moved))} now stand at other indices: the rows were reordered")
        if self.edited and self.moved:
            said.append(f"{_listed(self.edited)} have another content or are gone")
        return "; ".join(said)


def compare_samples(
    table: Table,
    dataset: DatasetConfig,
    modality: ModalityConfig,
    samples: Mapping[str, Mapping[int, str]],
) -> tuple[dict[str, list[int]], Changes]:
    """Compare the recorded digests of samples with the current rows.

    Args:
        table: The current dataset.
        dataset: Its column names.
        modality: Which columns are read.
        samples: Run -> row -> digest recorded in its sample.

    Returns:
        Run -> rows with outdated samples; and the changes of those rows.
    """
    rows = {row for made_from in samples.values() for row in made_from}
    now = digests_of(table, dataset, modality, rows)
    changed = {
        name: found
        for name, made_from in samples.items()
        if (
            found := [row for row, digest in made_from.items() if row not in now or not now[row].fits(digest)]
        )
    }
    if not changed:
        return {}, Changes((), {})
    recorded = {row: samples[name][row] for name, found in changed.items() for row in found}
    if not modality.has_audio_input:
        # Texts are cheap: rows without a sample are also searched for moved content.
        now = digests_of(table, dataset, modality, {*rows, *range(min(table.num_rows, _MOST_SEARCHED))})
    return changed, _changes(recorded, now)


def _changes(recorded: Mapping[int, str], now: Mapping[int, RowDigests]) -> Changes:
    """Return which changed rows moved, and whose content is gone."""
    places: dict[str, list[int]] = {}
    for index, digests in now.items():
        for digest in (digests.full, digests.texts):
            places.setdefault(digest, []).append(index)
    moved = {
        row: min(places[digest], key=lambda place: abs(place - row))
        for row, digest in recorded.items()
        if digest in places
    }
    return Changes(tuple(sorted(recorded.keys() - moved.keys())), moved)


def _listed(rows: Sequence[int]) -> str:
    """Return rows as ranges, the first few of them."""
    some = list(ranges(rows))[:_SHOWN]
    rest = len(rows) - sum(last - first + 1 for first, last in some)
    shown = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in some)
    return f"row {shown}" + (f" and {rest} more" if rest else "")

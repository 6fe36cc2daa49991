"""Finds a dataset's columns: by the config's mapping, else by the usual names."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mllm_shapx.config.models import DatasetConfig, ModalityConfig
from mllm_shapx.data.table import Table
from mllm_shapx.errors import DatasetError

TEXT_COLUMNS = ("sentences", "prompt")
"""Default names of the text column, tried in this order."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a row's conversation; None for a missing column."""

    text: str | None
    audio: str | None
    language: str | None
    original_language: str | None

    @property
    def names(self) -> list[str]:
        """Return the columns that are not None."""
        found = (self.text, self.audio, self.language, self.original_language)
        return [name for name in found if name is not None]


def resolve_columns(table: Table, dataset: DatasetConfig, modality: ModalityConfig) -> Columns:
    """Find the columns that `modality` needs.

    Raises:
        DatasetError: When one is missing; the message lists the columns and the key to set.
    """
    mapping = dataset.column_mapping
    return Columns(
        text=_text_column(table, mapping.text, modality),
        audio=_audio_column(table, mapping.audio, modality) if modality.has_audio_input else None,
        language=optional_column(table, mapping.language, "language"),
        original_language=optional_column(table, mapping.original_language, "original_language"),
    )


def _text_column(table: Table, mapped: str | None, modality: ModalityConfig) -> str | None:
    is_spoken = modality.input_modality.startswith("audio__")
    if mapped is None and is_spoken and not set(TEXT_COLUMNS) & set(table.columns):
        return None
    return _find(table, "text", mapped, TEXT_COLUMNS)


def optional_column(table: Table, mapped: str | None, usual: str) -> str | None:
    """Return an optional column; mapping it to its usual name does not make it required."""
    if mapped is None or mapped == usual:
        return usual if usual in table.columns else None
    return require_column(table, mapped, f"dataset.column_mapping.{usual}")


def require_column(table: Table, name: str, key: str) -> str:
    """Return `name`.

    Raises:
        DatasetError: When the table lacks it; `key` is its config key.
    """
    if name in table.columns:
        return name
    raise DatasetError(f"{table.name}: {missing(name, table.columns)}; correct {key}")


def missing(name: str, columns: Sequence[str]) -> str:
    """Return the error text for a missing column: the existing columns, and the nearest name."""
    return f"there is no column {name!r}{nearest_hint(name, columns)}; its columns are {listed(columns)}"


def nearest_hint(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` with the known name nearest to `name`; empty when none is near."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def listed(names: Iterable[str], most: int = 20) -> str:
    """Join names for a message, the first `most` of them."""
    shown = list(names)
    rest = f" and {len(shown) - most} more" if len(shown) > most else ""
    return (", ".join(shown[:most]) or "none") + rest


def _audio_column(table: Table, mapped: str | None, modality: ModalityConfig) -> str:
    voice = modality.input_modality.rsplit("__", 1)[-1]
    usual = [f"audio__{voice}", f"audio_{voice}"]
    # A plain `audio` column is the original recording; other voices must be named in the config.
    return _find(table, "audio", mapped, (*usual, "audio") if voice == "original" else usual)


def _find(table: Table, key: str, mapped: str | None, usual: Sequence[str]) -> str:
    if mapped is not None:
        return require_column(table, mapped, f"dataset.column_mapping.{key}")
    for name in usual:
        if name in table.columns:
            return name
    raise DatasetError(
        f"{table.name}: there is no {' or '.join(repr(name) for name in usual)} column; "
        f"its columns are {listed(table.columns)}; name the right one in dataset.column_mapping.{key}"
    )

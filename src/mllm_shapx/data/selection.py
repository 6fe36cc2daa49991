"""Chooses the rows to explain: filters, player counts, balance, order and slice."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mllm_shapx.config.models import DatasetConfig, ModalityConfig, SelectionConfig
from mllm_shapx.data.arrow import scalar, to_integers
from mllm_shapx.data.columns import listed, optional_column, require_column, resolve_columns
from mllm_shapx.data.conversations import is_missing, sentences
from mllm_shapx.data.filters import describe, passes, plain_values
from mllm_shapx.data.scripts import lacks_spaces
from mllm_shapx.data.table import UNREADABLE, ScanNotice, Table, python_values
from mllm_shapx.data.tokens import row_players
from mllm_shapx.errors import DatasetError, RowError
from mllm_shapx.planning.players import PlayerCounts, PlayerRule

_BYTES = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_fixed_size_binary,
    pa.types.is_binary_view,
)
_UNKNOWN = -1
"""Token count of a row without one."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The rows to explain."""

    rows: tuple[int, ...]
    """Row indices of the source, in selection order."""
    players: PlayerCounts | None
    """Players of each selected row; None for audio input, whose players are unknown before a row is read."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Scan:
    """The result of one pass over the needed columns."""

    kept_by_filter: tuple[int, ...]
    """Rows left after each filter."""
    mask: NDArray[np.bool_]
    """Rows that pass all filters."""
    players: NDArray[np.int64] | None
    """Players under each rule, (rules, rows), if counted; only rows of `mask` have a count."""
    unspaced: NDArray[np.bool_]
    """Rows whose text has no spaces between words."""
    token_counts: NDArray[np.int64] | None


def select_rows(
    table: Table,
    dataset: DatasetConfig,
    selection: SelectionConfig,
    modality: ModalityConfig,
    rule: PlayerRule,
    *,
    other_rules: Collection[PlayerRule] = (),
) -> Selection:
    """Select rows of `table`.

    All rows are ordered first (`RandomState(shuffle_seed).permutation`, or file order), so that a filter
    removes rows without reordering the others. Filters, player bounds and balance follow; `start_index` and
    `max_samples` count the remaining rows.

    `rule` decides the players for bounds and balance. Players are also counted under `other_rules`, the
    variants' own rules.

    Raises:
        DatasetError: When a column is missing, a filter does not fit its column, a balanced bucket is short,
            or no row is left; the message says what each step removed.
    """
    columns = resolve_columns(table, dataset, modality)
    text = None if modality.has_audio_input else columns.text
    others = [each for each in dict.fromkeys(other_rules) if each != rule]
    scan = _scan(table, dataset, selection, text, (rule, *others))
    steps = [("source", table.num_rows)]
    steps += [
        (f"filters[{number}] ({describe(row_filter)})", kept)
        for number, (row_filter, kept) in enumerate(zip(selection.filters, scan.kept_by_filter, strict=True))
    ]
    players = None if scan.players is None else scan.players[0]
    mask, warnings = scan.mask, []
    bounds = _bounds(selection)
    if bounds and players is None:
        warnings.append(f"selection.{bounds[0]}: bounds on players hold for text input only; not applied")
    elif bounds and players is not None:
        mask = mask & _within(players, selection)
        steps.append((" and ".join(bounds), int(mask.sum())))
    order = _order(table.num_rows, selection.shuffle_seed)
    rows = order[mask[order]]
    counts = players if scan.token_counts is None else scan.token_counts
    if selection.balanced_token_counts is not None and counts is not None:
        rows, short = _balance(rows, counts, selection, table.name)
        warnings += short
        steps.append(("balanced_token_counts", len(rows)))
    rows = rows[selection.start_index :]
    if selection.start_index:
        steps.append(("start_index", len(rows)))
    if selection.max_samples is not None:
        rows = rows[: selection.max_samples]
        steps.append(("max_samples", len(rows)))
    if len(rows) == 0:
        raise DatasetError(_nothing_left(table.name, steps))
    unspaced = int(scan.unspaced[rows].sum())
    if unspaced:
        warnings.append(_unspaced(unspaced, len(rows)))
    return Selection(
        rows=tuple(rows.tolist()),
        players=None if scan.players is None else _player_counts(scan.players, rows, others),
        warnings=tuple(warnings),
    )


def _player_counts(
    players: NDArray[np.int64], rows: NDArray[np.int64], other_rules: Sequence[PlayerRule]
) -> PlayerCounts:
    own, *others = (dict(zip(rows.tolist(), of_rule[rows].tolist(), strict=True)) for of_rule in players)
    return PlayerCounts(own, dict(zip(other_rules, others, strict=True)))


def _scan(
    table: Table,
    dataset: DatasetConfig,
    selection: SelectionConfig,
    text: str | None,
    rules: Sequence[PlayerRule],
) -> _Scan:
    """Read the columns of the selection once, in batches."""
    for number, row_filter in enumerate(selection.filters):
        require_column(table, row_filter.column, f"selection.filters[{number}].column")
    count_column = _token_count_column(table, dataset, selection, text)
    total = table.num_rows
    kept = [0] * len(selection.filters)
    mask = np.ones(total, dtype=np.bool_)
    players = None if text is None else np.zeros((len(rules), total), dtype=np.int64)
    unspaced = np.zeros(total, dtype=np.bool_)
    token_counts = None if count_column is None else np.full(total, _UNKNOWN, dtype=np.int64)
    wanted = dict.fromkeys(row_filter.column for row_filter in selection.filters)
    wanted |= dict.fromkeys(name for name in (text, count_column) if name is not None)
    notice = ScanNotice(table.name, total)
    start = 0
    for batch in table.batches(list(wanted)) if wanted else ():
        notice.show(start)
        place = slice(start, start + batch.num_rows)
        start = place.stop
        part = np.ones(batch.num_rows, dtype=np.bool_)
        for number, row_filter in enumerate(selection.filters):
            part &= passes(batch.column(row_filter.column), row_filter, number, table.name)
            kept[number] += int(part.sum())
        mask[place] = part
        if players is not None and text is not None:
            _check_text(batch.column(text).type, text, table.name)
            texts = plain_values(batch.column(text))
            players[:, place], unspaced[place] = _count(texts, part, rules)
        if token_counts is not None and count_column is not None:
            token_counts[place] = _integers(batch.column(count_column), count_column, table.name)
    return _Scan(tuple(kept), mask, players, unspaced, token_counts)


def _token_count_column(
    table: Table, dataset: DatasetConfig, selection: SelectionConfig, text: str | None
) -> str | None:
    """Return the column to balance by, None to balance by counted players."""
    if selection.balanced_token_counts is None:
        return None
    column = optional_column(table, dataset.column_mapping.token_count, "token_count")
    if column is None and text is None:
        raise DatasetError(
            f"{table.name}: selection.balanced_token_counts needs a token count per row, and there is no "
            f"column 'token_count'; its columns are {listed(table.columns)}; "
            "name the right one in dataset.column_mapping.token_count"
        )
    return column


def _count(
    texts: pa.Array, wanted: NDArray[np.bool_], rules: Sequence[PlayerRule]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the players of each text under each rule, (rules, texts), and which texts lack spaces, (texts,).

    A text that is not `wanted` has 0 players.
    """
    players = np.zeros((len(rules), len(texts)), dtype=np.int64)
    unspaced = np.zeros(len(texts), dtype=np.bool_)
    for place, (value, want) in enumerate(zip(python_values(texts), wanted.tolist(), strict=True)):
        parts = _parts(value) if want else []
        for number, rule in enumerate(rules):
            players[number, place] = row_players(parts, rule) if parts else 0
        unspaced[place] = (
            bool(parts) and rules[0].kind == "words" and lacks_spaces("".join(parts), int(players[0, place]))
        )
    return players, unspaced


def _parts(value: Any) -> list[str]:
    """Return the text or the texts of a row; empty for other values, which fail when the row is read."""
    if isinstance(value, str) and not is_missing(value):
        return [value]
    try:
        return list(sentences(value))
    except RowError:
        return []


def _check_text(kind: pa.DataType, name: str, where: str) -> None:
    """Refuse a text column of recordings or structures: no row could be explained."""
    item = kind.value_type if _is_list(kind) or pa.types.is_dictionary(kind) else kind
    if pa.types.is_nested(item) or any(is_bytes(item) for is_bytes in _BYTES):
        raise DatasetError(
            f"{where}: column {name!r} holds {kind}, neither text nor lists of texts; "
            "name the right one in dataset.column_mapping.text"
        )


def _is_list(kind: pa.DataType) -> bool:
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)
    return any(is_kind(kind) for is_kind in kinds)


def _integers(column: pa.Array, name: str, where: str) -> NDArray[np.int64]:
    try:
        whole = pc.cast(plain_values(column), pa.int64())
    except (*UNREADABLE, NotImplementedError) as error:
        # Arrow raises the latter for pairs of types without a cast.
        raise DatasetError(
            f"{where}: column {name!r} holds {column.type}, not whole numbers; "
            "name the right one in dataset.column_mapping.token_count"
        ) from error
    return to_integers(pc.fill_null(whole, scalar(_UNKNOWN)))


def _order(total: int, seed: int | None) -> NDArray[np.int64]:
    if seed is None:
        return np.arange(total, dtype=np.int64)
    return np.random.RandomState(seed).permutation(total).astype(np.int64)


def _bounds(selection: SelectionConfig) -> list[str]:
    bounds = {
        "min_prompt_tokens": selection.min_prompt_tokens,
        "max_prompt_tokens": selection.max_prompt_tokens,
    }
    return [f"{name} {value}" for name, value in bounds.items() if value is not None]


def _within(players: NDArray[np.int64], selection: SelectionConfig) -> NDArray[np.bool_]:
    low = selection.min_prompt_tokens or 0
    high = selection.max_prompt_tokens
    return (players >= low) & (True if high is None else players <= high)


def _balance(
    rows: NDArray[np.int64], counts: NDArray[np.int64], selection: SelectionConfig, where: str
) -> tuple[NDArray[np.int64], list[str]]:
    """Take `samples_per_token_count` rows of each count, the counts in the config's order."""
    asked, per_bucket = selection.balanced_token_counts or (), selection.samples_per_token_count or 0
    buckets = {count: rows[counts[rows] == count] for count in asked}
    short = [
        f"{count} tokens: {len(found)} of {per_bucket} rows"
        for count, found in buckets.items()
        if len(found) < per_bucket
    ]
    if short and not selection.allow_partial_token_count_buckets:
        raise DatasetError(
            f"{where}: selection.balanced_token_counts asks for more than there is ({'; '.join(short)}); "
            "lower samples_per_token_count, leave the counts out, or set allow_partial_token_count_buckets"
        )
    warnings = [f"selection.balanced_token_counts: short buckets ({'; '.join(short)})"] if short else []
    return np.concatenate([found[:per_bucket] for found in buckets.values()] or [rows[:0]]), warnings


def _unspaced(number: int, rows: int) -> str:
    return (
        f"{number:,} of {rows:,} row(s) are in a script that puts no spaces between words (Chinese, "
        "Japanese, Thai, Lao, Khmer, Burmese, ...). Players are the words between spaces, so that a whole "
        "sentence is one player. No setting changes that: put spaces between the words of the column with a "
        "segmenter first, or give a list of phrases per row, which become messages of their own"
    )


def _nothing_left(where: str, steps: Sequence[tuple[str, int]]) -> str:
    """Return the error; `steps` are the steps of the selection with the rows that each left."""
    if steps[0][1] == 0:
        return f"{where}: holds no rows; correct dataset.path, dataset.subset or dataset.split"
    told = [f"{steps[0][1]} rows"]
    told += [f"{name} removed {before - after}" for (_, before), (name, after) in pairwise(steps)]
    return f"{where}: the selection leaves no row ({', '.join(told)}); loosen the selection block"

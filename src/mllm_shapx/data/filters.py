"""Row filters: select the values of a column that satisfy `op value`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mllm_shapx.config.models import RowFilter
from mllm_shapx.data.arrow import scalar, to_mask
from mllm_shapx.data.table import UNREADABLE
from mllm_shapx.errors import DatasetError

_FALSE = scalar(value=False)

_COMPARE: dict[str, Callable[[pa.Array, pa.Scalar], pa.Array]] = {
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}


def describe(row_filter: RowFilter) -> str:
    """Return the filter in words."""
    return f"{row_filter.column} {row_filter.op} {row_filter.value!r}"


def passes(column: pa.Array, row_filter: RowFilter, number: int, where: str) -> NDArray[np.bool_]:
    """Return which values of `column` pass, as a mask of its length.

    A missing value (null or NaN) equals only null: it passes `!=` and `not_in` but no order comparison.

    Raises:
        DatasetError: When the value and the column are not comparable; the message names `where` and the
            filter.
    """
    named = f"{where}: selection.filters[{number}] ({describe(row_filter)})"
    try:
        values = plain_values(column)
        return _passes(values, row_filter, _Fits(values.type, named))
    except (*UNREADABLE, NotImplementedError) as error:
        # Arrow compares only some pairs of types.
        raise DatasetError(
            f"{named}: the column holds {column.type}, and values of that type cannot be compared; "
            "write it as text, a number or true/false"
        ) from error


def _passes(values: pa.Array, row_filter: RowFilter, fits: "_Fits") -> NDArray[np.bool_]:
    op, value = row_filter.op, row_filter.value
    if op in {"==", "!=", "in", "not_in"}:
        items = value if isinstance(value, list) and op in {"in", "not_in"} else [value]
        equal = _any_equal(values, items, fits)
        return ~equal if op in {"!=", "not_in"} else equal
    if pa.types.is_null(values.type):
        return np.zeros(len(values), dtype=np.bool_)
    if op == "between":
        low, high = (fits.ordered(end) for end in value)
        passed = pc.and_(pc.greater_equal(values, low), pc.less_equal(values, high))
        return to_mask(pc.fill_null(passed, _FALSE))
    return to_mask(pc.fill_null(_COMPARE[op](values, fits.ordered(value)), _FALSE))


def _any_equal(values: pa.Array, items: Sequence[Any], fits: "_Fits") -> NDArray[np.bool_]:
    """Return which values equal one of `items`; a null item stands for missing values."""
    equal = np.zeros(len(values), dtype=np.bool_)
    for item in items:
        if item is not None and pa.types.is_null(values.type):
            continue
        found = (
            pc.is_null(values, nan_is_null=True)
            if item is None
            else pc.fill_null(pc.equal(values, fits.scalar(item)), _FALSE)
        )
        equal |= to_mask(found)
    return equal


def plain_values(column: pa.Array) -> pa.Array:
    """Return a column's decoded values, without dictionaries, run lengths, extensions or views."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        return plain_values(column.dictionary_decode())
    if pa.types.is_run_end_encoded(column.type):
        return plain_values(pc.run_end_decode(column))
    return pc.cast(column, pa.large_string()) if pa.types.is_string_view(column.type) else column


@dataclass(frozen=True, slots=True)
class _Fits:
    """Converts a filter's JSON value to a scalar that is comparable with a column."""

    kind: pa.DataType
    where: str

    def ordered(self, value: Any) -> pa.Scalar:
        """Return the scalar of an order comparison."""
        if value is None or isinstance(value, bool):
            raise self._misfit(value)
        return self.scalar(value)

    def scalar(self, value: Any) -> pa.Scalar:
        """Return the scalar of `value`.

        Raises:
            DatasetError: When text meets numbers, or a list or recording meets anything.
        """
        if pa.types.is_boolean(self.kind):
            fits = isinstance(value, bool)
        elif (
            pa.types.is_integer(self.kind)
            or pa.types.is_floating(self.kind)
            or pa.types.is_decimal(self.kind)
        ):
            fits = isinstance(value, int | float) and not isinstance(value, bool)
        else:
            fits = isinstance(value, str) and (self._is_text or pa.types.is_temporal(self.kind))
        if not fits:
            raise self._misfit(value)
        try:
            found = scalar(value)
            return found.cast(self.kind) if pa.types.is_temporal(self.kind) else found
        except (pa.ArrowException, OverflowError) as error:
            raise self._misfit(value) from error

    @property
    def _is_text(self) -> bool:
        return bool(pa.types.is_string(self.kind) or pa.types.is_large_string(self.kind))

    def _misfit(self, value: Any) -> DatasetError:
        held = "text" if self._is_text else str(self.kind)
        return DatasetError(
            f"{self.where}: the column holds {held}, which cannot be compared with {value!r} "
            f"({type(value).__name__}); correct the filter's value or column"
        )

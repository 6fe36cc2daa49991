"""The types of numbers in files, and messages for invalid fields."""

import math
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError, WrapValidator

MOST_ROW = (1 << 53) - 1
"""The largest row index: the largest integer that a float holds exactly, so that all JSON readers agree."""

STRICT = ConfigDict(strict=True, allow_inf_nan=False)
"""A text is not a number, and NaN is not JSON."""

# Their sums, squares and products must not overflow; no similarity comes near the bound.
Real = Annotated[float, Field(ge=-1e100, le=1e100)]
Whole = Annotated[int, Field(ge=0, le=MOST_ROW)]


def _nan_for_null(value: Any, validate: Callable[[Any], float]) -> float:
    return math.nan if value is None else validate(value)


Known = Annotated[Real, WrapValidator(_nan_for_null)]
"""A number that may be unknown: null in a file, NaN in memory."""


def _nan_for_nulls(values: Any, validate: Callable[[Any], tuple[float, ...]]) -> tuple[float, ...]:
    if not isinstance(values, list) or None not in values:
        return validate(values)
    known = iter(validate([value for value in values if value is not None]))
    return tuple(math.nan if value is None else next(known) for value in values)


AllKnown = Annotated[tuple[Real, ...], Field(strict=False), WrapValidator(_nan_for_nulls)]
"""The same for several numbers; one call for all of them keeps parsing fast."""


def finite(value: float | None) -> float | None:
    """Return a number for a file: None for NaN and infinities."""
    return value if value is not None and math.isfinite(value) else None


def in_file(value: Any) -> Any:
    """Return a field's value as JSON data: numbers that JSON cannot hold become null, tuples become lists."""
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, tuple):
        return [in_file(item) for item in value]
    return value.to_json() if hasattr(value, "to_json") else value


def in_words(error: ValidationError) -> str:
    """Return the first validation error, with the field's name."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "json_invalid":
        return f"it is not JSON ({first['msg'].removeprefix('Invalid JSON: ')})"
    if first["type"] == "missing":
        return f"it lacks the field {where}"
    return f"{where or 'it'}: {first['msg']}"

"""The types of numbers in files, and messages for invalid fields."""

import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, WrapValidator

MOST_ROW = (1 << 53) - 1
"""The largest row index: the largest integer that a float holds exactly, so that all JSON readers agree."""

STRICT = ConfigDict(strict=True, allow_inf_nan=False)
"""A text is not a number, and NaN is not JSON."""

# Their sums, squares and products must not overflow; no similarity comes near the bound.
Real = Annotated[float, Field(strict=True, ge=-1e100, le=1e100)]
Whole = Annotated[int, Field(strict=True, ge=0, le=MOST_ROW)]
Time = Annotated[float, Field(strict=True, ge=0, lt=253402300800.0)]
"""Seconds since 1970, before the year 10000: no clock writes a later time."""


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


def in_file(value: Any) -> Any:
    """Return a field's value as JSON data: NaN and infinities become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, tuple):
        return [in_file(item) for item in value]
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value):
        return {each.name: in_file(getattr(value, each.name)) for each in fields(value)}
    return value


def validated[T](adapter: TypeAdapter[T], data: Any) -> T:
    """Return the object of JSON data.

    Raises:
        ValueError: When a field is missing or of the wrong type; the message names it.
    """
    try:
        return adapter.validate_python(data)
    except ValidationError as error:
        raise ValueError(in_words(error)) from error


def in_words(error: ValidationError) -> str:
    """Return the first validation error, with the field's name."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "json_invalid":
        return f"it is not JSON ({first['msg'].removeprefix('Invalid JSON: ')})"
    if first["type"] == "missing":
        return f"it lacks the field {where}"
    if first["type"] == "dataclass_type" and not where:
        return "it is not a JSON object"
    return f"{where or 'it'}: {first['msg']}"

"""Where JSON data differs from what it should be."""

import math
from typing import Any

_LARGEST = 1e300
"""Numbers of a damaged file beyond it cannot be computed with."""


def different_keys(found: Any, expected: Any, prefix: str = "") -> list[str]:
    """Return the keys of `expected` whose value in `found` is another; more keys there are welcome."""
    if isinstance(expected, dict):
        if not isinstance(found, dict):
            return [prefix or "not a JSON object"]
        return [
            key
            for name, value in expected.items()
            for key in different_keys(found.get(name), value, f"{prefix}.{name}" if prefix else name)
        ]
    if isinstance(expected, list):
        if not isinstance(found, list) or len(found) != len(expected):
            return [prefix]
        return [
            key
            for index, (one, other) in enumerate(zip(found, expected, strict=True))
            for key in different_keys(one, other, f"{prefix}[{index}]")
        ]
    if isinstance(expected, float) and isinstance(found, int | float):
        is_close = abs(found) < _LARGEST and math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-12)
        return [] if is_close else [prefix]
    return [] if found == expected else [prefix]

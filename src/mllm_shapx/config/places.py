"""Places in a config file's JSON data."""

from collections.abc import Iterator
from typing import Any

Place = tuple[str | int, ...]
"""Keys and list positions from the top of the file down."""


def dotted(place: Place) -> str:
    """Return `place` for display: `experiments[2].fractions[0]`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")


def walk(data: Any) -> Iterator[tuple[Place, Any]]:
    """Yield every value of JSON data with its place, in the file's order; takes data of any depth."""
    waiting: list[tuple[Place, Any]] = [((), data)]
    while waiting:
        place, value = waiting.pop()
        yield place, value
        items = (
            value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
        )
        waiting += reversed([((*place, key), item) for key, item in items])


def is_within(place: Place, block: Place) -> bool:
    """Return whether `place` is `block` or below it."""
    return place[: len(block)] == block

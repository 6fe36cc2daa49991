"""What checks of a config find, and the places of its values."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mllm_shapx.errors import Problem

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
        if isinstance(value, dict):
            waiting += reversed([((*place, key), item) for key, item in value.items()])
        elif isinstance(value, list):
            waiting += reversed([((*place, index), item) for index, item in enumerate(value)])


def is_within(place: Place, block: Place) -> bool:
    """Return whether `place` is `block` or below it."""
    return place[: len(block)] == block


@dataclass(frozen=True)
class Finding:
    """A problem or a warning on keys that are well-formed by themselves."""

    path: Place
    problem: Problem
    reads: tuple[Place, ...]
    """The keys that cause it."""
    warning: bool = False

    def depends_on(self, places: Collection[Place]) -> bool:
        """Whether its cause is a key at, above or below any of `places`."""
        return any(
            is_within(place, read) or is_within(read, place) for place in places for read in self.reads
        )


type Findings = Iterator[Finding]


def problem(path: str | Place, message: str, fix: str = "", *reads: str) -> Finding:
    """Return a problem at `path`, a place or as written by `dotted`; `reads` are other keys that cause it."""
    place = _place(path)
    return Finding(place, Problem(dotted(place), message, fix), (place, *map(_place, reads)))


def warning(path: str, message: str, fix: str = "") -> Finding:
    """Return a warning at `path`."""
    return replace(problem(path, message, fix), warning=True)


def _place(written: str | Place) -> Place:
    if not isinstance(written, str):
        return written
    parts = re.findall(r"[^.\[\]]+", written)
    return tuple(int(part) if part.isdigit() else part for part in parts)

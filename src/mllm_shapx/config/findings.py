"""What checks of a config find, and the places of its values."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
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
        items = (
            value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
        )
        waiting += reversed([((*place, key), item) for key, item in items])


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


def problem(path: Place, message: str, fix: str = "", *reads: Place) -> Finding:
    """Return a problem at `path`; `reads` are the other keys that cause it."""
    return Finding(path, Problem(dotted(path), message, fix), (path, *reads))


def warning(path: Place, message: str, fix: str = "") -> Finding:
    """Return a warning at `path`."""
    return Finding(path, Problem(dotted(path), message, fix), (path,), warning=True)

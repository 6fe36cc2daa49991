"""What a check across keys of a config finds: a problem, or a warning."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from mllm_shapx.config.places import Place, dotted, is_within
from mllm_shapx.errors import Problem


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

"""The answers in a study's coalition store, counted (`store info`)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mllm_shapx.records.store import CoalitionStore
from mllm_shapx.reporting.grid import grid, names, numbers, words
from mllm_shapx.reporting.reading import open_study


@dataclass(slots=True)
class StoredKey:
    """The answers of one generation key, added up over its rows."""

    key: str
    rows: int
    answers: int
    vectors: int
    likelihoods: int
    """Likelihoods of given texts after coalitions' prompts."""
    num_bytes: int
    settings: Mapping[str, Any]
    """Generation settings, model commit and dtype."""


@dataclass(frozen=True, slots=True)
class StoredReport:
    """All keys of a study, and files that cannot be read."""

    directory: str
    keys: tuple[StoredKey, ...]
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        return asdict(self)

    def to_text(self, width: int) -> str:
        """Return a table of at most `width` columns."""
        cells = [
            [
                key.key,
                f"{key.settings.get('model_id')} {key.settings.get('dtype')}",
                f"{key.rows:,}",
                f"{key.answers:,}",
                f"{key.vectors:,}",
                f"{key.likelihoods:,}",
                f"{key.num_bytes / 1e6:.1f}",
            ]
            for key in self.keys
        ]
        counts = numbers("rows", "answers", "vectors", "likelihoods", "MB")
        table = grid([*words("key"), *names("model"), *counts], cells, width)
        lines = [self.directory, "", *(table if cells else ["no answers are stored"]), *self.problems]
        return "\n".join(lines) + "\n"


def stored(directory: str) -> StoredReport:
    """Return what the store of an experiment set's directory holds.

    Raises:
        UsageError: When the directory is no study's.
    """
    study = open_study(directory)
    keys: dict[str, StoredKey] = {}
    problems = []
    for entry in CoalitionStore(study.storage).info():
        of_key = keys.setdefault(entry.key, StoredKey(entry.key, 0, 0, 0, 0, 0, entry.settings))
        of_key.rows += 1
        of_key.answers += entry.answers
        of_key.vectors += entry.embeddings
        of_key.likelihoods += entry.likelihoods
        of_key.num_bytes += entry.num_bytes
        of_key.settings = of_key.settings or entry.settings
        if entry.problem is not None:
            problems.append(entry.problem)
    return StoredReport(directory, tuple(keys.values()), tuple(problems))

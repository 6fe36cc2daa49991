"""What answers a study keeps in its coalition store (`store info`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mllm_shapx.records.store import CoalitionStore
from mllm_shapx.reporting.grid import Column, grid
from mllm_shapx.reporting.reading import open_study


@dataclass(frozen=True, slots=True)
class StoredKey:
    """The answers of one generation key."""

    key: str
    rows: int
    answers: int
    vectors: int
    num_bytes: int
    settings: Mapping[str, Any]
    """Generation settings, model commit and dtype."""
    likelihoods: int = 0
    """Likelihoods of given texts behind coalitions' prompts."""


@dataclass(frozen=True, slots=True)
class StoredReport:
    """All keys of a study, and files that cannot be read."""

    directory: str
    keys: tuple[StoredKey, ...]
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        return {
            "directory": self.directory,
            "keys": [
                {
                    "key": key.key,
                    "rows": key.rows,
                    "answers": key.answers,
                    "vectors": key.vectors,
                    "likelihoods": key.likelihoods,
                    "num_bytes": key.num_bytes,
                    "settings": dict(key.settings),
                }
                for key in self.keys
            ],
            "problems": list(self.problems),
        }

    def to_text(self, width: int) -> str:
        """Return a table of at most `width` columns."""
        columns = (
            Column("key"),
            Column("model", shrinks=True),
            Column("rows", right=True),
            Column("answers", right=True),
            Column("vectors", right=True),
            Column("likelihoods", right=True),
            Column("MB", right=True),
        )
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
        table = grid(columns, cells, width) if cells else ["no answers are stored"]
        lines = [self.directory, "", *table, *self.problems]
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
        before = keys.get(entry.key, StoredKey(entry.key, 0, 0, 0, 0, entry.settings))
        keys[entry.key] = StoredKey(
            entry.key,
            before.rows + 1,
            before.answers + entry.answers,
            before.vectors + entry.embeddings,
            before.num_bytes + entry.num_bytes,
            before.settings or entry.settings,
            before.likelihoods + entry.likelihoods,
        )
        if entry.problem is not None:
            problems.append(entry.problem)
    return StoredReport(directory, tuple(keys.values()), tuple(problems))

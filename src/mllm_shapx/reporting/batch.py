"""The outcomes of several configs as a table, one line each."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mllm_shapx.reporting.grid import grid, words

_OUTCOMES = {0: "done", 1: "stopped", 2: "refused", 3: "done, with quarantined samples"}


@dataclass(frozen=True, slots=True)
class BatchItem:
    """The outcome of one config."""

    config: str
    exit_code: int | None
    """None for a config that was not reached."""
    done: int = 0
    """Samples that exist."""
    total: int = 0
    """Samples of the study; 0 where their number is not known."""
    tries: int = 0
    seconds: float = 0.0
    error: str = ""

    @property
    def outcome(self) -> str:
        """Return the outcome in words."""
        if self.exit_code is None:
            return "not begun"
        return _OUTCOMES.get(self.exit_code, "interrupted")

    def to_json(self) -> dict[str, Any]:
        """Return the item as JSON data, for configs without any other outcome."""
        return {
            "config": self.config,
            "outcome": self.outcome,
            "exit_code": self.exit_code,
            "error": self.error,
            "seconds": self.seconds,
        }


def batch_table(items: Sequence[BatchItem]) -> str:
    """Return a table of configs, outcomes and times (hours:minutes:seconds); paths are never cut."""
    rows = []
    for item in items:
        samples = f"{item.done:,}/{item.total:,}" if item.total else "-"
        minutes, seconds = divmod(round(item.seconds), 60)
        time = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if item.tries else "-"
        rows.append((item.config, item.outcome, samples, str(item.tries), time))
    return "\n".join(grid(words("config", "outcome", "samples", "tries", "time"), rows, sys.maxsize))

"""A benchmark's results, as a table and as data."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_shapx.benchmark.probes import Recommendation
from mllm_shapx.benchmark.rounds import Contest, Tally
from mllm_shapx.benchmark.sharing import Sharing
from mllm_shapx.models.base import ModelIdentity
from mllm_shapx.reporting.grid import grid, numbers, words

_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine of the figures."""

    device: str
    hardware: str
    """Name of the CPU or GPU."""
    dtype: str
    threads: int
    load_average: float
    """Load average of the minute before; well above 0, other processes used the CPU too."""

    @classmethod
    def describe(cls, identity: ModelIdentity) -> "Machine":
        """Return this machine's current state."""
        import torch

        on_gpu = identity.device.startswith("cuda")
        return cls(
            device=identity.device,
            hardware=torch.cuda.get_device_name(identity.device) if on_gpu else _processor(),
            dtype=identity.dtype,
            threads=torch.get_num_threads(),
            load_average=os.getloadavg()[0],
        )


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All measurements of one call. Rates are coalitions per second, medians over the rounds."""

    model_id: str
    machine: Machine
    rows: int
    contest: Contest
    raw_batch_size: int | None
    raw_rates: dict[int, float]
    """Batch size -> prompts per second of plain generate, from the search."""
    sharing: Sharing
    recommended: Recommendation
    batch_size: int
    rows_in_flight: int
    notes: Sequence[str]

    @property
    def rate(self) -> float:
        """Return our coalitions per second."""
        return self.contest.ours.median_rate or 0.0

    @property
    def idle_fraction(self) -> float:
        """Return the share of our time that the device spent outside the model."""
        turns = self.contest.turns
        return 1.0 - sum(turn.busy_seconds for turn in turns) / sum(turn.seconds for turn in turns)

    @property
    def outside_model_us(self) -> float:
        """Return the microseconds of CPU time per coalition for sampling, rendering and scoring."""
        turns = self.contest.turns
        return 1e6 * sum(turn.own_seconds for turn in turns) / sum(turn.coalitions for turn in turns)

    @property
    def encoding_us(self) -> float:
        """Return the microseconds per coalition of the encoding thread, parallel to the device's thread."""
        turns = self.contest.turns
        return 1e6 * sum(turn.encode_seconds for turn in turns) / sum(turn.coalitions for turn in turns)

    def to_json(self) -> dict[str, Any]:
        """Return the report as one JSON object."""
        contest, machine = self.contest, self.machine
        return {
            "coalitions_per_second": self.rate,
            "library_coalitions_per_second": contest.library.median_rate,
            "ratio": self._over(contest.library),
            "raw_coalitions_per_second": contest.raw.median_rate,
            "raw_batch_size": self.raw_batch_size,
            "fraction_of_raw": self._over(contest.raw),
            "sharing_factor": self.sharing.factor,
            "idle_fraction": self.idle_fraction,
            "outside_model_us_per_coalition": self.outside_model_us,
            "encoding_us_per_coalition": self.encoding_us,
            "batch_size": self.batch_size,
            "rows_in_flight": self.rows_in_flight,
            "recommended": {
                "batch_size": self.recommended.batch_size,
                "rows_in_flight": self.recommended.rows_in_flight,
            },
            "rows": self.rows,
            "coalitions": int(contest.ours.coalitions),
            "model": self.model_id,
            "device": machine.device,
            "hardware": machine.hardware,
            "dtype": machine.dtype,
            "threads": machine.threads,
            "load_average": machine.load_average,
            "largest_value_difference": contest.largest_difference,
            "rows_compared": contest.compared_rows,
            "library_sampled": contest.library_sampled,
            "sharing": {
                "rows": self.sharing.rows,
                "coalitions": self.sharing.coalitions,
                "answers": self.sharing.answers,
                "measured": self.sharing.measured,
            },
            "rounds": {
                "ours": _rounds(contest.ours),
                "library": _rounds(contest.library),
                "raw": _rounds(contest.raw),
            },
            "raw_search": {str(size): rate for size, rate in self.raw_rates.items()},
            "probes": [probe.to_json() for probe in self.recommended.probes],
            "notes": list(self.notes),
        }

    def to_text(self) -> str:
        """Return the report as a table and some sentences."""
        machine, rounds = self.machine, len(self.contest.ours.rounds)
        where = f"{machine.device} ({machine.hardware}), {machine.threads} thread(s)"
        lines = [
            f"{self.model_id}, {machine.dtype}, {where}, load average {machine.load_average:.1f}",
            f"{self.rows} row(s), the same for all, in turns; medians of {rounds} round(s)",
            "",
            *self._table(),
            "",
            *self._sentences(),
        ]
        return "\n".join(lines)

    def _table(self) -> list[str]:
        contest = self.contest
        rows = [
            ("ours", contest.ours),
            ("mllm_shap's own runner", contest.library),
            (f"plain generate, batches of {self.raw_batch_size}", contest.raw),
        ]
        cells = [
            (name, f"{tally.median_rate:,.1f}", f"{tally.total_rate:,.1f}", _times(self._over(tally), name))
            for name, tally in rows
            if tally.median_rate is not None and tally.total_rate is not None
        ]
        columns = [*words(""), *numbers("coalitions/s", "all rounds", "ours is")]
        return grid(columns, cells, _WIDTH)

    def _sentences(self) -> list[str]:
        contest, sharing, best = self.contest, self.sharing, self.recommended
        lines = []
        lines.append(
            f"The device was idle for {self.idle_fraction:.1%} of our time. A coalition took "
            f"{self.outside_model_us:,.0f} us of sampling, rendering and scoring, and beside that "
            f"{self.encoding_us:,.0f} us of encoding."
        )
        if sharing.factor is not None:
            how = "" if sharing.measured else ", as planned"
            lines.append(
                f"The sweep evaluates {sharing.factor:.2f} coalitions for each answer that it asks for "
                f"({sharing.coalitions:,.0f} for {sharing.answers:,.0f} on {sharing.rows} row(s){how})."
            )
        if contest.largest_difference is not None:
            lines.append(
                f"Values of ours and the library's differ by at most {contest.largest_difference:.1e} "
                f"on {contest.compared_rows} row(s)."
            )
        lines += [f"Note: {note}." for note in self.notes]
        lines.append(
            f"Recommended: batch size {best.batch_size} (the contest came to {self.batch_size}), "
            f"{best.rows_in_flight} row(s) in flight."
        )
        return lines

    def _over(self, other: Tally) -> float | None:
        rate = other.median_rate
        return None if rate is None else self.rate / rate


def _rounds(tally: Tally) -> list[dict[str, float]]:
    return [
        {"coalitions": coalitions, "seconds": seconds, "coalitions_per_second": coalitions / seconds}
        for coalitions, seconds in tally.rounds
    ]


def _times(ratio: float | None, name: str) -> str:
    return "" if ratio is None or name == "ours" else f"{ratio:.2f}x"


def _processor() -> str:
    listed = Path("/proc/cpuinfo")  # only on Linux
    for line in listed.read_text(encoding="utf-8").splitlines() if listed.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

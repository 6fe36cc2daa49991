"""A benchmark's results, as a table and as data."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_shapx.benchmark.contest import Contest, Tally
from mllm_shapx.models.base import ModelIdentity
from mllm_shapx.reporting.grid import grid, names, numbers

CLEARLY = 1.03
"""A larger batch size is recommended only if it is faster by this factor."""
_WIDTH = 100


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All measurements of one call. Rates are coalitions per second, medians over the rounds."""

    model: ModelIdentity
    load_average: float
    """Load average of the minute before; well above 0, other processes used the CPU too."""
    rows: int
    contest: Contest
    sharing_factor: float | None
    """Coalitions of all runs of the config per answer, as planned; None if no run can explain the rows."""
    batch_size: int
    """Ours at the end of the contest."""
    rows_in_flight: int
    trials: Mapping[int, float]
    """Batch size tried -> coalitions per second, the contest's first; empty without time for trials."""
    notes: Sequence[str]

    @property
    def rate(self) -> float:
        """Return our coalitions per second."""
        return self.contest.ours.median_rate or 0.0

    @property
    def idle_fraction(self) -> float:
        """Return the share of our time that the device spent outside the model."""
        return 1.0 - self.contest.busy_seconds / self.contest.ours.total[1]

    @property
    def recommended(self) -> int:
        """Return the contest's batch size, or another one that was clearly better."""
        fastest = max(self.trials.values(), default=0.0)
        best = min((size for size, rate in self.trials.items() if rate * CLEARLY >= fastest), default=0)
        return self.batch_size if best == next(iter(self.trials), 0) else best

    def to_json(self) -> dict[str, Any]:
        """Return the report as one JSON object."""
        contest, plain = self.contest, self.contest.generate
        return {
            "coalitions_per_second": self.rate,
            "library_coalitions_per_second": contest.library.median_rate,
            "ratio": self._over(contest.library),
            "raw_coalitions_per_second": contest.raw.median_rate,
            "raw_batch_size": None if plain is None else plain.batch_size,
            "fraction_of_raw": self._over(contest.raw),
            "sharing_factor": self.sharing_factor,
            "idle_fraction": self.idle_fraction,
            "batch_size": self.batch_size,
            "rows_in_flight": self.rows_in_flight,
            "recommended": {"batch_size": self.recommended, "rows_in_flight": self.rows_in_flight},
            "rows": self.rows,
            "coalitions": contest.ours.total[0],
            "model": self.model.model_id,
            "device": self.model.device,
            "hardware": _hardware(self.model.device),
            "dtype": self.model.dtype,
            "threads": _threads(),
            "load_average": self.load_average,
            "largest_value_difference": contest.largest_difference,
            "rows_compared": contest.rows_compared,
            "rounds": {
                "ours": contest.ours.to_json(),
                "library": contest.library.to_json(),
                "raw": contest.raw.to_json(),
            },
            "raw_search": {} if plain is None else plain.rates,
            "probes": [
                {"batch_size": size, "rows_in_flight": self.rows_in_flight, "coalitions_per_second": rate}
                for size, rate in self.trials.items()
            ],
            "notes": list(self.notes),
        }

    def to_text(self) -> str:
        """Return the report as a table and some sentences."""
        model, rounds = self.model, len(self.contest.ours.rounds)
        where = f"{model.device} ({_hardware(model.device)}), {_threads()} thread(s)"
        lines = [
            f"{model.model_id}, {model.dtype}, {where}, load average {self.load_average:.1f}",
            f"{self.rows} row(s) in turns, a part of them by the library; medians of {rounds} round(s)",
            "",
            *self._table(),
            "",
            *self._sentences(),
        ]
        return "\n".join(lines)

    def _table(self) -> list[str]:
        contest, plain = self.contest, self.contest.generate
        cells = [("ours", *_rates(contest.ours), "")]
        others = {"mllm_shap's own runner": contest.library}
        if plain is not None:
            others[f"plain generate, batches of {plain.batch_size}"] = contest.raw
        for name, tally in others.items():
            ratio = self._over(tally)
            if ratio is not None:
                cells.append((name, *_rates(tally), f"{ratio:.2f}x"))
        return grid([*names(""), *numbers("coalitions/s", "all rounds", "ours is")], cells, _WIDTH)

    def _sentences(self) -> list[str]:
        lines = [f"The device was idle for {self.idle_fraction:.1%} of our time."]
        if self.sharing_factor is not None:
            lines.append(
                f"By the plan, the runs evaluate {self.sharing_factor:.2f} coalitions for each answer that "
                "they ask for."
            )
        contest = self.contest
        if contest.largest_difference is not None:
            lines.append(
                f"Values of ours and the library's differ by at most {contest.largest_difference:.1e} "
                f"on {contest.rows_compared} row(s)."
            )
        lines += [f"Note: {note}." for note in self.notes]
        lines.append(
            f"Recommended: batch size {self.recommended} (the contest came to {self.batch_size}), "
            f"{self.rows_in_flight} row(s) in flight."
        )
        return lines

    def _over(self, other: Tally) -> float | None:
        rate = other.median_rate
        return None if rate is None else self.rate / rate


def _rates(tally: Tally) -> tuple[str, str]:
    coalitions, seconds = tally.total
    return f"{tally.median_rate or 0.0:,.1f}", f"{coalitions / seconds:,.1f}"


def _threads() -> int:
    import torch

    return int(torch.get_num_threads())


def _hardware(device: str) -> str:
    """Return the name of the GPU or of the CPU."""
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(device))
    listed = Path("/proc/cpuinfo")  # only on Linux
    for line in listed.read_text(encoding="utf-8").splitlines() if listed.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

"""A run's aggregate metrics. Sums are exact, so they do not depend on the order of completion."""

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from mllm_shapx.records.results import SampleFile

N_CONSTANT = "n_constant"
"""Key of the number of samples whose coalitions all have the same answer; absent in earlier versions."""

AREAS = ("deletion_area_mean", "insertion_area_mean", "random_area_mean")
"""Keys of the areas under faithfulness curves; negative if the value function is."""

OLDER_KEYS = ("n_samples", "runtime_sec_total", "runtime_sec_avg", "avg_frac_text", "avg_frac_audio")
"""Keys that the older runner's summaries also have."""


class _Group:
    """The counts and numbers of one set of samples; unknown ones (None, NaN, infinities) are left out."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.numbers: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))

    def add(self, sample: SampleFile) -> None:
        counts = {
            "samples": 1,
            "n_calls": sample.n_calls,
            "model_calls": sample.model_calls,
            "tokens_in": sample.tokens_in,
            "tokens_out": sample.tokens_out,
            "sure": None if sample.stopped is None else int(sample.stopped == "standard_error"),
        }
        numbers = {
            "runtime": sample.runtime_sec,
            "frac_text": sample.attr_summary.frac_text,
            "frac_audio": sample.attr_summary.frac_audio,
            "residual": sample.imbalance,
            "standard_error": _mean([each for each in sample.standard_errors or () if math.isfinite(each)]),
        }
        if sample.faithfulness is not None:
            areas = sample.faithfulness.areas
            counts |= {
                "curves": 1,
                "deletion_better": areas.deletion_is_better,
                "insertion_better": areas.insertion_is_better,
            }
            numbers |= dict(zip(AREAS, (areas.deletion, areas.insertion, areas.random), strict=True))
        self.counts.update({name: count for name, count in counts.items() if count is not None})
        for name, number in numbers.items():
            if number is not None and math.isfinite(number):
                self.numbers[name].append(number)

    def extend(self, other: "_Group") -> None:
        self.counts.update(other.counts)
        for name, numbers in other.numbers.items():
            self.numbers[name].extend(numbers)

    def to_json(self) -> dict[str, Any]:
        counts = self.counts
        return {
            "n_samples": counts["samples"],
            "runtime_sec_total": math.fsum(self.numbers["runtime"]),
            "runtime_sec_avg": self._mean("runtime"),
            "avg_frac_text": self._mean("frac_text"),
            "avg_frac_audio": self._mean("frac_audio"),
            "n_calls_total": counts["n_calls"],
            "model_calls_total": counts["model_calls"],
            **{f"{name}_total": counts[name] for name in ("tokens_in", "tokens_out") if name in counts},
            "efficiency_residual_mean": self._mean("residual"),
            "efficiency_residual_max": max(self.numbers["residual"], default=0.0),
            "standard_error_mean": _mean(self.numbers["standard_error"]),
            **({"n_sure": counts["sure"]} if "sure" in counts else {}),
            **(self._faithfulness() if counts["curves"] else {}),
        }

    def _faithfulness(self) -> dict[str, Any]:
        curves = self.counts["curves"]
        return {
            "n_curves": curves,
            **{name: self._mean(name) for name in AREAS},
            "deletion_better": self.counts["deletion_better"] / curves,
            "insertion_better": self.counts["insertion_better"] / curves,
        }

    def _mean(self, name: str) -> float:
        return _mean(self.numbers[name]) or 0.0


def _mean(numbers: Sequence[float]) -> float | None:
    """Return the mean by `math.fsum`, which is the same in any order; None without numbers."""
    return math.fsum(numbers) / len(numbers) if numbers else None


class RunSummary:
    """`summary/aggregate_metrics.json` of one run, fed sample by sample.

    A sample takes 40 bytes, plus 24 with curves. Add each row only once: duplicates count twice.
    """

    def __init__(self) -> None:
        self._languages: defaultdict[str, _Group] = defaultdict(_Group)
        self._failed = 0
        self.n_samples = 0
        self.n_constant = 0
        """Samples whose coalitions all have the same answer."""

    def add(self, sample: SampleFile) -> None:
        """Add one sample."""
        self.n_samples += 1
        self.n_constant += sample.is_constant
        self._languages[sample.language].add(sample)

    def add_failure(self) -> None:
        """Count one quarantined row."""
        self._failed += 1

    def to_json(self) -> dict[str, Any]:
        """Return the file's data (docs/formats.md); without samples, means are 0 or null."""
        whole = _Group()
        for group in self._languages.values():
            whole.extend(group)
        return {
            **whole.to_json(),
            "n_failed": self._failed,
            N_CONSTANT: self.n_constant,
            "by_language": [
                {"language": language, **group.to_json()}
                for language, group in sorted(self._languages.items())
            ],
        }

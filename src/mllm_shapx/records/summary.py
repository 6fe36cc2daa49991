"""A run's aggregate metrics. Sums are exact, so they do not depend on the order of completion."""

import math
from array import array
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Self

from mllm_shapx.records.measures import Areas
from mllm_shapx.records.results import SampleFile

N_CONSTANT = "n_constant"
"""Key of the number of samples whose coalitions all have the same answer; absent in earlier versions."""

AREAS = ("deletion_area_mean", "insertion_area_mean", "random_area_mean")
"""Keys of the areas under faithfulness curves; negative if the value function is."""

OLDER_KEYS = ("n_samples", "runtime_sec_total", "runtime_sec_avg", "avg_frac_text", "avg_frac_audio")
"""Keys that the older runner's summaries also have."""


@dataclass(frozen=True, slots=True)
class SampleMetrics:
    """One sample's metrics for a summary."""

    row_index: int
    language: str
    runtime_sec: float
    n_calls: int
    model_calls: int
    tokens_in: int | None
    """Tokens of this sample's prompts to a server; None without a server."""
    tokens_out: int | None
    frac_text: float
    """Share of text in the absolute values, in [0, 1]; NaN if unknown."""
    frac_audio: float
    efficiency_residual: float
    """|sum of values - (v(N) - v(empty))|, before normalizing; NaN if unknown."""
    standard_error: float
    """Mean standard error of the players that have one; NaN if none has."""
    num_players: int
    is_constant: bool
    """Whether every coalition is known to have the same answer."""
    made_from: str
    """Digest of the row; see `SampleFile.made_from`."""
    areas: Areas | None = None
    """Areas under its faithfulness curves."""
    is_sure: bool | None = None
    """Whether sampling ended because its values were sure enough; None if it cannot end early."""

    @classmethod
    def of(cls, sample: SampleFile) -> Self:
        """Return the metrics of a sample."""
        return cls(
            row_index=sample.row_index,
            language=sample.language,
            runtime_sec=sample.runtime_sec,
            n_calls=sample.n_calls,
            model_calls=sample.model_calls,
            tokens_in=sample.tokens_in,
            tokens_out=sample.tokens_out,
            frac_text=sample.attr_summary.frac_text,
            frac_audio=sample.attr_summary.frac_audio,
            efficiency_residual=sample.imbalance,
            standard_error=_mean_error(sample),
            num_players=sample.num_players,
            is_constant=sample.is_constant,
            made_from=sample.made_from,
            areas=None if sample.faithfulness is None else sample.faithfulness.areas,
            is_sure=None if sample.stopped is None else sample.stopped == "standard_error",
        )


def _mean_error(sample: SampleFile) -> float:
    known = [error for error in sample.standard_errors or () if math.isfinite(error)]
    return math.fsum(known) / len(known) if known else math.nan


class ExactSum:
    """The sum of floats by `math.fsum`: the same numbers in any order give the same sum.

    Ignores NaN and infinities. Stores every number: 8 bytes each.
    """

    __slots__ = ("_values",)

    def __init__(self) -> None:
        self._values = array("d")

    def add(self, value: float) -> None:
        """Add one number."""
        if math.isfinite(value):
            self._values.append(value)

    def extend(self, other: "ExactSum") -> None:
        """Add the numbers of another sum."""
        self._values.extend(other._values)  # noqa: SLF001 -- of this class

    @property
    def has_any(self) -> bool:
        """Return whether the sum has numbers."""
        return bool(self._values)

    @property
    def total(self) -> float:
        """Return the correctly rounded sum; 0 when nothing was added."""
        return math.fsum(self._values)

    @property
    def mean(self) -> float:
        """Return the mean; 0 when nothing was added."""
        return self.total / len(self._values) if self._values else 0.0


@dataclass(slots=True)
class _Curves:
    """The sums over the samples with faithfulness curves."""

    samples: int = 0
    deletion_better: int = 0
    insertion_better: int = 0
    deletion: ExactSum = field(default_factory=ExactSum)
    insertion: ExactSum = field(default_factory=ExactSum)
    random: ExactSum = field(default_factory=ExactSum)

    def add(self, areas: Areas) -> None:
        self.samples += 1
        self.deletion_better += areas.deletion_is_better
        self.insertion_better += areas.insertion_is_better
        self.deletion.add(areas.deletion)
        self.insertion.add(areas.insertion)
        self.random.add(areas.random)

    def extend(self, other: "_Curves") -> None:
        self.samples += other.samples
        self.deletion_better += other.deletion_better
        self.insertion_better += other.insertion_better
        self.deletion.extend(other.deletion)
        self.insertion.extend(other.insertion)
        self.random.extend(other.random)

    def to_json(self) -> dict[str, Any]:
        if not self.samples:
            return {}
        return {
            "n_curves": self.samples,
            **dict(zip(AREAS, (self.deletion.mean, self.insertion.mean, self.random.mean), strict=True)),
            "deletion_better": self.deletion_better / self.samples,
            "insertion_better": self.insertion_better / self.samples,
        }


@dataclass(slots=True)
class _Group:
    """The sums over one set of samples."""

    samples: int = 0
    n_calls: int = 0
    model_calls: int = 0
    tokens_in: int | None = None
    tokens_out: int | None = None
    runtime: ExactSum = field(default_factory=ExactSum)
    frac_text: ExactSum = field(default_factory=ExactSum)
    frac_audio: ExactSum = field(default_factory=ExactSum)
    residual: ExactSum = field(default_factory=ExactSum)
    residual_max: float = 0.0
    standard_error: ExactSum = field(default_factory=ExactSum)
    sure: int | None = None
    curves: _Curves = field(default_factory=_Curves)

    def add(self, metrics: SampleMetrics) -> None:
        self.samples += 1
        self.n_calls += metrics.n_calls
        self.model_calls += metrics.model_calls
        self.tokens_in = _sum_of_known(self.tokens_in, metrics.tokens_in)
        self.tokens_out = _sum_of_known(self.tokens_out, metrics.tokens_out)
        self.runtime.add(metrics.runtime_sec)
        self.frac_text.add(metrics.frac_text)
        self.frac_audio.add(metrics.frac_audio)
        self.residual.add(metrics.efficiency_residual)
        self.standard_error.add(metrics.standard_error)
        self.sure = _sum_of_known(self.sure, metrics.is_sure)
        # In this argument order, NaN never wins.
        self.residual_max = max(self.residual_max, metrics.efficiency_residual)
        if metrics.areas is not None:
            self.curves.add(metrics.areas)

    def extend(self, other: "_Group") -> None:
        self.samples += other.samples
        self.n_calls += other.n_calls
        self.model_calls += other.model_calls
        self.tokens_in = _sum_of_known(self.tokens_in, other.tokens_in)
        self.tokens_out = _sum_of_known(self.tokens_out, other.tokens_out)
        self.runtime.extend(other.runtime)
        self.frac_text.extend(other.frac_text)
        self.frac_audio.extend(other.frac_audio)
        self.residual.extend(other.residual)
        self.standard_error.extend(other.standard_error)
        self.sure = _sum_of_known(self.sure, other.sure)
        self.residual_max = max(self.residual_max, other.residual_max)
        self.curves.extend(other.curves)

    def to_json(self) -> dict[str, Any]:
        return {
            "n_samples": self.samples,
            "runtime_sec_total": self.runtime.total,
            "runtime_sec_avg": self.runtime.mean,
            "avg_frac_text": self.frac_text.mean,
            "avg_frac_audio": self.frac_audio.mean,
            "n_calls_total": self.n_calls,
            "model_calls_total": self.model_calls,
            **({} if self.tokens_in is None else {"tokens_in_total": self.tokens_in}),
            **({} if self.tokens_out is None else {"tokens_out_total": self.tokens_out}),
            "efficiency_residual_mean": self.residual.mean,
            "efficiency_residual_max": self.residual_max,
            "standard_error_mean": self.standard_error.mean if self.standard_error.has_any else None,
            **({} if self.sure is None else {"n_sure": self.sure}),
            **self.curves.to_json(),
        }


def _sum_of_known(first: int | None, second: int | None) -> int | None:
    """Return the sum of two counts; an unknown one counts as 0, two unknown ones give None."""
    return second if first is None else first + (second or 0)


class RunSummary:
    """`summary/aggregate_metrics.json` of one run, fed sample by sample.

    A sample takes 40 bytes, plus 24 with curves. Add each row only once: duplicates count twice.
    """

    def __init__(self) -> None:
        self._languages: defaultdict[str, _Group] = defaultdict(_Group)
        self._failed = 0
        self.n_constant = 0
        """Samples whose coalitions all have the same answer."""

    @property
    def n_samples(self) -> int:
        """Return the number of added samples."""
        return sum(group.samples for group in self._languages.values())

    def add(self, sample: SampleFile | SampleMetrics) -> None:
        """Add one sample."""
        metrics = sample if isinstance(sample, SampleMetrics) else SampleMetrics.of(sample)
        self.n_constant += metrics.is_constant
        self._languages[metrics.language].add(metrics)

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

"""A run's aggregate metrics: exact sums, so that they do not depend on the order of completion."""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Self

from mllm_shapx.records.results import SampleResult, texts_digest
from mllm_shapx.records.sample_file import SampleFile, nan_for_null

N_CONSTANT = "n_constant"
"""Key of the samples in which every coalition has the same answer; summaries of earlier versions lack it."""

OLDER_KEYS = ("n_samples", "runtime_sec_total", "runtime_sec_avg", "avg_frac_text", "avg_frac_audio")
"""Keys that the older runner's summaries have too."""


@dataclass(frozen=True, slots=True)
class SampleMetrics:
    """What a summary needs of one sample."""

    row_index: int
    language: str
    runtime_sec: float
    n_calls: int
    model_calls: int
    tokens_in: int | None
    """Tokens of the prompts that a server was asked for this sample; None without a server."""
    tokens_out: int | None
    frac_text: float
    """Share of the absolute values that lies on text, in [0, 1]; NaN where it is unknown."""
    frac_audio: float
    efficiency_residual: float
    """|sum of values - (v(N) - v(empty))|, before normalizing; NaN where it is unknown."""
    num_players: int
    is_constant: bool
    """Whether every coalition is known to have the same answer."""
    made_from: str
    """Digest of the row, see `SampleResult.made_from`."""

    @classmethod
    def of(cls, sample: SampleResult) -> Self:
        """Return the metrics of a sample in memory."""
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
            efficiency_residual=sample.efficiency_residual,
            num_players=sample.num_players,
            is_constant=sample.is_constant,
            made_from=sample.made_from,
        )

    @classmethod
    def of_file(cls, file: SampleFile) -> Self:
        """Return the metrics of a sample's file."""
        base, grand, total = (nan_for_null(file[key]) for key in ("base_value", "grand_value", "values_sum"))
        return cls(
            row_index=file["row_index"],
            language=file["language"],
            runtime_sec=file["runtime_sec"],
            n_calls=file["n_calls"],
            model_calls=file["model_calls"],
            tokens_in=file.get("tokens_in"),
            tokens_out=file.get("tokens_out"),
            frac_text=nan_for_null(file["attr_summary"]["frac_text"]),
            frac_audio=nan_for_null(file["attr_summary"]["frac_audio"]),
            efficiency_residual=abs(total - (grand - base)),
            num_players=file["num_players"],
            is_constant=file.get("distinct_answers") == 1,
            made_from=file.get("row_digest") or texts_digest(file["prompt_texts"]),
        )


class ExactSum:
    """A sum of floats that is rounded once, at the end: `math.fsum` in constant memory.

    The same numbers in any order give the same sum. NaN and infinities are left out.
    """

    __slots__ = ("_exact", "count")

    def __init__(self) -> None:
        self._exact = Fraction(0)
        self.count = 0
        """How many numbers were added."""

    def add(self, value: float) -> None:
        """Add one number."""
        if math.isfinite(value):
            self.count += 1
            self._exact += Fraction(value)

    @property
    def total(self) -> float:
        """Return the correctly rounded sum; 0 when nothing was added."""
        return float(self._exact)

    @property
    def mean(self) -> float:
        """Return the mean; 0 when nothing was added."""
        return self.total / self.count if self.count else 0.0


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

    def add(self, metrics: SampleMetrics) -> None:
        self.samples += 1
        self.n_calls += metrics.n_calls
        self.model_calls += metrics.model_calls
        if metrics.tokens_in is not None:
            self.tokens_in = (self.tokens_in or 0) + metrics.tokens_in
        if metrics.tokens_out is not None:
            self.tokens_out = (self.tokens_out or 0) + metrics.tokens_out
        self.runtime.add(metrics.runtime_sec)
        self.frac_text.add(metrics.frac_text)
        self.frac_audio.add(metrics.frac_audio)
        self.residual.add(metrics.efficiency_residual)
        # In this order NaN never wins.
        self.residual_max = max(self.residual_max, metrics.efficiency_residual)

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
        }


class RunSummary:
    """`summary/aggregate_metrics.json` of one run, kept up to date sample by sample.

    Memory does not grow with the samples. Resuming feeds the samples on disk back in; nothing is added twice
    only if the caller adds each row once.
    """

    def __init__(self) -> None:
        self._all = _Group()
        self._languages: dict[str, _Group] = {}
        self._failed = 0
        self._constant = 0

    @property
    def n_samples(self) -> int:
        """Return how many samples were added."""
        return self._all.samples

    @property
    def n_constant(self) -> int:
        """Return in how many of them every coalition has the same answer."""
        return self._constant

    def add(self, sample: SampleResult | SampleMetrics) -> None:
        """Add one sample."""
        metrics = sample if isinstance(sample, SampleMetrics) else SampleMetrics.of(sample)
        self._all.add(metrics)
        self._constant += metrics.is_constant
        group = self._languages.get(metrics.language)
        if group is None:
            group = self._languages[metrics.language] = _Group()
        group.add(metrics)

    def add_failure(self) -> None:
        """Count one row that was quarantined."""
        self._failed += 1

    def to_json(self) -> dict[str, Any]:
        """Return the file's data (docs/formats.md); means are 0 where there are no samples."""
        return {
            **self._all.to_json(),
            "n_failed": self._failed,
            N_CONSTANT: self._constant,
            "by_language": [
                {"language": language, **self._languages[language].to_json()}
                for language in sorted(self._languages)
            ],
        }

"""Checks of the numbers of a sample: counts, sums and the axioms of its explainer."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.spec import result_settings, stop_at

TOLERANCE = 1e-6
"""Allowed deviation from an axiom, absolute and relative to the compared numbers."""

_EFFICIENT = frozenset({"k-SII", "STII"})
"""Indices of interactions that sum to v(N) - v(empty) over all sets up to the order."""

type ValueCheck = Callable[[SampleResult], Iterator[str]]


def value_checks(spec: dict[str, Any]) -> list[ValueCheck]:
    """Return the checks for a run's samples that follow from its spec."""
    settings = result_settings(spec) or {}
    checks: list[ValueCheck] = [_counts, _attribution, _raw_values, _faithfulness, _interactions]
    if settings.get("explainer_type") == "exact":
        checks.append(_efficiency)
    checks.append(partial(_stopped, stop_at(settings)))
    shap = settings.get("shap")
    normalizer = shap.get("normalizer") if isinstance(shap, dict) else None
    if normalizer in _NORMALIZERS:
        checks.append(partial(_normalized, normalizer))
    return checks


def _efficiency(sample: SampleResult) -> Iterator[str]:
    """The values of an exact run sum to v(N) - v(empty) before normalizing (Shapley 1953, efficiency)."""
    gain = sample.grand_value - sample.base_value
    if math.isnan(gain) or math.isnan(sample.values_sum):
        return  # a value that is no number is written as null, and no axiom holds for it
    if not _close(sample.values_sum, gain):
        yield (
            f"the values sum to {sample.values_sum:.9g}, not to v(all) - v(none) = {gain:.9g} "
            "as exact Shapley values do"
        )


def _counts(sample: SampleResult) -> Iterator[str]:
    values = len(sample.player_values())
    is_finite = math.isfinite(sample.values_sum)
    if values > sample.num_players or (is_finite and values != sample.num_players):
        yield f"it has {values} values for {sample.num_players} players"
    counted = sample.attr_summary.count_text_tokens + sample.attr_summary.count_audio_segments
    if counted != sample.num_players:
        yield f"attr_summary counts {counted} players of {sample.num_players}"


def _raw_values(sample: SampleResult) -> Iterator[str]:
    """The values before normalizing are one per player and sum to `values_sum`."""
    values = sample.raw_values
    if values is None:
        return  # written by an earlier version
    if len(values) != sample.num_players:
        yield f"it has {len(values)} raw_values for {sample.num_players} players"
    elif math.isfinite(sample.values_sum) and not _close(math.fsum(values), sample.values_sum):
        yield f"raw_values sum to {math.fsum(values):.9g}, values_sum says {sample.values_sum:.9g}"


def _stopped(standard_error: float | None, sample: SampleResult) -> Iterator[str]:
    """`stopped` is `standard_error` if no standard error is above that of `stop_when`, else `budget`."""
    if standard_error is None:
        if sample.stopped is not None:
            yield f"stopped is {sample.stopped}, though the run has no stop_when"
        return
    errors = sample.standard_errors or ()
    is_sure = sample.standard_errors is not None and all(error <= standard_error for error in errors)
    expected = "standard_error" if is_sure else "budget"
    if sample.stopped != expected:
        found = "absent" if sample.stopped is None else sample.stopped
        what = "every" if is_sure else "not every"
        yield (
            f"stopped is {found}, not {expected}: {what} standard error is at most {standard_error:g} "
            "(stop_when)"
        )


def _faithfulness(sample: SampleResult) -> Iterator[str]:
    """The curves go from no player to all, and have a value at each point."""
    curves = sample.faithfulness
    if curves is None:
        return
    if not curves.kept or (curves.kept[0], curves.kept[-1]) != (0, sample.num_players):
        yield f"the curves of faithfulness do not go from 0 to {sample.num_players} players"
    if any(len(each) != len(curves.kept) for each in (curves.deletion, curves.insertion, *curves.random)):
        yield f"a curve of faithfulness has not one value for each of its {len(curves.kept)} points"


def _interactions(sample: SampleResult) -> Iterator[str]:
    """There is one number per set of players; those of an efficient index sum to v(N) - v(empty)."""
    found = sample.interactions
    if found is None:
        return
    gain, total = sample.grand_value - sample.base_value, math.fsum(found.values)
    if len(found.players) != len(found.values):
        yield f"it has {len(found.values)} interactions for {len(found.players)} sets of players"
    elif found.index in _EFFICIENT and math.isfinite(gain) and not _close(total, gain):
        yield f"the interactions sum to {total:.9g}, not to v(all) - v(none) = {gain:.9g}"


def _attribution(sample: SampleResult) -> Iterator[str]:
    summary = sample.attr_summary
    total = math.fsum(abs(value) for value in sample.player_values() if value is not None)
    stated = summary.abs_sum_text + summary.abs_sum_audio
    if math.isfinite(stated) and not _close(stated, total):
        yield f"attr_summary's sums give {stated:.9g}, the values {total:.9g}"
    shares = summary.frac_text + summary.frac_audio
    if math.isfinite(shares) and not _close(shares, 1.0 if stated else 0.0):
        yield f"attr_summary's shares sum to {shares:.9g}"


def _identity(values: list[float], sample: SampleResult) -> Iterator[str]:
    if not _close(math.fsum(values), sample.values_sum):
        yield f"the values sum to {math.fsum(values):.9g}, values_sum says {sample.values_sum:.9g}"


def _abs_sum(values: list[float], _: SampleResult) -> Iterator[str]:
    total = math.fsum(map(abs, values))
    if any(values) and not _close(total, 1.0):
        yield f"the absolute values sum to {total:.9g}, not to 1 as AbsSumNormalizer leaves them"


def _shares(values: list[float], _: SampleResult) -> Iterator[str]:
    """MinMax and PowerShift leave shares of 1; equal values may stay as they were."""
    total, least = math.fsum(values), min(values)
    if max(values) != least and (least < -TOLERANCE or not _close(total, 1.0)):
        yield f"the values are no shares of 1: they sum to {total:.9g}, the least is {least:.9g}"


_NORMALIZERS: dict[str, Callable[[list[float], SampleResult], Iterator[str]]] = {
    "IdentityNormalizer": _identity,
    "AbsSumNormalizer": _abs_sum,
    "MinMaxNormalizer": _shares,
    "PowerShiftNormalizer": _shares,
}


def _normalized(name: str, sample: SampleResult) -> Iterator[str]:
    """The values are what the normalizer leaves; not checked when one of them is no number."""
    values = [value for value in sample.player_values() if value is not None]
    if values and len(values) == sample.num_players and math.isfinite(sample.values_sum):
        yield from _NORMALIZERS[name](values, sample)


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)

"""Standard errors of estimated values: one per player, from the evaluated coalitions.

A standard error is the square root of the estimator's variance over draws of coalitions, for one game with
fixed payoffs. It includes neither the randomness of the model's answers nor a bias.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mllm_shapx.config.vocabulary import EXPLAINERS

type Floats = NDArray[np.float64]
type Errors = tuple[float, ...]

MIN_PAIRS = 2
"""Pairs beyond the number of coefficients that a regression needs for standard errors."""
_CERTAIN = 1e-9
_MOST = 1 << 1000
"""Upper bound for numbers of coalitions: floats overflow soon above it."""


def standard_errors(
    explainer_type: str, coalitions: Sequence[Sequence[bool]], payoffs: Sequence[float]
) -> Errors | None:
    """Return the standard error of each player's value, in the units of the payoffs.

    Coalitions are drawn without replacement, so every method has the finite population correction: with all
    2^n coalitions the standard errors are 0.

    Monte Carlo (`mc` and its Banzhaf variants): a value is a weighted sum of means over strata (coalitions of
    one size with, or without, the player); its variance is the sum over the strata (Cochran, Sampling
    Techniques, 1977, 5.4; Kolpaczki et al., Approximating the Shapley value without marginal contributions,
    2024). A stratum without draws counts like the player's other strata: the variance between the observed
    strata is added.

    Complementary contributions and Neyman allocation: the same, with strata of the coalitions of one size
    that contain the player, and means of v(S) - v(N - S) (Zhang et al., Efficient sampling approaches to
    Shapley value approximation, 2023). A player with an empty stratum has no standard error, because the
    estimator uses 0 for that stratum.

    In both, a stratum with one draw uses the variance of all draws of its size. Complementary strata are
    small, so this variance counts as one draw in each of them.

    Regressions (`leverage`, `kernel_banzhaf`): a sandwich over pairs of a coalition and its complement, with
    each residual divided by 1 - leverage, which approximates leaving a pair out (MacKinnon and White, Some
    heteroskedasticity-consistent covariance matrix estimators, 1985; Binder, On the variances of
    asymptotically normal estimators from complex surveys, 1983).

    Args:
        explainer_type: Any type but `hierarchical`.
        coalitions: Distinct coalitions, one flag per player.
        payoffs: Their values.

    Returns:
        One per player, NaN for a player with too few draws. None for explainers without standard errors:
        `exact` and `loo` draw nothing, and the trees of `proxy` adapt to the draws.
    """
    facts = EXPLAINERS[explainer_type]
    present = np.array(coalitions, dtype=np.float64)
    pay = np.array(payoffs, dtype=np.float64)
    if not np.isfinite(pay).all():
        return (math.nan,) * len(coalitions[0])
    # Centred for numerical accuracy of squares; no method depends on a constant.
    pay = pay - pay.mean()
    found: Floats
    match facts.estimator:
        case "mc":
            found = _of_marginal_means(present, pay, facts.estimand)
        case "complementary" | "neyman_cc":
            found = _of_complementary_means(present, pay)
        case "leverage":
            found = _of_kernel_regression(present, pay)
        case "kernel_banzhaf":
            found = _of_banzhaf_regression(present, pay)
        case _:
            return None
    return tuple(float(error) for error in found)


def _of_marginal_means(present: Floats, pay: Floats, estimand: Literal["shapley", "banzhaf"]) -> Floats:
    players = present.shape[1]
    share = _probabilities(players, estimand)
    mean_with, error_with, seen_with = _strata(present, pay, holds_player=True)
    mean_without, error_without, seen_without = _strata(1.0 - present, pay, holds_player=False)
    # Stratum l: coalitions of l others, with the player (size l + 1) and without (size l).
    seen = seen_with[:, 1:] & seen_without[:, :-1]
    gain = mean_with[:, 1:] - mean_without[:, :-1]
    variance = error_with[:, 1:] + error_without[:, :-1]
    mass = (seen * share).sum(axis=1)
    found = np.full(players, np.nan)
    for player in range(players):
        known = seen[player]
        if known.all() or known.sum() > 1:
            weights = share[known] / mass[player]
            between = 0.0 if known.all() else float(np.var(gain[player][known], ddof=1))
            missing = float((share[~known] ** 2).sum() + share[~known].sum() ** 2 * (weights**2).sum())
            found[player] = math.sqrt((weights**2 @ variance[player][known]) + between * missing)
    return found


def _of_complementary_means(present: Floats, pay: Floats) -> Floats:
    players = present.shape[1]
    gain = pay - pay[_complements(present)]
    _, errors, seen = _strata(present, gain, holds_player=True, borrowed=1.0)
    found = np.sqrt(errors[:, 1:].sum(axis=1)) / players
    found[~seen[:, 1:].all(axis=1)] = np.nan
    return np.asarray(found)


def _strata(
    member: Floats, pay: Floats, *, holds_player: bool, borrowed: float = 0.0
) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Return mean, squared error of the mean, and whether there are draws, per player and coalition size.

    `member` marks the coalitions of a player's strata: those with it, or those without it. `borrowed` is the
    weight, in draws, of the variance of all draws of a size.
    """
    players = member.shape[1]
    sizes = (member if holds_player else 1.0 - member).sum(axis=1).astype(np.int64)
    of_size = np.eye(players + 1)[sizes]
    count = member.T @ of_size
    some = np.maximum(count, 1.0)
    mean = (member * pay[:, None]).T @ of_size / some
    squares = (member * pay[:, None] ** 2).T @ of_size
    others = np.arange(players + 1) - holds_player
    whole = np.array([_choices(players - 1, size) for size in others.tolist()])
    variance = np.maximum(squares - count * mean**2, 0.0) / np.maximum(count - 1.0, 1.0)
    pooled = _pooled(pay, of_size)[None, :]
    variance = np.where(
        count > 1, variance + (pooled - variance) * borrowed / np.maximum(count - 1.0 + borrowed, 1.0), pooled
    )
    left_out = np.clip(1.0 - count / np.maximum(whole, 1.0), 0.0, 1.0)
    error = np.where(left_out > 0.0, variance / some * left_out, 0.0)
    return mean, error, count > 0


def _pooled(pay: Floats, of_size: Floats) -> Floats:
    """Return the variance of all draws of each size; over all sizes for a size with fewer than two draws."""
    count = of_size.sum(axis=0)
    mean = pay @ of_size / np.maximum(count, 1.0)
    squares = np.maximum(pay**2 @ of_size - count * mean**2, 0.0)
    freedom = np.maximum(count - 1.0, 0.0)
    overall = squares.sum() / freedom.sum() if freedom.sum() else np.nan
    return np.where(freedom > 0, squares / np.maximum(freedom, 1.0), overall)


def _of_kernel_regression(present: Floats, pay: Floats) -> Floats:
    """Return the errors of least squares with values that sum to the grand value: the last is the rest."""
    players = present.shape[1]
    complements = _complements(present)
    sizes = present.sum(axis=1).astype(np.int64)
    first = np.flatnonzero((sizes > 0) & (sizes < players) & (np.arange(len(sizes)) < complements))
    grand = pay[np.flatnonzero(sizes == players)[0]] - pay[np.flatnonzero(sizes == 0)[0]]
    if players == 1:
        return np.zeros(1)
    rows = present[first]
    design = rows[:, :-1] - rows[:, [-1]]
    target = (pay[first] - pay[complements[first]]) / 2 - (rows[:, -1] - 0.5) * grand
    small = np.minimum(sizes[first], players - sizes[first])
    drawn = np.bincount(small, minlength=players + 1)[small]
    both = 2 * small == players
    whole = np.array([_choices(players, size) for size in small.tolist()]) / np.where(both, 2, 1)
    weights = 1.0 / (small * (players - small) * drawn * np.where(both, 2, 1))
    influence = _influence(design, target, weights, drawn >= whole)
    influence = np.column_stack([influence, -influence.sum(axis=1)])
    return np.asarray(np.sqrt((1.0 - np.minimum(drawn / whole, 1.0)) @ influence**2))


def _of_banzhaf_regression(present: Floats, pay: Floats) -> Floats:
    players = present.shape[1]
    complements = _complements(present)
    first = np.flatnonzero(np.arange(len(pay)) < complements)
    certain = (present[first].sum(axis=1) % players) == 0
    whole = float(min(1 << (players - 1), _MOST) - 1)
    left_out = np.where(certain, 0.0, 1.0 - (len(first) - 1) / max(whole, 1.0))
    target = (pay[first] - pay[complements[first]]) / 2
    influence = _influence(present[first] - 0.5, target, np.ones(len(first)), left_out <= 0.0)
    return np.asarray(np.sqrt(left_out @ influence**2))


def _influence(design: Floats, target: Floats, weights: Floats, certain: NDArray[np.bool_]) -> Floats:
    """Return the change of the coefficients without each pair; NaN with too few pairs."""
    pairs, coefficients = design.shape
    if certain.all():
        return np.zeros((pairs, coefficients))
    if pairs < coefficients + MIN_PAIRS:
        return np.full((pairs, coefficients), np.nan)
    scaled = design * np.sqrt(weights)[:, None]
    inverse = np.linalg.pinv(scaled.T @ scaled)
    solved = scaled @ inverse
    leverage = (solved * scaled).sum(axis=1)
    rest = np.sqrt(weights) * target - scaled @ (solved.T @ (np.sqrt(weights) * target))
    fixed = leverage > 1.0 - _CERTAIN
    if np.linalg.matrix_rank(scaled) < coefficients or (fixed & ~certain).any():
        return np.full((pairs, coefficients), np.nan)
    return np.asarray(solved * (rest / np.where(fixed, 1.0, 1.0 - leverage))[:, None])


def _complements(present: Floats) -> NDArray[np.int64]:
    """Return the index of each coalition's complement."""
    place = {row.tobytes(): index for index, row in enumerate(present)}
    return np.array([place[row.tobytes()] for row in 1.0 - present], dtype=np.int64)


def _choices(players: int, size: int) -> float:
    """Return the number of coalitions of a size, at most `_MOST`."""
    return float(min(math.comb(players, size), _MOST)) if size >= 0 else 0.0


def _probabilities(players: int, estimand: Literal["shapley", "banzhaf"]) -> Floats:
    """Return the probability of each number of other players that a semivalue's player joins."""
    if estimand == "shapley":
        return np.full(players, 1.0 / players)
    return np.array([math.comb(players - 1, size) / 2 ** (players - 1) for size in range(players)])

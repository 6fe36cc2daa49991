"""Counts the distinct coalitions that several runs need together, with mllm_shap's own samplers.

A run's coalitions are drawn once per number of players and cached; rows with as many players differ only in
their seeds. Beyond a cap nothing is drawn: the remaining coalitions count as drawn uniformly.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

from mllm_shapx.config.vocabulary import EXPLAINERS

if TYPE_CHECKING:
    from mllm_shap import CoalitionMask

WHOLE_LOG2 = 12
"""Most players for which all coalitions of a run are drawn."""
MOST_DRAWN = 256
"""Most coalitions drawn for a run on more players."""
MOST_PLAYERS = 62
"""With more players, runs share only their certain coalitions."""

_SAMPLERS = {
    "mc": "MonteCarloEstimator",
    "complementary": "ComplementaryEstimator",
    "neyman_cc": "NeymanEstimator",
    "leverage": "LeverageEstimator",
    "proxy": "LeverageEstimator",
    "kernel_banzhaf": "KernelBanzhafEstimator",
    "loo": "LeaveOneOutEstimator",
}
"""The library's name of an estimator -> the class of its sampler in `mllm_shap.estimation`."""
_BEGIN_WITH_COMPLEMENTS = frozenset({"mc", "complementary", "neyman_cc"})
"""Estimators that first draw the grand and the empty coalition, then those with and without one player."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """The coalitions of one run on n players."""

    masks: frozenset[int]
    """The drawn coalitions."""
    rest: int
    """Number of further coalitions, uniform over all others."""


def distinct(runs: Sequence[Drawn], num_players: int) -> float:
    """Return how many distinct coalitions the runs evaluate together; an expectation if one has a rest."""
    known = frozenset[int]().union(*(run.masks for run in runs))
    if num_players > MOST_PLAYERS:
        return float(len(known)) + float(sum(run.rest for run in runs))
    table, missed = 1 << num_players, 1.0
    for run in runs:
        missed *= 1.0 - min(1.0, run.rest / max(1, table - len(run.masks)))
    return len(known) + (table - len(known)) * (1.0 - missed)


@lru_cache(maxsize=8192)
def drawn(explainer_type: str, evaluations: int, num_players: int, seed: int) -> Drawn:
    """Return the coalitions that a flat run evaluates.

    The second phase of the Neyman estimators depends on the model's answers; noise replaces them here.

    Args:
        explainer_type: Any type but `exact` and `hierarchical`.
        evaluations: The result of `flat_coalitions`.
        num_players: Players of the row, at least 1.
        seed: Seed of the sampler.
    """
    if num_players > MOST_PLAYERS:
        certain = 2 * num_players + 2 if has_complements(explainer_type, evaluations, num_players) else 0
        return Drawn(frozenset(range(certain)), evaluations - certain)
    most = evaluations if num_players <= WHOLE_LOG2 else min(evaluations, MOST_DRAWN)
    share = evaluations / (1 << num_players)
    sampled = islice(_coalitions(explainer_type, num_players, share, seed), most)
    masks = frozenset(_bits(mask) for mask in sampled)
    return Drawn(masks, max(0, evaluations - len(masks)))


def has_complements(explainer_type: str, evaluations: int, num_players: int) -> bool:
    """Return whether a run certainly evaluates all coalitions of 1 and of n - 1 players."""
    if evaluations >= 1 << num_players:
        return True
    begins = EXPLAINERS[explainer_type].estimator in _BEGIN_WITH_COMPLEMENTS
    return begins and evaluations >= 2 * num_players + 2


def _coalitions(explainer_type: str, num_players: int, share: float, seed: int) -> "Iterator[CoalitionMask]":
    """Yield the coalitions of the library's sampler for a share of the 2^n coalitions."""
    from mllm_shap import CoalitionMask, PlayerSet, estimation
    from mllm_shap.protocols.estimator import TwoPhaseEstimator

    facts = EXPLAINERS[explainer_type]
    estimator = getattr(estimation, _SAMPLERS[facts.estimator])(**facts.settings.get("neyman", {}))
    with_minimal = facts.settings.get("include_minimal_masks", False)
    players = PlayerSet(player_ids=tuple(map(str, range(num_players))))
    first = []
    for mask in estimator.sample_masks(players, share, with_minimal, seed):
        first.append(mask)
        yield mask
    if facts.estimator == "loo":
        yield CoalitionMask((False,) * num_players)  # the recorded base value
    if isinstance(estimator, TwoPhaseEstimator):
        draw = random.Random(seed)
        estimator.begin_allocation(first, [draw.gauss(0.0, 1.0) for _ in first])
        yield from estimator.sample_allocation_masks()


def _bits(mask: "CoalitionMask") -> int:
    return sum(1 << index for index, present in enumerate(mask.present) if present)

"""Counts how many distinct coalitions several runs need together, with mllm_shap's own samplers.

A run's coalitions are drawn once for each number of players and kept; rows of as many players differ in their
seeds alone. Large tables are not drawn to the end: beyond a cap, coalitions count as drawn evenly.
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
"""Players up to which all coalitions of a run are drawn."""
MOST_DRAWN = 256
"""Coalitions that are drawn of a run on more players."""
MOST_PLAYERS = 62
"""Players beyond which runs share no coalitions but the certain ones."""

_SAMPLERS = {
    "mc": "MonteCarloEstimator",
    "complementary": "ComplementaryEstimator",
    "neyman_cc": "NeymanEstimator",
    "leverage": "LeverageEstimator",
    "proxy": "LeverageEstimator",
    "kernel_banzhaf": "KernelBanzhafEstimator",
    "loo": "LeaveOneOutEstimator",
}
"""The library's name of an estimator -> the class in `mllm_shap.estimation` whose sampler it has."""
_BEGIN_WITH_COMPLEMENTS = frozenset({"mc", "complementary", "neyman_cc"})
"""Estimators that begin with the grand and the empty coalition, then those with and without one player."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """The coalitions of one run on n players."""

    masks: frozenset[int]
    """Those that were drawn."""
    rest: int
    """How many more there are; each is any other coalition with the same chance."""


def distinct(runs: Sequence[Drawn], num_players: int) -> float:
    """Return how many distinct coalitions the runs evaluate together: expected where one has a rest."""
    known = frozenset[int]().union(*(run.masks for run in runs))
    if num_players > MOST_PLAYERS:
        return float(len(known)) + float(sum(run.rest for run in runs))
    table, missed = 1 << num_players, 1.0
    for run in runs:
        missed *= 1.0 - min(1.0, run.rest / max(1, table - len(run.masks)))
    return len(known) + (table - len(known)) * (1.0 - missed)


def evenly(evaluations: int) -> Drawn:
    """Return the coalitions of a run whose sampler is not known, such as a hierarchical one."""
    return Drawn(frozenset(), evaluations)


@lru_cache(maxsize=8192)
def drawn(explainer_type: str, evaluations: int, num_players: int, seed: int) -> Drawn:
    """Return the coalitions that a flat run evaluates.

    The second phase of the Neyman estimators follows the model's answers; they are noise here.

    Args:
        explainer_type: Any type but `exact` and `hierarchical`.
        evaluations: What `flat_coalitions` returns.
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
    """Return whether a run surely evaluates every coalition of one player, and every one that lacks one."""
    if evaluations >= 1 << num_players:
        return True
    begins = EXPLAINERS[explainer_type].estimator in _BEGIN_WITH_COMPLEMENTS
    return begins and evaluations >= 2 * num_players + 2


def _coalitions(explainer_type: str, num_players: int, share: float, seed: int) -> "Iterator[CoalitionMask]":
    """Yield what the library's sampler draws for a share of the 2^n coalitions."""
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
        yield CoalitionMask((False,) * num_players)  # whose value is recorded
    if isinstance(estimator, TwoPhaseEstimator):
        draw = random.Random(seed)
        estimator.begin_allocation(first, [draw.gauss(0.0, 1.0) for _ in first])
        yield from estimator.sample_allocation_masks()


def _bits(mask: "CoalitionMask") -> int:
    return sum(1 << index for index, present in enumerate(mask.present) if present)

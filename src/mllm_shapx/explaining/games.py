"""One cooperative game: sample coalitions, score them, estimate the players' values.

Sampling and estimation are mllm_shap's plugins. All coalitions of a phase are scored in one call, so that the
model can answer them in full batches.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mllm_shap import CoalitionMask, ExplainConfig, PlayerSet, PluginGroup
from mllm_shap.protocols.estimator import TwoPhaseEstimator

from mllm_shapx.errors import RowError
from mllm_shapx.explaining.settings import GameSettings, explain_config, resolve
from mllm_shapx.explaining.standard_errors import standard_errors
from mllm_shapx.explaining.values import Value
from mllm_shapx.planning.runs import MAX_LOG2_COALITIONS, Budget, RunSpec, flat_coalitions, rounds
from mllm_shapx.records.results import Stopped


@dataclass(frozen=True, slots=True)
class GameResult:
    """Values of one game, or of a hierarchy of games, before normalizing."""

    values: tuple[float, ...]
    """One per player of the game; of a hierarchy, one per player of the row."""
    base_value: float
    """v(empty coalition) of the game; of a hierarchy, of its first game."""
    grand_value: float
    """v(all players)."""
    masks: tuple[int, ...]
    """Evaluated coalitions, as masks of the row's players."""
    payoffs: tuple[float, ...] = ()
    """The value of each coalition; none for a hierarchy."""
    standard_errors: tuple[float, ...] | None = None
    """One per player of the game, NaN if unknown; None for an explainer without standard errors."""
    stopped: Stopped | None = None
    """Why sampling ended, None if it spends the whole budget in any case."""
    num_levels: int | None = None
    """Levels of a hierarchy."""


class Game:
    """A game whose players are single players of the row, or groups of them.

    Args:
        run: The run that plays it.
        groups: For each player of the game, the mask of the row's players in it.
        context: The mask of the row's players that are present in every coalition.
        value: Scores coalitions.
    """

    def __init__(self, run: RunSpec, groups: Sequence[int], context: int, value: Value) -> None:
        self._run = run
        self._groups = tuple(groups)
        self._context = context
        self._value = value
        self._everyone = context
        for group in self._groups:
            self._everyone |= group

    async def play(self, settings: GameSettings) -> GameResult:
        """Estimate the values of the game's players.

        With `settings.stop_at`, the result is that of the same game with the budget at which it stopped, and
        no coalition is asked twice: the estimator draws those of a smaller budget first.

        Raises:
            RowError: `too_many_players` when the budget plans more coalitions than the limit.
        """
        count = len(self._groups)
        self._refuse_hopeless(settings, count)
        stop_at = settings.stop_at
        stopped: Stopped | None = None
        budgets: Iterable[Budget] = (settings.budget,)
        if stop_at is not None:
            budgets, stopped = rounds(settings.explainer_type, settings.budget, count), "budget"
        for budget in budgets:
            config = explain_config(self._run, replace(settings, budget=budget), count)
            estimator = resolve(config, PluginGroup.ESTIMATORS, config.explanation.estimator)
            coalitions, payoffs = await self._draw(config, estimator, budget, count)
            value_of = dict(zip((coalition.present for coalition in coalitions), payoffs, strict=True))
            errors = standard_errors(settings.explainer_type, list(value_of), list(value_of.values()))
            if stop_at is not None and errors is not None and all(error <= stop_at for error in errors):
                stopped = "standard_error"
                break
        aggregator = resolve(config, PluginGroup.ESTIMANDS, config.explanation.estimand.value)
        return GameResult(
            values=tuple(estimator.estimate_attributions(coalitions, payoffs, aggregator)),
            base_value=value_of[(False,) * count],
            grand_value=value_of[(True,) * count],
            masks=tuple(self._row_mask(coalition) for coalition in coalitions),
            payoffs=tuple(payoffs),
            standard_errors=errors,
            stopped=stopped,
        )

    async def _draw(
        self, config: ExplainConfig, estimator: Any, budget: Budget, count: int
    ) -> tuple[list[CoalitionMask], list[float]]:
        """Return the coalitions that `estimator` draws, and their values."""
        players = PlayerSet(player_ids=tuple(str(index) for index in range(count)))
        evaluations = budget.evaluations(count)
        share = budget.fraction if evaluations is None else min(1.0, evaluations / (1 << count))
        minimal, seed = config.explanation.include_minimal_masks, config.explanation.seed
        coalitions = _with_boundaries(list(estimator.sample_masks(players, share, minimal, seed)), count)
        payoffs = await self._payoffs(coalitions)
        if isinstance(estimator, TwoPhaseEstimator):
            estimator.begin_allocation(coalitions, payoffs)
            second = list(estimator.sample_allocation_masks())
            if second:
                coalitions.extend(second)
                # Score all coalitions again, so that both phases share one TF-IDF corpus.
                payoffs = await self._payoffs(coalitions)
        return coalitions, payoffs

    async def _payoffs(self, coalitions: Sequence[CoalitionMask]) -> list[float]:
        masks = [self._row_mask(coalition) for coalition in coalitions]
        return await self._value.payoffs(self._everyone, masks)

    def _row_mask(self, coalition: CoalitionMask) -> int:
        mask = self._context
        for present, group in zip(coalition.present, self._groups, strict=True):
            if present:
                mask |= group
        return mask

    def _refuse_hopeless(self, settings: GameSettings, count: int) -> None:
        planned = flat_coalitions(settings.explainer_type, settings.budget, count)
        if math.log2(planned) > MAX_LOG2_COALITIONS:
            raise RowError(
                "too_many_players",
                f"{count} players with explainer {settings.explainer_type!r} plan {planned:,} coalitions, "
                f"more than 2^{MAX_LOG2_COALITIONS}; use a sampling explainer with num_samples or "
                "linear, the hierarchical one, or selection.max_prompt_tokens",
            )


def _with_boundaries(coalitions: list[CoalitionMask], count: int) -> list[CoalitionMask]:
    """Add the grand and the empty coalition if the sampler omits them."""
    present = {coalition.present for coalition in coalitions}
    boundaries = ((True,) * count, (False,) * count)
    return coalitions + [CoalitionMask(each) for each in boundaries if each not in present]

"""One cooperative game: sample coalitions, score them, estimate the players' values.

Sampling and estimation are mllm_shap's plugins. All coalitions of a phase are scored in one call, so that the
model can answer them in full batches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mllm_shap import CoalitionMask, PlayerSet, PluginGroup
from mllm_shap.protocols.estimator import TwoPhaseEstimator

from mllm_shapx.errors import RowError
from mllm_shapx.explaining.settings import GameSettings, explain_config, resolve
from mllm_shapx.explaining.standard_errors import standard_errors
from mllm_shapx.explaining.values import Value
from mllm_shapx.planning.runs import MAX_LOG2_COALITIONS, RunSpec, flat_coalitions


@dataclass(frozen=True, slots=True)
class GameResult:
    """Values of one game, before normalizing."""

    values: tuple[float, ...]
    """One per player of the game."""
    base_value: float
    """v(empty coalition) of the game."""
    grand_value: float
    """v(all players)."""
    masks: tuple[int, ...]
    """Evaluated coalitions, as masks of the row's players."""
    payoffs: tuple[float, ...]
    """The value of each coalition."""
    standard_errors: tuple[float, ...] | None = None
    """One per player of the game; see `standard_errors`."""


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

        Raises:
            RowError: `too_many_players` when the budget plans more coalitions than the limit.
        """
        count = len(self._groups)
        self._refuse_hopeless(settings, count)
        config = explain_config(self._run, settings, count)
        estimator = resolve(config, PluginGroup.ESTIMATORS, config.explanation.estimator)
        aggregator = resolve(config, PluginGroup.ESTIMANDS, config.explanation.estimand.value)
        players = PlayerSet(player_ids=tuple(str(index) for index in range(count)))
        evaluations = settings.budget.evaluations(count)
        share = settings.budget.fraction if evaluations is None else min(1.0, evaluations / (1 << count))
        coalitions = _with_boundaries(
            list(
                estimator.sample_masks(
                    players, share, config.explanation.include_minimal_masks, settings.seed
                )
            ),
            count,
        )
        payoffs = await self._payoffs(coalitions)
        if isinstance(estimator, TwoPhaseEstimator):
            estimator.begin_allocation(coalitions, payoffs)
            second = list(estimator.sample_allocation_masks())
            if second:
                coalitions.extend(second)
                # Score all coalitions again, so that both phases share one TF-IDF corpus.
                payoffs = await self._payoffs(coalitions)
        value_of = dict(zip((coalition.present for coalition in coalitions), payoffs, strict=True))
        return GameResult(
            values=tuple(estimator.estimate_attributions(coalitions, payoffs, aggregator)),
            base_value=value_of[(False,) * count],
            grand_value=value_of[(True,) * count],
            masks=tuple(self._row_mask(coalition) for coalition in coalitions),
            standard_errors=standard_errors(settings.explainer_type, list(value_of), list(value_of.values())),
            payoffs=tuple(payoffs),
        )

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

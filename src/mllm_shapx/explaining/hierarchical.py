"""Hierarchical values: a game of groups first, then a game of the members of each group."""

from collections.abc import Sequence

from mllm_shap import PlayerSet

from mllm_shapx.explaining.games import Game, GameResult
from mllm_shapx.explaining.settings import GameSettings
from mllm_shapx.explaining.values import Value
from mllm_shapx.planning.runs import Budget, HierarchicalSpec, RunSpec


class HierarchicalExplainer:
    """Splits the row's players into groups of neighbours and plays a game at each level.

    A game has at most k players: groups of neighbouring players of one message and modality. A group is
    opened by a game of its members, in which all players outside the group are present. The members' values
    s_i of that game are fitted to the group's share phi: phi_i = s_i + (phi - sum(s)) |s_i| / sum(|s|). They
    sum to phi, and a member without influence keeps 0. Where all s_i are 0, the share is split evenly. A
    group with share 0 is not opened.
    """

    def __init__(self, run: RunSpec, spec: HierarchicalSpec, players: PlayerSet, value: Value) -> None:
        self._run = run
        self._spec = spec
        self._players = players
        self._value = value

    async def explain(self, seed: int) -> GameResult:
        """Play all games. The values sum to the sum of the first game's. A seed gives the same values."""
        count = self._players.num_players
        everyone = (1 << count) - 1
        blocks = message_blocks(self._players)
        top_groups = split(blocks, self._spec.k)
        top = await self._play(
            top_groups, 0, GameSettings(self._spec.first_layer_type, self._spec.first_layer_budget, seed)
        )
        values = [0.0] * count
        masks = dict.fromkeys(top.masks)
        total = sum(abs(value) for value in top.values)
        levels = 1
        pending = [(group, share, 2) for group, share in zip(top_groups, top.values, strict=True)]
        while pending:
            group, share, level = pending.pop(0)
            if len(group) == 1:
                values[group[0]] = share
                continue
            if share == 0.0:
                continue
            levels = max(levels, level)
            members = split([group], self._spec.k)
            budget = self._lower_budget(abs(share) / total)
            settings = GameSettings(self._spec.inner_type, budget, seed + group[0] + level)
            context = everyone & ~_bits(group)
            game = await self._play(members, context, settings)
            masks.update(dict.fromkeys(game.masks))
            fitted = fit_to_share(game.values, share)
            pending.extend((member, value, level + 1) for member, value in zip(members, fitted, strict=True))
        return GameResult(tuple(values), top.base_value, top.grand_value, tuple(masks), num_levels=levels)

    async def _play(
        self, groups: Sequence[Sequence[int]], context: int, settings: GameSettings
    ) -> GameResult:
        game = Game(self._run, [_bits(group) for group in groups], context, self._value)
        return await game.play(settings)

    def _lower_budget(self, share: float) -> Budget:
        budget = self._spec.inner_budget
        if not self._spec.use_importance_sampling or budget.kind == "all" or budget.value == -1:
            return budget
        scale = min(1.0, max(share, self._spec.importance_min_fraction))
        if budget.kind == "num_samples":
            return Budget("num_samples", max(1, int(budget.value * scale)))
        return Budget(budget.kind, max(budget.value * scale, 1e-12))


def message_blocks(players: PlayerSet) -> list[list[int]]:
    """Return the players of each message and modality, in conversation order."""
    blocks: dict[tuple[int, bool], list[int]] = {}
    for index, span in enumerate(players.spans):
        blocks.setdefault((span.message_index, span.samples is not None), []).append(index)
    return list(blocks.values())


def split(blocks: Sequence[Sequence[int]], k: int) -> list[list[int]]:
    """Split blocks of neighbours into groups for a game of at most k players.

    The group size is the smallest power of k that gives at most k groups. With more than k blocks, each block
    is a group, since a group never spans two messages.
    """
    size, longest = 1, max(len(block) for block in blocks)
    while size < longest and sum(-(-len(block) // size) for block in blocks) > k:
        size *= k
    return [list(block[start : start + size]) for block in blocks for start in range(0, len(block), size)]


def fit_to_share(values: Sequence[float], share: float) -> list[float]:
    """Return `values` corrected so that they sum to `share` (see `HierarchicalExplainer`)."""
    weight = sum(abs(value) for value in values)
    if weight == 0.0:
        return [share / len(values)] * len(values)
    rest = share - sum(values)
    return [value + rest * abs(value) / weight for value in values]


def _bits(group: Sequence[int]) -> int:
    mask = 0
    for index in group:
        mask |= 1 << index
    return mask

"""Likelihoods of one row: how probable given texts are after each coalition's prompt."""

from collections.abc import Iterable, Mapping

from mllm_shapx.records.likelihood import Likelihood, LikelihoodKey


class RowLikelihoods:
    """All likelihoods of one row under one generation key."""

    def __init__(self) -> None:
        self.stored: dict[LikelihoodKey, Likelihood] = {}
        self._fresh: dict[LikelihoodKey, Likelihood] = {}

    def know(self, stored: Mapping[LikelihoodKey, Likelihood]) -> None:
        """Add stored likelihoods, so that they are not read again."""
        self.stored.update(stored)

    def knows(self, key: LikelihoodKey, top_k: int) -> bool:
        """Return whether a likelihood with at least the `top_k` most probable tokens is known."""
        found = self.stored.get(key)
        return found is not None and found.top_k >= top_k

    def keep(self, key: LikelihoodKey, likelihood: Likelihood) -> None:
        """Add a new likelihood."""
        self.stored[key] = self._fresh[key] = likelihood

    def read_for(self, run_name: str, masks: Iterable[int]) -> int:
        """Return how many likelihoods after the prompts of `masks` were read for a run."""
        wanted = set(masks)
        return sum(each.asked_by == run_name and mask in wanted for (_, mask), each in self.stored.items())

    def take_fresh(self) -> dict[LikelihoodKey, Likelihood]:
        """Return the new likelihoods since the last call, for the store."""
        fresh, self._fresh = self._fresh, {}
        return fresh

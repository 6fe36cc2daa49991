"""Reads the likelihoods of a row's coalitions with a loaded model."""

import asyncio
from collections.abc import Callable, Sequence

from mllm_shap import ConversationSnapshot

from mllm_shapx.explaining.forcing import KeepLikelihood
from mllm_shapx.models.base import Decoding, Forcing, Likelihood, PromptEngine, ReadsLikelihoods
from mllm_shapx.records.likelihood import Forced


class LikelihoodReader:
    """Reads likelihoods with one engine (see `ReadLikelihoods`). Idle workers do not help.

    Args:
        engine: The model's engine.
        model: The model.
        decoding: How the run's prompts are encoded.
        count: Called once per likelihood that the model has read.
    """

    def __init__(
        self, engine: PromptEngine, model: ReadsLikelihoods, decoding: Decoding, count: Callable[[], None]
    ) -> None:
        self._engine = engine
        self._model = model
        self._decoding = decoding
        self._count = count

    async def __call__(
        self,
        prompts: Sequence[tuple[int, ConversationSnapshot]],
        forced: Sequence[Forced],
        top_k: int,
        keep: KeepLikelihood,
    ) -> None:
        """Read the likelihood of each of `forced` after its prompt, (coalition, prompt)."""
        continuations = await asyncio.to_thread(self._tokens, forced)
        places = [place for place, tokens in enumerate(continuations) if tokens]
        for place, tokens in enumerate(continuations):
            if not tokens:
                keep(place, Likelihood.of_nothing(top_k))

        def take(index: int, likelihood: Likelihood) -> None:
            self._count()
            keep(places[index], likelihood)

        await self._engine.likelihoods(
            Forcing(
                [prompts[place][1] for place in places],
                [continuations[place] for place in places],
                self._decoding,
                top_k,
            ),
            take,
        )

    def _tokens(self, forced: Sequence[Forced]) -> list[tuple[int, ...]]:
        texts = {each: self._model.tokens_of(each) for each in set(forced) if isinstance(each, str)}
        return [texts[each] if isinstance(each, str) else each for each in forced]

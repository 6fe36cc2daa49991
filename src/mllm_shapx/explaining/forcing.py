"""Teacher forcing: gives runs the likelihoods of a row; the model reads each once."""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from mllm_shap import ConversationSnapshot
from mllm_shap.domain.generation import ForcedScore
from mllm_shap.value.teacher_forced import TfJsdOptions
from numpy.typing import NDArray

from mllm_shapx.errors import RowError
from mllm_shapx.explaining.coalitions import RowCoalitions, in_slices
from mllm_shapx.models.base import Answer, Decoding, Forcing, Likelihood, PromptEngine, ReadsLikelihoods
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.records.likelihood import Forced, forced_id

KeepLikelihood = Callable[[int, Likelihood], None]
"""Receives each new likelihood: `(index, likelihood)`."""

_Prompts = Sequence[tuple[int, ConversationSnapshot]]

ReadLikelihoods = Callable[[_Prompts, Sequence[Forced], int, KeepLikelihood], Awaitable[None]]
"""Reads the likelihood of each text (or tokens) after its prompt, given as (coalition, prompt), with
the `top_k` most probable tokens per position, and passes each likelihood to `KeepLikelihood`."""

OwnLogprobs = Callable[[Sequence[int], Sequence[Answer]], Awaitable[list[Answer]]]
"""Adds the log-probabilities of their tokens to coalitions' answers."""

_SLICES_IN_HAND = 4


class Forcer:
    """Gives one run the likelihoods of a row's coalitions; the model reads those that are not stored.

    Args:
        coalitions: The row.
        run_name: The run that asks.
        read: The model.
        least_top_k: Fewest most probable tokens to request, because another run needs them.
    """

    def __init__(
        self, coalitions: RowCoalitions, run_name: str, read: ReadLikelihoods, least_top_k: int = 0
    ) -> None:
        self._coalitions = coalitions
        self._table = coalitions.likelihoods
        self._run_name = run_name
        self._read = read
        self._least_top_k = least_top_k

    async def force(
        self, masks: Sequence[int], answers: Sequence[Answer], top_k: int
    ) -> Iterator[tuple[ForcedScore, ...]]:
        """Return, for each coalition, the likelihood of the text of each answer (see `values.Force`)."""
        texts = [answer.text for answer in answers]
        wanted = [(mask, text) for mask in dict.fromkeys(masks) for text in texts]
        await self._ask(wanted, top_k, max(top_k, self._least_top_k))
        ids, stored = [forced_id(text) for text in texts], self._table.stored
        return (tuple(_score(stored[each, mask], top_k) for each in ids) for mask in masks)

    async def with_logprobs(self, masks: Sequence[int], answers: Sequence[Answer]) -> list[Answer]:
        """Return the coalitions' answers with the log-probabilities of their tokens.

        Answers stored without them are read by the model, each after its own coalition's prompt.

        Raises:
            RowError: `spoken_answer` when such an answer contains speech, which cannot be forced.
        """
        if any(answer.logprobs is None and answer.audio_frames for answer in answers):
            raise RowError(
                "spoken_answer",
                "an answer that was stored without log-probabilities goes over to speech, so that its tokens "
                "cannot be read again; explain the row in an experiment set of its own",
            )
        pairs = list(zip(masks, answers, strict=True))
        lacking = {mask: answer.token_ids for mask, answer in pairs if answer.logprobs is None}
        await self._ask(list(lacking.items()), 0, 0)

        def logprobs(mask: int) -> tuple[float, ...]:
            return tuple(self._table.stored[forced_id(lacking[mask]), mask].logprobs.tolist())

        return [
            replace(answer, logprobs=logprobs(mask)) if mask in lacking else answer for mask, answer in pairs
        ]

    async def _ask(self, wanted: Sequence[tuple[int, Forced]], needed: int, top_k: int) -> None:
        """Read the likelihoods of `wanted`, (coalition, forced text or tokens), that are not stored."""
        identify = functools.cache(forced_id)  # the same text is forced after many prompts
        missing = [
            (mask, forced)
            for mask, forced in wanted
            if not self._table.knows((identify(forced), mask), needed)
        ]

        def render(part: Sequence[tuple[int, Forced]]) -> _Prompts:
            return [(mask, self._coalitions.render(mask)) for mask, _ in part]

        async def read(part: Sequence[tuple[int, Forced]], prompts: _Prompts) -> None:
            def keep(place: int, likelihood: Likelihood) -> None:
                mask, forced = part[place]
                self._table.keep((identify(forced), mask), replace(likelihood, asked_by=self._run_name))

            await self._read(prompts, [forced for _, forced in part], top_k, keep)

        await in_slices(missing, render, read, _SLICES_IN_HAND)


def reader(
    engine: PromptEngine, model: ReadsLikelihoods, decoding: Decoding, count: Callable[[], None]
) -> ReadLikelihoods:
    """Return a function that reads likelihoods with one engine. Idle workers do not help.

    Args:
        engine: The model's engine.
        model: The model.
        decoding: How the run's prompts are encoded.
        count: Called once per likelihood that the model has read.
    """

    def tokens(forced: Sequence[Forced]) -> list[tuple[int, ...]]:
        texts = {each: model.tokens_of(each) for each in set(forced) if isinstance(each, str)}
        return [texts[each] if isinstance(each, str) else each for each in forced]

    async def read(prompts: _Prompts, forced: Sequence[Forced], top_k: int, keep: KeepLikelihood) -> None:
        continuations = await asyncio.to_thread(tokens, forced)
        places = [place for place, given in enumerate(continuations) if given]
        for place, given in enumerate(continuations):
            if not given:
                keep(place, Likelihood.of_nothing(top_k))

        def take(index: int, likelihood: Likelihood) -> None:
            count()
            keep(places[index], likelihood)

        snapshots = [prompts[place][1] for place in places]
        forcing = Forcing(snapshots, [continuations[place] for place in places], decoding, top_k)
        await engine.likelihoods(forcing, take)

    return read


def most_top_k(runs: Iterable[RunSpec]) -> int:
    """Return the largest top-k that a run needs, so that all runs share one reading."""
    options = [run.shap.value_options or {} for run in runs if run.shap.value_function == "tf_jsd"]
    return max((TfJsdOptions.model_validate(each).top_k for each in options), default=0)


def _score(likelihood: Likelihood, top_k: int) -> ForcedScore:
    ids, logprobs = (_rows(each[:, :top_k]) for each in (likelihood.top_ids, likelihood.top_logprobs))
    return ForcedScore(tuple(likelihood.logprobs.tolist()), ids, logprobs)


def _rows(values: NDArray[Any]) -> tuple[tuple[Any, ...], ...]:
    return tuple(map(tuple, values.tolist()))

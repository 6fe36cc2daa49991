"""Teacher forcing: gives runs the likelihoods of a row; the model reads each once."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

from mllm_shap import ConversationSnapshot
from mllm_shap.domain.generation import ForcedScore
from mllm_shap.value.teacher_forced import TfJsdOptions
from numpy.typing import NDArray

from mllm_shapx.errors import RowError, first_of
from mllm_shapx.explaining.coalitions import RowCoalitions
from mllm_shapx.models.base import Answer, Likelihood
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.records.likelihood import Forced, LikelihoodKey, forced_id

KeepLikelihood = Callable[[int, Likelihood], None]
"""Receives each new likelihood: `(index, likelihood)`."""

ReadLikelihoods = Callable[
    [Sequence[tuple[int, ConversationSnapshot]], Sequence[Forced], int, KeepLikelihood], Awaitable[None]
]
"""Reads the likelihood of each text (or tokens) after its prompt, given as (coalition, prompt), with
the `top_k` most probable tokens per position, and passes each likelihood to `KeepLikelihood`."""

_Prompts = Sequence[tuple[int, ConversationSnapshot]]

OwnLogprobs = Callable[[Sequence[int], Sequence[Answer]], Awaitable[list[Answer]]]
"""Adds the log-probabilities of their tokens to coalitions' answers."""

_SLICE = 1 << 10
"""Prompts rendered at a time, while earlier ones are being read."""
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
    ) -> Sequence[tuple[ForcedScore, ...]]:
        """Return, for each coalition, the likelihood of the text of each answer (see `values.Force`)."""
        texts = [answer.text for answer in answers]
        wanted = [(mask, text) for mask in dict.fromkeys(masks) for text in texts]
        await self._ask(wanted, top_k, max(top_k, self._least_top_k))
        return _Scores(self._table.stored, masks, [forced_id(text) for text in texts], top_k)

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
        lacking = {
            mask: answer.token_ids
            for mask, answer in zip(masks, answers, strict=True)
            if answer.logprobs is None
        }
        await self._ask(list(lacking.items()), 0, 0)
        found = []
        for mask, answer in zip(masks, answers, strict=True):
            if mask in lacking:
                likelihood = self._table.stored[forced_id(answer.token_ids), mask]
                answer = replace(answer, logprobs=tuple(likelihood.logprobs.tolist()))  # noqa: PLW2901
            found.append(answer)
        return found

    async def _ask(self, wanted: Sequence[tuple[int, Forced]], needed: int, top_k: int) -> None:
        """Read the likelihoods of `wanted`, (coalition, forced text or tokens), that are not stored."""
        identify = _Identifier()
        missing = [
            (mask, forced)
            for mask, forced in wanted
            if not self._table.knows((identify(forced), mask), needed)
        ]
        room = asyncio.Semaphore(_SLICES_IN_HAND)

        async def read(part: Sequence[tuple[int, Forced]], prompts: _Prompts) -> None:
            def keep(place: int, likelihood: Likelihood) -> None:
                mask, forced = part[place]
                self._table.keep((identify(forced), mask), replace(likelihood, asked_by=self._run_name))

            await self._read(prompts, [forced for _, forced in part], top_k, keep)
            room.release()

        try:
            async with asyncio.TaskGroup() as group:
                for start in range(0, len(missing), _SLICE):
                    await room.acquire()
                    part = missing[start : start + _SLICE]
                    prompts = await asyncio.to_thread(self._prompts, part)
                    group.create_task(read(part, prompts))
        except ExceptionGroup as failures:
            raise first_of(failures) from None

    def _prompts(self, part: Sequence[tuple[int, Forced]]) -> _Prompts:
        return [(mask, self._coalitions.render(mask)) for mask, _ in part]


class _Identifier:
    """Caches `forced_id`: the same text is forced after many prompts."""

    def __init__(self) -> None:
        self._known: dict[Forced, bytes] = {}

    def __call__(self, forced: Forced) -> bytes:
        if forced not in self._known:
            self._known[forced] = forced_id(forced)
        return self._known[forced]


class _Scores(Sequence[tuple[ForcedScore, ...]]):
    """mllm_shap's scores of many coalitions, created on access to save memory."""

    def __init__(
        self,
        stored: Mapping[LikelihoodKey, Likelihood],
        masks: Sequence[int],
        ids: Sequence[bytes],
        top_k: int,
    ) -> None:
        self._stored, self._masks, self._ids, self._top_k = stored, masks, ids, top_k

    def __len__(self) -> int:
        return len(self._masks)

    @overload
    def __getitem__(self, index: int) -> tuple[ForcedScore, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> "_Scores": ...
    def __getitem__(self, index: int | slice) -> "tuple[ForcedScore, ...] | _Scores":
        if isinstance(index, slice):
            return _Scores(self._stored, self._masks[index], self._ids, self._top_k)
        mask = self._masks[index]
        return tuple(_score(self._stored[each, mask], self._top_k) for each in self._ids)


def _score(likelihood: Likelihood, top_k: int) -> ForcedScore:
    ids, logprobs = (_rows(each[:, :top_k]) for each in (likelihood.top_ids, likelihood.top_logprobs))
    return ForcedScore(tuple(likelihood.logprobs.tolist()), ids, logprobs)


def _rows(values: NDArray[Any]) -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(row) for row in values.tolist())


def most_top_k(runs: Iterable[RunSpec]) -> int:
    """Return the largest top-k that a run needs, so that all runs share one reading."""
    options = [run.shap.value_options or {} for run in runs if run.shap.value_function == "tf_jsd"]
    return max((TfJsdOptions.model_validate(each).top_k for each in options), default=0)

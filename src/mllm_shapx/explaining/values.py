"""Builds a run's value function; no other module does.

A value function returns a number for each coalition. It reads `Sources`: answers, their vectors, and the
likelihood of given texts after a coalition's prompt.
"""

import asyncio
import dataclasses
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mllm_shap import GenerationRecord, PluginGroup
from mllm_shap.domain.generation import ForcedScore
from mllm_shap.pipeline.orchestrator import score_coalitions
from mllm_shap.protocols.value import PreparesScores, RequiresTeacherForcing
from mllm_shap.value.generation_records import generation_record_from_text

from mllm_shapx.errors import ModelError
from mllm_shapx.explaining.settings import flat_config, resolve
from mllm_shapx.explaining.similarity import Embedder, Similarity, build_similarity
from mllm_shapx.explaining.value_models import refuse_changed
from mllm_shapx.models.base import Answer
from mllm_shapx.planning.runs import RunSpec

Ask = Callable[[Sequence[int]], Awaitable[list[Answer]]]
"""Gives the answers to coalitions of the row's players (bit i = player i)."""

Force = Callable[[Sequence[int], Sequence[Answer], int], Awaitable[Iterable[tuple[ForcedScore, ...]]]]
"""Returns, for each coalition in order, the likelihood of the text of each answer after its prompt.

The arguments are the coalitions, the answers and the number of next-token candidates per position. A text is
tokenized by itself, as in mllm_shap's own backend.
"""


@dataclass(frozen=True, slots=True)
class Sources:
    """A row's data for a value function."""

    ask: Ask
    embed: Embedder
    force: Force | None = None
    """None if the model cannot score given texts."""


class Value(Protocol):
    """Scores coalitions of one row under one run."""

    async def payoffs(self, everyone: int, coalitions: Sequence[int]) -> list[float]:
        """Return one number per coalition, in order.

        Args:
            everyone: The coalition whose answer is the reference.
            coalitions: All coalitions of the game so far; they form the corpus.
        """


def build_value(run: RunSpec, sources: Sources) -> Value:
    """Return the value function of `run`.

    Args:
        run: Its `shap.value_function` or `shap.similarity` selects the function.
        sources: The function's data.

    Raises:
        ModelError: When the function needs likelihoods and `sources` has none.
        ModelChangedError: When the files of the function's model changed since the study's start.
    """
    if run.value_model is not None:
        refuse_changed(run.value_model)
    if run.shap.value_function is None:
        return _OfAnswers(build_similarity(run.shap.similarity, sources.embed), sources.ask)
    function = resolve(flat_config(run), PluginGroup.VALUE_FNS, run.shap.value_function)
    if not isinstance(function, RequiresTeacherForcing):
        return _OfAnswers(_LibrarySimilarity(function), sources.ask)
    if sources.force is None:
        raise ModelError(
            f'shap.value_function "{run.shap.value_function}" needs the likelihood of a given text, which '
            "is not available for this model; use a value function of answers"
        )
    return _Forced(function, sources.ask, sources.force)


class _OfAnswers:
    """A value function that compares the coalitions' answers with the reference answer."""

    def __init__(self, similarity: Similarity, ask: Ask) -> None:
        self._similarity = similarity
        self._ask = ask

    async def payoffs(self, everyone: int, coalitions: Sequence[int]) -> list[float]:
        """See `Value`."""
        base, *answers = await self._ask([everyone, *coalitions])
        return await self._similarity.score(base, answers)


_one_at_a_time = threading.Lock()
"""Guards the library's models: they are loaded once per process, and fast tokenizers are not thread-safe."""


class _LibrarySimilarity:
    """A value function of mllm_shap that reads answers."""

    def __init__(self, function: Any) -> None:
        self._function = function

    async def score(self, base: Answer, answers: Sequence[Answer]) -> list[float]:
        """See `Similarity`."""
        record, records = record_of(base), [record_of(answer) for answer in answers]
        if isinstance(self._function, PreparesScores):
            await self._function.prepare(record, records)
        # In a thread: an encoder takes seconds, and other rows must not wait.
        return await asyncio.to_thread(self._scored, record, records)

    def _scored(self, base: GenerationRecord, records: Sequence[GenerationRecord]) -> list[float]:
        with _one_at_a_time:
            return score_coalitions(self._function, base, records)


class _Forced:
    """A value function of mllm_shap that reads likelihoods of texts; coalitions are not answered."""

    def __init__(self, function: Any, ask: Ask, force: Force) -> None:
        self._function = function
        self._ask = ask
        self._force = force

    async def payoffs(self, everyone: int, coalitions: Sequence[int]) -> list[float]:
        """See `Value`."""
        (base,) = await self._ask([everyone])
        base_record = record_of(base)
        texts = self._function.forced_continuations(base_record)
        wanted = [Answer(text) for text in texts]
        found = iter(await self._force([everyone, *coalitions], wanted, self._function.forced_top_k))

        def scored() -> list[float]:
            # One at a time: distributions of many coalitions need much memory.
            forced = (dict(zip(texts, scores, strict=True)) for scores in found)
            base = dataclasses.replace(base_record, forced=next(forced))
            records = (GenerationRecord(text="", forced=each) for each in forced)
            return [score_coalitions(self._function, base, [record])[0] for record in records]

        return await asyncio.to_thread(scored)


def record_of(answer: Answer) -> GenerationRecord:
    """Return the record for mllm_shap's value functions.

    Text rows are the hashed whitespace words of the text, as in mllm_shap's own backends; audio rows are the
    frames.
    """
    record = generation_record_from_text(answer.text)
    return dataclasses.replace(record, audio_token_rows=answer.audio_frames, logprobs=answer.logprobs)

"""Explains a work unit: one row by all runs of one generation key, which share answers."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from mllm_shap import ConversationSnapshot

from mllm_shapx.config.models import EmbeddingConfig
from mllm_shapx.data.conversations import Row
from mllm_shapx.data.digests import row_digest
from mllm_shapx.explaining.audio_records import DecodeAudio
from mllm_shapx.explaining.coalitions import Generate, Keep
from mllm_shapx.explaining.forcing import Forcer, most_top_k, reader
from mllm_shapx.explaining.sample import explain_run, open_row
from mllm_shapx.explaining.settings import answer_seed, decoding
from mllm_shapx.explaining.similarity import Embedder, Vector
from mllm_shapx.models.base import Answer, PromptEngine, ReadsLikelihoods
from mllm_shapx.models.encoder import TextEncoder
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.records.results import SampleResult


class RowExplainer:
    """Explains one row by runs of one generation key, one after the other.

    Args:
        row: The row.
        run: Any of the runs.

    Raises:
        RowError: When the row has no players or its recordings cannot be used.
    """

    def __init__(self, row: Row, run: RunSpec) -> None:
        self.coalitions = open_row(row, run)
        self._row = row
        self._digest = row_digest(row)

    @property
    def num_players(self) -> int:
        """Return the players of the row."""
        return self.coalitions.players.num_players

    async def explain(
        self,
        run: RunSpec,
        generate: Generate,
        embed: Embedder,
        decode_audio: DecodeAudio | None = None,
        forcer: Forcer | None = None,
    ) -> SampleResult:
        """Explain the row by `run` and return the sample.

        Args:
            run: A run of the generation key.
            generate: Generates answers that no earlier run needed.
            embed: Embeds answers for the run.
            decode_audio: Decodes a spoken answer, if the model can.
            forcer: Gives likelihoods of texts, if the model can.

        Raises:
            RowError: When this run cannot explain the row.
        """
        sample = await explain_run(
            self._row,
            self.coalitions,
            run,
            generate,
            embed,
            decode_audio=decode_audio,
            force=None if forcer is None else forcer.force,
            own_logprobs=None if forcer is None else forcer.with_logprobs,
        )
        return replace(sample, row_digest=self._digest)


class ModelAnswers:
    """Answers, vectors and likelihoods of a loaded model.

    Args:
        engine: The model's engine.
        encoders: Loaded external encoders; others are loaded once, on demand.
    """

    def __init__(self, engine: PromptEngine, encoders: Mapping[EmbeddingConfig, TextEncoder]) -> None:
        self._engine = engine
        self._encoders = dict(encoders)

    async def answer(
        self, run: RunSpec, row_index: int, prompts: Mapping[int, ConversationSnapshot], keep: Keep
    ) -> None:
        """Answer `prompts` (mask -> prompt) of a row with the decoding of `run`; `keep` gets each answer."""
        masks = list(prompts)
        await self._engine.answer(
            list(prompts.values()),
            decoding(run),
            seeds(run, row_index, masks),
            lambda index, answer: keep(masks[index], answer),
        )

    def embedder(self, run: RunSpec) -> Embedder:
        """Return the run's embedder: the model's own states, or the encoder of the config."""

        async def embed(answers: Sequence[Answer]) -> list[Vector]:
            if run.embedding is None:
                return await self._engine.embed(answers, run.shap.mode, run.shap.reducer)
            if run.embedding not in self._encoders:
                self._encoders[run.embedding] = await asyncio.to_thread(TextEncoder.load, run.embedding)
            texts = [answer.text for answer in answers]
            return await asyncio.to_thread(self._encoders[run.embedding].embed, texts, run.shap.reducer)

        return embed

    def forcer(
        self,
        row: RowExplainer,
        run: RunSpec,
        runs: Iterable[RunSpec],
        on_likelihood: Callable[[], None] = lambda: None,
    ) -> Forcer | None:
        """Return the source of likelihoods of a row's coalitions for `run`; None if the model reads none.

        Args:
            row: The row.
            run: The run that asks.
            runs: All runs of the row: each likelihood is read for all of them.
            on_likelihood: Called for each likelihood that the model reads.
        """
        model = self._engine.model
        if not isinstance(model, ReadsLikelihoods):
            return None
        read = reader(self._engine, model, decoding(run), on_likelihood)
        return Forcer(row.coalitions, run.name, read, most_top_k(runs))


def seeds(run: RunSpec, row_index: int, masks: Iterable[int]) -> list[int]:
    """Return the seed of each coalition's draws; all 0 for greedy decoding, which draws nothing."""
    return [0 if run.generation.is_greedy else answer_seed(run, row_index, mask) for mask in masks]

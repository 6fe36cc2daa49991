"""Batched decoding and teacher forcing for LFM2-Audio; each sequence of a batch has its own modality."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mllm_shapx.models.base import Decoding, Likelihood
from mllm_shapx.models.likelihood import likelihoods
from mllm_shapx.models.liquid_encoding import PrefillBatch
from mllm_shapx.models.plain_generate import token_logprobs
from mllm_shapx.models.sampling import FiniteLogits, Sampler, draws_for

IM_END, AUDIO_START, TEXT_END = 7, 128, 130
"""Text tokens that control generation, as in liquid_audio's code."""
END_OF_AUDIO = 2048
"""Code of the first codebook that ends a run of audio."""

COMPACT_SHARE = 0.125
"""Finished sequences leave the batch when they are at least this share of it."""


@dataclass(slots=True)
class LiquidSequence:
    """One unfinished answer: its tokens and frames so far, and the modality of the next step.

    The rules are those of the package's `generate_sequential` and `generate_interleaved`.
    """

    interleaved: bool
    text_run: int
    """Text tokens before the modality changes; interleaved only."""
    audio_run: int
    """Audio frames before it changes back."""
    steps: list[int | tuple[int, ...]] = field(default_factory=list)
    """Text tokens (numbers) and audio frames (tuples), in the order of generation."""
    logprobs: list[float] = field(default_factory=list)
    """One per text token in `steps`; empty unless requested."""
    in_audio: bool = False
    finished: bool = False
    _left: int = 0
    _text_done: bool = False

    def __post_init__(self) -> None:
        self._left = self.text_run

    def take_text(self, token: int, logprob: float | None) -> None:
        """Add one text token."""
        if self.interleaved:
            self._left -= 1
            if token == IM_END:
                self.finished = True
                return
        self.steps.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if not self.interleaved:
            self.in_audio = token == AUDIO_START
            self.finished = token == IM_END
            return
        self._text_done = self._text_done or token == TEXT_END
        if not self._left or self._text_done:
            self.in_audio = True
            self._left = self.audio_run

    def take_frame(self, frame: tuple[int, ...]) -> None:
        """Add one audio frame."""
        if self.interleaved:
            self._left -= 1
            if not self._left and not self._text_done:
                self.in_audio = False
                self._left = self.text_run
        if frame[0] == END_OF_AUDIO:
            self.in_audio = False
        self.steps.append(frame)


class _Sampling:
    """Chooses text tokens and codes, greedily or by draws, and checks that logits are numbers."""

    def __init__(self, decoding: Decoding) -> None:
        self.text = _sampler(decoding.text_temperature, decoding.text_top_k)
        self.audio = _sampler(decoding.audio_temperature, decoding.audio_top_k)
        self.finite = FiniteLogits()

    def choose(
        self, sampler: Sampler | None, logits: torch.Tensor, draws: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the chosen entries, shaped (rows,), from logits shaped (rows, vocabulary)."""
        self.finite(None, logits)
        return logits.argmax(dim=-1) if sampler is None or draws is None else sampler(logits, draws)


def _sampler(temperature: float | None, top_k: int | None) -> Sampler | None:
    """Return what draws from logits; None for greedy decoding."""
    return Sampler(temperature, top_k) if temperature and temperature > 0 and top_k != 1 else None


class BatchDecoder:
    """Answers prefilled batches."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._codebooks = int(model.codebooks)

    def decode(self, batch: PrefillBatch, decoding: Decoding, seeds: Sequence[int]) -> list[LiquidSequence]:
        """Generate until every sequence has ended or holds `max_new_tokens` steps.

        Raises:
            RowError: When the model's logits are not numbers.
        """
        conf = self._model.conf
        interleaved = decoding.output_modality == "audio"
        everyone = [
            LiquidSequence(interleaved, conf.interleaved_n_text, conf.interleaved_n_audio)
            for _ in batch.lengths
        ]
        state = _BatchState(everyone, batch)
        sampling = _Sampling(decoding)
        draws = self._draws(decoding, seeds, sampling, batch.embeddings.device)
        inputs = batch.embeddings
        for step in range(decoding.max_new_tokens):
            hidden = state.forward(self._model.lfm, inputs)
            inputs = self._advance(
                state.sequences,
                hidden,
                sampling,
                None if draws is None else draws[state.rows, step],
                logprobs=decoding.logprobs,
            )
            if all(sequence.finished for sequence in state.sequences):
                break
            inputs = state.drop_finished(inputs)
        sampling.finite.check()
        return everyone

    def _draws(
        self, decoding: Decoding, seeds: Sequence[int], sampling: _Sampling, device: Any
    ) -> torch.Tensor | None:
        """Return draws shaped (prompts, steps, codebooks); None for greedy decoding."""
        if sampling.text is None and sampling.audio is None:
            return None
        flat = draws_for(seeds, decoding.max_new_tokens * self._codebooks, device)
        return flat.view(len(seeds), decoding.max_new_tokens, self._codebooks)

    def _advance(
        self,
        sequences: Sequence[LiquidSequence],
        hidden: torch.Tensor,
        sampling: _Sampling,
        draws: torch.Tensor | None,
        *,
        logprobs: bool,
    ) -> torch.Tensor:
        """Advance every unfinished sequence by one step; return the next inputs, (rows, 1, hidden)."""
        alive = [row for row, sequence in enumerate(sequences) if not sequence.finished]
        writing = [row for row in alive if not sequences[row].in_audio]
        speaking = [row for row in alive if sequences[row].in_audio]
        inputs = torch.zeros_like(hidden)
        # Queue both modalities on the device before waiting for the first result.
        tokens, frames, scores = inputs.new_empty(0), inputs.new_empty(0), None
        if writing:
            logits = torch.nn.functional.linear(hidden[writing], self._model.lfm.embed_tokens.weight)
            tokens = sampling.choose(sampling.text, logits, None if draws is None else draws[writing, 0])
            inputs[writing] = self._model.lfm.embed_tokens(tokens)
            scores = token_logprobs(logits, tokens) if logprobs else None
        if speaking:
            frames = self._frames(hidden[speaking], sampling, None if draws is None else draws[speaking])
            inputs[speaking] = self._model.audio_embedding(frames + self._model.codebook_offsets).sum(1)
        known = [None] * len(writing) if scores is None else scores.tolist()
        for row, token, score in zip(writing, tokens.tolist(), known, strict=True):
            sequences[row].take_text(token, score)
        for row, frame in zip(speaking, frames.tolist(), strict=True):
            sequences[row].take_frame(tuple(frame))
        return inputs[:, None]

    def _frames(self, hidden: torch.Tensor, sampling: _Sampling, draws: torch.Tensor | None) -> torch.Tensor:
        """Return one audio frame per row, shaped (rows, codebooks), from states shaped (rows, hidden)."""
        model = self._model
        inputs = model.depth_linear(hidden).view(len(hidden), self._codebooks, model.depthformer_dim)
        previous = torch.zeros_like(inputs[:, 0])
        cache = None
        codes = []
        for book in range(self._codebooks):
            output, cache = model.depthformer.forward_cached((inputs[:, book] + previous)[:, None], cache)
            logits = model.depth_embeddings[book].get_logits(output[:, 0])
            code = sampling.choose(sampling.audio, logits, None if draws is None else draws[:, book])
            codes.append(code)
            previous = model.depth_embeddings[book](code)
        frames = torch.stack(codes, dim=1)
        return torch.where(frames[:, :1] == END_OF_AUDIO, END_OF_AUDIO, frames)


class _BatchState:
    """Cache, mask and positions of the sequences in the batch."""

    def __init__(self, sequences: list[LiquidSequence], batch: PrefillBatch) -> None:
        device = batch.embeddings.device
        self.sequences = list(sequences)
        self.rows = torch.arange(len(sequences), device=device)
        """Row of each sequence in the original batch."""
        self._mask = batch.mask()
        self._lengths = torch.tensor(batch.lengths, device=device)
        self._cache: Any = None

    def forward(self, lfm: Any, inputs: torch.Tensor) -> torch.Tensor:
        """Run the backbone; return the last position's states, shaped (rows, hidden)."""
        output = lfm(
            inputs_embeds=inputs,
            attention_mask=self._mask,
            position_ids=self._positions(inputs.shape[1]),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = output.past_key_values
        if self._mask is not None:
            self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        states: torch.Tensor = output.last_hidden_state[:, -1]
        return states

    def drop_finished(self, inputs: torch.Tensor) -> torch.Tensor:
        """Drop finished sequences if they are many (`COMPACT_SHARE`); return the inputs of the others."""
        kept = [row for row, sequence in enumerate(self.sequences) if not sequence.finished]
        if len(self.sequences) - len(kept) < max(1, COMPACT_SHARE * len(self.sequences)):
            return inputs
        index = torch.tensor(kept, device=inputs.device)
        self.sequences = [self.sequences[row] for row in kept]
        self.rows, self._lengths = self.rows[index], self._lengths[index]
        self._mask = None if self._mask is None else self._mask[index]
        self._cache.reorder_cache(index)
        return inputs[index]

    def _positions(self, width: int) -> torch.Tensor:
        """Return the position ids of the next `width` inputs, shaped (rows, width)."""
        if self._cache is None:
            columns = torch.arange(width, device=self._lengths.device)
            return (columns[None] - (width - self._lengths)[:, None]).clamp(min=0)
        positions = self._lengths[:, None]
        self._lengths = self._lengths + 1
        return positions


def read_batch(
    model: Any, batch: PrefillBatch, continuations: Sequence[Sequence[int]], top_k: int
) -> list[Likelihood]:
    """Return the likelihood of `continuations[i]` (text tokens, not empty) after prompt i of the batch.

    Raises:
        RowError: When the model's logits are not numbers.
    """
    table, device = model.lfm.embed_tokens, batch.embeddings.device
    longest = max(map(len, continuations))
    # The last token is not an input. Padding comes after shorter continuations, which never attend to it.
    rows = [[*tokens[:-1], *[0] * (longest - len(tokens))] for tokens in continuations]
    given = table(torch.tensor(rows, dtype=torch.long, device=device))
    width = batch.embeddings.shape[1]
    mask = batch.mask()
    lengths = torch.tensor(batch.lengths, device=device)
    columns = torch.arange(width + longest - 1, device=device)
    output = model.lfm(
        inputs_embeds=torch.cat([batch.embeddings, given], dim=1),
        attention_mask=None if mask is None else torch.nn.functional.pad(mask, (0, longest - 1), value=1),
        position_ids=(columns[None] - (width - lengths)[:, None]).clamp(min=0),
        use_cache=False,
    )
    states = output.last_hidden_state[:, width - 1 :]
    kept = [each[: len(tokens)] for each, tokens in zip(states, continuations, strict=True)]
    return likelihoods(torch.nn.functional.linear(torch.cat(kept), table.weight), continuations, top_k)

"""The `liquid_audio` connector: LFM2-Audio answers spoken and written prompts in batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mllm_shap import ConversationSnapshot
from numpy.typing import NDArray

from mllm_shapx.config.model_settings import ModelSettings
from mllm_shapx.data.hub_access import one_line
from mllm_shapx.errors import ModelError
from mllm_shapx.models.base import (
    Answer,
    Decoding,
    EmbeddingMode,
    Likelihood,
    ModelIdentity,
    ModelReport,
    States,
    Vector,
    pool,
)
from mllm_shapx.models.devices import loaded_identity, memory_errors, own_memory, pick_device, pick_dtype
from mllm_shapx.models.liquid_chat import ChatEncoder, LiquidPrompt
from mllm_shapx.models.liquid_checkpoint import load_checkpoint
from mllm_shapx.models.liquid_decoding import (
    AUDIO_START,
    END_OF_AUDIO,
    IM_END,
    TEXT_END,
    BatchDecoder,
    LiquidSequence,
    read_batch,
)
from mllm_shapx.models.liquid_encoding import PromptEmbedder
from mllm_shapx.models.liquid_waveform import OUTPUT_RATE, FrameDecoder

_STEERING = frozenset({IM_END, AUDIO_START, TEXT_END})


class LiquidAudioModel:
    """LFM2-Audio and its processor in memory.

    Text output follows the package's `generate_sequential`, audio output its `generate_interleaved`. In
    float32 the answers of a batch equal the package's answers to single prompts.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        settings: ModelSettings,
        identity: ModelIdentity,
        device: torch.device,
    ) -> None:
        self.network = model
        """The package's own `LFM2AudioModel`."""
        self.identity = identity
        self.max_batch_size = None if settings.kwargs.batch_size == "auto" else settings.kwargs.batch_size
        self.embedder = PromptEmbedder(model)
        self._device = device
        self._chats = ChatEncoder(processor)
        self._decoder = BatchDecoder(model)
        self._frames = FrameDecoder(processor, device)

    @property
    def report(self) -> ModelReport:
        """Return an empty report: the config decides the answers."""
        return ModelReport()

    def forget_recordings(self) -> None:
        """Drop the cached features and encodings of recordings."""
        self._chats.recordings.clear()
        self.embedder.encoded.clear()

    def encode(self, snapshot: ConversationSnapshot, decoding: Decoding) -> LiquidPrompt:
        """Encode one conversation; see `ChatEncoder.encode`.

        Raises:
            RowError: `bad_audio` when a recording cannot be decoded.
        """
        return self._chats.encode(snapshot, decoding.assistant_prefill)

    def answer(
        self, prompts: Sequence[LiquidPrompt], decoding: Decoding, seeds: Sequence[int]
    ) -> list[Answer]:
        """Answer one batch, in the order of `prompts`.

        Raises:
            OutOfMemory: When the device cannot hold the batch.
        """
        return [
            self._answer(generation, decoding.logprobs)
            for generation in self.generate(prompts, decoding, seeds)
        ]

    def generate(
        self, prompts: Sequence[LiquidPrompt], decoding: Decoding, seeds: Sequence[int]
    ) -> list[LiquidSequence]:
        """Return tokens and frames of the answers, in the order of generation.

        Raises:
            OutOfMemory: When the device cannot hold the batch.
        """
        with torch.inference_mode(), memory_errors(self._device):
            return self._decoder.decode(self.embedder.batch(prompts), decoding, seeds)

    def tokens_of(self, text: str) -> tuple[int, ...]:
        """Return the tokens of `text` alone (see `ReadsLikelihoods`)."""
        return self._chats.tokens_of(text)

    def likelihoods(
        self, prompts: Sequence[LiquidPrompt], continuations: Sequence[Sequence[int]], top_k: int
    ) -> list[Likelihood]:
        """Return the likelihood of `continuations[i]` (text) after prompt i (see `ReadsLikelihoods`)."""
        with torch.inference_mode(), memory_errors(self._device):
            return read_batch(self.network, self.embedder.batch(prompts), continuations, top_k)

    def embed(self, answers: Sequence[Answer], mode: EmbeddingMode, reducer: str) -> list[Vector]:
        """Return one vector per answer (see `Model.embed`); audio frames follow the text tokens."""
        with torch.inference_mode(), memory_errors(self._device):
            return [pool(states, reducer) for states in self._states(answers, mode)]

    def decode_audio(self, answer: Answer) -> tuple[NDArray[np.float32], int] | None:
        """Return the answer's audio as (mono samples in [-1, 1], hertz); None without frames or decoder."""
        wave = self._frames.waveform(answer.audio_frames)
        return None if wave is None else (wave, OUTPUT_RATE)

    def close(self) -> None:
        """Release the weights."""
        self.forget_recordings()
        del self.network, self.embedder, self._decoder, self._frames
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _answer(self, generation: LiquidSequence, logprobs: bool) -> Answer:
        tokens = [step for step in generation.steps if isinstance(step, int)]
        frames = [step for step in generation.steps if isinstance(step, tuple)]
        return Answer(
            text=self._chats.decode([token for token in tokens if token not in _STEERING]).strip(),
            token_ids=tuple(tokens),
            logprobs=tuple(generation.logprobs) if logprobs else None,
            audio_frames=tuple(frame for frame in frames if frame[0] != END_OF_AUDIO),
        )

    def _states(self, answers: Sequence[Answer], mode: EmbeddingMode) -> list[States]:
        """Return each answer's states, (tokens and frames, hidden)."""
        inputs = [self._input_embeddings(answer) for answer in answers]
        if mode == "CONTEXTUAL":
            inputs = self._contextual(inputs)
        return [states.double().cpu().numpy() for states in inputs]

    def _input_embeddings(self, answer: Answer) -> torch.Tensor:
        """Return the answer's input embeddings, shaped (tokens and frames, hidden)."""
        tokens = torch.tensor(answer.token_ids, dtype=torch.long, device=self._device)
        text: torch.Tensor = self.network.lfm.embed_tokens(tokens)
        if not answer.audio_frames:
            return text
        frames = torch.tensor(answer.audio_frames, device=self._device)
        audio = self.network.audio_embedding(frames + self.network.codebook_offsets).sum(1)
        return torch.cat([text, audio])

    def _contextual(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run the backbone over each answer alone. Padding comes after it and is never attended to."""
        filled = [states for states in inputs if len(states)]
        if not filled:
            return inputs
        padded = torch.nn.utils.rnn.pad_sequence(filled, batch_first=True)
        output = iter(self.network.lfm(inputs_embeds=padded, use_cache=False).last_hidden_state)
        return [next(output)[: len(states)] if len(states) else states for states in inputs]


def load(settings: ModelSettings, model_path: Path | None, revision: str | None) -> LiquidAudioModel:
    """Load the model of a run (see `registry.LOADERS`).

    Raises:
        ModelError: When the model cannot be loaded.
        ResourceError: When the machine lacks the device.
    """
    options = settings.kwargs
    device = pick_device(settings.device)
    dtype = pick_dtype(options.dtype, device)
    folder = _download(settings.model_id, revision) if model_path is None else model_path
    model, processor = load_checkpoint(
        folder, dtype=dtype, device=device, attn_implementation=options.attn_implementation or "sdpa"
    )
    own_memory(model)
    identity = loaded_identity(settings, revision, dtype, device)
    return LiquidAudioModel(model, processor, settings, identity, device)


def _download(repo_id: str, revision: str | None) -> Path:
    """Return the folder of a hub commit in the local cache; missing files are downloaded.

    Raises:
        ModelError: When the hub lacks it or is unreachable.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"connector_kwargs.model_id: {repo_id!r} at revision {revision!r} cannot be downloaded: "
            f"{one_line(error)}; check the name and the network, or name a local directory"
        ) from error

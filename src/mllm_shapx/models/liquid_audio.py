"""The `liquid_audio` connector: LFM2-Audio answers spoken and written prompts in batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mllm_shap import ConversationSnapshot
from numpy.typing import NDArray

from mllm_shapx.config.model_settings import ModelSettings
from mllm_shapx.errors import ModelError
from mllm_shapx.models.base import (
    Answer,
    Decoding,
    EmbeddingMode,
    Likelihood,
    ModelIdentity,
    ModelReport,
    pool,
)
from mllm_shapx.models.devices import memory_errors, own_memory, pick_device, pick_dtype
from mllm_shapx.models.liquid_chat import ChatEncoder, LiquidPrompt
from mllm_shapx.models.liquid_checkpoint import LiquidCheckpoint, load_checkpoint
from mllm_shapx.models.liquid_decoding import (
    AUDIO_START,
    END_OF_AUDIO,
    IM_END,
    TEXT_END,
    BatchDecoder,
    Generation,
)
from mllm_shapx.models.liquid_encoding import PromptEmbedder
from mllm_shapx.models.liquid_likelihood import read_batch
from mllm_shapx.models.liquid_waveform import OUTPUT_RATE, FrameDecoder

_STEERING = frozenset({IM_END, AUDIO_START, TEXT_END})


class LiquidAudioModel:
    """LFM2-Audio and its processor in memory.

    Text output follows the package's `generate_sequential`, audio output its `generate_interleaved`. In
    float32 the answers of a batch equal the package's answers to single prompts.
    """

    def __init__(
        self,
        checkpoint: LiquidCheckpoint,
        identity: ModelIdentity,
        device: torch.device,
        *,
        max_batch_size: int | None = None,
    ) -> None:
        self._model = checkpoint.model
        self._identity = identity
        self._device = device
        self._max_batch_size = max_batch_size
        self._chats = ChatEncoder(checkpoint.processor)
        self._embedder = PromptEmbedder(checkpoint.model)
        self._decoder = BatchDecoder(checkpoint.model)
        self._frames = FrameDecoder(checkpoint, device)

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        dtype: str = "auto",
        device: str | None = None,
        attn_implementation: str | None = None,
        max_batch_size: int | None = None,
        model_id: str | None = None,
        revision: str | None = None,
    ) -> "LiquidAudioModel":
        """Load a checkpoint directory.

        Args:
            folder: Directory of the checkpoint.
            dtype: `auto`, `float32`, `bfloat16` or `float16`.
            device: `cuda`, `cuda:1`, `cpu`, `mps`; the best available when None.
            attn_implementation: Attention kernel of the backbone; `sdpa` when None.
            max_batch_size: Prompts per batch; None for `auto`.
            model_id: Name recorded with results; the folder when None.
            revision: Hub commit or digest recorded with results.

        Raises:
            ModelError: When the model cannot be loaded.
            ResourceError: When the machine lacks the device.
        """
        place = pick_device(device)
        weights = pick_dtype(dtype, place)
        checkpoint = load_checkpoint(
            folder, dtype=weights, device=place, attn_implementation=attn_implementation or "sdpa"
        )
        own_memory(checkpoint.model)
        identity = ModelIdentity(
            connector="liquid_audio",
            model_id=model_id or str(folder),
            revision=revision,
            dtype=str(weights).removeprefix("torch."),
            device=str(place),
        )
        return cls(checkpoint, identity, place, max_batch_size=max_batch_size)

    @property
    def identity(self) -> ModelIdentity:
        """Return name, revision, dtype and device of the loaded model."""
        return self._identity

    @property
    def report(self) -> ModelReport:
        """Return an empty report: the config decides the answers."""
        return ModelReport()

    @property
    def max_batch_size(self) -> int | None:
        """Return the configured prompts per batch, None for `auto`."""
        return self._max_batch_size

    @property
    def package_model(self) -> Any:
        """Return the package's own `LFM2AudioModel`."""
        return self._model

    @property
    def recordings_encoded(self) -> int:
        """Return the number of recordings that the audio encoder has encoded."""
        return self._embedder.recordings_encoded

    def forget_recordings(self) -> None:
        """Drop the cached features and encodings of recordings."""
        self._chats.forget_recordings()
        self._embedder.clear()

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
    ) -> list[Generation]:
        """Return tokens and frames of the answers, in the order of generation.

        Raises:
            OutOfMemory: When the device cannot hold the batch.
        """
        with torch.inference_mode(), memory_errors(self._device):
            return self._decoder.decode(self._embedder.batch(prompts), decoding, seeds)

    def tokens_of(self, text: str) -> tuple[int, ...]:
        """Return the tokens of `text` alone (see `ReadsLikelihoods`)."""
        return self._chats.tokens_of(text)

    def likelihoods(
        self, prompts: Sequence[LiquidPrompt], continuations: Sequence[Sequence[int]], top_k: int
    ) -> list[Likelihood]:
        """Return the likelihood of `continuations[i]` (text) after prompt i (see `ReadsLikelihoods`)."""
        with torch.inference_mode(), memory_errors(self._device):
            return read_batch(self._model, self._embedder.batch(prompts), continuations, top_k)

    def embed(
        self, answers: Sequence[Answer], mode: EmbeddingMode, reducer: str
    ) -> list[NDArray[np.float64]]:
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
        del self._model, self._embedder, self._decoder, self._frames
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _answer(self, generation: Generation, logprobs: bool) -> Answer:
        tokens = [step for step in generation.steps if isinstance(step, int)]
        frames = [step for step in generation.steps if isinstance(step, tuple)]
        return Answer(
            text=self._chats.decode([token for token in tokens if token not in _STEERING]).strip(),
            token_ids=tuple(tokens),
            logprobs=tuple(generation.logprobs) if logprobs else None,
            audio_frames=tuple(frame for frame in frames if frame[0] != END_OF_AUDIO),
        )

    def _states(self, answers: Sequence[Answer], mode: EmbeddingMode) -> list[NDArray[np.float64]]:
        """Return each answer's states, (tokens and frames, hidden)."""
        inputs = [self._input_embeddings(answer) for answer in answers]
        if mode == "CONTEXTUAL":
            inputs = self._contextual(inputs)
        return [states.double().cpu().numpy() for states in inputs]

    def _input_embeddings(self, answer: Answer) -> torch.Tensor:
        """Return the answer's input embeddings, shaped (tokens and frames, hidden)."""
        tokens = torch.tensor(answer.token_ids, dtype=torch.long, device=self._device)
        text: torch.Tensor = self._model.lfm.embed_tokens(tokens)
        if not answer.audio_frames:
            return text
        frames = torch.tensor(answer.audio_frames, device=self._device)
        audio = self._model.audio_embedding(frames + self._model.codebook_offsets).sum(1)
        return torch.cat([text, audio])

    def _contextual(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run the backbone over each answer alone. Padding comes after it and is never attended to."""
        filled = [states for states in inputs if len(states)]
        if not filled:
            return inputs
        padded = torch.nn.utils.rnn.pad_sequence(filled, batch_first=True)
        output = iter(self._model.lfm(inputs_embeds=padded, use_cache=False).last_hidden_state)
        return [next(output)[: len(states)] if len(states) else states for states in inputs]


def load(settings: ModelSettings, model_path: Path | None, revision: str | None) -> LiquidAudioModel:
    """Load the model of a run (see `registry.LOADERS`)."""
    options = settings.kwargs
    return LiquidAudioModel.load(
        _download(settings.model_id, revision) if model_path is None else model_path,
        dtype=options.dtype,
        device=settings.device,
        attn_implementation=options.attn_implementation,
        max_batch_size=None if options.batch_size == "auto" else options.batch_size,
        model_id=settings.model_id,
        revision=revision,
    )


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
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"connector_kwargs.model_id: {repo_id!r} at revision {revision!r} cannot be downloaded: "
            f"{reason}; check the name and the network, or name a local directory"
        ) from error

"""The `openai` connector: a text model behind an OpenAI-compatible server."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mllm_shap import ConversationSnapshot
from mllm_shap.backends._chat import snapshot_has_audio, snapshot_to_chat_messages
from numpy.typing import NDArray

from mllm_shapx.config.model_settings import ModelSettings
from mllm_shapx.config.servers import CONNECTOR
from mllm_shapx.errors import ModelError, RowError
from mllm_shapx.models.base import Answer, Decoding, EmbeddingMode, ModelIdentity, ModelReport
from mllm_shapx.models.server_client import Messages, Reply, ServerClient, Service, Setback

SERVER = "server"
"""Stands for the device and the dtype, which are the server's."""


@dataclass(frozen=True, slots=True)
class ServerPrompt:
    """A conversation as the server gets it."""

    messages: Messages

    @property
    def length(self) -> int:
        """Return its characters; its tokens are the server's to know."""
        return sum(len(message["content"]) for message in self.messages)

    @property
    def order(self) -> tuple[str, ...]:
        """Return what to sort prompts by so that those with the same beginning come together."""
        return tuple(message["content"] for message in self.messages)


class ServerModel:
    """A model behind a server. `server_engine.ServerEngine` sends its prompts.

    Args:
        settings: Says where the server is, which model is asked for and how.
        service: The same with the secrets of this process.
        commit: What `server_identity.ServedModel.commit` was when the study began.
    """

    def __init__(self, settings: ModelSettings, service: Service, commit: str) -> None:
        self.settings = settings
        self.service = service
        self._identity = ModelIdentity(CONNECTOR, settings.model_id, commit, dtype=SERVER, device=SERVER)
        self._notes: dict[str, None] = {}
        self._name: str | None = None
        self._fingerprint: str | None = None

    @property
    def identity(self) -> ModelIdentity:
        """Return what is asked; its dtype and device are unknown."""
        return self._identity

    @property
    def report(self) -> ModelReport:
        """Return what answers were unusual, and what the server says of itself."""
        settings = {
            "base_url": self.service.base_url,
            "model": self._name,
            "system_fingerprint": self._fingerprint,
        }
        return ModelReport(tuple(self._notes), {} if self._name is None else {"server": settings})

    @property
    def max_batch_size(self) -> int | None:
        """Return 1: every prompt is a request."""
        return 1

    def encode(self, snapshot: ConversationSnapshot, decoding: Decoding) -> ServerPrompt:  # noqa: ARG002
        """Return a conversation's messages; the server's chat template makes tokens of them.

        Raises:
            RowError: When it holds audio.
        """
        if snapshot_has_audio(snapshot):
            raise RowError(
                "audio_input", "connector 'openai' takes text only, and this conversation holds audio"
            )
        return ServerPrompt(tuple(snapshot_to_chat_messages(snapshot)))

    def answer(
        self, prompts: Sequence[ServerPrompt], decoding: Decoding, seeds: Sequence[int]
    ) -> list[Answer]:
        """Ask one prompt after the other, each once.

        Raises:
            ModelError: When the server does not answer.
        """
        return asyncio.run(self._answers(prompts, decoding, seeds))

    async def _answers(
        self, prompts: Sequence[ServerPrompt], decoding: Decoding, seeds: Sequence[int]
    ) -> list[Answer]:
        client = ServerClient(self.service)
        try:
            return [
                (await client.ask(prompt.messages, decoding, seed)).answer
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
        except Setback as setback:
            raise ModelError(f"the server at {self.service.base_url}: {setback.why}") from None
        finally:
            await client.aclose()

    def embed(
        self,
        answers: Sequence[Answer],  # noqa: ARG002
        mode: EmbeddingMode,  # noqa: ARG002
        reducer: str,  # noqa: ARG002
    ) -> list[NDArray[np.float64]]:
        """Refuse: a server gives no states.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            "connector 'openai' gives no states to embed answers with; name an encoder in embedding.model_id"
        )

    def count(self, reply: Reply) -> None:
        """Take note of an answer that came."""
        self._name, self._fingerprint = reply.model, reply.fingerprint
        if reply.answer.ending is not None:
            self._notes[_ENDINGS[reply.answer.ending]] = None

    def close(self) -> None:
        """Do nothing: the connections are the engine's."""


_MARKED = "the store of answers marks them in the column `ending`"
_ENDINGS = {
    "refusal": f"some answers are refusals, scored by the server's words of refusal; {_MARKED}",
    "content_filter": f"some answers were cut by the server's content filter, scored as they came; {_MARKED}",
    "empty": f"some answers are empty, and are scored as such; {_MARKED}",
}


def load(settings: ModelSettings, model_path: Path | None, revision: str | None) -> ServerModel:  # noqa: ARG001
    """Return the model of a study (see `registry.LOADERS`); asks the server nothing."""
    return ServerModel(settings, Service.of(settings), revision or "")

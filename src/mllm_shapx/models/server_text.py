"""The `openai` connector: a text model behind an OpenAI-compatible server."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mllm_shap import ConversationSnapshot
from mllm_shap.backends._chat import snapshot_has_audio, snapshot_to_chat_messages

from mllm_shapx.config.model_settings import ModelSettings
from mllm_shapx.config.servers import CONNECTOR
from mllm_shapx.errors import ModelError, RowError
from mllm_shapx.models.base import Answer, Decoding, EmbeddingMode, ModelIdentity, ModelReport, Vector
from mllm_shapx.models.server_client import Messages, Reply, ServerClient, Service, Setback
from mllm_shapx.models.server_identity import with_listed_name
from mllm_shapx.models.server_process import START_S, OwnServer

SERVER = "server"
"""Recorded as device and dtype, which only the server knows."""


@dataclass(frozen=True, slots=True)
class ServerPrompt:
    """A conversation as the server gets it."""

    messages: Messages

    @property
    def length(self) -> int:
        """Return the number of characters; only the server knows the tokens."""
        return sum(len(message["content"]) for message in self.messages)

    @property
    def size(self) -> int:
        """Return its bytes in UTF-8, which no tokenizer makes more tokens of."""
        return sum(len(message["content"].encode(errors="replace")) for message in self.messages)


class ServerModel:
    """A model behind a server. `server_engine.ServerEngine` sends its prompts.

    Args:
        service: The server and how it is asked, with the secrets of this process.
        commit: What `server_identity.ServedModel.commit` was when the study began.
        server: The server, where this process started it; the model ends it.
    """

    max_batch_size = 1
    """Every prompt is a request."""

    def __init__(self, service: Service, commit: str, server: OwnServer | None = None) -> None:
        self.server = server
        self.service = service
        name = service.settings.model_id
        self.identity = ModelIdentity(CONNECTOR, name, commit, dtype=SERVER, device=SERVER)
        self._notes: dict[str, None] = {}
        self._name: str | None = None
        self._fingerprint: str | None = None

    @property
    def report(self) -> ModelReport:
        """Return notes on unusual answers, and the server's name and fingerprint of its model."""
        settings = {
            "base_url": self.service.base_url,
            "model": self._name,
            "system_fingerprint": self._fingerprint,
        }
        return ModelReport(tuple(self._notes), {} if self._name is None else {"server": settings})

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

        async def ask() -> list[Answer]:
            async with ServerClient(self.service) as client:
                pairs = zip(prompts, seeds, strict=True)
                return [(await client.ask(each.messages, decoding, seed)).answer for each, seed in pairs]

        try:
            return asyncio.run(ask())
        except Setback as setback:
            raise ModelError(f"the server at {self.service.base_url}: {setback.why}") from None

    def embed(
        self,
        answers: Sequence[Answer],  # noqa: ARG002
        mode: EmbeddingMode,  # noqa: ARG002
        reducer: str,  # noqa: ARG002
    ) -> list[Vector]:
        """Refuse: a server gives no states.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            "connector 'openai' gives no states to embed answers with; name an encoder in embedding.model_id"
        )

    def begin(self) -> None:
        """Forget the notes on the answers of an earlier engine, which belong to another study."""
        self._notes.clear()

    def count(self, reply: Reply) -> None:
        """Record an answer: the model's name, the fingerprint, an unusual end, missing counts of tokens."""
        self._name, self._fingerprint = reply.model, reply.fingerprint
        if reply.answer.ending is not None:
            self._notes[_ENDINGS[reply.answer.ending]] = None
        if reply.answer.tokens_in is None or reply.answer.tokens_out is None:
            self._notes[_NO_COUNT] = None

    def close(self) -> None:
        """End the server, where this process started it; the connections are the engine's."""
        if self.server is not None:
            self.server.close()


_NO_COUNT = (
    "the server gives no count of tokens (`usage`) with some answers: the sums of tokens leave them out, and "
    "--max-tokens takes them to cost as much as they may"
)
_MARKED = "the store of answers marks them in the column `ending`"
_ENDINGS = {
    "refusal": f"some answers are refusals, scored by the server's words of refusal; {_MARKED}",
    "content_filter": f"some answers were cut by the server's content filter, scored as they came; {_MARKED}",
    "empty": f"some answers are empty, and are scored as such; {_MARKED}",
}


def load(settings: ModelSettings, model_path: Path | None, revision: str | None) -> ServerModel:
    """Return the model of a study (see `registry.LOADERS`); start its server where the config says so."""
    own = settings.kwargs.server
    if own is None:
        return ServerModel(Service.of(settings), revision or "")
    name = settings.model_id if model_path is None else str(model_path)
    server = OwnServer(own.command, name, own.start_s or START_S)
    try:
        service = Service.of(settings, server.base_url, name)
        return ServerModel(asyncio.run(with_listed_name(service)), revision or "", server)
    except BaseException:
        server.close()
        raise

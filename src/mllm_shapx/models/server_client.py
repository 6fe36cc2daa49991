"""Sends one request to an OpenAI-compatible server and turns failures into clear errors."""

import asyncio
import math
import os
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Literal, NoReturn, Self

import httpx

from mllm_shapx.config.model_settings import ModelSettings
from mllm_shapx.errors import ModelError, RowError, ServerError
from mllm_shapx.models.base import Answer, Decoding, Ending
from mllm_shapx.models.reasoning import cut_reasoning
from mllm_shapx.plaintext import printable

MAX_CONCURRENCY = 256
TIMEOUT_S = 300.0
CONNECT_S = 10.0
NEWER_LIMIT = "max_completion_tokens"
"""What some services call `max_tokens`; they say so when they refuse that."""
_LONGEST_WORDS = 300
_SEEDS = 1 << 31
_BUSY = frozenset({429, 503})
_REFUSED = frozenset({400, 413, 422})
_TRY_AGAIN = frozenset({408, 409, 425})

Messages = tuple[dict[str, str], ...]


class Setback(Exception):  # noqa: N818 -- a condition that the engine handles
    """A request that got no answer and may be sent again.

    Args:
        why: What happened, for messages.
        kind: `away` without a connection, or when it broke; `busy` when the server says that it takes no
            requests now; `late` when no answer came in time, because of an overload or of the prompt;
            `failed` for everything else.
        wait_s: Seconds of the header Retry-After, which hold for all requests.
    """

    def __init__(
        self,
        why: str,
        kind: Literal["away", "busy", "late", "failed"] = "failed",
        wait_s: float | None = None,
    ) -> None:
        self.why, self.kind, self.wait_s = why, kind, wait_s
        super().__init__(why)


@dataclass(frozen=True, slots=True)
class Reply:
    """A chat completion."""

    answer: Answer
    model: str | None
    """Name of the model as the server gives it."""
    fingerprint: str | None


@dataclass(frozen=True)
class Service:
    """A server's address, its model and the request settings. Its repr shows no secrets."""

    settings: ModelSettings
    base_url: str
    model: str
    headers: Mapping[str, str] = field(repr=False)
    """HTTP headers, secrets among them."""

    @classmethod
    def of(cls, settings: ModelSettings, base_url: str | None = None, model: str | None = None) -> "Service":
        """Return the service of a study, with the secrets of this process's environment.

        `base_url` and `model` replace the config's for a server that was started for this worker.

        Raises:
            ModelError: When a variable is not set.
        """
        kwargs = settings.kwargs
        headers = {
            header: _secret("headers_env", variable)
            for header, variable in (kwargs.headers_env or {}).items()
        }
        if kwargs.api_key_env is not None:
            headers["Authorization"] = f"Bearer {_secret('api_key_env', kwargs.api_key_env)}"
        return cls(settings, base_url or kwargs.base_url or "", model or settings.model_id, headers)

    @property
    def max_concurrency(self) -> int:
        """Return the most requests in flight."""
        return self.settings.kwargs.max_concurrency or MAX_CONCURRENCY

    @property
    def timeout_s(self) -> float:
        """Return the seconds that one answer may take."""
        return self.settings.kwargs.timeout_s or TIMEOUT_S

    @property
    def root(self) -> str:
        """Return the address without `/v1`."""
        return self.base_url.removesuffix("/v1")

    def without_secrets(self, text: str) -> str:
        """Return a server's message as one line, with secrets masked."""
        for value in self.headers.values():
            for secret in {value, value.removeprefix("Bearer ")}:
                text = text.replace(secret, "***")
        text = " ".join(printable(text).split())
        return text if len(text) <= _LONGEST_WORDS else f"{text[:_LONGEST_WORDS]}…"


def _secret(key: str, variable: str) -> str:
    value = os.environ.get(variable, "").strip()
    if not value:
        raise ModelError(
            f"connector_kwargs.{key}: the environment variable {variable} is not set here; export it before "
            "the call, and on a cluster before `ray start` of every node"
        )
    if not value.isascii() or not value.isprintable():
        raise ModelError(f"connector_kwargs.{key}: the value of {variable} can be no HTTP header")
    return value


class ServerClient:
    """Sends requests. For one event loop; a context manager, or closed with `aclose`."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._limit_key = "max_tokens"
        self._client = httpx.AsyncClient(
            headers=dict(service.headers),
            timeout=httpx.Timeout(service.timeout_s, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=service.max_concurrency),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def ask(self, messages: Messages, decoding: Decoding, seed: int) -> Reply:
        """Return the server's answer to a conversation.

        Raises:
            Setback: When the request may be sent again.
            RowError: When the server does not take this conversation.
            ServerError: When it takes none.
        """
        body = request_body(self.service, messages, decoding, seed, limit_key=self._limit_key)
        try:
            response = await self._send("POST", f"{self.service.base_url}/chat/completions", body)
        except RowError as error:
            if self._limit_key == NEWER_LIMIT or NEWER_LIMIT not in str(error):
                raise
            self._limit_key = NEWER_LIMIT
            return await self.ask(messages, decoding, seed)
        return self._reply(_json(response))

    async def get(self, url: str) -> Any:
        """Return the JSON data at an address of the server.

        Raises:
            Setback, ServerError: As `ask`.
        """
        return _json(await self._send("GET", url))

    async def _send(self, method: str, url: str, body: Any = None) -> httpx.Response:
        try:
            async with asyncio.timeout(self.service.timeout_s + CONNECT_S):
                response = await self._client.request(method, url, json=body)
        except httpx.ConnectTimeout:
            raise Setback("it cannot be reached (no connection in time)", "away") from None
        except (TimeoutError, httpx.TimeoutException):
            raise Setback(f"it gave no answer within {self.service.timeout_s:g} s", "late") from None
        except httpx.ConnectError as error:
            if _is_certificate(error):
                self._stop(f"its certificate is not accepted: {error}")
            raise Setback(f"it cannot be reached ({self._words(error)})", "away") from None
        except httpx.TransportError as error:
            raise Setback(f"the connection broke ({self._words(error)})", "away") from None
        except httpx.DecodingError as error:
            raise Setback(f"its answer cannot be decoded ({self._words(error)})") from None
        self._check_status(response)
        return response

    def _check_status(self, response: httpx.Response) -> None:
        status = response.status_code
        if status == httpx.codes.OK:
            return
        said = f"HTTP {status}"
        if words := self.service.without_secrets(_error_words(response)):
            said += f": {words}"
        if status in _BUSY:
            raise Setback(f"it is busy ({said})", "busy", _wait_s(response))
        if status >= httpx.codes.INTERNAL_SERVER_ERROR or status in _TRY_AGAIN:
            raise Setback(f"it failed ({said})", wait_s=_wait_s(response))
        if status in _REFUSED:
            raise RowError("prompt_refused", f"the server refused the prompt ({said})")
        if status in {401, 403}:
            variable = self.service.settings.kwargs.api_key_env
            fix = f"look at the key in {variable}" if variable else "name its variable in api_key_env"
            self._stop(f"it does not let this key in ({said}); {fix}")
        self._stop(f"it does not answer there ({said}); look at base_url and model_id")

    def _stop(self, why: str) -> NoReturn:
        raise ServerError(f"the server at {self.service.base_url}: {why}")

    def _words(self, error: Exception) -> str:
        return self.service.without_secrets(str(error)) or type(error).__name__

    def _reply(self, data: Any) -> Reply:
        if isinstance(data, dict) and data.get("error"):
            words = self.service.without_secrets(_words_of(data["error"]))
            raise Setback(f"it failed (HTTP 200 with the error: {words})")
        try:
            return parse_reply(data, strip_reasoning=self.service.settings.kwargs.strip_reasoning)
        except (KeyError, IndexError, TypeError, ValueError):
            raise Setback("its answer is no chat completion") from None


def request_body(
    service: Service, messages: Messages, decoding: Decoding, seed: int, *, limit_key: str = "max_tokens"
) -> dict[str, Any]:
    """Return the body of a request; `seed` is sent modulo 2^31, which every server takes.

    `limit_key` is the name of the limit of new tokens: some services take `max_completion_tokens` only.
    """
    body: dict[str, Any] = {
        **(service.settings.kwargs.extra_body or {}),
        "model": service.model,
        "messages": list(messages),
        "temperature": decoding.text_temperature,
        limit_key: decoding.max_new_tokens,
        "seed": seed % _SEEDS,
        "stream": False,
    }
    if decoding.text_top_k is not None and decoding.text_temperature > 0:
        body["top_k"] = decoding.text_top_k
    if decoding.logprobs:
        body["logprobs"] = True
    return body


def parse_reply(data: Any, *, strip_reasoning: bool = False) -> Reply:
    """Return what a chat completion says.

    A refusal's own words are its text. Reasoning that the server sends apart is kept apart.

    Raises:
        KeyError, IndexError, TypeError, ValueError: When it is no chat completion.
    """
    choice = data["choices"][0]
    message = choice["message"]
    content, refusal = message.get("content"), message.get("refusal")
    text = _text(content) or _text(refusal)
    if strip_reasoning:
        text = cut_reasoning(text)
    text = text.strip()
    ending: Ending | None = None
    if refusal or choice.get("finish_reason") == "content_filter":
        ending = "refusal" if refusal else "content_filter"
    elif not text:
        ending = "empty"
    found = (choice.get("logprobs") or {}).get("content") or None
    logprobs = None if found is None else tuple(float(token["logprob"]) for token in found)
    reasoning = _text(message.get("reasoning_content") or message.get("reasoning"))
    usage = data.get("usage")
    return Reply(
        Answer(
            text,
            logprobs=logprobs,
            ending=ending,
            reasoning=reasoning,
            tokens_in=_tokens(usage, "prompt_tokens"),
            tokens_out=_tokens(usage, "completion_tokens"),
        ),
        _name(data.get("model")),
        _name(data.get("system_fingerprint")),
    )


def _text(content: Any) -> str:
    """Return text that is given whole or in parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(str(part["text"]) for part in content if part.get("type", "text") == "text")


def _tokens(usage: Any, key: str) -> int | None:
    """Return a count of tokens; anything else is ignored, since the answer is usable."""
    value = usage.get(key) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _name(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError
    return value or None


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        raise Setback("its answer is no JSON, or a part of it") from None


def _error_words(response: httpx.Response) -> str:
    try:
        data = response.json()
    except ValueError:
        return response.text[: 4 * _LONGEST_WORDS]
    return _words_of(data.get("error", data) if isinstance(data, dict) else data)


def _words_of(error: Any) -> str:
    """Return the message of an error as servers send it."""
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    return str(error)


def _wait_s(response: httpx.Response) -> float | None:
    """Return the seconds of Retry-After, a number or a date; None without it.

    A date is compared with the answer's own, since the server's clock may differ from this one.
    """
    value = response.headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        until = _timestamp(value)
        if until is None:
            return None
        seconds = until - (_timestamp(response.headers.get("date", "")) or time.time())
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _timestamp(date: str) -> float | None:
    try:
        return parsedate_to_datetime(date).timestamp()
    except ValueError:
        return None


def _is_certificate(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False

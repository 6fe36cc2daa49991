"""Identifies the model behind a server, from what the server says about it."""

import asyncio
import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

from mllm_shapx.config.model_settings import ModelSettings
from mllm_shapx.errors import ModelError, RowError, ServerAwayError, ServerError
from mllm_shapx.models.base import Decoding
from mllm_shapx.models.server_client import Messages, Reply, ServerClient, Service, Setback

TRIES = 4
PAUSE_S = 1.0
"""Between two tries of the first questions; Retry-After may make it longer, up to `LONGEST_PAUSE_S`."""
LONGEST_PAUSE_S = 30.0
RETRY_S = 0.1
_SAYS_WHICH = ("id", "owned_by", "root", "parent", "meta", "quantization", "arch")
"""Fields of an entry of /models that only change with the model."""
_LISTED = 8
_HELLO = {"role": "user", "content": "Hello"}


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a server says about its model."""

    model: str | None
    """Name in its answers."""
    fingerprint: str | None
    """`system_fingerprint` of its answers."""
    version: str | None
    """Version of the server, where it gives one."""
    entry: str | None
    """Its entry in the server's list of models, as JSON."""
    gives_logprobs: bool = False
    """Whether answers come with log-probabilities on request; no part of the version."""

    @property
    def commit(self) -> str:
        """Return the model's version for specs and the store's keys."""
        told = json.dumps(list(self.told.values()))
        return f"server-{hashlib.sha256(told.encode()).hexdigest()[:32]}"

    def difference(self, now: "ServedModel") -> str:
        """Return how `now` differs from this model, as text; empty when it does not."""
        changed = [
            f"{name} was {old!r} and is {now.told[name]!r}"
            for name, old in self.told.items()
            if old != now.told[name]
        ]
        return ", ".join(changed)

    @property
    def told(self) -> dict[str, str | None]:
        """Return what tells versions of a model apart, each under its name."""
        return {
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "version": self.version,
            "entry in /models": self.entry,
        }


def served_model(settings: ModelSettings) -> ServedModel:
    """Ask the server which model it has, by its list and one answer of one token.

    Raises:
        ModelError: When it cannot be reached, does not have the model or does not take the study's requests.
    """
    return asyncio.run(_served_model(Service.of(settings)))


async def _served_model(service: Service) -> ServedModel:
    attempt = 0
    async with ServerClient(service) as client:
        while True:
            attempt += 1
            try:
                return await look(client)
            except ServerError as error:
                raise ModelError(str(error)) from error
            except Setback as setback:
                if attempt == TRIES or (setback.wait_s or 0) > LONGEST_PAUSE_S:
                    kind = ServerAwayError if setback.kind == "away" else ModelError
                    raise kind(
                        f"connector_kwargs.base_url: the server at {service.base_url}: {setback.why}; start "
                        "it, or look at the address"
                    ) from None
                await asyncio.sleep(setback.wait_s or PAUSE_S * attempt / 2)


async def look(client: ServerClient) -> ServedModel:
    """Return which model the server has.

    Raises:
        Setback: When it may be asked again.
        ModelError: When it does not have the model or does not take the study's requests.
        ServerError: When it takes no request.
    """
    service = client.service
    entries = await _entries(client)
    try:
        reply = await _first_reply(client)
    except RowError as error:
        message = f"the server at {service.base_url} does not take the study's requests: {error}"
        raise ModelError(message) from None
    except ServerError as error:
        if entries and service.model not in entries:
            raise ModelError(f"{error}. {_not_there(service, list(entries))}") from None
        raise
    check_name(service, reply, list(entries))
    entry = entries.get(service.model)
    gives_logprobs = reply.answer.logprobs is not None
    return ServedModel(reply.model, reply.fingerprint, await _version(client), entry, gives_logprobs)


async def _first_reply(client: ServerClient) -> Reply:
    """Ask for one token, with its log-probability where the server takes such a request.

    Raises:
        Setback, RowError, ServerError: As `ServerClient.ask`.
    """
    settings = client.service.settings
    system = settings.chat.system_prompt
    opening: Messages = ({"role": "system", "content": system},) if system else ()
    question = (*opening, _HELLO)
    decoding = Decoding(1, settings.generation.text_temperature)
    try:
        return await client.ask(question, replace(decoding, logprobs=True), 0)
    except (RowError, ServerError):
        pass
    except Setback as setback:
        await _wait_after(setback)
    return await client.ask(question, decoding, 0)


async def with_listed_name(service: Service) -> Service:
    """Return the service with the name that a server gives its one model, where it does not know ours."""
    async with ServerClient(service) as client:
        try:
            await client.ask((_HELLO,), Decoding(1), 0)
        except (Setback, RowError):
            return service
        except ServerError:
            entries = await _entries(client)
            return replace(service, model=next(iter(entries))) if len(entries) == 1 else service
    return service


def check_name(service: Service, reply: Reply, listed: list[str]) -> None:
    """Check that a server answers with the model that was asked for.

    A more exact name of the same model (`gpt-4o-2024-08-06` for `gpt-4o`, a path for its last part) is right.

    Raises:
        ModelError: When it is another model's name.
    """
    if reply.model is None:
        return
    asked, given = service.model.lower(), reply.model.lower()
    if asked not in given and given not in asked:
        raise ModelError(
            f"connector_kwargs.model_id: the server at {service.base_url} was asked for {service.model!r} "
            f"and answers as {reply.model!r}; {_not_there(service, listed) if listed else 'name that'}"
        )


def _not_there(service: Service, names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
    return f"{service.base_url}/models lists: {shown}"


async def _entries(client: ServerClient) -> dict[str, str]:
    """Return name -> the stable fields of its entry in the server's list of models, as JSON."""
    data = await _told(client, f"{client.service.base_url}/models")
    found = data.get("data") if isinstance(data, dict) else None
    entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    stable = [{key: entry[key] for key in _SAYS_WHICH if key in entry} for entry in entries]
    return {str(entry.get("id")): json.dumps(entry, sort_keys=True) for entry in stable}


async def _told(client: ServerClient, url: str) -> Any:
    """Return the JSON data of an address that a server need not have, None where it has not.

    Raises:
        Setback: When the server is away or busy.
    """
    for _ in range(TRIES):
        try:
            return await client.get(url)
        except (ServerError, RowError):
            return None
        except Setback as setback:
            await _wait_after(setback)
    return None


async def _wait_after(setback: Setback) -> None:
    """Wait until the server may be asked again.

    Raises:
        Setback: When it is away or busy, or wants a long pause: all requests are to wait for it.
    """
    if setback.kind != "failed" or (setback.wait_s or 0.0) > LONGEST_PAUSE_S:
        raise setback
    await asyncio.sleep(setback.wait_s or RETRY_S)


async def _version(client: ServerClient) -> str | None:
    """Return the server's version (vLLM and others give one at /version), None where it gives none."""
    data = await _told(client, f"{client.service.root}/version")
    version = data.get("version") if isinstance(data, dict) else None
    return version if isinstance(version, str) else None

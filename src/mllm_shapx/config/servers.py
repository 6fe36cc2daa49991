"""A config's keys for a model behind a server: older names, addresses, no secrets.

The functions that take a value return it, or raise a ValueError with the reason.
"""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from mllm_shapx.config.blocks import wrong_key
from mllm_shapx.config.findings import walk

CONNECTOR = "openai"
CONNECTOR_ALIASES = {"openai_compat_text": CONNECTOR, "lm_studio_text": CONNECTOR}
"""Older name of a connector -> its current name."""
LM_STUDIO_URL = "http://localhost:1234/v1"
"""LM Studio's default address."""
OLD_KEYS = ("chat_model", "lm_studio")
SECRET_KEYS = ("api_key", "api_token", "token", "authorization", "headers", "password")
"""Keys that users write secrets under; none of them is a config key."""

_OURS = frozenset(
    {"model", "messages", "temperature", "top_k", "seed", "max_tokens", "max_completion_tokens"}
    | {"stream", "stream_options", "n", "logprobs", "top_logprobs"}
)
_OLD_LM_STUDIO = ("model_key", "api_host")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")
_SAYS_SECRET = frozenset({"KEY", "APIKEY", "TOKEN", "SECRET", "PASSWORD", "AUTH"})
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")
_SECRET_WORDS = re.compile(
    r"(?i)(x[-_])?(api[-_]?key|(access|auth|bearer|api)[-_]?token|token|authorization|password|secret)"
)
_LITERAL_KEY = re.compile(
    r"\b(sk-[\w-]{16,}|hf_\w{20,}|gsk_\w{20,}|AIza[\w-]{30,}|xai-\w{20,}|[Bb]earer\s+[\w.~+/-]{8,})"
)


def without_old_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return `connector_kwargs` with older keys under their current names.

    Raises:
        PydanticCustomError: When a key holds a secret, or an older key is unreadable or repeats another key.
    """
    for key in data:
        if key.lower().replace("-", "_") in SECRET_KEYS:
            raise wrong_key(
                key,
                "is not taken: configs are copied into the results; put the secret into a variable of the "
                "environment and its name into api_key_env, or into headers_env for a header",
            )
    rest = {key: value for key, value in data.items() if key not in OLD_KEYS}
    found = {"model_id": ("chat_model", data.get("chat_model"))}
    block = data.get("lm_studio")
    if block is not None:
        model, address = _lm_studio(block)
        if model is not None:
            found["model_id"] = ("lm_studio", model)
        found["base_url"] = ("lm_studio", address)
    for name, (key, value) in found.items():
        if value is not None and rest.get(name) not in (None, value):
            raise wrong_key(key, f'is the same setting as "{name}"; keep one')
        if value is not None:
            rest[name] = value
    if block is not None:
        rest.setdefault("base_url", LM_STUDIO_URL)
    return rest


def _lm_studio(block: Any) -> tuple[Any, str | None]:
    """Return the model and the server's address of an older block, None where it has none."""
    if not isinstance(block, dict):
        raise wrong_key("lm_studio", "must be an object with model_key and api_host")
    for key in block:
        if key not in _OLD_LM_STUDIO:
            raise wrong_key("lm_studio", f'has the unknown key "{key}"; known: model_key, api_host')
    model, host = block.get("model_key"), block.get("api_host")
    if host is None:
        return model, None
    if not isinstance(host, str):
        raise wrong_key("lm_studio", "must name api_host as text, such as localhost:1234")
    address = host if "://" in host else f"http://{host}"
    return model, address if urlsplit(address).path.strip("/") else f"{address}/v1"


def base_url(value: str) -> str:
    """Return a server's address without a final slash."""
    try:
        parts = urlsplit(value)
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:
        has_host = False
    if has_host and (parts.query or parts.fragment):
        raise ValueError("must end before its query, which may hold a secret; give that through headers_env")
    if not has_host or parts.scheme not in {"http", "https"}:
        raise ValueError(f'"{value}" must be the address of a server, such as http://localhost:8000/v1')
    for ending in ("/chat/completions", "/completions"):
        if parts.path.rstrip("/").endswith(ending):
            raise ValueError(f'"{value}" must end before "{ending}", which is added to it')
    return value.rstrip("/")


def variable_name(value: str) -> str:
    """Return the name of an environment variable."""
    if not _VARIABLE.fullmatch(value) or _SAYS_SECRET.isdisjoint(value.split("_")):
        raise ValueError(
            "must be the NAME of an environment variable, in capitals and with the word KEY, TOKEN, "
            "SECRET, PASSWORD or AUTH, such as OPENAI_API_KEY, and not the key itself: configs are copied "
            "into the results, and Ray's logs hold variables that do not say so"
        )
    return value


def header_variables(value: dict[str, str]) -> dict[str, str]:
    """Return HTTP header -> name of the variable with its value."""
    for header, variable in value.items():
        if not _HEADER.fullmatch(header):
            raise ValueError("must name HTTP headers, such as X-Api-Key")
        variable_name(variable)
    return value


def extra_body(value: dict[str, Any]) -> dict[str, Any]:
    """Return the further keys of a request."""
    for key in value:
        if key in _OURS:
            raise ValueError(f'must not hold "{key}", which the generation block and the study decide')
    names = (place[-1] for place, _ in walk(value) if place)
    secret = next((name for name in names if isinstance(name, str) and _SECRET_WORDS.fullmatch(name)), None)
    if secret is not None:
        raise ValueError(
            f'must not hold "{secret}": configs are copied into the results; use api_key_env or headers_env'
        )
    return value


def command(value: tuple[str, ...]) -> tuple[str, ...]:
    """Return a command that starts a server."""
    if not value or not value[0].strip():
        raise ValueError('must name a program and its arguments, such as ["vllm", "serve", "{model_id}", …]')
    if any("\0" in part for part in value):
        raise ValueError("must not hold the character NUL")
    if not any("{port}" in part for part in value):
        raise ValueError('must hold "{port}": each worker gives its server a free port')
    return value


def looks_like_key(text: str) -> bool:
    """Return whether a text looks like a service's API key."""
    return _LITERAL_KEY.search(text) is not None

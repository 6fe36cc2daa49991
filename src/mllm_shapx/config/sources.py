"""Resolved sources of the tokenizer and of a value function's model."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """The source of the explained model's tokenizer."""

    model: str
    """Absolute directory, or hub id."""
    revision: str | None = None
    gguf_file: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class ValueModel:
    """The model that a value function loads."""

    source: str
    """Absolute directory, or hub id."""
    commit: str
    """Digest of the directory, or hub commit."""
    is_directory: bool

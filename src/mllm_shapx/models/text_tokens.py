"""Splits a text into the explained model's tokens, as character spans, without loading the model."""

import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from mllm_shapx.config.sources import TokenizerSource
from mllm_shapx.data.hub_access import one_line
from mllm_shapx.errors import ModelError

Spans = list[tuple[int, int]]
"""`[start, end)` character offsets, in order and without overlap."""


@lru_cache(maxsize=4)
def token_spans(source: TokenizerSource) -> Callable[[str], Spans]:
    """Return a function that splits a text into the tokens of a model; loaded once per process.

    Tokens that share a character, such as the bytes of an emoji, form one piece. Pieces of white space are
    left out. torch is not imported if the model has a `tokenizer.json`.

    Raises:
        ModelError: When there is no tokenizer, or it gives no character offsets.
    """
    path = _tokenizer_file(source)
    offsets = _of_transformers(source) if path is None else _of_file(path)
    guard = threading.Lock()  # fast tokenizers are not thread-safe

    def spans(text: str) -> Spans:
        with guard:
            return _pieces(text, offsets(text))

    return spans


def _pieces(text: str, offsets: Spans) -> Spans:
    pieces: Spans = []
    for start, end in offsets:
        if pieces and start < pieces[-1][1]:
            pieces[-1] = (pieces[-1][0], max(end, pieces[-1][1]))
        elif end > start:
            pieces.append((start, end))
    return [(start, end) for start, end in pieces if text[start:end].strip()]


def _tokenizer_file(source: TokenizerSource) -> Path | None:
    """Return the model's `tokenizer.json`; None when transformers must build the tokenizer."""
    if source.gguf_file is not None or source.trust_remote_code:
        return None
    directory = Path(source.model)
    if directory.is_dir():
        path = directory / "tokenizer.json"
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(source.model, "tokenizer.json", revision=source.revision))
    except EntryNotFoundError:
        return None
    except Exception as error:  # the hub client raises many types
        raise _fault(source, error) from error


def _of_file(path: Path) -> Callable[[str], Spans]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def offsets(text: str) -> Spans:
        return list(tokenizer.encode(text, add_special_tokens=False).offsets)

    return offsets


def _of_transformers(source: TokenizerSource) -> Callable[[str], Spans]:
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    if source.gguf_file is not None:
        options["gguf_file"] = source.gguf_file
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.model, revision=source.revision, **options)
    except Exception as error:  # tokenizer readers raise many types
        raise _fault(source, error) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f'shap.players "tokens": the tokenizer of {source.model} does not tell which characters a token '
            'stands for; use "words"'
        )

    def offsets(text: str) -> Spans:
        return list(tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"])

    return offsets


def _fault(source: TokenizerSource, error: Exception) -> ModelError:
    return ModelError(
        f'shap.players "tokens" needs the tokenizer of {source.model}, which cannot be loaded: '
        f'{one_line(error)}; download it once, or use "words"'
    )

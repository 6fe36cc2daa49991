"""Finds special tokens in a user's text: transformers turns them into control tokens.

The tokens come from a tokenizer, or from its files without importing torch or transformers.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mllm_shapx.config.loading import resolve_path
from mllm_shapx.config.model_settings import ModelSettings
from mllm_shapx.config.models import DatasetConfig, ModalityConfig
from mllm_shapx.config.vocabulary import CONNECTORS
from mllm_shapx.data.columns import resolve_columns
from mllm_shapx.data.conversations import sentences
from mllm_shapx.data.table import Table, python_values
from mllm_shapx.errors import RowError

_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def control_tokens(tokenizer: Any, template: str | None) -> tuple[str, ...]:
    """Return the strings that `tokenizer` reads as control tokens anywhere in a text.

    These are the special tokens, and the added tokens that the chat template writes.
    """
    own = tokenizer.chat_template
    templates = own.values() if isinstance(own, dict) else [own or ""]
    added = ((token.content, token.special) for token in tokenizer.added_tokens_decoder.values())
    return _chosen(added, template or "".join(templates))


def matcher(tokens: Sequence[str]) -> re.Pattern[str] | None:
    """Return a pattern that finds any of `tokens`; None when `tokens` is empty."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if tokens else None


def are_readable(source: str) -> bool:
    """Return whether the special tokens of the model directory `source` can be read from its files."""
    return bool(source) and (Path(source) / "tokenizer.json").is_file()


def control_token_warnings(
    settings: ModelSettings,
    config_path: Path | None,
    table: Table,
    rows: Sequence[int],
    *,
    dataset: DatasetConfig,
    modality: ModalityConfig,
) -> tuple[str, ...]:
    """Return a warning when texts of `rows` hold special tokens of the model.

    Only local directories and models in the local hub cache are checked.
    """
    if not CONNECTORS[settings.connector].has_tokenizer or modality.has_audio_input:
        return ()
    pattern = matcher(_tokens_of(settings, config_path))
    column = resolve_columns(table, dataset, modality).text
    if pattern is None or column is None:
        return ()
    found = [
        (row, match.group()) for row, text in _texts(table, column, rows) if (match := pattern.search(text))
    ]
    if not found:
        return ()
    row, token = found[0]
    warning = (
        f"{len(found):,} of {len(rows):,} row(s) hold special tokens of the model (row {row}: {token}); "
        "they become control tokens, as in the tokenizer's own apply_chat_template"
    )
    return (warning,)


def _texts(table: Table, column: str, rows: Sequence[int]) -> Iterator[tuple[int, str]]:
    wanted = set(rows)
    start = 0
    for batch in table.batches([column]):
        inside = [row for row in range(start, start + batch.num_rows) if row in wanted]
        values = python_values(batch.column(0)) if inside else []
        for row in inside:
            try:
                yield row, "\n".join(sentences(values[row - start]))
            except RowError:
                continue  # reported when the row is explained
        wanted.difference_update(inside)
        if not wanted:
            return
        start += batch.num_rows


def _tokens_of(settings: ModelSettings, config_path: Path | None) -> tuple[str, ...]:
    """Return the control tokens from the model's files; empty without local files."""
    options = settings.kwargs
    if options.gguf_file is not None or (options.chat_template_kwargs or {}).get("sanitize_control_tokens"):
        return ()
    directory = resolve_path(settings.model_id, config_path)
    paths = {name: directory / name for name in _FILES} if directory.is_dir() else _cached(settings)
    config, fast = (_json(paths.get(name)) for name in ("tokenizer_config.json", "tokenizer.json"))
    added = [*_list(fast.get("added_tokens")), *_dict(config.get("added_tokens_decoder")).values()]
    entries = ((_dict(each).get("content"), _dict(each).get("special")) for each in added)
    template = options.chat_template or _text(paths.get("chat_template.jinja")) or config.get("chat_template")
    return _chosen(
        ((content, bool(special)) for content, special in entries if isinstance(content, str)),
        template if isinstance(template, str) else json.dumps(template, ensure_ascii=False),
    )


def _cached(settings: ModelSettings) -> dict[str, Path]:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = {
            name: try_to_load_from_cache(settings.model_id, name, revision=settings.revision)
            for name in _FILES
        }
    except HFValidationError:
        return {}
    return {name: Path(path) for name, path in found.items() if isinstance(path, str)}


def _chosen(added: Iterable[tuple[str, bool]], template: str) -> tuple[str, ...]:
    """Return the special tokens and the added tokens in the template; blank tokens are left out."""
    kept = (token for token, special in added if special or token in template)
    return tuple(dict.fromkeys(token for token in kept if token.strip()))


def _text(path: Path | None) -> str:
    try:
        return "" if path is None else path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""  # loading the model reports the unreadable file


def _json(path: Path | None) -> dict[str, Any]:
    try:
        return _dict(json.loads(_text(path) or "{}"))
    except (ValueError, RecursionError):
        return {}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []

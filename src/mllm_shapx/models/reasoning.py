"""Removes a model's reasoning from its answers."""

import re
from collections.abc import Sequence
from typing import Any

TAGS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "◁think▷": "◁/think▷",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<unused94>thought": "<unused95>",
    "<|channel|>analysis<|message|>": "<|channel|>final<|message|>",
}
"""Opening tag -> closing tag of published models."""

_ANY = ""
"""Matches every closing tag: the prompt opened the reasoning."""
_CLOSING = frozenset(TAGS.values())
_TAG = re.compile("|".join(map(re.escape, sorted([*TAGS, *_CLOSING], key=len, reverse=True))))


def cut_reasoning(text: str, *, begun: bool = False) -> str:
    """Return `text` without think tags and the text between them.

    Unclosed reasoning extends to the end. A lone closing tag ends reasoning that began before the text.
    `begun` says that `text` begins inside the reasoning, because the prompt opened it.
    """
    return _scan(text, begun)[0]


def opens_reasoning(prompt: str) -> bool:
    """Return whether a rendered prompt ends with an opening think tag."""
    return prompt.rstrip().endswith(tuple(TAGS))


class ReasoningCut:
    """Turns generated tokens into texts without their reasoning; `begun` when the template opens it."""

    def __init__(self, tokenizer: Any, *, begun: bool) -> None:
        self._tokenizer = tokenizer
        self._begun = begun
        # Decoding skips special tokens, and some think tags are special.
        self._tags = {
            number: token.content
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special and token.content and any(token.content in tag for tag in (*TAGS, *_CLOSING))
        }

    def texts(self, rows: Sequence[Sequence[int]], prefill: str = "") -> list[str]:
        """Return the text of each row of generated tokens; `prefill` comes before each."""
        _, begun = _scan(prefill, self._begun)
        return [self._without_tags(cut_reasoning(self._decoded(row), begun=begun)) for row in rows]

    def _decoded(self, row: Sequence[int]) -> str:
        """Decode with the special tokens of think tags and without other special tokens."""
        pieces: list[str] = []
        first = 0
        for place, token in enumerate(row):
            if token in self._tags:
                pieces += [self._plain(row[first:place]), self._tags[token]]
                first = place + 1
        return "".join([*pieces, self._plain(row[first:])])

    def _plain(self, row: Sequence[int]) -> str:
        return str(self._tokenizer.decode(row, skip_special_tokens=True)) if row else ""

    def _without_tags(self, text: str) -> str:
        for tag in self._tags.values():
            text = text.replace(tag, "")
        return text


def _scan(text: str, begun: bool) -> tuple[str, bool]:
    """Return the text without reasoning, and whether the text ends inside reasoning."""
    kept: list[str] = []
    awaited: str | None = _ANY if begun else None
    position = 0
    for match in _TAG.finditer(text):
        tag = match.group()
        if awaited is None and tag in TAGS:
            kept.append(text[position : match.start()])
            awaited = TAGS[tag]
        elif tag in _CLOSING and awaited in {None, _ANY, tag}:
            if awaited is None:
                kept.clear()
            awaited, position = None, match.end()
    if awaited is None:
        kept.append(text[position:])
    return "".join(kept), awaited is not None

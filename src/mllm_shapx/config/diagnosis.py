"""Turns pydantic's errors into problems with the value found, the value expected, and the fix."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mllm_shapx.config.blocks import Block
from mllm_shapx.config.findings import Finding, Place, dotted, is_within, problem
from mllm_shapx.config.models import ExperimentSet
from mllm_shapx.config.variants import HierarchicalConfig, Variant
from mllm_shapx.config.vocabulary import EXPLAINER_ALIASES
from mllm_shapx.plaintext import redacted

_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text in quotes",
    "model": "an object {...}",
    "dict": "an object {...}",
    "tuple": "a list [...]",
    "list": "a list [...]",
}
"""First word of pydantic's error type -> the value expected there."""

_BOUNDS = {
    "greater_than": ("gt", "a number above"),
    "greater_than_equal": ("ge", "a number of at least"),
    "less_than": ("lt", "a number below"),
    "less_than_equal": ("le", "a number of at most"),
}
_LONGEST_QUOTE = 60
_MOST_PLACES = 3
_MOST_PASSES = 100
"""A pass leaves out one value of each block at least."""
_ANY_VARIANT = {"explainer_type": "exact"}
_REQUIRED: dict[str, Any] = {"experiment_set_id": "placeholder", "experiments": [_ANY_VARIANT]}
_ALIASES = {**HierarchicalConfig.aliases, **Variant.aliases}


def diagnose(error: ValidationError, data: Mapping[str, Any]) -> list[Finding]:
    """Return one problem per refused place of `data`, in the file's order of blocks."""
    by_place: dict[Place, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        by_place.setdefault(_place(details, data), []).append(details)
    return [
        _problem(path, group)
        for path, group in by_place.items()
        if not (_only_follows(group) and any(is_within(other, path) for other in by_place if other != path))
    ]


def usable_part(data: Mapping[str, Any]) -> tuple[ExperimentSet, set[Place]] | None:
    """Return `data` without its refused values, and the places left out; None if nothing usable is left.

    Checks across keys run on it, so that their problems are listed together with the refused values.
    """
    rest, broken = deepcopy(dict(data)), set[Place]()
    for _ in range(_MOST_PASSES):
        try:
            return ExperimentSet.model_validate({**_REQUIRED, **rest}), broken
        except ValidationError as error:
            broken |= {_leave_out(rest, _place(details, rest)) for details in error.errors(include_url=False)}
    return None


def _leave_out(data: dict[str, Any], place: Place) -> Place:
    """Remove the key of a block or a variant that holds `place`; return the place of its field.

    A list keeps its positions: a variant that is no object is replaced.
    """
    container: Any = data
    part: Any
    for depth, part in enumerate(place, start=1):
        inner = container.get(part) if isinstance(container, dict) else container[part]
        is_inside = depth < len(place) and isinstance(inner, dict | list)
        if not is_inside or depth == (3 if place[0] == "experiments" else 2):
            if isinstance(container, list):
                container[part] = dict(_ANY_VARIANT)
            else:
                container.pop(part, None)
            return (*place[: depth - 1], _ALIASES.get(part, part))
        container = inner
    return place


def _place(details: ErrorDetails, data: Any) -> Place:
    """Return an error's place in the file: pydantic's location without its own tags and renamings."""
    path: list[str | int] = []
    value = data
    for part in details["loc"]:
        if isinstance(value, dict):
            key = part if part in value else _written_as(part, value)
            path.append(key)
            value = value.get(key)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            path.append(part)
            value = value[part]
        else:
            break
    if details["type"] == "wrong_key":
        path.append(details["ctx"]["key"])
    return tuple(path)


def _written_as(key: str | int, block: dict[str, Any]) -> str | int:
    return next((alias for alias, name in _ALIASES.items() if name == key and alias in block), key)


def _only_follows(group: Sequence[ErrorDetails]) -> bool:
    """Whether a list is too short only because its items were refused."""
    return all(details["type"] == "too_short" and details["input"] for details in group)


def _problem(path: Place, group: Sequence[ErrorDetails]) -> Finding:
    first = group[0]
    kind = first["type"]
    if kind == "extra_forbidden":
        return problem(path, f'unknown key "{path[-1]}"', _known_key_for(path))
    if kind == "missing":
        return problem(path, "is required and missing")
    if kind in {"wrong_key", "value_error"}:
        return problem(path, first["msg"].removeprefix("Value error, "))
    if kind == "too_short":
        return problem(path, "must not be empty")
    names = [name for details in group for name in _allowed_names(details)]
    value = first["input"]
    if isinstance(value, str) and all(map(_allowed_names, group)):
        return problem(path, f"{_quoted(value)} is not known", _nearest_name(value, names))
    wanted = " or ".join(dict.fromkeys(filter(None, map(_wanted, group)))) or first["msg"]
    return problem(path, f"found {_described(value)}, wanted {wanted}")


def _wanted(details: ErrorDetails) -> str:
    kind = details["type"]
    names = _allowed_names(details)
    if names:
        shown = ", ".join(f'"{name}"' for name in names)
        return shown if len(names) == 1 else f"one of {shown}"
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"{words} {details['ctx'][key]:g}"
    return _WANTED.get(kind.split("_")[0], details["msg"])


def _allowed_names(details: ErrorDetails) -> list[str]:
    if details["type"] not in {"literal_error", "unknown_name"}:
        return []
    return re.findall(r"'([^']*)'", details["ctx"]["expected"])


def _nearest_name(value: str, names: Sequence[str]) -> str:
    aliases = [alias for alias, name in EXPLAINER_ALIASES.items() if name in names]
    listed = "allowed: " + ", ".join([*names, *aliases])
    close = _closest(value, [*names, *aliases])
    return f'did you mean "{close}"? {listed}' if close else listed


def _closest(word: str, names: Sequence[str], cutoff: float = 0.6) -> str | None:
    """Return the name closest to `word`, else the first one that contains it, ignoring case."""
    by_folded = {name.casefold(): name for name in reversed(names)}
    folded = word.casefold()
    close = difflib.get_close_matches(folded, by_folded, n=1, cutoff=cutoff)
    containing = [name for name in names if folded and folded in name.casefold()]
    return by_folded[close[0]] if close else next(iter(containing), None)


def _known_key_for(place: Place) -> str:
    key = str(place[-1])
    blocks = list(_blocks(ExperimentSet, ""))
    here = re.sub(r"\[\d+\]", "[]", dotted(place[:-1]))
    block = next(block for home, block in blocks if home == here)
    homes = [home for home, other in blocks if key in other.model_fields]
    hints = []
    if 0 < len(homes) <= _MOST_PLACES:
        hints.append("it belongs in " + " or ".join(map(_named, homes)))
    known = [*block.model_fields, *block.aliases, *block.also_accepted]
    if close := _closest(key, known):
        hints.append(f'did you mean "{close}"?')
    if not hints:
        keys = {name: home for home, other in reversed(blocks) for name in other.model_fields}
        if close := _closest(key, list(keys), cutoff=0.75):
            hints.append(f'the nearest known key is "{close}" in {_named(keys[close])}')
    return "; ".join(hints) or "known here: " + ", ".join(known)


def _named(home: str) -> str:
    return f'"{home}"' if home else "the top of the file"


def _blocks(block: type[Block], home: str) -> Iterator[tuple[str, type[Block]]]:
    """Yield all blocks of a config with their places, lists without positions: `selection.filters[]`."""
    yield home, block
    for key, field in block.model_fields.items():
        for inner in _blocks_in(field.annotation):
            in_list = "[]" if "tuple" in str(field.annotation) else ""
            yield from _blocks(inner, f"{home}.{key}{in_list}".removeprefix("."))


def _blocks_in(annotation: Any) -> Iterator[type[Block]]:
    if isinstance(annotation, type) and issubclass(annotation, Block):
        yield annotation
    for argument in get_args(annotation):
        yield from _blocks_in(argument)


def _described(value: Any) -> str:
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    return _short(json.dumps(value))


def _quoted(value: str) -> str:
    return json.dumps(_short(redacted(value)), ensure_ascii=False)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + "…"

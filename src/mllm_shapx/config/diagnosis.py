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
from mllm_shapx.config.models import ExperimentSet
from mllm_shapx.config.variants import HierarchicalConfig
from mllm_shapx.config.vocabulary import EXPLAINER_ALIASES
from mllm_shapx.errors import Problem
from mllm_shapx.plaintext import redacted

Place = tuple[str | int, ...]
"""Keys and list positions from the top of the file down."""

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
_PLACEHOLDERS: dict[str, Any] = {
    "experiment_set_id": "placeholder",
    "experiments": [{"explainer_type": "exact"}],
}


def dotted(place: Place) -> str:
    """Return `place` for display: `experiments[2].fractions[0]`."""
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def diagnose(error: ValidationError, data: Mapping[str, Any]) -> list[tuple[Place, Problem]]:
    """Return one problem per refused place of `data`, in the file's order of blocks."""
    by_place: dict[Place, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        by_place.setdefault(_place(details, data), []).append(details)
    return [
        (path, _problem(path, group))
        for path, group in by_place.items()
        if not (_only_follows(group) and any(_is_below(other, path) for other in by_place))
    ]


def usable_part(data: Mapping[str, Any]) -> tuple[ExperimentSet, set[Place]] | None:
    """Return `data` without its refused values, and the places left out; None if nothing usable is left.

    Checks across keys run on it, so that their problems are listed together with the refused values.
    """
    rest = deepcopy(dict(data))
    broken: set[Place] = set()
    for _ in range(_depth(rest) + len(ExperimentSet.model_fields)):
        try:
            return ExperimentSet.model_validate(rest), broken
        except ValidationError as error:
            for details in error.errors(include_url=False):
                broken.add(_leave_out(rest, _place(details, rest), missing=details["type"] == "missing"))
    return None


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
    names = [alias for alias, name in HierarchicalConfig.aliases.items() if name == key and alias in block]
    return names[0] if names else key


def _is_below(path: Place, parent: Place) -> bool:
    return len(path) > len(parent) and path[: len(parent)] == parent


def _only_follows(group: Sequence[ErrorDetails]) -> bool:
    """Whether a list is too short only because its items were refused."""
    return all(details["type"] == "too_short" and details["input"] for details in group)


def _problem(path: Place, group: Sequence[ErrorDetails]) -> Problem:
    first = group[0]
    kind = first["type"]
    where = dotted(path)
    if kind == "extra_forbidden":
        return Problem(where, f'unknown key "{path[-1]}"', _known_key_for(path))
    if kind == "missing":
        return Problem(where, "is required and missing")
    if kind in {"wrong_key", "value_error"}:
        return Problem(where, first["msg"].removeprefix("Value error, "))
    if kind == "too_short":
        return Problem(where, "must not be empty")
    names = [name for details in group for name in _allowed_names(details)]
    value = first["input"]
    if isinstance(value, str) and all(map(_allowed_names, group)):
        return Problem(where, f"{_quoted(value)} is not known", _nearest_name(value, names))
    wanted = " or ".join(dict.fromkeys(filter(None, map(_wanted, group)))) or first["msg"]
    return Problem(where, f"found {_described(value)}, wanted {wanted}")


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
    block = _block_at(place[:-1])
    known = [*block.model_fields, *block.aliases, *block.also_accepted]
    elsewhere = list(_blocks(ExperimentSet, ()))
    homes = [home for home, other in elsewhere if key in other.model_fields]
    hints = []
    if 0 < len(homes) <= _MOST_PLACES:
        hints.append("it belongs in " + " or ".join(map(_named, homes)))
    close = _closest(key, known)
    if close:
        hints.append(f'did you mean "{close}"?')
    if not hints:
        keys = {name: home for home, other in reversed(elsewhere) for name in other.model_fields}
        close = _closest(key, list(keys), cutoff=0.75)
        hints += [f'the nearest known key is "{close}" in {_named(keys[close])}'] if close else []
    return "; ".join(hints) or "known here: " + ", ".join(known)


def _named(block: Place) -> str:
    return f'"{dotted(block)}"' if block else "the top of the file"


def _block_at(path: Place) -> type[Block]:
    block: type[Block] = ExperimentSet
    for part in path:
        field = block.model_fields.get(part) if isinstance(part, str) else None
        if field is not None:
            block = next(_blocks_in(field.annotation), block)
    return block


def _blocks(block: type[Block], place: Place) -> Iterator[tuple[Place, type[Block]]]:
    yield place, block
    for key, field in block.model_fields.items():
        for inner in _blocks_in(field.annotation):
            in_list = "[]" if "tuple" in str(field.annotation) else ""
            yield from _blocks(inner, (*place, key + in_list))


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
    text = json.dumps(value)
    return text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + "…"


def _quoted(value: str) -> str:
    value = redacted(value)
    return json.dumps(
        value if len(value) <= _LONGEST_QUOTE else value[:_LONGEST_QUOTE] + "…", ensure_ascii=False
    )


def _depth(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max((_depth(item) for item in items), default=0)


def _leave_out(data: dict[str, Any], place: Place, *, missing: bool) -> Place:
    """Remove the value at `place` from `data`; return the place of the removed part.

    A list keeps its positions: a refused item removes the whole list, but a refused variant is replaced.
    Required keys are replaced too.
    """
    if missing and len(place) > 1:
        place = place[:-1]
    while place and place[0] not in _PLACEHOLDERS and isinstance(place[-1], int):
        place = place[:-1]
    if not place:
        return place
    if place[0] in _PLACEHOLDERS and all(isinstance(part, int) for part in place[1:]):
        _put_placeholder(data, place)
        return place
    while isinstance(place[-1], int):
        place = place[:-1]
    parent: Any = data
    for part in place[:-1]:
        inside = isinstance(parent, dict | list) and (isinstance(parent, list) or part in parent)
        parent = parent[part] if inside else {}
    parent.pop(place[-1], None)
    return place


def _put_placeholder(data: dict[str, Any], place: Place) -> None:
    key, item = str(place[0]), place[1:2]
    if item and isinstance(data.get(key), list):
        data[key][item[0]] = deepcopy(_PLACEHOLDERS[key][0])
    else:
        data[key] = deepcopy(_PLACEHOLDERS[key])

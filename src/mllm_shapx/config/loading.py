"""Reads a config file: its JSON, its bases, and all its problems at once."""

import glob
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mllm_shapx.config import checks, diagnosis
from mllm_shapx.config.chat_templates import is_template_text, read_template
from mllm_shapx.config.findings import Finding, Place, dotted, problem, walk
from mllm_shapx.config.models import ExperimentSet
from mllm_shapx.config.paths import exists, expanded, matches, real
from mllm_shapx.errors import ConfigError, Problem

_TEMPLATE = ("connector_kwargs", "chat_template")
_PATH_KEYS = (
    ("dataset", "path"),
    ("connector_kwargs", "model_id"),
    ("connector_kwargs", "adapter"),
    ("embedding", "model_id"),
    _TEMPLATE,
)
"""Keys that may be a local path."""

MOST_BYTES = 1 << 24
"""Maximum size of a config file in bytes; larger files are something else."""

DEEPEST = 32
"""Maximum nesting of objects and lists in a config file."""


@dataclass(frozen=True)
class LoadedConfig:
    """A config file after reading, inheritance and checks."""

    experiment_set: ExperimentSet
    path: Path
    """The file as the call names it."""
    warnings: tuple[str, ...]
    """Warnings for the user, one sentence each."""
    data: dict[str, Any]
    """The file's JSON, bases merged in, without `base`."""


@dataclass(frozen=True)
class _Layer:
    """One file of an inheritance chain."""

    path: Path
    data: dict[str, Any]


def load_config(path: Path, text: str | None = None) -> LoadedConfig:
    """Read the config file at `path`; if `text` is given, it replaces the file's content.

    Raises:
        ConfigError: When the file or one of its bases is unreadable or wrong; lists all problems at once,
            each with its place in the file.
    """
    layers = _layers(Path(path), text)
    merged: dict[str, Any] = {}
    for layer in reversed(layers):
        merged = _merge(merged, layer.data)
    _find_paths_of_bases(merged, layers)
    unread = _read_chat_template(merged, Path(path))
    experiment_set, found = _validate(merged)
    problems = [_with_origin(finding, layers) for finding in (*found, *unread) if not finding.warning]
    if problems or experiment_set is None:
        raise ConfigError(str(path), problems)
    warnings = tuple(str(finding.problem) for finding in found if finding.warning)
    return LoadedConfig(experiment_set, Path(path), warnings, merged)


def resolve_path(written: str, config_path: Path | None) -> Path:
    """Return a config's path, relative to the working directory, else to the config's folder.

    Absolute paths and missing ones are returned as written, `~` expanded. Globs exist if they match
    something.

    Raises:
        ValueError: When it cannot be a path; the message has the reason.
    """
    path = expanded(written)
    if path.is_absolute() or config_path is None or _exists(path):
        return path
    beside = config_path.parent / path
    return beside if _exists(beside) else path


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a config file without a base."""
    data = ExperimentSet.model_json_schema(mode="validation")
    data["properties"] |= {
        "base": {
            "type": "string",
            "description": "File to inherit from, relative to this one; this file wins.",
        },
        "$schema": {"type": "string"},
    }
    data["$defs"]["DatasetConfig"]["properties"]["use_parquet"] = {
        "type": "boolean",
        "deprecated": True,
        "description": "Old name: true is source hf_parquet, false is hf_datasets.",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **data}


def _validate(merged: dict[str, Any]) -> tuple[ExperimentSet | None, list[Finding]]:
    try:
        experiment_set = ExperimentSet.model_validate(merged)
    except ValidationError as error:
        found = diagnosis.diagnose(error, merged)
        if (usable := diagnosis.usable_part(merged)) is not None:
            rest, broken = usable
            found += [finding for finding in checks.findings(rest) if not finding.depends_on(broken)]
        return None, found
    return experiment_set, list(checks.findings(experiment_set))


def _layers(path: Path, text: str | None) -> list[_Layer]:
    """Return the file and its bases, the file first."""
    layers: list[_Layer] = []
    current = path
    while True:
        chain = [*(layer.path for layer in layers), current]
        if real(current) in map(real, chain[:-1]):
            message = f"the files inherit in a circle: {_shown(chain)}"
            raise _refused(path, message, "remove one of the bases", where="base")
        data = _parse(current, _read(path, chain) if layers or text is None else text)
        base = data.pop("base", None)
        data.pop("$schema", None)
        layers.append(_Layer(current, data))
        if base is None:
            return layers
        if not isinstance(base, str):
            raise _refused(current, "must name one file, as text in quotes", where="base")
        try:
            current = current.parent / expanded(base)
        except ValueError as error:
            raise _refused(current, str(error), where="base") from None


def _refused(path: Path, message: str, fix: str = "", *, where: str = "") -> ConfigError:
    return ConfigError(str(path), [Problem(where, message, fix)])


def _shown(chain: Sequence[Path]) -> str:
    return " -> ".join(os.path.normpath(path) for path in chain)


def _read(path: Path, chain: Sequence[Path]) -> str:
    """Return the text of the last file of `chain`, by which `path` inherits from it."""
    current, where, inherited = chain[-1], "", ""
    if len(chain) > 1:
        where, inherited = "base", f", inherited by {_shown(chain)}"
    try:
        with current.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise _refused(path, f"there is no file {_shown([current])}{inherited}", where=where) from None
    except OSError as error:
        message = f"cannot read {_shown([current])}{inherited}: {error.strerror}"
        raise _refused(path, message, where=where) from None
    except UnicodeDecodeError as error:
        raise _refused(current, f"is not UTF-8 text (byte {error.start})") from None
    if len(content) > MOST_BYTES:
        raise _refused(current, f"is larger than {MOST_BYTES >> 20} MB, which is no config")
    return text


def _parse(path: Path, text: str) -> dict[str, Any]:
    repeated: list[tuple[dict[str, Any], str]] = []

    def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        repeated.extend((data, key) for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        return data

    try:
        data = json.loads(
            text, object_pairs_hook=as_dict, parse_constant=_refuse_constant, parse_float=_finite
        )
    except json.JSONDecodeError as error:
        message = f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise _refused(path, message, _json_hint(text, error)) from None
    except RecursionError:
        raise _refused(path, _TOO_DEEP) from None
    except ValueError as error:
        raise _refused(path, f"is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise _refused(path, "must be one JSON object {...}")
    if any(len(place) > DEEPEST for place, _ in walk(data)):
        raise _refused(path, _TOO_DEEP)
    broken = [place for place, value in walk(data) if _is_broken(value) or _is_broken(("", *place)[-1])]
    twice = [(*place, key) for place, value in walk(data) for found, key in repeated if found is value]
    for places, message, fix in (
        (broken, "holds half of a surrogate pair, which is no character", "remove it"),
        (twice, "is written more than once", "keep one"),
    ):
        if places:
            raise ConfigError(str(path), [Problem(dotted(place), message, fix) for place in places])
    return data


_TOO_DEEP = f"is nested too deeply to be a config: at most {DEEPEST} levels"


def _is_broken(value: Any) -> bool:
    return isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:30]} is too large")
    return number


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _json_hint(text: str, error: json.JSONDecodeError) -> str:
    before = text[: error.pos].rstrip()
    if before.endswith(",") and text[error.pos : error.pos + 1] in {"}", "]"}:
        return "remove the comma before it"
    if error.msg.startswith("Illegal trailing comma"):
        return "remove the comma"
    if text[error.pos : error.pos + 1] in {"/", "#"}:
        return "JSON has no comments"
    if text[error.pos : error.pos + 1] == "'":
        return 'write "double quotes"'
    return ""


def _merge(base: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """Return `base` updated by `child`: objects are merged, other values replaced."""
    merged = dict(base)
    for key, value in child.items():
        below = base.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _find_paths_of_bases(merged: dict[str, Any], layers: Sequence[_Layer]) -> None:
    """Resolve a path of a base from the base's folder, if it does not exist relative to nearer folders."""
    folder = layers[0].path.parent
    for block, key in _PATH_KEYS:
        origin = _origin((block, key), layers)
        value = merged.get(block)
        written = value.get(key) if isinstance(value, dict) else None
        if not isinstance(written, str) or not written or origin.path.parent == folder:
            continue
        if (block, key) == _TEMPLATE and is_template_text(written):
            continue
        try:
            path = expanded(written)
        except ValueError:
            continue  # that key's own check reports it
        beside = origin.path.parent / path
        if not path.is_absolute() and not _exists(path) and not _exists(folder / path) and _exists(beside):
            merged[block] = {**merged[block], key: os.path.relpath(beside, folder)}


def _read_chat_template(merged: dict[str, Any], path: Path) -> list[Finding]:
    """Replace the path of the chat template by the file's content; return its problems."""
    block, key = _TEMPLATE
    options = merged.get(block)
    written = options.get(key) if isinstance(options, dict) else None
    if not isinstance(options, dict) or not isinstance(written, str):
        return []
    try:
        at = Path() if is_template_text(written) else resolve_path(written, path)
        merged[block] = {**options, key: read_template(written, at)}
    except (ValueError, OSError) as error:
        return [problem(_TEMPLATE, str(error), "give the path of a jinja file, or the template's text")]
    return []


def _exists(path: Path) -> bool:
    return exists(path) or (glob.has_magic(str(path)) and next(matches(path), None) is not None)


def _with_origin(finding: Finding, layers: Sequence[_Layer]) -> Problem:
    """Return a problem; an inherited one with the file's name."""
    origin = _origin(finding.path, layers)
    if origin is layers[0]:
        return finding.problem
    shown = os.path.relpath(origin.path, layers[0].path.parent)
    return replace(finding.problem, message=f"{finding.problem.message} [inherited from {shown}]")


def _origin(where: Place, layers: Sequence[_Layer]) -> _Layer:
    """Return the origin of the value at `where`: the nearest file that has it, or most of its path."""
    return max(layers, key=lambda layer: _depth_of(where, layer.data))


def _depth_of(where: Place, data: Any) -> int:
    for depth, part in enumerate(where):
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return depth
    return len(where)

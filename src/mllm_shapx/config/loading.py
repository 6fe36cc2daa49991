"""Reads a config file: its JSON, its bases, and all its problems at once."""

import glob
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mllm_shapx.config import checks, diagnosis
from mllm_shapx.config.chat_templates import is_template_text, read_template
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


class _Repeated(dict[str, Any]):
    """A JSON object that also knows its repeated keys."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        keys = [key for key, _ in pairs]
        self.repeated = tuple(dict.fromkeys(key for key in keys if keys.count(key) > 1))


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
    found += unread
    problems = [_with_origin(where, problem, layers) for where, problem in found]
    if problems or experiment_set is None:
        raise ConfigError(str(path), problems)
    warnings = tuple(str(finding.problem) for finding in checks.findings(experiment_set) if finding.warning)
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
    definitions = data["$defs"]
    text = {"type": "string"}
    data["properties"] |= {
        "base": {**text, "description": "File to inherit from, relative to this one; this file wins."},
        "$schema": text,
    }
    definitions["DatasetConfig"]["properties"]["use_parquet"] = {
        "type": "boolean",
        "deprecated": True,
        "description": "Old name: true is source hf_parquet, false is hf_datasets.",
    }
    hierarchical = definitions["HierarchicalConfig"]["properties"]
    for alias, name in (
        ("shap_fraction", "shap_fractions"),
        ("first_layer_fraction", "first_layer_fractions"),
    ):
        hierarchical[alias] = hierarchical[name]
    variant = definitions["Variant"]["properties"]
    variant["fraction"] = variant["fractions"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **data}


def _validate(
    merged: dict[str, Any],
) -> tuple[ExperimentSet | None, list[tuple[diagnosis.Place, Problem]]]:
    try:
        experiment_set = ExperimentSet.model_validate(merged)
    except ValidationError as error:
        found = diagnosis.diagnose(error, merged)
        usable = diagnosis.usable_part(merged)
        if usable is not None:
            rest, broken = usable
            found += [
                (finding.path, finding.problem)
                for finding in checks.findings(rest)
                if not finding.warning and not finding.depends_on(broken)
            ]
        return None, found
    return experiment_set, [
        (finding.path, finding.problem) for finding in checks.findings(experiment_set) if not finding.warning
    ]


def _layers(path: Path, text: str | None) -> list[_Layer]:
    """Return the file and its bases, the file first."""
    layers: list[_Layer] = []
    chain: list[Path] = []
    current: Path = path
    while True:
        _refuse_cycle(path, chain, current)
        chain.append(current)
        data = _read(path, chain) if layers or text is None else _parse(path, text)
        base = data.pop("base", None)
        data.pop("$schema", None)
        layers.append(_Layer(current, data))
        if base is None:
            return layers
        if not isinstance(base, str):
            problem = Problem("base", "must name one file, as text in quotes")
            raise ConfigError(str(current), [problem])
        try:
            current = current.parent / expanded(base)
        except ValueError as error:
            raise ConfigError(str(current), [Problem("base", str(error))]) from None


def _refuse_cycle(path: Path, chain: Sequence[Path], current: Path) -> None:
    if real(current) in [real(known) for known in chain]:
        message = f"the files inherit in a circle: {_shown([*chain, current])}"
        raise ConfigError(str(path), [Problem("base", message, "remove one of the bases")])


def _shown(chain: Sequence[Path]) -> str:
    return " -> ".join(os.path.normpath(path) for path in chain)


def _read(path: Path, chain: Sequence[Path]) -> dict[str, Any]:
    current = chain[-1]
    where = "" if len(chain) == 1 else "base"
    inherited = "" if len(chain) == 1 else f", inherited by {_shown(chain)}"
    try:
        with current.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        message = f"there is no file {os.path.normpath(current)}{inherited}"
        raise ConfigError(str(path), [Problem(where, message)]) from None
    except OSError as error:
        message = f"cannot read {os.path.normpath(current)}{inherited}: {error.strerror}"
        raise ConfigError(str(path), [Problem(where, message)]) from None
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text (byte {error.start})"
        raise ConfigError(str(current), [Problem("", message)]) from None
    if len(content) > MOST_BYTES:
        message = f"is larger than {MOST_BYTES >> 20} MB, which is no config"
        raise ConfigError(str(current), [Problem("", message)])
    return _parse(current, text)


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        data = json.loads(
            text,
            object_pairs_hook=_Repeated,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except json.JSONDecodeError as error:
        message = f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise ConfigError(str(path), [Problem("", message, _json_hint(text, error))]) from None
    except RecursionError:
        raise ConfigError(str(path), [_TOO_DEEP]) from None
    except ValueError as error:
        raise ConfigError(str(path), [Problem("", f"is not JSON: {error}")]) from None
    if not isinstance(data, dict):
        raise ConfigError(str(path), [Problem("", "must be one JSON object {...}")])
    if is_deeper(data, DEEPEST):
        raise ConfigError(str(path), [_TOO_DEEP])
    broken = [
        Problem(diagnosis.dotted(where), "holds half of a surrogate pair, which is no character", "remove it")
        for where in _broken_texts(data, ())
    ]
    if broken:
        raise ConfigError(str(path), broken)
    repeated = [
        Problem(diagnosis.dotted(where), "is written more than once", "keep one")
        for where in _repeated(data, ())
    ]
    if repeated:
        raise ConfigError(str(path), repeated)
    return data


_TOO_DEEP = Problem("", f"is nested too deeply to be a config: at most {DEEPEST} levels")


def is_deeper(data: Any, most: int) -> bool:
    """Return whether objects and lists are nested deeper than `most` levels."""
    level = [data]
    for _ in range(most + 1):
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
    return bool(level)


def _broken_texts(value: Any, where: diagnosis.Place) -> list[diagnosis.Place]:
    """Return the places of texts, keys included, with half of a surrogate pair."""
    if isinstance(value, str):
        return [where] if _is_broken(value) else []
    if isinstance(value, dict):
        keys = [(*where, key) for key in value if _is_broken(key)]
        return keys + [place for key, item in value.items() for place in _broken_texts(item, (*where, key))]
    if isinstance(value, list):
        return [place for index, item in enumerate(value) for place in _broken_texts(item, (*where, index))]
    return []


def _is_broken(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        msg = f"the number {text[:30]} is too large"
        raise ValueError(msg)
    return number


def _refuse_constant(name: str) -> None:
    msg = f"{name} is no JSON number"
    raise ValueError(msg)


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


def _repeated(value: Any, where: diagnosis.Place) -> list[diagnosis.Place]:
    found: list[diagnosis.Place] = []
    if isinstance(value, _Repeated):
        found += [(*where, key) for key in value.repeated]
        for key, item in value.items():
            found += _repeated(item, (*where, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            found += _repeated(item, (*where, index))
    return found


def _merge(base: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` updated by `child`: objects are merged, other values replaced."""
    merged = dict(base)
    for key, value in child.items():
        below = base.get(key)
        merged[key] = (
            _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else _plain(value)
        )
    return merged


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


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


def _read_chat_template(merged: dict[str, Any], path: Path) -> list[tuple[diagnosis.Place, Problem]]:
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
        fix = "give the path of a jinja file, or the template's text"
        return [(_TEMPLATE, Problem(diagnosis.dotted(_TEMPLATE), str(error), fix))]
    return []


def _exists(path: Path) -> bool:
    return exists(path) or (glob.has_magic(str(path)) and next(matches(path), None) is not None)


def _with_origin(where: diagnosis.Place, problem: Problem, layers: Sequence[_Layer]) -> Problem:
    """Add the file's name to an inherited problem."""
    origin = _origin(where, layers)
    if origin is layers[0]:
        return problem
    shown = os.path.relpath(origin.path, layers[0].path.parent)
    return Problem(problem.path, f"{problem.message} [inherited from {shown}]", problem.fix)


def _origin(where: diagnosis.Place, layers: Sequence[_Layer]) -> _Layer:
    """Return the origin of the value at `where`: the nearest file that has it, or most of its path."""
    return max(layers, key=lambda layer: _depth_of(where, layer.data))


def _depth_of(where: diagnosis.Place, data: Any) -> int:
    for depth, part in enumerate(where):
        present = (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        )
        if not present:
            return depth
        data = data[part]
    return len(where)

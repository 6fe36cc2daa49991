"""The software and hardware of samples, and its history in `spec.json`."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

ENVIRONMENTS = "environments"
"""Key of the environments of a run's samples in `spec.json`, oldest first."""

MODEL = "model"
"""Key of the model report: `notes`, and settings that decide the answers."""

_DECISIVE = ("mllm-shap", "torch", "transformers", "tokenizers", "liquid-audio")
"""Libraries whose versions may change a model's texts."""


@dataclass(frozen=True, slots=True)
class Environment:
    """The software and hardware of a worker."""

    libraries: Mapping[str, str]
    """Library -> version; `python` is one of them."""
    device: str
    """`cpu`, `cuda` or `mps`."""
    device_name: str | None
    """The accelerator's name."""
    dtype: str
    """Dtype of the weights in memory."""
    attn_implementation: str | None
    """Attention kernel of the config; None for the model's default."""

    @property
    def id(self) -> str:
        """Return 8 hex digits, equal for equal environments; samples record them."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def to_json(self) -> dict[str, Any]:
        """Return the environment as JSON data."""
        return asdict(self)


def sole_environment(specs: Iterable[Mapping[str, Any]]) -> Environment | None:
    """Return the environment of all answers of some runs, None when there are several."""
    found = {entry.get("id"): entry for spec in specs for entry in history(spec)}
    if len(found) != 1 or None in found:
        return None
    (entry,) = found.values()
    try:
        environment = Environment(**{each.name: entry[each.name] for each in fields(Environment)})
    except KeyError:
        return None
    return environment if environment.id == entry["id"] else None


def history(spec: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the environments recorded in a spec; a spec of an older version has one."""
    if spec is None:
        return []
    found = spec.get(ENVIRONMENTS)
    if isinstance(found, list):
        return [entry for entry in found if isinstance(entry, dict)]
    if not isinstance(spec.get("libraries"), dict):
        return []
    # Without device and dtype: the older version recorded the config's, not the actual ones.
    return [
        {
            "id": None,
            "since": None,
            "samples_before": 0,
            "libraries": spec["libraries"],
            "attn_implementation": spec.get("attn_implementation"),
        }
    ]


def with_environment(
    spec: Mapping[str, Any], environment: Environment, samples: int, at: float
) -> dict[str, Any] | None:
    """Return `spec` with one more entry in its history, None when it already has the environment.

    Args:
        spec: Content of a `spec.json`.
        environment: The environment of samples from now on.
        samples: Number of existing samples.
        at: Current time, in seconds since 1970.
    """
    entries = history(spec)
    if any(entry.get("id") == environment.id for entry in entries):
        return None
    if not samples and entries and entries[-1].get("id") is None:
        entries = entries[:-1]  # an older version's entry without samples
    entry = {"id": environment.id, "since": at, "samples_before": samples, **environment.to_json()}
    return {**spec, ENVIRONMENTS: [*entries, entry], "libraries": dict(environment.libraries)}


def with_model_report(
    spec: Mapping[str, Any], notes: Sequence[str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return `spec` with a model report added; existing notes are kept."""
    before = spec.get(MODEL)
    known = before.get("notes") if isinstance(before, dict) else None
    known = known if isinstance(known, list) else []
    return {**spec, MODEL: {**settings, "notes": list(dict.fromkeys([*known, *notes]))}}


def decisive_changes(spec: Mapping[str, Any], environment: Environment) -> list[str]:
    """Return the differences from the last recorded environment that may change texts, in words."""
    entries = history(spec)
    if not entries:
        return []
    before, now = entries[-1], environment.to_json()
    libraries = before.get("libraries")
    libraries = libraries if isinstance(libraries, dict) else {}
    pairs = [(name, libraries.get(name), now["libraries"].get(name)) for name in _DECISIVE]
    keys = ("device", "device_name", "dtype", "attn_implementation")
    pairs += [(key, before.get(key), now[key]) for key in keys if key in before]
    return [f"{name} {_shown(old)} -> {_shown(new)}" for name, old, new in pairs if old != new]


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)

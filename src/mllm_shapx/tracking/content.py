"""What a tracker gets of a run: its id, its settings without secrets, a sample as metrics."""

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

from mllm_shapx.records.results import SampleResult

_SECRET_KEY = re.compile(
    r"(^|_)(api_?key|access_?key|secret|password|passwd|credentials?|authorization|"
    r"(hf|auth|access|api|bearer|session)_?token)($|_)|^token$",
    re.IGNORECASE,
)
_URI_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")


NUMBERS = (
    "num_players",
    "runtime_sec",
    "n_calls",
    "model_calls",
    "frac_text",
    "frac_audio",
    "residual",
    "values_max",
    "values_max_abs",
    "row_index",
)
"""The numbers that are logged for a sample; unknown ones are left out."""


def run_id(experiment_set_id: str, run_name: str, salt: str = "") -> str:
    """Return a run's id: readable, at most 64 characters, always the same for the same three words."""
    digest = hashlib.sha256(f"{experiment_set_id}\0{run_name}\0{salt}".encode()).hexdigest()[:10]
    return f"{_readable(f'{experiment_set_id}-{run_name}')}-{digest}"


def set_prefix(experiment_set_id: str) -> str:
    """Return what the ids of all runs of a set begin with."""
    return _readable(f"{experiment_set_id}-")


def _readable(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:53]


def sample_metrics(result: SampleResult) -> dict[str, float | str]:
    """Return what is logged for one sample; numbers that are not finite are left out."""
    values = [value for value in result.player_values() if value is not None]
    numbers: dict[str, float] = {
        "row_index": result.row_index,
        "num_players": result.num_players,
        "runtime_sec": result.runtime_sec,
        "n_calls": result.n_calls,
        "model_calls": result.model_calls,
        "frac_text": result.attr_summary.frac_text,
        "frac_audio": result.attr_summary.frac_audio,
        "residual": result.imbalance,
    }
    if values:
        numbers["values_max"] = max(values)
        numbers["values_max_abs"] = max(abs(value) for value in values)
    finite = {key: value for key, value in numbers.items() if math.isfinite(value)}
    return {**finite, "language": result.language}


def without_secrets(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return `spec` without keys that name a secret, and without logins in its URIs."""
    return {key: _scrub(value) for key, value in spec.items() if not _SECRET_KEY.search(key)}


def _scrub(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_secrets(value)
    if isinstance(value, list | tuple):
        return [_scrub(item) for item in value]
    return _URI_LOGIN.sub("", value) if isinstance(value, str) else value

"""`spec.json`: the settings that must not change within a directory, and the planned rows."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

RESULT_SETTINGS = "result_settings"
"""Key of the settings that decide the values (`RunSpec.result_settings`)."""

DATASET_COMMIT = "dataset_commit"
"""Key of the dataset's version: a hub commit, or a hash of local files."""

DATASET_PATH = "dataset_path"
"""Key of a local dataset's absolute path at the study's last start."""

SELECTED_ROWS = "selected_rows"
"""Key of the planned rows, in the form of `selected_rows`."""


_OLDER_RESULT_BLOCKS = (
    "connector",
    "dataset",
    "generation",
    "modality",
    "audio_segmentation",
    "shap",
    "embedding",
    "chat",
)
"""Keys of the older runner's spec that decide the values, besides `variant`."""


def is_of_older_runner(spec: Mapping[str, Any]) -> bool:
    """Return whether the older runner wrote a spec: only it uses `run_slug`."""
    return "run_slug" in spec and not {"run_name", RESULT_SETTINGS} & spec.keys()


def result_settings(spec: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the settings that decide the values, None if the spec lacks them.

    For the older runner's spec, these are its blocks and the explainer's type.
    """
    if is_of_older_runner(spec):
        blocks = {key: spec[key] for key in _OLDER_RESULT_BLOCKS if key in spec}
        return {**blocks, "explainer_type": explainer_type(spec)}
    settings = spec.get(RESULT_SETTINGS)
    return settings if isinstance(settings, dict) else None


def explainer_type(spec: Mapping[str, Any]) -> str | None:
    """Return the run's explainer type, None if the spec lacks it."""
    variant = spec.get("variant")
    found = spec.get("explainer_type") or (
        variant.get("explainer_type") if isinstance(variant, dict) else None
    )
    return found if isinstance(found, str) else None


def stop_at(settings: Mapping[str, Any]) -> float | None:
    """Return the standard error at which a run's sampling stops (`stop_when`), None where it does not."""
    stop_when = settings.get("stop_when")
    found = stop_when.get("standard_error") if isinstance(stop_when, dict) else None
    return float(found) if isinstance(found, int | float) else None


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys whose values differ, sorted; a missing key equals null.

    Lists are compared as a whole. The arguments are the result settings of the stored and the current spec.
    """
    are_blocks = isinstance(old, dict) or isinstance(new, dict)
    if are_blocks and all(each is None or isinstance(each, dict) for each in (old, new)):
        # A block that was added or removed is named by its keys.
        old, new = old or {}, new or {}
        keys = sorted(old.keys() | new.keys())
        start = f"{prefix}." if prefix else ""
        return [path for key in keys for path in differences(old.get(key), new.get(key), f"{start}{key}")]
    return [] if _canonical(old) == _canonical(new) else [prefix]


def _canonical(value: Any) -> str:
    """Return a text, equal for equal settings: 1 equals 1.0, but not true."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(_canonical(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_canonical(value[key])}' for key in sorted(value))}}}"
    return json.dumps(value)


def selected_rows(rows: Iterable[int]) -> dict[str, Any]:
    """Return the record of the planned rows: `count` and `ranges`, such as `0-4,7`."""
    ordered = sorted(rows)
    found = (str(first) if first == last else f"{first}-{last}" for first, last in ranges(ordered))
    return {"count": len(ordered), "ranges": ",".join(found)}


def ranges(ordered: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the first and the last of each run of successive numbers; the numbers ascend."""
    start = 0
    for end, row in enumerate(ordered, start=1):
        if end == len(ordered) or ordered[end] != row + 1:
            yield ordered[start], row
            start = end


def planned_rows(spec: dict[str, Any]) -> frozenset[int] | None:
    """Return the planned rows of a spec, None if it lacks them.

    Raises:
        ValueError: When the record is invalid.
    """
    record = spec.get(SELECTED_ROWS)
    if record is None:
        return None
    try:
        rows = frozenset(
            row
            for part in record["ranges"].split(",")
            if part
            for row in range(int(part.partition("-")[0]), int(part.rpartition("-")[2]) + 1)
        )
        count = record["count"]
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{SELECTED_ROWS} cannot be read: {error}") from error
    if len(rows) != count:
        raise ValueError(f"{SELECTED_ROWS} says {count} rows and lists {len(rows)}")
    return rows

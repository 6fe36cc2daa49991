"""Result directories of an earlier version of this package and of the older runner."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from small_study import MODEL

_EARLIER = Path(__file__).with_name("earlier_study.json")


def write_earlier_study(folder: Path) -> Path:
    """Write an earlier version's directory of a study of two rows; return its config.

    A third row is not selected. The system prompt is empty. Samples lack `raw_values` and `neyman_steps`,
    the conversation's first turn is empty, and specs have only result settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model").symlink_to(MODEL)
    for name, content in json.loads(_EARLIER.read_text()).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            path.write_text(json.dumps(content, indent=2).replace("@FOLDER@", str(folder)))
        else:
            path.write_bytes(base64.b64decode(content))
    return folder / "config.json"


OLDER_WORDS = ("tell", " me", " about", " copper")

OLDER_VALUES: dict[str, Sequence[Sequence[float]]] = {
    "exact": ((0.1, 0.2, 0.1, 0.6), (0.3, -0.1, 0.2, 0.4)),
    "neyman_frac0_5": ((0.15, 0.2, 0.05, 0.6), (0.25, -0.15, 0.2, 0.4)),
}
"""Run -> row -> values after AbsSumNormalizer."""

_OLDER_VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {"explainer_type": "exact"},
    "neyman_frac0_5": {"explainer_type": "limited_neyman", "fraction": 0.5},
}


def write_older_directory(directory: Path, blocks: Mapping[str, Any]) -> Path:
    """Write an experiment set of the older runner, without our additions (formats.md).

    Args:
        directory: The experiment set's directory.
        blocks: The blocks of its specs: `connector`, `dataset` and so on.
    """
    for name, rows in OLDER_VALUES.items():
        variant = {"num_samples": None, "fraction": None, "linear": None, "hierarchical": None}
        spec = {
            "experiment_set_id": directory.name,
            "run_slug": name,
            **blocks,
            "variant": {**variant, **_OLDER_VARIANTS[name]},
        }
        samples = {
            f"samples/sample_{row:05d}_result.json": _older_sample(row, values, spec)
            for row, values in enumerate(rows)
        }
        done = list(range(len(rows)))
        times = {"created_at": 1_700_000_000.0, "updated_at": 1_700_000_100.0}
        files = {
            "spec.json": spec,
            # Its first versions write checkpoints with version 1, or without one.
            "checkpoint.json": {
                **({"version": 2} if name == "exact" else {}),
                "completed_indices": done,
                "next_index": len(done),
                **times,
            },
            **samples,
            "summary/aggregate_metrics.json": {
                "n_samples": len(done),
                "runtime_sec_total": 1.5 * len(done),
                "runtime_sec_avg": 1.5,
                "avg_frac_text": 1.0,
                "avg_frac_audio": 0.0,
            },
        }
        for path, content in files.items():
            (directory / name / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / name / path).write_text(json.dumps(content, indent=2))
    return directory


def _older_sample(row: int, values: Sequence[float], spec: Mapping[str, Any]) -> dict[str, Any]:
    is_neyman = "neyman" in spec["variant"]["explainer_type"]
    total = sum(abs(value) for value in values)

    def text(role: int, pieces: Sequence[str], given: Sequence[float] | None) -> dict[str, Any]:
        return {
            "content_type": 0,
            "roles": [role] * len(pieces),
            "content": list(pieces),
            "shap_values": given,
        }

    return {
        "row_index": row,
        "language": "en",
        "original_language": "unknown",
        "runtime_sec": 1.5,
        "n_calls": 8 if is_neyman else 16,
        "neyman_steps": 2 if is_neyman else None,
        "prompt_texts": ["".join(OLDER_WORDS)],
        "input_modality": "text",
        "output_modality": "text",
        "attr_summary": {
            "abs_sum_text": total,
            "abs_sum_audio": 0.0,
            "frac_text": 1.0,
            "frac_audio": 0.0,
            "count_text_tokens": len(values),
            "count_audio_segments": 0,
        },
        "conversation": [
            [text(2, ["You are a helpful assistant."], None)],
            [text(0, OLDER_WORDS, values)],
            [text(1, ["Copper is", " a metal."], None)],
        ],
    }

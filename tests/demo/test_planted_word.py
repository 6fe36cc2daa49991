"""What the demo is for: its right explanation is known, and the exact values find it."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import mllm_shapx

ROOT = Path(__file__).resolve().parents[2]
MOST_PLAYERS = 6
"""Rows with more players are left to `make demo`; these ones are a second's work each."""


def test_planted_word_has_the_largest_exact_value(tmp_path: Path) -> None:
    """The exact values put the planted word first, by a wide margin."""
    config: dict[str, Any] = json.loads((ROOT / "configs" / "demo.json").read_text())
    config["connector_kwargs"]["model_id"] = ROOT / "demo" / "model"
    config["dataset"]["path"] = ROOT / "demo" / "rows.parquet"
    config |= {"output_root": tmp_path, "experiments": [{"explainer_type": "exact"}]}
    config["selection"]["max_prompt_tokens"] = MOST_PLAYERS
    outcome = mllm_shapx.run(config, inline=True, progress=False)
    assert outcome.done["exact"] >= 5
    rows: list[dict[str, Any]] = pq.read_table(ROOT / "demo" / "rows.parquet").to_pylist()
    for row, values in mllm_shapx.load(outcome.output_uri).values("exact").groupby("row")["value"]:
        planted = rows[row]["planted_index"]
        others = values.reset_index(drop=True).drop(planted)
        assert values.iloc[planted] > 2 * others.max(), rows[row]["prompt"]

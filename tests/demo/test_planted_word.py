"""What the demo is for: its right explanation is known, and the exact values find it."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import mllm_shapx
from mllm_shapx.reporting.table import results_table
from mllm_shapx.reporting.verify import verify

ROOT = Path(__file__).resolve().parents[2]
MOST_PLAYERS = 6
"""Rows with more players are left to `make demo`; these ones are a second's work each."""


def test_planted_word_has_the_largest_exact_value(tmp_path: Path) -> None:
    """The exact values put the planted word first, by a wide margin."""
    config: dict[str, Any] = json.loads((ROOT / "configs" / "demo.json").read_text())
    config["connector_kwargs"]["model_id"] = ROOT / "demo" / "model"
    config["dataset"]["path"] = ROOT / "demo" / "rows.parquet"
    variants = [{"explainer_type": "exact"}, {"explainer_type": "limited_mc", "linear": [1.0]}]
    config |= {"output_root": tmp_path, "faithfulness": {"steps": 10, "random": 5}, "experiments": variants}
    config["selection"]["max_prompt_tokens"] = MOST_PLAYERS
    outcome = mllm_shapx.run(config, inline=True, progress=False)
    assert outcome.done["exact"] >= 5
    rows: list[dict[str, Any]] = pq.read_table(ROOT / "demo" / "rows.parquet").to_pylist()
    results = mllm_shapx.load(outcome.output_uri)
    assert outcome.model_calls == results.summary("exact")["n_calls_total"]
    for run in results.runs:
        _check_faithfulness(results, run)
    for row, values in results.values("exact").groupby("row")["value"]:
        planted = rows[row]["planted_index"]
        others = values.reset_index(drop=True).drop(planted)
        assert values.iloc[planted] > 2 * others.max(), rows[row]["prompt"]


def _check_faithfulness(results: mllm_shapx.Results, run: str) -> None:
    """The answer is lost with the first word deleted, and faster than at random, in every row."""
    for sample in results.samples(run):
        assert sample.faithfulness is not None
        assert sample.faithfulness.kept[-2:] == (sample.num_players - 1, sample.num_players)
        assert sample.faithfulness.deletion[-2] < 0.5
        assert sample.faithfulness.deletion[-1] > 0.99
        assert sample.faithfulness.areas.deletion_is_better
        assert sample.faithfulness.areas.insertion_is_better
    summary = results.summary(run)
    assert summary["n_curves"] == summary["n_samples"] >= 5
    assert (summary["deletion_better"], summary["insertion_better"]) == (1.0, 1.0)
    assert summary["deletion_area_mean"] < 0.3 < summary["random_area_mean"] < summary["insertion_area_mean"]
    assert verify([results.directory]).text().endswith("all sound")
    assert "deleted" in results_table(results.directory)

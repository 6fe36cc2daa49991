"""The audio demo as it lies in the repository: its rows, its model, and what the exact game says of them."""

import asyncio
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from demo_audio_task import STRETCH_MS, demo_recordings, draw_coalition
from liquid_kit import load_liquid
from mllm_shap import ConversationSnapshot
from train_demo_audio_model import answers

from mllm_shapx.config.loading import load_config
from mllm_shapx.data.conversations import load_row
from mllm_shapx.data.sources import open_table
from mllm_shapx.explaining.coalitions import Keep
from mllm_shapx.explaining.sample import explain_run, open_row
from mllm_shapx.explaining.settings import decoding
from mllm_shapx.models.engine import Engine
from mllm_shapx.planning.sweep import expand

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "demo_audio.json"
MODEL = ROOT / "demo_audio" / "model"
SEED, ROWS = 1011, 21


@cache
def _rows() -> list[dict[str, Any]]:
    return list(pq.read_table(ROOT / "demo_audio" / "rows.parquet").to_pylist())


def test_rows_are_what_the_script_draws() -> None:
    """The parquet holds the script's recordings, with the planted stretch named and timed."""
    drawn = demo_recordings(SEED, ROWS)
    assert [row["audio"]["bytes"] for row in _rows()] == [recording.wav() for recording in drawn]
    for row, recording in zip(_rows(), drawn, strict=True):
        assert row["planted_index"] == recording.planted_index
        assert row["planted_start_ms"] == row["planted_index"] * STRETCH_MS
        assert row["planted_end_ms"] - row["planted_start_ms"] == STRETCH_MS
        assert 6 <= len(row["stretches"].split()) <= 8


def test_the_demo_is_small() -> None:
    """Model and rows together stay below 8 MB."""
    files = [path for path in (ROOT / "demo_audio").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8_000_000


def test_the_model_answers_what_cutting_leaves() -> None:
    """Whole recordings and random coalitions of their stretches get the right answer 9 of 10 times."""
    rng = np.random.default_rng(5)
    recordings = demo_recordings(SEED, ROWS)
    parts = [draw_coalition(rng, recording) for recording in recordings for _ in range(5)]
    said = answers(MODEL, [*recordings, *parts])
    expected = [recording.answer for recording in [*recordings, *parts]]
    right = sum(left == right for left, right in zip(said, expected, strict=True))
    assert right >= 0.9 * len(expected)


def test_the_largest_exact_value_lies_on_the_planted_stretch() -> None:
    """The config's exact game over the first rows of every sound finds the planted stretch."""
    loaded = load_config(CONFIG)
    (run,) = expand(loaded.experiment_set).runs
    table = open_table(run.dataset, loaded.path)
    engine = Engine(load_liquid(MODEL))
    few = sorted(range(ROWS), key=lambda index: len(_rows()[index]["stretches"].split()))[:6]

    async def generate(prompts: Mapping[int, ConversationSnapshot], keep: Keep) -> None:
        masks = list(prompts)
        found = await engine.answer([prompts[mask] for mask in masks], decoding(run), [0] * len(masks))
        for mask, answer in zip(masks, found, strict=True):
            keep(mask, answer)

    async def never(*_: Any) -> Any:
        raise AssertionError("TF-IDF needs no vectors")

    for index in few:
        row = load_row(table, index, run.dataset, run.modality)
        sample = asyncio.run(explain_run(row, open_row(row, run), run, generate, never))
        values = [abs(value or 0.0) for value in sample.player_values()]
        assert int(np.argmax(values)) == _rows()[index]["planted_index"]
        assert sample.attr_summary.frac_audio == 1.0
        assert sample.attr_summary.count_audio_segments == len(_rows()[index]["stretches"].split())
    engine.close()

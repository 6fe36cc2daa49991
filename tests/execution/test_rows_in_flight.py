"""Short rows are explained side by side, so that batches are full; nothing is lost or done twice by it."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from bench_overhead import InstantModel
from small_study import results

from mllm_shapx.config.loading import load_config
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.run import run_config
from mllm_shapx.models.base import Answer
from mllm_shapx.reporting.progress import ProgressReporter

ROOT = Path(__file__).parents[2]
ROWS, COALITIONS = 40, 8


class SlowModel(InstantModel):
    """Takes a while for a batch, and keeps its size."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def answer(self, prompts: Sequence[Any], *arguments: Any) -> list[Answer]:
        """Wait, then answer."""
        self.batches.append(len(prompts))
        time.sleep(0.03)
        return super().answer(prompts, *arguments)


def explain(folder: Path, model: SlowModel, rows_in_flight: int | None) -> dict[str, Any]:
    """Explain rows of three words; return every sample and summary."""
    folder.mkdir()
    rows = [f"first{row} second{row} third{row}" for row in range(ROWS)]
    pq.write_table(pa.table({"prompt": rows}), folder / "rows.parquet")
    config = {
        "base": str(ROOT / "configs/demo.json"),
        "experiment_set_id": "short",
        "output_root": str(folder / "out"),
        "dataset": {"source": "local_parquet", "path": str(folder / "rows.parquet")},
        "experiments": [{"explainer_type": "exact"}, {"explainer_type": "limited_mc", "num_samples": [6]}],
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    options = RunOptions(rows_in_flight=rows_in_flight)
    with (folder / "log").open("w") as log, ProgressReporter(log, interactive=False) as reporter:
        outcome = run_config(load_config(path), options, reporter, inline=True, load=lambda _: model)
    assert outcome.exit_code == 0
    assert outcome.model_calls == ROWS * COALITIONS == sum(model.batches)
    return results(folder / "out" / "short")


def test_short_rows_share_batches_and_values_stay_the_same(tmp_path: Path) -> None:
    """By default more rows are under way than two; a number that is asked for is kept to."""
    found: dict[int | None, dict[str, Any]] = {}
    largest: dict[int | None, int] = {}
    for rows_in_flight in (None, 1, 2):
        model = SlowModel()
        found[rows_in_flight] = explain(tmp_path / str(rows_in_flight), model, rows_in_flight)
        largest[rows_in_flight] = max(model.batches)
    assert largest[None] > 2 * COALITIONS
    assert largest[2] <= 2 * COALITIONS
    assert largest[1] <= COALITIONS
    assert len(found[None]) >= 2 * ROWS
    assert found[None] == found[1] == found[2]

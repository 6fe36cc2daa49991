"""Every combination of the vocabulary runs to its end on the demo, or is refused with the reason.

A part of the grid, drawn from a seed so that every name occurs, is tried each time; `MLLM_SHAPX_FULL_GRID=1`
tries all of it, which takes about an hour.
"""

import itertools
import json
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from demo_kit import DEMO, DemoModel, demo_rows
from explaining_kit import row_of
from test_value_models import models as value_models

from mllm_shapx.config.loading import load_config
from mllm_shapx.config.vocabulary import (
    EXPLAINERS,
    VALUE_FUNCTIONS,
    Absence,
    EmbeddingMode,
    NormalizerName,
    PlayerKind,
    ReducerName,
    SimilarityName,
)
from mllm_shapx.errors import ConfigError
from mllm_shapx.explaining.sample import open_row
from mllm_shapx.planning.sweep import expand

models = value_models
ROWS = (0, 7, 15)
TRIED = 80
OPTIONS: dict[str, dict[str, Any]] = {
    "contrastive": {"target": "the boat", "foil": "a lamp"},
    "bertscore": {"encoder": "encoder", "layer": 1},
    "semascore": {"encoder": "encoder"},
    "nli_logodds": {"model": "model"},
    "judge_grade": {"backend": "mock", "model_id": "judge"},
}
DIMENSIONS: dict[str, tuple[Any, ...]] = {
    "explainer": (*EXPLAINERS, "hierarchical"),
    "value": (*get_args(SimilarityName), *VALUE_FUNCTIONS),
    "reducer": get_args(ReducerName),
    "normalizer": get_args(NormalizerName),
    "mode": get_args(EmbeddingMode),
    "players": get_args(PlayerKind),
    "absence": get_args(Absence),
}


def combinations() -> Iterator[dict[str, Any]]:
    """Yield the whole grid, or a part in which every name occurs."""
    if os.environ.get("MLLM_SHAPX_FULL_GRID") == "1":
        for chosen in itertools.product(*DIMENSIONS.values()):
            yield dict(zip(DIMENSIONS, chosen, strict=True))
        return
    draw = random.Random(13)
    columns = []
    for names in DIMENSIONS.values():
        column = [names[place % len(names)] for place in range(TRIED)]
        draw.shuffle(column)
        columns.append(column)
    for chosen in zip(*columns, strict=True):
        yield dict(zip(DIMENSIONS, chosen, strict=True))


def config_of(folder: Path, models: dict[str, Path], chosen: dict[str, Any]) -> Path:
    shap: dict[str, Any] = {
        key: chosen[key] for key in ("reducer", "normalizer", "mode", "players", "absence")
    }
    if chosen["value"] in VALUE_FUNCTIONS:
        options = dict(OPTIONS.get(chosen["value"], {}))
        options |= {key: str(models[name]) for key, name in options.items() if key in {"encoder", "model"}}
        shap |= {"value_function": chosen["value"], "value_options": options or None}
    else:
        shap["similarity"] = chosen["value"]
    variant: dict[str, Any] = {"explainer_type": chosen["explainer"]}
    if chosen["explainer"] == "hierarchical":
        variant["hierarchical"] = {"ks": 3}
    elif EXPLAINERS[chosen["explainer"]].takes_budget:
        variant["num_samples"] = -1
    data = {
        "experiment_set_id": "grid",
        "connector": "hf_text",
        "connector_kwargs": {"model_id": str(DEMO / "model"), "dtype": "float32"},
        "dataset": {"source": "local_parquet", "path": str(DEMO / "rows.parquet")},
        "generation": {"text_temperature": 0},
        "shap": shap,
        "experiments": [variant],
    }
    path = folder / "grid.json"
    path.write_text(json.dumps(data))
    return path


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_combination_runs_or_is_refused_with_the_reason(
    tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    demo, ran, refused = DemoModel(), 0, 0
    for chosen in combinations():
        try:
            config = load_config(config_of(tmp_path, models, chosen))
        except ConfigError as error:
            reasons = [problem.message for problem in error.problems]
            refused += 1
            if all(reasons):
                continue
            raise
        (run,) = expand(config.experiment_set, str(config.path)).runs
        for row_index in ROWS:
            row = row_of(demo_rows()[row_index]["prompt"], row_index=row_index)
            coalitions = open_row(row, run)
            sample = demo.explain(run, coalitions, row_index)
            values = sample.player_values()
            assert len(values) == coalitions.players.num_players, chosen
            assert all(value is not None and math.isfinite(value) for value in values), chosen
            assert sample.n_calls <= run.coalitions(len(values)), chosen
        ran += 1
    with capsys.disabled():
        print(f"\ngrid: {ran} combination(s) ran on {len(ROWS)} rows, {refused} refused")
    assert ran >= TRIED // 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_explainer_puts_the_planted_word_first_with_3_n_squared_coalitions(tmp_path: Path) -> None:
    variants: list[dict[str, Any]] = []
    for name, facts in EXPLAINERS.items():
        variants.append({"explainer_type": name, **({"linear": 3} if facts.takes_budget else {})})
    data = {
        "experiment_set_id": "planted",
        "connector": "hf_text",
        "connector_kwargs": {"model_id": str(DEMO / "model"), "dtype": "float32"},
        "dataset": {"source": "local_parquet", "path": str(DEMO / "rows.parquet")},
        "generation": {"text_temperature": 0},
        "experiments": [*variants, {"explainer_type": "hierarchical", "hierarchical": {"ks": 3}}],
    }
    path = tmp_path / "planted.json"
    path.write_text(json.dumps(data))
    config = load_config(path)
    runs = expand(config.experiment_set, str(config.path)).runs
    demo, first = DemoModel(), dict.fromkeys((run.name for run in runs), 0)
    for row_index, about in enumerate(demo_rows()):
        coalitions = open_row(row_of(about["prompt"], row_index=row_index), runs[0])
        for run in runs:
            values = [value or 0.0 for value in demo.explain(run, coalitions, row_index).player_values()]
            first[run.name] += max(range(len(values)), key=values.__getitem__) == about["planted_index"]
    assert {name: count for name, count in first.items() if count < 0.95 * len(demo_rows())} == {}

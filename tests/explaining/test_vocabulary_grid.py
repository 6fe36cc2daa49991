"""Every combination of the vocabulary runs to its end on the demo, or is refused with the reason.

A part of the grid, in which every three names of different dimensions meet, is tried each time;
`MLLM_SHAPX_FULL_GRID=1` tries all of it, which takes hours.
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
from mllm_shapx.config.variants import Variant
from mllm_shapx.config.vocabulary import (
    EXPLAINERS,
    VALUE_FUNCTIONS,
    Absence,
    AudioAbsence,
    ConnectorName,
    EmbeddingMode,
    NormalizerName,
    OutputModality,
    PlayerKind,
    ReducerName,
    SimilarityName,
)
from mllm_shapx.errors import ConfigError
from mllm_shapx.explaining.sample import open_row
from mllm_shapx.planning.plan import make_plan
from mllm_shapx.planning.sweep import expand

Dimensions = dict[str, tuple[Any, ...]]
Meeting = tuple[tuple[str, int], ...]

models = value_models
ROWS = (0, 7, 15)
MEETING = 3
"""How many names meet in some combination that is tried."""
CANDIDATES = 20
SHAP_KEYS = ("reducer", "normalizer", "mode", "players", "absence", "audio_absence", "keep")
OPTIONS: dict[str, dict[str, Any]] = {
    "contrastive": {"target": "the boat", "foil": "a lamp"},
    "bertscore": {"encoder": "encoder", "layer": 1},
    "semascore": {"encoder": "encoder"},
    "nli_logodds": {"model": "model"},
    "judge_grade": {"backend": "mock", "model_id": "judge"},
}
DIMENSIONS: Dimensions = {
    "explainer": (*EXPLAINERS, "hierarchical"),
    "value": (*get_args(SimilarityName), *VALUE_FUNCTIONS),
    "reducer": get_args(ReducerName),
    "normalizer": get_args(NormalizerName),
    "mode": get_args(EmbeddingMode),
    "players": get_args(PlayerKind),
    "absence": get_args(Absence),
}


KEYS: Dimensions = {
    "explainer": DIMENSIONS["explainer"],
    "value": DIMENSIONS["value"],
    "players": DIMENSIONS["players"],
    "absence": DIMENSIONS["absence"],
    "audio_absence": (None, *get_args(AudioAbsence)),
    "keep": (None, {"words": ["not"]}, {"roles": ["user"]}, {"roles": ["system"]}),
    "connector": get_args(ConnectorName),
    "input_modality": ("text", "audio__male", "interleaved__text_first__female"),
    "output_modality": get_args(OutputModality),
    "method": ("raw", "sgpa"),
    "strip_reasoning": (False, True),
    "stop_when": (None, {"standard_error": 0.1}),
    "interactions": (None, {"index": "SII"}),
    "faithfulness": (None, {"steps": 3}),
}
"""Keys of a config that have to agree."""


def part_of(dimensions: Dimensions) -> Iterator[dict[str, Any]]:
    """Yield combinations in which every three names of different dimensions meet."""
    draw, order = random.Random(13), list(all_meetings(dimensions))
    draw.shuffle(order)
    left = set(order)
    for meeting in order:
        if meeting in left:
            # Of some combinations around it, the one in which most others are left.
            tried = [dict(meeting) | _rest(dimensions, meeting, draw) for _ in range(CANDIDATES)]
            chosen = max(tried, key=lambda each: len(left.intersection(meetings(dimensions, each))))
            left.difference_update(meetings(dimensions, chosen))
            yield {key: dimensions[key][place] for key, place in chosen.items()}


def _rest(dimensions: Dimensions, meeting: Meeting, draw: random.Random) -> dict[str, int]:
    given = dict(meeting)
    return {key: draw.randrange(len(names)) for key, names in dimensions.items() if key not in given}


def meetings(dimensions: Dimensions, chosen: dict[str, int]) -> Iterator[Meeting]:
    """Yield every three places of a combination, with their dimensions."""
    return itertools.combinations(((key, chosen[key]) for key in dimensions), MEETING)


def all_meetings(dimensions: Dimensions) -> Iterator[Meeting]:
    """Yield every three places of different dimensions."""
    for keys in itertools.combinations(dimensions, MEETING):
        for places in itertools.product(*(range(len(dimensions[key])) for key in keys)):
            yield tuple(zip(keys, places, strict=True))


def combinations() -> Iterator[dict[str, Any]]:
    """Yield the whole grid, or a part of it."""
    if os.environ.get("MLLM_SHAPX_FULL_GRID") != "1":
        yield from part_of(DIMENSIONS)
        return
    for chosen in itertools.product(*DIMENSIONS.values()):
        yield dict(zip(DIMENSIONS, chosen, strict=True))


def config_of(folder: Path, models: dict[str, Path], chosen: dict[str, Any]) -> Path:
    """Write a config with the chosen names, and the usual ones where no dimension has them."""
    shap = {key: chosen[key] for key in SHAP_KEYS if key in chosen}
    if chosen["value"] in VALUE_FUNCTIONS:
        options = dict(OPTIONS.get(chosen["value"], {}))
        options |= {key: str(models[name]) for key, name in options.items() if key in {"encoder", "model"}}
        shap |= {"value_function": chosen["value"], "value_options": options or None}
    else:
        shap["similarity"] = chosen["value"]
    variant: dict[str, Any] = {"explainer_type": chosen["explainer"]}
    variant |= {key: chosen[key] for key in ("stop_when", "interactions", "faithfulness") if key in chosen}
    if chosen["explainer"] == "hierarchical":
        variant["hierarchical"] = {"ks": 3}
    elif EXPLAINERS[chosen["explainer"]].takes_budget:
        variant["num_samples"] = -1
    connector = chosen.get("connector", "hf_text")
    model: dict[str, Any] = {"model_id": str(DEMO / "model"), "dtype": "float32"}
    if connector == "openai":
        model = {"model_id": "demo", "base_url": "http://localhost:1/v1"}
    data = {
        "experiment_set_id": "grid",
        "connector": connector,
        "connector_kwargs": {**model, "strip_reasoning": chosen.get("strip_reasoning", False)},
        "dataset": {"source": "local_parquet", "path": str(DEMO / "rows.parquet")},
        "generation": {"text_temperature": 0},
        "modality": {key: chosen[key] for key in ("input_modality", "output_modality") if key in chosen},
        "audio_segmentation": {"method": chosen.get("method", "raw")},
        "shap": shap,
        "experiments": [variant],
    }
    path = folder / "grid.json"
    path.write_text(json.dumps(data))
    return path


def test_without_the_keys_that_messages_name_every_combination_makes_a_plan(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    """Every three names meet. What is accepted can be planned, and its `spec.json` makes the same run."""
    accepted = 0
    for chosen in part_of(KEYS):
        path = config_of(tmp_path, models, chosen)
        faults = faults_of(path)
        accepted += not faults
        while faults:
            content = json.loads(path.read_text())
            removed = [remove(content, fault) for fault in faults]
            assert any(removed), (chosen, faults)
            path.write_text(json.dumps(content))
            faults = faults_of(path)
        config = load_config(path).experiment_set
        (run,) = expand(config).runs
        assert make_plan("grid", [run], (0, 1), {0: 3, 1: 9}).totals()["coalitions"] >= 4, chosen
        again = config.model_copy(update={"experiments": (Variant.model_validate(run.variant),)})
        assert expand(again).runs[0].result_settings == run.result_settings, chosen
    assert accepted > 0


def faults_of(path: Path) -> list[str]:
    """Return the keys that are refused, each with a reason."""
    try:
        load_config(path)
    except ConfigError as error:
        return [problem.path for problem in error.problems if problem.message]
    return []


def remove(content: dict[str, Any], path: str) -> bool:
    """Remove the key of a block, or of the variant, that a path leads to; return whether it was there."""
    first, _, rest = path.partition(".")
    block = content["experiments"][0] if first == "experiments[0]" else content[first]
    return block.pop(rest.partition(".")[0].partition("[")[0], None) is not None


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
    assert ran > refused


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

"""Damaged configs: whatever stands in them, they are used or refused in words."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from mllm_shapx.config.loading import load_config
from mllm_shapx.errors import ConfigError, Problem
from mllm_shapx.planning.plan import make_plan
from mllm_shapx.planning.sweep import expand

WHOLE: dict[str, Any] = {
    "experiment_set_id": "study",
    "connector": "hf_text",
    "connector_kwargs": {"model_id": "a/b", "batch_size": "auto", "dtype": "float32"},
    "device": "cpu",
    "dataset": {"source": "local_csv", "path": "rows.csv", "column_mapping": {"text": "prompt"}},
    "selection": {
        "filters": [{"column": "a", "op": "in", "value": [1]}, {"column": "b", "op": "<", "value": 3}],
        "min_prompt_tokens": 2,
        "max_prompt_tokens": 9,
        "balanced_token_counts": [3, 4],
        "samples_per_token_count": 2,
    },
    "modality": {"input_modality": "text"},
    "generation": {"max_new_tokens": 8, "text_temperature": 0},
    "shap": {"similarity": "CosineSimilarity", "mode": "STATIC"},
    "embedding": {"model_id": "c/d"},
    "wandb": {"enabled": False, "tags": ["x"]},
    "experiments": [
        {"explainer_type": "exact"},
        {"explainer_type": "mc", "name": "n", "num_samples": [5, -1], "fractions": [0.5], "linear": 3},
        {
            "explainer_type": "hierarchical",
            "hierarchical": {
                "ks": [3],
                "shap_type": "cc",
                "shap_fraction": [0.5],
                "first_layer_type": "exact",
            },
            "shap_override": {"reducer": "MaxReducer"},
            "embedding_override": {"max_length": 3},
        },
    ],
}
JUNK: list[Any] = [
    None,
    True,
    0,
    -1,
    3,
    1.5,
    1e308,
    "",
    "text",
    "mc",
    [],
    [1],
    ["a"],
    {},
    {"a": 1},
    [[]],
    [{}],
]


def places(data: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of every value in `data`."""
    keys = list(data) if isinstance(data, dict) else list(range(len(data))) if isinstance(data, list) else []
    found = [(data, key) for key in keys]
    return found + [place for key in keys for place in places(data[key])]


def damage(data: dict[str, Any], draw: random.Random) -> None:
    container, key = draw.choice(places(data))
    action = draw.randrange(3)
    if action == 0:
        container[key] = copy.deepcopy(draw.choice(JUNK))
    elif action == 1:
        del container[key]
    elif isinstance(container, dict):
        container[draw.choice(["a", "ks", "name", "num_samples", "shap", "base_", str(key) + "s"])] = (
            copy.deepcopy(draw.choice(JUNK))
        )


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_config_is_used_or_refused_with_places_and_words(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    path = tmp_path / "study.json"
    for _ in range(60):
        data = copy.deepcopy(WHOLE)
        for _ in range(draw.randrange(1, 6)):
            if data:
                damage(data, draw)
        path.write_text(json.dumps(data))
        problems = refusal(path)
        assert all(problem.message and problem.path for problem in problems), data
        assert len({problem.path for problem in problems}) == len(problems), data


def refusal(path: Path) -> tuple[Problem, ...]:
    """Return what is wrong with a config; none when runs and a plan can be made of it."""
    try:
        sweep = expand(load_config(path).experiment_set)
    except ConfigError as error:
        return error.problems
    make_plan("study", sweep.runs, [0, 1], {0: 3, 1: 6}).to_text()
    return ()


def test_the_whole_config_itself_is_used(tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    path.write_text(json.dumps(WHOLE))
    assert len(expand(load_config(path).experiment_set).runs) == 6

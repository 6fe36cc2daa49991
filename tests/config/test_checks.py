"""What several keys of a config must agree on, and the warnings."""

import json
from pathlib import Path
from typing import Any

import pytest

from mllm_shapx.config.loading import load_config
from mllm_shapx.errors import ConfigError

EXACT = {"explainer_type": "exact"}
HIERARCHICAL = {"explainer_type": "hierarchical"}


def config(folder: Path, data: dict[str, Any]) -> Path:
    path = folder / "study.json"
    path.write_text(json.dumps({"experiment_set_id": "study", "experiments": [EXACT], **data}))
    return path


@pytest.mark.parametrize(
    ("data", "place"),
    [
        ({"connector": "hf_text", "modality": {"input_modality": "audio__male"}}, "modality.input_modality"),
        ({"connector": "hf_text", "modality": {"output_modality": "audio"}}, "modality.output_modality"),
        ({"audio_segmentation": {"method": "sgpa"}}, "audio_segmentation.method"),
        ({"dataset": {"source": "local_parquet"}}, "dataset.path"),
        ({"dataset": {"source": "local_csv", "path": ""}}, "dataset.path"),
        ({"dataset": {"revision": "main"}}, "dataset.revision"),
        ({"dataset": {"revision": "3F9322D8"}}, "dataset.revision"),
        ({"selection": {"min_prompt_tokens": 6, "max_prompt_tokens": 5}}, "selection.min_prompt_tokens"),
        ({"selection": {"balanced_token_counts": [5]}}, "selection.balanced_token_counts"),
        ({"selection": {"samples_per_token_count": 5}}, "selection.samples_per_token_count"),
        ({"selection": {"filters": [{"column": "a", "op": "in", "value": 1}]}}, "selection.filters[0].value"),
        (
            {"selection": {"filters": [{"column": "a", "op": "between", "value": [1]}]}},
            "selection.filters[0].value",
        ),
        (
            {"selection": {"filters": [{"column": "a", "op": "<", "value": [1]}]}},
            "selection.filters[0].value",
        ),
        ({"experiments": [EXACT, {"explainer_type": "limited_mc"}]}, "experiments[1]"),
        ({"experiments": [{**EXACT, "linear": [3.0]}]}, "experiments[0].linear"),
        ({"experiments": [{**EXACT, "hierarchical": {}}]}, "experiments[0].hierarchical"),
        ({"experiments": [HIERARCHICAL]}, "experiments[0].hierarchical"),
        (
            {"experiments": [{**HIERARCHICAL, "hierarchical": {}, "num_samples": [3]}]},
            "experiments[0].num_samples",
        ),
        (
            {"experiments": [{**EXACT, "seeds": [1], "shap_override": {"seed": 1}}]},
            "experiments[0].shap_override.seed",
        ),
        (
            {"experiments": [{**EXACT, "embedding_override": {"max_length": 9}}]},
            "experiments[0].embedding_override",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_refused_at_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Any, place: Any
) -> None:
    monkeypatch.delenv("ALLOW_UNPINNED_HF_DOWNLOAD", raising=False)
    with pytest.raises(ConfigError) as caught:
        load_config(config(tmp_path, data))
    assert [problem.path for problem in caught.value.problems] == [place]


def test_an_unpinned_revision_is_allowed_by_the_environment_and_for_local_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ALLOW_UNPINNED_HF_DOWNLOAD", raising=False)
    local = {"source": "local_csv", "path": "rows.csv", "revision": "main"}
    assert load_config(config(tmp_path, {"dataset": local})).warnings == ()
    assert load_config(config(tmp_path, {"dataset": {"revision": "a" * 40}})).warnings == ()
    monkeypatch.setenv("ALLOW_UNPINNED_HF_DOWNLOAD", "1")
    assert load_config(config(tmp_path, {"dataset": {"revision": "main"}})).warnings == ()


@pytest.mark.parametrize(
    ("data", "place"),
    [
        ({"dataset": {"subset": "my_own"}}, "dataset.subset"),
        ({"dataset": {"trust_remote_code": True}}, "dataset.trust_remote_code"),
        ({"dataset": {"path": "rows.csv"}}, "dataset.path"),
        ({"embedding": {"model_id": "a/b"}}, "embedding"),
        (
            {"modality": {"input_modality": "audio__male"}, "selection": {"max_prompt_tokens": 5}},
            "selection.max_prompt_tokens",
        ),
        ({"shap": {"allow_mask_duplicates": True}}, "shap.allow_mask_duplicates"),
        (
            {"experiments": [{**EXACT, "shap_override": {"allow_mask_duplicates": True}}]},
            "shap.allow_mask_duplicates",
        ),
        (
            {
                "experiments": [
                    {**HIERARCHICAL, "hierarchical": {"shap_num_samples": 9, "shap_fractions": 0.5}}
                ]
            },
            "experiments[0].hierarchical.shap_fractions",
        ),
        (
            {
                "experiments": [
                    {**HIERARCHICAL, "hierarchical": {"shap_type": "exact", "shap_fractions": [0.5]}}
                ]
            },
            "experiments[0].hierarchical.shap_fractions",
        ),
        (
            {
                "experiments": [
                    {**HIERARCHICAL, "hierarchical": {"shap_type": "exact", "first_layer_fractions": 1}}
                ]
            },
            "experiments[0].hierarchical.first_layer_fractions",
        ),
        ({"runtime": {"n_generator_jobs": 4}}, "runtime.n_generator_jobs"),
        (
            {"generation": {"text_temperature": 0}, "experiments": [{**EXACT, "seeds": [1]}]},
            "experiments[0].seeds",
        ),
        (
            {
                "experiments": [
                    {
                        **EXACT,
                        "generation_override": {"text_temperature": 0},
                        "shap_override": {"seed": 1},
                    }
                ]
            },
            "experiments[0].shap_override.seed",
        ),
    ],
)
def test_what_has_no_effect_or_is_unusual_is_said_once(tmp_path: Path, data: Any, place: Any) -> None:
    warnings = load_config(config(tmp_path, data)).warnings
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{place}: ")


@pytest.mark.parametrize(
    "data",
    [
        {"mlflow": {"enabled": False, "experiment_name": "mine", "nested_per_variant": True}},
        {"mlflow": {"tracking_uri": "sqlite:///mlflow.db", "tags": {"team": "a"}}},
        {"runtime": {"gc_interval": 10}},
        {"experiments": [{**EXACT, "seeds": [0, 1]}]},
        {"dataset": {"repo_id": "me/mine", "subset": "my_own"}},
        {"shap": {"similarity": "EuclideanSimilarity"}},
        {"shap": {"similarity": "CosineSimilarity"}, "embedding": {"model_id": "a/b"}},
        {
            "embedding": {"model_id": "a/b"},
            "experiments": [{**EXACT, "shap_override": {"similarity": "CosineSimilarity"}}],
        },
        {"modality": {"input_modality": "audio__male"}, "audio_segmentation": {"method": "sgpa"}},
        {"connector": "hf_text", "selection": {"min_prompt_tokens": 3, "max_prompt_tokens": 3}},
    ],
)
def test_what_fits_together_gives_no_warning(tmp_path: Path, data: Any) -> None:
    assert load_config(config(tmp_path, data)).warnings == ()

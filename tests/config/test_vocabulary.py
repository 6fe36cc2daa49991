"""The further names of a config: which combinations work, and what the refusal says."""

import json
from pathlib import Path
from typing import Any

import pytest

from mllm_shapx.config.loading import load_config
from mllm_shapx.errors import ConfigError

USUAL: dict[str, Any] = {
    "experiment_set_id": "study",
    "connector": "hf_text",
    "dataset": {"source": "local_csv", "path": "rows.csv"},
    "experiments": [{"explainer_type": "exact"}],
}


def loaded(folder: Path, **changes: Any) -> Any:
    path = folder / "study.json"
    path.write_text(json.dumps(USUAL | changes))
    return load_config(path)


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        (
            {"shap": {"similarity": "CosineSimilarity", "value_function": "wer"}},
            "shap.value_function",
            "takes the place of the similarity",
        ),
        ({"shap": {"value_options": {"reference": "x"}}}, "shap.value_options", "none is named"),
        ({"shap": {"value_function": "contrastive"}}, "shap.value_function", "'target': Field required"),
        (
            {"shap": {"value_function": "bertscore", "value_options": {"layr": 2}}},
            "shap.value_options",
            "'layr': Extra inputs",
        ),
        ({"shap": {"value_function": "tfidf_cosine"}}, "shap.value_function", "TfIdfCosineSimilarity"),
        ({"shap": {"value_function": "transcribed"}}, "shap.value_function", "sound of each answer"),
        ({"shap": {"value_function": "bertscor"}}, "shap.value_function", 'did you mean "bertscore"'),
        (
            {
                "connector": "liquid_audio",
                "modality": {"output_modality": "audio"},
                "shap": {"value_function": "wer"},
            },
            "shap.value_function",
            "the answers are spoken",
        ),
        (
            {
                "connector": "openai",
                "connector_kwargs": {"base_url": "http://localhost:1/v1", "model_id": "m"},
                "shap": {"value_function": "tf_logprob"},
            },
            "shap.value_function",
            "which a server does not give",
        ),
        (
            {
                "connector_kwargs": {"model_id": "m", "strip_reasoning": True},
                "shap": {"value_function": "tf_logprob"},
            },
            "shap.value_function",
            "reasoning would precede it",
        ),
        (
            {
                "experiments": [
                    {"explainer_type": "exact", "shap_override": {"value_function": "contrastive"}}
                ]
            },
            "experiments[0].shap_override.value_function",
            "'foil': Field required",
        ),
    ],
)
def test_a_combination_that_does_not_work_is_refused_with_the_key(
    tmp_path: Path, changes: dict[str, Any], key: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, **changes)
    assert key in str(caught.value)
    assert message in str(caught.value)


def test_an_inherited_similarity_is_taken_back_with_null(tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text(json.dumps({"shap": {"similarity": "CosineSimilarity"}}))
    found = loaded(tmp_path, base="base.json", shap={"similarity": None, "value_function": "wer"})
    assert found.experiment_set.shap.value_function == "reference_wer"
    assert found.warnings == ()

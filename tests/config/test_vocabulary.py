"""The further names of a config: which combinations work, and what the refusal says."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from mllm_shapx.config.loading import load_config
from mllm_shapx.config.vocabulary import CONNECTORS, SIMILARITIES, ConnectorName, SimilarityName
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


def assert_refused(folder: Path, changes: dict[str, Any], key: str, message: str) -> None:
    """Hold that a config with `changes` is refused at `key` with the words of `message`."""
    with pytest.raises(ConfigError) as caught:
        loaded(folder, **changes)
    assert key in str(caught.value)
    assert message in str(caught.value)


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
            "where reasoning would come",
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
    assert_refused(tmp_path, changes, key, message)


def test_an_inherited_similarity_is_taken_back_with_null(tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text(json.dumps({"shap": {"similarity": "CosineSimilarity"}}))
    found = loaded(tmp_path, base="base.json", shap={"similarity": None, "value_function": "wer"})
    assert found.experiment_set.shap.value_function == "reference_wer"
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("variant", "key", "message"),
    [
        ({"explainer_type": "loo", "num_samples": 3}, "experiments[0].num_samples", "lack one player"),
        ({"explainer_type": "exact_banzhaf", "linear": 1}, "experiments[0].linear", "every coalition"),
        ({"explainer_type": "kernel_banzhaf"}, "experiments[0]", "needs a budget"),
        ({"explainer_type": "levrage"}, "experiments[0].explainer_type", 'did you mean "leverage"'),
        (
            {"explainer_type": "hierarchical", "hierarchical": {"shap_type": "loo"}},
            "experiments[0].hierarchical.shap_type",
            "gives no shares of a whole",
        ),
        (
            {"explainer_type": "mc", "num_samples": 9, "interactions": {"order": 2}},
            "experiments[0].interactions",
            '"limited_mc" evaluates some of them',
        ),
        (
            {"explainer_type": "hierarchical", "hierarchical": {}, "interactions": {}},
            "experiments[0].interactions",
            "values of all coalitions",
        ),
        (
            {"explainer_type": "exact", "interactions": {"index": "kSII"}},
            "experiments[0].interactions.index",
            'did you mean "k-SII"',
        ),
        (
            {"explainer_type": "exact", "faithfulness": {"steps": 0}},
            "experiments[0].faithfulness.steps",
            "at least 1",
        ),
        *(
            ({**variant, "stop_when": {"standard_error": 0.1}}, "experiments[0].stop_when", message)
            for variant, message in (
                ({"explainer_type": "exact"}, "draws nothing"),
                ({"explainer_type": "loo"}, "draws nothing"),
                ({"explainer_type": "proxy", "linear": 1}, "its trees fit themselves"),
                ({"explainer_type": "leverage", "linear": 1}, "draws other coalitions for each budget"),
                ({"explainer_type": "neyman", "linear": 1}, 'or take "limited_mc"'),
                ({"explainer_type": "hierarchical", "hierarchical": {}}, "depend on the values"),
            )
        ),
        ({"num_samples": 9, "stop_when": {}}, "experiments[0].stop_when.standard_error", "required"),
        (
            {"num_samples": 9, "stop_when": {"standard_error": 0}},
            "experiments[0].stop_when.standard_error",
            "a number above 0",
        ),
    ],
)
def test_an_explainer_that_cannot_be_used_so_is_refused(
    tmp_path: Path, variant: dict[str, Any], key: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, experiments=[variant])
    assert key in str(caught.value)
    assert message in str(caught.value)


def test_an_explainer_whose_package_is_missing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mllm_shapx.config.vocabulary_checks.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="needs scikit-learn"):
        loaded(tmp_path, experiments=[{"explainer_type": "proxy", "linear": [1]}])
    with pytest.raises(ConfigError, match=r"need shapiq.*mllm-shapx\[interactions\]"):
        loaded(tmp_path, experiments=[{"explainer_type": "exact", "interactions": {}}])


SPOKEN = {"connector": "liquid_audio", "modality": {"input_modality": "audio__male"}}


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({**SPOKEN, "shap": {"players": "sentences"}}, "shap.players", "the input is spoken"),
        (
            {"connector": "liquid_audio", "shap": {"players": "tokens"}},
            "shap.players",
            'needs connector "hf_text"',
        ),
        ({"shap": {"players": "syllables"}}, "shap.players", "allowed: words, tokens"),
        ({"shap": {"keep": {"roles": ["user"]}}}, "shap.keep.roles", "nothing is left to explain"),
        ({"shap": {"keep": {"words": [" "]}}}, "shap.keep.words[0]", "must not be empty"),
        ({"shap": {"keep": {"wrods": []}}}, "shap.keep.wrods", 'did you mean "words"'),
        ({"shap": {"absence_text": "..."}}, "shap.absence_text", 'absence is "delete"'),
        ({"shap": {"absence": "neutral", "absence_text": "ab"}}, "shap.absence_text", "one character"),
        ({"shap": {"absence": "pad", "absence_text": ""}}, "shap.absence_text", "must not be empty"),
        ({"shap": {"audio_absence": "noise"}}, "shap.audio_absence", "the input is text"),
        (
            {
                **SPOKEN,
                "audio_segmentation": {"method": "sgpa"},
                "shap": {"keep": {"words": ["not"]}},
            },
            "shap.keep.words",
            "explains spoken ones",
        ),
    ],
)
def test_players_and_absence_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, Any], key: str, message: str
) -> None:
    assert_refused(tmp_path, changes, key, message)


def test_every_connector_and_similarity_has_its_facts() -> None:
    assert set(CONNECTORS) == set(get_args(ConnectorName))
    assert set(SIMILARITIES) == set(get_args(SimilarityName))

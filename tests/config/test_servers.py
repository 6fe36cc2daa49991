"""The keys of a model behind a server: today's, older ones, and secrets, which are never taken."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer
from click.testing import CliRunner

from mllm_shapx.cli import main
from mllm_shapx.config.loading import load_config
from mllm_shapx.errors import ConfigError
from mllm_shapx.planning.sweep import expand

SERVER: dict[str, Any] = {"base_url": "http://localhost:8000/v1", "model_id": "tiny"}


def config(folder: Path, kwargs: dict[str, Any], **more: Any) -> Path:
    path = folder / "study.json"
    usual = {
        "experiment_set_id": "study",
        "connector": "openai",
        "wandb": {"enabled": False},
        "experiments": [{"explainer_type": "exact"}],
    }
    path.write_text(json.dumps({**usual, "connector_kwargs": kwargs, **more}))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    (problem,) = caught.value.problems
    return str(problem)


@pytest.mark.parametrize(
    ("kwargs", "url", "model"),
    [
        (SERVER, "http://localhost:8000/v1", "tiny"),
        ({**SERVER, "base_url": "https://host/api/v1/"}, "https://host/api/v1", "tiny"),
        ({"base_url": "http://h/v1", "chat_model": "old"}, "http://h/v1", "old"),
        ({"lm_studio": {"model_key": "qwen"}}, "http://localhost:1234/v1", "qwen"),
        ({"lm_studio": {"model_key": "qwen", "api_host": "box:9999"}}, "http://box:9999/v1", "qwen"),
        ({"lm_studio": {"model_key": "q", "api_host": "http://box:9/v1"}}, "http://box:9/v1", "q"),
    ],
)
@pytest.mark.parametrize("connector", ["openai", "openai_compat_text", "lm_studio_text"])
def test_older_names_mean_the_same(
    kwargs: dict[str, Any], url: str, model: str, connector: str, tmp_path: Path
) -> None:
    settings = load_config(config(tmp_path, kwargs, connector=connector)).experiment_set
    assert settings.connector == "openai"
    assert settings.connector_kwargs.base_url == url
    assert settings.model_id == model
    assert settings.model_revision is None


@pytest.mark.parametrize(
    ("kwargs", "key", "said"),
    [
        ({"model_id": "tiny"}, "base_url", "is required"),
        ({"base_url": "http://h/v1"}, "model_id", "is required"),
        ({**SERVER, "base_url": "localhost:8000"}, "base_url", "must be the address of a server"),
        ({**SERVER, "base_url": "http://h/v1/chat/completions"}, "base_url", "must end before"),
        ({**SERVER, "base_url": "http://me:pw@h/v1"}, "base_url", "login"),
        ({**SERVER, "base_url": "http://h/v1?key=abc"}, "base_url", "must end before its query"),
        ({**SERVER, "timeout_s": 0.0}, "timeout_s", "0.1"),
        ({**SERVER, "max_concurrency": 100_000}, "max_concurrency", "at most 4,096"),
        ({**SERVER, "extra_body": {"temperature": 1}}, "extra_body", "generation block"),
        ({**SERVER, "chat_model": "other"}, "chat_model", 'the same setting as "model_id"'),
        ({**SERVER, "lm_studio": {"model": "q"}}, "lm_studio", "known: model_key, api_host"),
        ({**SERVER, "chat_template": "{{ x }}"}, "chat_template", "hf_text"),
        ({**SERVER, "quantization": "4bit"}, "quantization", "not known to connector"),
    ],
)
def test_what_is_wrong_is_named_with_its_key(
    kwargs: dict[str, Any], key: str, said: str, tmp_path: Path
) -> None:
    message = refusal(config(tmp_path, kwargs))
    assert message.startswith(f"connector_kwargs.{key}")
    assert said in message


SECRET = "sk-proj-0123456789abcdefghij"  # noqa: S105 -- nobody's


@pytest.mark.parametrize(
    "changes",
    [
        {"connector_kwargs": {**SERVER, "api_key": SECRET}},
        {"connector_kwargs": {**SERVER, "api_key_env": SECRET}},
        {"connector_kwargs": {**SERVER, "api_key_env": "hf_abcdefghijklmnopqrstuvwxyz"}},
        {"connector_kwargs": {**SERVER, "api_key_env": "HF_PLACE"}},
        {"connector_kwargs": {**SERVER, "headers": {"Authorization": f"Bearer {SECRET}"}}},
        {"connector_kwargs": {**SERVER, "headers_env": {"Authorization": f"Bearer {SECRET}"}}},
        {"connector_kwargs": {**SERVER, "extra_body": {"provider": {"api_key": "short"}}}},
        {"connector_kwargs": {**SERVER, "extra_body": {"note": f"use {SECRET}"}}},
        {"connector_kwargs": {**SERVER, "model_id": SECRET}},
        {"connector_kwargs": SERVER, "wandb": {"enabled": False, "tags": [SECRET]}},
        {"connector_kwargs": SERVER, "chat": {"system_prompt": f"Bearer {SECRET}"}},
    ],
)
def test_a_literal_key_is_refused_and_not_repeated(changes: dict[str, Any], tmp_path: Path) -> None:
    path = config(tmp_path, **{"kwargs": changes.pop("connector_kwargs"), **changes})
    found = CliRunner().invoke(main, ["validate", "--config", str(path)])
    assert found.exit_code == 2
    assert "copied into the results" in found.output
    assert SECRET not in found.output
    assert "hf_abc" not in found.output


@pytest.mark.parametrize(
    ("more", "place"),
    [
        ({"shap": {"similarity": "CosineSimilarity"}}, "shap.similarity"),
        (
            {
                "experiments": [
                    {"explainer_type": "exact"},
                    {
                        "explainer_type": "exact",
                        "name": "b",
                        "shap_override": {"similarity": "EuclideanSimilarity"},
                    },
                ]
            },
            "experiments[1].shap_override.similarity",
        ),
    ],
)
def test_states_that_nobody_sees_cannot_be_compared(more: dict[str, Any], place: str, tmp_path: Path) -> None:
    message = refusal(config(tmp_path, SERVER, **more))
    assert message.startswith(f"{place}: ")
    assert "embedding.model_id" in message
    load_config(config(tmp_path, SERVER, **more, embedding={"model_id": "some/encoder"}))


@pytest.mark.parametrize(
    ("more", "place"),
    [
        ({"modality": {"input_modality": "audio__original"}}, "modality.input_modality"),
        ({"chat": {"assistant_prefill": "Sure"}}, "chat.assistant_prefill"),
    ],
)
def test_what_a_server_cannot_do_is_refused(more: dict[str, Any], place: str, tmp_path: Path) -> None:
    assert refusal(config(tmp_path, SERVER, **more)).startswith(f"{place}: ")


def test_other_connectors_do_not_read_the_keys(tmp_path: Path) -> None:
    kwargs = {"model_id": "a/b", "max_concurrency": 3}
    message = refusal(config(tmp_path, kwargs, connector="hf_text"))
    assert "connector_kwargs.max_concurrency: is read by connector" in message


def test_the_place_of_a_server_decides_no_answer_and_the_body_does(tmp_path: Path) -> None:
    def key(**kwargs: Any) -> str:
        path = config(tmp_path, {**SERVER, **kwargs})
        return expand(load_config(path).experiment_set, str(path)).runs[0].generation_key

    assert key() == key(base_url="http://elsewhere:1/v1", timeout_s=5.0, api_key_env="MY_KEY")
    assert key() != key(extra_body={"min_p": 0.1})


def test_check_model_asks_the_server(tmp_path: Path) -> None:
    with ChatServer() as server:
        path = config(tmp_path, {**SERVER, "base_url": server.url})
        call = ["validate", "--check-model", "--config", str(path)]
        found = CliRunner().invoke(main, call)
        assert found.exit_code == 0
        assert f"model tiny at {server.url}" in found.output
        server.listed = [{"id": "small"}, {"id": "large"}]
        server.model = "large"
        found = CliRunner().invoke(main, call)
    assert found.exit_code == 2
    assert "was asked for 'tiny' and answers as 'large'" in found.output
    assert "lists: small, large" in found.output

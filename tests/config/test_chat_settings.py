"""`chat_template`, `chat_template_kwargs` and `strip_reasoning`: read, checked, part of the key."""

import json
from pathlib import Path
from typing import Any

import pytest

from mllm_shapx.config.chat_templates import read_template, template_variables
from mllm_shapx.config.loading import load_config, schema
from mllm_shapx.errors import ConfigError
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.planning.sweep import expand

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}{{ mood }}\n"


def config(folder: Path, name: str = "study.json", connector: str = "hf_text", **options: Any) -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    data = {
        "experiment_set_id": "study",
        "connector": connector,
        "connector_kwargs": {"model_id": "acme/chat", **options},
        "experiments": [{"explainer_type": "exact"}],
    }
    path.write_text(json.dumps(data))
    return path


def run_of(path: Path) -> RunSpec:
    return expand(load_config(path).experiment_set).runs[0]


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    (problem,) = caught.value.problems
    return str(problem)


def test_a_template_is_a_file_beside_the_config_or_the_text_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways give one text, one generation key and one spec: the content counts, not the path."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "chat.jinja").write_text(TEMPLATE)
    (tmp_path / "other.jinja").write_text(TEMPLATE)
    written = [
        config(folder, "a.json", chat_template="chat.jinja"),
        config(folder, "b.json", chat_template="other.jinja"),
        config(folder, "c.json", chat_template=str(folder / "chat.jinja")),
        config(folder, "d.json", chat_template=TEMPLATE),
    ]
    for path in written:
        run = run_of(path)
        assert run.connector_kwargs.chat_template == TEMPLATE
        assert run.result_settings["connector_kwargs"]["chat_template"] == TEMPLATE
        assert load_config(path).data["connector_kwargs"]["chat_template"] == TEMPLATE
    assert len({run_of(path).generation_key for path in written}) == 1


def test_a_template_that_a_base_names_is_found_from_the_base(tmp_path: Path) -> None:
    """As other paths are."""
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "chat.jinja").write_text(TEMPLATE)
    config(shared, "base.json", chat_template="chat.jinja")
    child = tmp_path / "child.json"
    child.write_text(json.dumps({"base": "shared/base.json", "experiment_set_id": "child"}))
    assert run_of(child).connector_kwargs.chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("written", "content", "said"),
    [
        ("gone.jinja", None, "there is no file gone.jinja, and it is no template text"),
        ("", None, "is empty"),
        (".", None, "there is no file ."),
        ("chat.jinja", b"Hello, {user}", "holds no chat template: there is no {{ or {% in it"),
        ("chat.jinja", b"\xff\xfe{\x00", "is not UTF-8 text (byte 0)"),
        ("chat.jinja", b"{{ x }}" + b" " * (1 << 20), "larger than 1 MiB"),
        ("chat.jinja", b"{% for m in messages %}\n{{ m.content }}", "jinja cannot read the template: "),
        ("{{ messages | nothing }}", None, "No filter named 'nothing'. (line 1)"),
        ("{{ messages[0 }}", None, "(line 1)"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", None, "jinja cannot read the template: "),
        ("x" * 5000, None, "long for a path"),
        ("a\0b", None, "holds the control character"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_read_is_named_with_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, content: bytes | None, said: str
) -> None:
    """Missing, empty, no text, too large, bad syntax: one message that says what to give."""
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "chat.jinja").write_bytes(content)
    message = refusal(config(tmp_path, chat_template=written))
    assert message.startswith("connector_kwargs.chat_template: ")
    assert said in message
    assert "give the path of a jinja file, or the template's text" in message


def test_templates_of_transformers_are_read(tmp_path: Path) -> None:
    """Its own tags and filters are known: generation marks, breaks and continues, tojson, the date."""
    text = (
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson(indent=2) }}{% endgeneration %}{% endfor %}"
        "{% set day = strftime_now('%d') %}{{ day }}{{ raise_exception('no') if tools }}{{ enable_thinking }}"
    )
    (tmp_path / "chat.jinja").write_text(text)
    assert read_template("chat.jinja", tmp_path / "chat.jinja") == text
    assert template_variables(text) == {
        "messages", "strftime_now", "raise_exception", "tools", "enable_thinking"
    }  # fmt: skip


def test_each_setting_is_part_of_the_generation_key_only_when_it_is_set(tmp_path: Path) -> None:
    """Answers stored before these keys existed stay known; each of them asks for answers of its own."""
    bare = run_of(config(tmp_path))
    unset = run_of(config(tmp_path, chat_template=None, chat_template_kwargs=None, strip_reasoning=False))
    empty = run_of(config(tmp_path, chat_template_kwargs={}))
    assert unset.generation_settings == empty.generation_settings == bare.generation_settings
    assert bare.generation_key == "5feb37aac0426204"
    assert not {"chat_template", "chat_template_kwargs", "strip_reasoning"} & set(bare.generation_settings)
    settings: list[dict[str, Any]] = [
        {"chat_template": TEMPLATE},
        {"chat_template": TEMPLATE + " "},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": {"enable_thinking": True, "tools": [{"name": None}]}},
        {"strip_reasoning": True},
    ]
    runs = [run_of(config(tmp_path, **each)) for each in settings]
    assert len({run.generation_key for run in (bare, *runs)}) == 6
    for run, setting in zip(runs, settings, strict=True):
        assert setting.items() <= run.generation_settings.items()
        assert setting.items() <= run.result_settings["connector_kwargs"].items()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"chat_template_kwargs": {"add_generation_prompt": False}},
         "connector_kwargs.chat_template_kwargs.add_generation_prompt: is no variable of a chat template"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs.tokenize: is no variable"),
        ({"chat_template_kwargs": ["enable_thinking"]}, "_kwargs: found a list, wanted an object"),
        ({"strip_reasoning": "yes"}, 'connector_kwargs.strip_reasoning: found "yes", wanted true or false'),
        ({"chat_template": 3}, "connector_kwargs.chat_template: found 3, wanted text"),
        ({"chat_templat": "a"}, "chat_template"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_by_its_key(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    """Arguments of apply_chat_template that are not the user's, other types, mistyped keys."""
    assert said in refusal(config(tmp_path, **options))


def test_other_connectors_do_not_take_them(tmp_path: Path) -> None:
    """A setting that would be ignored is refused."""
    message = refusal(config(tmp_path, connector="liquid_audio", strip_reasoning=True))
    assert 'is read by connectors "hf_text" and "openai" alone, not by "liquid_audio"' in message
    message = refusal(config(tmp_path, connector="liquid_audio", chat_template_kwargs={"thinking": False}))
    assert 'is read by connector "hf_text" alone, not by "liquid_audio"' in message


def test_sanitized_control_tokens_exclude_a_prefill(tmp_path: Path) -> None:
    """Transformers cannot sanitize a text that is continued."""
    path = config(tmp_path, chat_template_kwargs={"sanitize_control_tokens": True})
    load_config(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat": {"assistant_prefill": "Well,"}}))
    assert "cannot be had with an assistant_prefill" in refusal(path)


def test_reasoning_in_the_models_own_embeddings_is_warned_of(tmp_path: Path) -> None:
    """The cut is one of texts; states of the model cover all tokens. An encoder reads the text alone."""
    path = config(tmp_path, strip_reasoning=True)
    assert load_config(path).warnings == ()
    data = json.loads(path.read_text()) | {"shap": {"similarity": "CosineSimilarity"}}
    path.write_text(json.dumps(data))
    (warning,) = load_config(path).warnings
    assert "connector_kwargs.strip_reasoning: CosineSimilarity compares the model's own states" in warning
    path.write_text(json.dumps(data | {"embedding": {"model_id": "acme/encoder"}}))
    assert load_config(path).warnings == ()


def test_the_schema_has_them() -> None:
    """With their types."""
    properties = schema()["$defs"]["ConnectorKwargs"]["properties"]
    assert properties["strip_reasoning"]["type"] == "boolean"
    kinds = {name: [each["type"] for each in properties[name]["anyOf"]] for name in
             ("chat_template", "chat_template_kwargs")}  # fmt: skip
    assert kinds == {"chat_template": ["string", "null"], "chat_template_kwargs": ["object", "null"]}

"""What a text model's files say before anything is loaded: their commit, and that they can be a model."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer

from mllm_shapx.config.models import ExperimentSet
from mllm_shapx.errors import ModelError
from mllm_shapx.models.identity import directory_digest
from mllm_shapx.models.registry import load_model, model_directories, model_identity
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.planning.sweep import expand
from mllm_shapx.records.spec import differences

Directories = Callable[[str], Path]
POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def run_of(model_id: Path | str, **options: Any) -> RunSpec:
    """Return the run of a config with these connector_kwargs."""
    settings = {
        "experiment_set_id": "t",
        "connector": "hf_text",
        "device": "cpu",
        "connector_kwargs": {"model_id": str(model_id), "dtype": "float32", **options},
        "generation": {"text_temperature": 0.0},
        "experiments": [{"explainer_type": "exact"}],
    }
    return expand(ExperimentSet.model_validate(settings)).runs[0]


def commit_of(model_id: Path | str, **options: Any) -> str:
    """Return the commit of a model, as results record it."""
    return model_identity(run_of(model_id, **options).model_settings, Path("nowhere.json"))[1]


def refusal_of(model_id: Path | str, **options: Any) -> str:
    """Return the message that a model is refused with, before anything is loaded."""
    with pytest.raises(ModelError) as caught:
        commit_of(model_id, **options)
    return str(caught.value)


@pytest.fixture
def llama(model_directory: Directories, tmp_path: Path) -> Path:
    """Return a copy of a small Llama's directory, to be changed."""
    return Path(shutil.copytree(model_directory("llama"), tmp_path / "llama"))


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    """Return a LoRA adapter on the small Llama."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(path: Path, **keys: Any) -> None:
    """Write keys into a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


# --- identity


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
)
def test_every_file_that_decides_answers_is_part_of_the_commit(llama: Path, name: str) -> None:
    """A changed byte, and a file that comes or goes, make another model."""
    path = llama / name
    path.exists() or path.write_text("{}")
    before = commit_of(llama)
    content = path.read_bytes()
    path.write_bytes(content + b" ")
    changed = commit_of(llama)
    path.unlink()
    assert len({before, changed, commit_of(llama)}) == 3
    path.write_bytes(content)
    assert commit_of(llama) == before


def test_links_are_followed_to_the_models_files(llama: Path, tmp_path: Path) -> None:
    """A linked model is the model, and a change below a linked folder is noticed."""
    (tmp_path / "link").symlink_to(llama)
    assert commit_of(tmp_path / "link") == commit_of(llama)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "own.py").write_text("a = 1")
    (llama / "code").symlink_to(tmp_path / "code")
    before = commit_of(llama)
    (tmp_path / "code" / "own.py").write_text("a = 2")
    linked = commit_of(llama)
    assert linked != before
    (llama / "code").unlink()
    shutil.copytree(tmp_path / "code", llama / "code")
    assert commit_of(tmp_path / "link") == linked


def test_a_link_in_a_circle_ends(llama: Path) -> None:
    """A folder that is linked below itself is read once."""
    (llama / "sub").mkdir()
    (llama / "sub" / "notes.txt").write_text("x")
    before = commit_of(llama)
    (llama / "sub" / "again").symlink_to(llama)
    assert len({before, commit_of(llama)}) == 1


def test_an_adapter_is_part_of_the_commit_and_of_the_settings(llama: Path, adapter: Path) -> None:
    """Base and adapter each stand in the commit; a run with an adapter shares no answers with one without."""
    base, both = run_of(llama), run_of(llama, adapter=str(adapter))
    commit = commit_of(llama, adapter=str(adapter))
    assert commit == f"{directory_digest(llama)}+{directory_digest(adapter)}"
    assert base.generation_key != both.generation_key
    change(adapter / "adapter_config.json", lora_alpha=99)
    assert commit_of(llama, adapter=str(adapter)) != commit


def test_the_gguf_file_counts_and_its_siblings_do_not(llama: Path) -> None:
    """Of several quantizations the one that is loaded decides."""
    for name in ("q4.gguf", "q8.gguf"):
        (llama / name).write_bytes(b"GGUF" + name.encode())
    before = commit_of(llama, gguf_file="q4.gguf")
    assert commit_of(llama, gguf_file="q8.gguf") != before
    (llama / "q8.gguf").write_bytes(b"GGUF other")
    assert commit_of(llama, gguf_file="q4.gguf") == before
    (llama / "q4.gguf").write_bytes(b"GGUF other")
    assert commit_of(llama, gguf_file="q4.gguf") != before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization", "4bit"),
        ("adapter", "org/lora"),
        ("trust_remote_code", True),
        ("gguf_file", "q4.gguf"),
    ],
)
def test_each_loading_key_changes_the_generation_key_and_the_result_settings(key: str, value: Any) -> None:
    """Unset keys leave both as they were, so that older results still match."""
    plain, changed = run_of("org/model"), run_of("org/model", **{key: value})
    unset = run_of("org/model", **{key: None if key != "trust_remote_code" else False})
    assert key not in plain.generation_settings
    assert key not in plain.result_settings["connector_kwargs"]
    assert unset.generation_key == plain.generation_key != changed.generation_key
    found = differences(plain.result_settings, changed.result_settings)
    assert found == [f"connector_kwargs.{key}"]


# --- files that are not whole


def test_weights_of_another_length_than_their_header_says_are_refused(llama: Path) -> None:
    """The message has the file's name and size."""
    path = llama / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1000])
    assert f"model.safetensors ({len(content) - 1000:,} bytes) is truncated" in refusal_of(llama)
    path.write_bytes(content + b"x")
    assert "model.safetensors" in refusal_of(llama)


@pytest.mark.parametrize("kept", [0, 5, 100])
def test_weights_cut_in_their_header_are_refused(llama: Path, kept: int) -> None:
    """An empty file, too."""
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert f"model.safetensors ({kept} bytes) is truncated, damaged or not a safetensors file" in refusal_of(
        llama
    )


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_is_told_from_the_file(llama: Path, name: str) -> None:
    """A clone without LFS holds texts of three lines in place of the files."""
    (llama / name).write_text(POINTER)
    assert f"{name} is a Git LFS pointer" in refusal_of(llama)


def test_shards_that_are_missing_are_named(llama: Path) -> None:
    """The index lists them."""
    (llama / "model.safetensors").rename(llama / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    said = refusal_of(llama)
    assert "1 of 2 weight files" in said
    assert "model-00002-of-00002.safetensors" in said


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", "\x00\x01"])
def test_a_config_that_is_no_json_object_is_refused(llama: Path, name: str, content: str) -> None:
    """Transformers would go on without the generation config."""
    (llama / name).write_text(content)
    assert f": {name} " in refusal_of(llama)


def test_a_truncated_archive_of_pytorch_is_refused(llama: Path) -> None:
    import torch
    from safetensors.torch import load_file

    path = llama / "pytorch_model.bin"
    torch.save(load_file(llama / "model.safetensors"), path)
    (llama / "model.safetensors").unlink()
    assert commit_of(llama)
    path.write_bytes(path.read_bytes()[:-1000])
    assert "pytorch_model.bin is truncated" in refusal_of(llama)


def test_a_trainers_leftovers_are_no_weights(llama: Path) -> None:
    """`training_args.bin` beside config.json does not make a model."""
    (llama / "model.safetensors").unlink()
    (llama / "training_args.bin").write_bytes(b"x")
    assert "lack of weights" in refusal_of(llama)


# --- kinds of models


def test_an_encoder_decoder_is_refused_by_its_config(llama: Path) -> None:
    change(llama / "config.json", model_type="t5", is_encoder_decoder=True)
    assert "is an encoder-decoder model (t5); hf_text takes causal language models only" in refusal_of(llama)


def test_a_masked_language_model_is_refused_by_its_config(llama: Path) -> None:
    change(llama / "config.json", model_type="bert", architectures=["BertForMaskedLM"])
    assert "is a masked language model (BertForMaskedLM)" in refusal_of(llama)
    change(llama / "config.json", is_decoder=True)
    assert commit_of(llama)


def test_code_of_a_models_own_is_refused_unless_trusted_or_known(llama: Path) -> None:
    """A model that transformers has code for runs that, whatever auto_map says."""
    change(llama / "config.json", auto_map={"AutoModelForCausalLM": "own.OwnModel"})
    assert commit_of(llama)
    change(llama / "config.json", model_type="own")
    assert "set connector_kwargs.trust_remote_code to true" in refusal_of(llama)
    assert commit_of(llama, trust_remote_code=True)


# --- adapters


def test_a_directory_with_a_model_and_an_adapter_is_ambiguous(llama: Path, adapter: Path) -> None:
    """The base alone would answer, or both, by whether PEFT is installed."""
    for path in adapter.iterdir():
        shutil.copy(path, llama / path.name)
    said = refusal_of(llama)
    assert "holds a model and an adapter" in said
    assert "connector_kwargs.adapter" in said


def answers_of(run: RunSpec) -> tuple[list[str], tuple[str, ...]]:
    """Load a run's model; return its answers to a few prompts, and its notes."""
    from model_kit import answer_in_batches, conversations

    from mllm_shapx.models.base import Decoding
    from mllm_shapx.models.hf_text import HfTextModel

    path, commit = model_identity(run.model_settings, Path("nowhere.json"))
    model = load_model(run.model_settings, path, commit)
    assert isinstance(model, HfTextModel)
    assert model.identity.revision == commit
    given = answer_in_batches(model, conversations(6), Decoding(max_new_tokens=6), 6)
    return [answer.text for answer in given], model.notes


@pytest.mark.parametrize("base", ["absolute", "beside the adapter"])
def test_a_directory_that_holds_an_adapter_alone_is_loaded_on_its_base(
    llama: Path, adapter: Path, base: str
) -> None:
    """As `model_id` it is the same model as its base with the adapter."""
    change(
        adapter / "adapter_config.json",
        base_model_name_or_path=str(llama) if base == "absolute" else "../llama",
    )
    alone, both = run_of(adapter), run_of(llama, adapter=str(adapter))
    found = [path.resolve() for path in model_directories(alone.model_settings, adapter)]
    assert (
        found
        == [path.resolve() for path in model_directories(both.model_settings, llama)]
        == [llama, adapter]
    )
    assert commit_of(adapter) == commit_of(llama, adapter=str(adapter))
    texts, notes = answers_of(alone)
    assert texts == answers_of(both)[0]
    assert any(str(adapter) in note for note in notes)


def test_a_relative_adapter_is_found_beside_the_config(llama: Path, adapter: Path, tmp_path: Path) -> None:
    run, config = run_of("llama", adapter="adapter"), tmp_path / "study.json"
    path, commit = model_identity(run.model_settings, config)
    assert commit == commit_of(llama, adapter=str(adapter))
    assert load_model(run.model_settings, path, commit, config).identity.revision == commit


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shutil.rmtree, "there is no directory"),
        (lambda adapter: (adapter / "adapter_config.json").unlink(), "is no adapter of PEFT"),
        (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), "holds no weights of an adapter"),
        (lambda adapter: (adapter / "adapter_model.safetensors").write_text(POINTER), "Git LFS pointer"),
        (lambda adapter: (adapter / "adapter_config.json").write_text("{"), "is not JSON"),
    ],
    ids=["missing", "no config", "no weights", "pointer", "no JSON"],
)
def test_a_broken_adapter_is_refused_by_its_key(
    llama: Path, adapter: Path, spoil: Callable[[Path], Any], said: str
) -> None:
    spoil(adapter)
    message = refusal_of(llama, adapter=str(adapter))
    assert said in message
    assert "connector_kwargs.adapter" in message


def test_an_adapter_without_its_base_names_the_base(adapter: Path) -> None:
    change(adapter / "adapter_config.json", base_model_name_or_path="/no/such/base")
    assert "base_model_name_or_path of connector_kwargs.model_id" in refusal_of(adapter)
    change(adapter / "adapter_config.json", base_model_name_or_path=None)
    assert "names no base_model_name_or_path" in refusal_of(adapter)


@pytest.mark.parametrize(
    ("package", "options"),
    [
        ("peft", {"adapter": "."}),
        ("gguf", {"gguf_file": "q4.gguf"}),
        ("bitsandbytes", {"quantization": "8bit"}),
    ],
)
def test_a_setting_whose_package_is_missing_says_how_to_install_it(
    llama: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, package: str, options: dict[str, str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    given = {key: str(adapter) if value == "." else value for key, value in options.items()}
    said = refusal_of(llama, **given)
    assert f"needs the package {package}, which is not installed: pip install 'mllm-shapx[" in said


# --- GGUF


def test_a_gguf_file_is_named_inside_its_directory(llama: Path) -> None:
    """A path of the file itself, a missing file and another kind of file each say what to write."""
    gguf = llama / "tiny.gguf"
    gguf.write_bytes(b"GGUF....")
    assert "connector_kwargs.gguf_file 'tiny.gguf'" in refusal_of(gguf)
    assert "there is no file 'other.gguf'" in refusal_of(llama, gguf_file="other.gguf")
    gguf.write_bytes(b"PK..")
    assert "is not a GGUF file" in refusal_of(llama, gguf_file="tiny.gguf")
    (llama / "model.safetensors").unlink()
    assert "to load tiny.gguf, name it in connector_kwargs.gguf_file" in refusal_of(llama)


# --- the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Serve a hub on loopback and point this process to it."""
    with HubServer() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.url)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            server.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def test_a_hub_models_config_is_read_before_anything_is_loaded(hub: HubServer) -> None:
    """Encoder-decoders and masked models of the hub are refused as local ones are."""
    for kind, config in {
        "t5": {"model_type": "t5", "is_encoder_decoder": True},
        "bert": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        "own": {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "own.Own"}},
        "fine": {"model_type": "llama"},
    }.items():
        hub.add("model", f"org/{kind}", {"config.json": json.dumps(config).encode()})
    assert "encoder-decoder" in refusal_of("org/t5")
    assert "masked language model" in refusal_of("org/bert")
    assert "trust_remote_code" in refusal_of("org/own")
    assert len(commit_of("org/fine")) == 40


def test_adapters_and_gguf_files_of_the_hub_are_pinned(hub: HubServer, llama: Path) -> None:
    """The commit of each repository stands in the model's."""
    base = hub.add("model", "org/base", {"config.json": b'{"model_type": "llama"}'})
    lora = hub.add("model", "org/lora", {"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
    packed = hub.add("model", "org/packed", {"q4.gguf": b"GGUF"})
    assert commit_of("org/base", adapter="org/lora") == f"{base}+{lora}"
    assert commit_of(llama, adapter="org/lora") == f"{directory_digest(llama)}+{lora}"
    assert commit_of("org/packed", gguf_file="q4.gguf") == packed
    assert "has no q8.gguf" in refusal_of("org/packed", gguf_file="q8.gguf")
    assert "is not an adapter of PEFT" in refusal_of("org/base", adapter="org/base")
    assert "holds an adapter (adapter_config.json); name its base model here" in refusal_of("org/lora")


def test_unreadable_files_are_named(llama: Path) -> None:
    if os.geteuid() == 0:
        # Root passes every permission; other users run this.
        pytest.skip("root reads everything")
    (llama / "tokenizer.json").chmod(0)
    assert "tokenizer.json: Permission denied" in refusal_of(llama)

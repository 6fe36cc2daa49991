"""Config files: what is read, what is inherited, and what is said about wrong ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from mllm_shapx.config.loading import load_config, resolve_path, schema
from mllm_shapx.errors import ConfigError

EXACT = {"explainer_type": "exact"}


def write(folder: Path, name: str, **data: Any) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def config(folder: Path, **data: Any) -> Path:
    return write(folder, "study.json", **{"experiment_set_id": "study", "experiments": [EXACT], **data})


def problems(path: Path) -> dict[str, str]:
    """Return place -> message and fix of everything that is wrong with the file."""
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))
    return {problem.path: f"{problem.message} | {problem.fix}" for problem in caught.value.problems}


def test_a_minimal_config_gets_the_documented_defaults(tmp_path: Path) -> None:
    loaded = load_config(config(tmp_path))
    settings = loaded.experiment_set
    assert (settings.connector, settings.dataset.repo_id) == ("liquid_audio", "Pawlo77/mllm-shap")
    assert settings.model_revision == "3f9322d8cfdcf3df281227af9ca80d948f5ba878"
    assert (settings.selection.shuffle_seed, settings.generation.max_new_tokens) == (0, 32)
    assert loaded.warnings == ()
    assert loaded.data == {"experiment_set_id": "study", "experiments": [EXACT]}


def test_a_base_is_merged_deeply_lists_are_replaced_and_the_child_wins(tmp_path: Path) -> None:
    write(tmp_path, "common/root.json", generation={"max_new_tokens": 8, "text_temperature": 0}, device="cpu")
    write(
        tmp_path,
        "common/middle.json",
        base="root.json",
        generation={"max_new_tokens": 16},
        experiments=[EXACT, {"num_samples": [4]}],
    )
    path = config(tmp_path / "studies", base="../common/middle.json", generation={"text_top_k": 3})
    loaded = load_config(path)
    assert loaded.data["generation"] == {"max_new_tokens": 16, "text_temperature": 0, "text_top_k": 3}
    assert loaded.data["experiments"] == [EXACT]
    assert loaded.experiment_set.device == "cpu"
    assert "base" not in loaded.data


def test_a_circle_of_bases_is_refused_with_the_whole_chain(tmp_path: Path) -> None:
    write(tmp_path, "b.json", base="study.json")
    found = problems(config(tmp_path, base="b.json"))
    chain = " -> ".join(str(tmp_path / name) for name in ("study.json", "b.json", "study.json"))
    assert chain in found["base"]


def test_a_missing_base_is_refused_with_the_chain_that_names_it(tmp_path: Path) -> None:
    write(tmp_path, "b.json", base="gone.json")
    found = problems(config(tmp_path, base="b.json"))
    assert "no file" in found["base"]
    assert f"{tmp_path / 'b.json'} -> {tmp_path / 'gone.json'}" in found["base"]


def test_a_problem_that_was_inherited_names_the_file_it_stands_in(tmp_path: Path) -> None:
    write(tmp_path, "common/base.json", generation={"max_new_tokens": 0})
    path = config(tmp_path, base="common/base.json", shap={"reducer": "Mean"})
    found = problems(path)
    assert "common/base.json" in found["generation.max_new_tokens"]
    assert "base.json" not in found["shap.reducer"]


def test_a_dataset_path_written_in_a_base_is_found_from_the_base_s_folder(tmp_path: Path) -> None:
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "rows.csv").write_text("prompt\nhello\n")
    write(tmp_path, "common/base.json", dataset={"source": "local_csv", "path": "rows.csv"})
    path = config(tmp_path / "studies", base="../common/base.json")
    dataset = load_config(path).experiment_set.dataset
    assert dataset.path is not None
    assert resolve_path(dataset.path, path).read_text() == "prompt\nhello\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1,\n  "b" 2}', ("line 2", "column 7")),
        ('{"experiments": [],}', ("line 1", "comma")),
        ("{'a': 1}", ("line 1, column 2", "double quotes")),
        ("// note\n{}", ("line 1", "no comments")),
        ("", ("line 1, column 1",)),
        ("[1, 2]", ("one JSON object",)),
        ('{"generation": {"text_temperature": NaN}}', ("NaN",)),
        ("[" * 100_000, ("nested too deeply",)),
        ('{"a": ' + "9" * 5000 + "}", ("is not JSON",)),
    ],
)
def test_what_is_no_json_object_is_refused_with_its_place(tmp_path: Path, text: Any, words: Any) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    found = problems(path)[""]
    assert all(word in found for word in words), found


def test_bytes_that_are_no_text_and_files_that_cannot_be_read_are_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(b'{"a": "\xff"}')
    assert "UTF-8" in problems(path)[""]
    assert "no file" in problems(tmp_path / "gone.json")[""]
    assert "directory" in problems(tmp_path)[""]


def test_a_byte_order_mark_and_a_schema_key_are_accepted(tmp_path: Path) -> None:
    path = config(tmp_path, **{"$schema": "schema.json"})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_config(path).experiment_set.experiment_set_id == "study"


def test_a_key_written_twice_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "twice.json"
    path.write_text(
        '{"experiments": [{"explainer_type": "exact", "name": "a", "name": "b"}], "device": 1, "device": 2}'
    )
    found = problems(path)
    assert set(found) == {"device", "experiments[0].name"}
    assert "more than once" in found["device"]


def test_all_problems_are_listed_at_once_each_with_its_place(tmp_path: Path) -> None:
    path = config(
        tmp_path,
        experiment_set_id="../x",
        connector="hf_text",
        connector_kwargs={"batch_size": 0},
        modality={"output_modality": "audio"},
        selection={"min_prompt_tokens": 5, "max_prompt_tokens": 3},
        experiments=[
            EXACT,
            "mc",
            {"explainer_type": "exact", "fractions": [0, 0.5, 2, "a"]},
            {"explainer_type": "cc"},
        ],
    )
    assert set(problems(path)) == {
        "experiment_set_id",
        "connector_kwargs.batch_size",
        "modality.output_modality",
        "selection.min_prompt_tokens",
        "experiments[1]",
        "experiments[2].fractions[0]",
        "experiments[2].fractions[2]",
        "experiments[2].fractions[3]",
        "experiments[3]",
    }


def test_a_check_across_keys_is_left_out_when_it_hangs_on_a_refused_value(tmp_path: Path) -> None:
    path = config(tmp_path, modality={"input_modality": "audi"}, audio_segmentation={"method": "sgpa"})
    assert set(problems(path)) == {"modality.input_modality"}


@pytest.mark.parametrize(
    ("data", "place", "hint"),
    [
        ({"experimnts": []}, "experimnts", 'did you mean "experiments"?'),
        ({"max_new_tokens": 3}, "max_new_tokens", 'it belongs in "generation"'),
        ({"num_sampels": [3]}, "num_sampels", '"num_samples" in "experiments[]"'),
        ({"dataset": {"Subset": "a"}}, "dataset.Subset", 'did you mean "subset"?'),
        ({"dataset": {"use_parket": True}}, "dataset.use_parket", 'did you mean "use_parquet"?'),
        ({"shap": {"connector": "hf_text"}}, "shap.connector", "the top of the file"),
        ({"experiments": [{"fractoins": [1]}]}, "experiments[0].fractoins", 'did you mean "fractions"?'),
        (
            {"experiments": [{"explainer_type": "hierarchical", "hierarchical": {"k": 3}}]},
            "experiments[0].hierarchical.k",
            'did you mean "ks"?',
        ),
        ({"selection": {"filters": [{"colum": "a"}]}}, "selection.filters[0].colum", '"column"'),
        ({"zzzz": 1}, "zzzz", "known here: experiment_set_id"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_known_one(
    tmp_path: Path, data: Any, place: Any, hint: Any
) -> None:
    found = problems(config(tmp_path, **data))
    assert f'unknown key "{place.rpartition(".")[2]}"' in found[place]
    assert hint in found[place]


@pytest.mark.parametrize(
    ("data", "place", "hints"),
    [
        (
            {"experiments": [{"explainer_type": "limited_nyman", "fractions": [1]}]},
            "experiments[0].explainer_type",
            ('did you mean "limited_neyman"?', "allowed: exact", "complementary"),
        ),
        ({"shap": {"similarity": "cosine"}}, "shap.similarity", ("CosineSimilarity", "Euclidean")),
        ({"device": "gpu"}, "device", ("allowed: cuda, cpu, mps",)),
        (
            {
                "experiments": [
                    {"explainer_type": "hierarchical", "hierarchical": {"first_layer_type": "mcc"}}
                ]
            },
            "experiments[0].hierarchical.first_layer_type",
            ('"mc"', "limited_cc"),
        ),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_one_and_all_allowed(
    tmp_path: Path, data: Any, place: Any, hints: Any
) -> None:
    found = problems(config(tmp_path, **data))
    assert all(hint in found[place] for hint in hints), found


@pytest.mark.parametrize(
    ("data", "place", "message"),
    [
        (
            {"generation": {"max_new_tokens": "32"}},
            "generation.max_new_tokens",
            'found "32", wanted a whole number',
        ),
        (
            {"generation": {"max_new_tokens": 3.5}},
            "generation.max_new_tokens",
            "found 3.5, wanted a whole number",
        ),
        (
            {"generation": {"max_new_tokens": None}},
            "generation.max_new_tokens",
            "found null, wanted a whole number",
        ),
        (
            {"generation": {"text_temperature": True}},
            "generation.text_temperature",
            "found true, wanted a number",
        ),
        ({"runtime": {"verbose": "yes"}}, "runtime.verbose", 'found "yes", wanted true or false'),
        ({"chat": {"system_prompt": 3}}, "chat.system_prompt", "found 3, wanted text in quotes"),
        ({"dataset": []}, "dataset", "found a list, wanted an object"),
        ({"experiments": EXACT}, "experiments", "found an object, wanted a list"),
        ({"experiments": []}, "experiments", "must not be empty"),
        (
            {"connector_kwargs": {"batch_size": "x"}},
            "connector_kwargs.batch_size",
            'wanted a whole number or "auto"',
        ),
        ({"dataset": {"use_parquet": 1}}, "dataset.use_parquet", "true or false"),
        ({"experiments": [{"num_samples": [0]}]}, "experiments[0].num_samples[0]", "at least 1, or -1"),
        (
            {"experiments": [{"linear": 11}]},
            "experiments[0].linear",
            "found 11, wanted a number of at most 10",
        ),
        ({"experiment_set_id": "x" * 151}, "experiment_set_id", "at most 150 characters"),
    ],
)
def test_a_wrong_value_is_answered_with_what_was_found_and_what_is_wanted(
    tmp_path: Path, data: Any, place: Any, message: Any
) -> None:
    assert message in problems(config(tmp_path, **data))[place]


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", "a b", "ä"])
def test_an_id_that_is_no_path_segment_is_refused(tmp_path: Path, name: Any) -> None:
    assert "one path segment" in problems(config(tmp_path, experiment_set_id=name))["experiment_set_id"]


def test_missing_required_keys_are_named(tmp_path: Path) -> None:
    found = problems(write(tmp_path, "study.json", device="cpu"))
    assert found == dict.fromkeys(("experiment_set_id", "experiments"), "is required and missing | ")


def test_old_configs_keep_working(tmp_path: Path) -> None:
    path = config(
        tmp_path,
        dataset={"use_parquet": False, "column_mapping": None},
        embedding={"model_id": None, "max_length": 32},
        wandb=None,
        shap={"mode": "static"},
        experiments=[
            {"explainer_type": "PRECISE", "num_samples": None},
            {"explainer_type": "mc", "num_samples": 20, "fractions": None},
            {
                "explainer_type": "hierarchical",
                "hierarchical": {
                    "ks": 4,
                    "shap_type": "Neyman",
                    "shap_fraction": [0.5],
                    "first_layer_fraction": None,
                },
            },
        ],
    )
    settings = load_config(path).experiment_set
    assert (settings.dataset.source, settings.shap.mode, settings.wandb.enabled) == (
        "hf_datasets",
        "STATIC",
        True,
    )
    assert [variant.explainer_type for variant in settings.experiments] == [
        "exact",
        "limited_mc",
        "hierarchical",
    ]
    hierarchical = settings.experiments[2].hierarchical
    assert hierarchical is not None
    assert (hierarchical.ks, hierarchical.shap_type, hierarchical.shap_fractions) == (
        (4,),
        "Neyman",
        (0.5,),
    )


def test_relative_paths_are_looked_for_from_the_working_directory_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    monkeypatch.chdir(here)
    file = there / "study.json"
    (there / "rows.csv").touch()
    assert resolve_path("rows.csv", file) == there / "rows.csv"
    assert resolve_path("rows*.csv", file) == there / "rows*.csv"
    (here / "rows.csv").touch()
    assert resolve_path("rows.csv", file) == Path("rows.csv")
    assert resolve_path(str(there / "rows.csv"), file) == there / "rows.csv"
    assert resolve_path("gone.csv", file) == Path("gone.csv")


def test_the_schema_accepts_what_is_accepted_and_refuses_what_is_refused(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema())
    validator.check_schema(schema())
    good: dict[str, Any] = {
        "$schema": "x",
        "experiment_set_id": "a",
        "device": "auto",
        "dataset": {"use_parquet": True},
        "selection": {"filters": [{"column": "a", "op": "in", "value": [1]}], "shuffle_seed": None},
        "experiments": [
            {"explainer_type": "mc", "num_samples": 3},
            {
                "explainer_type": "hierarchical",
                "hierarchical": {"ks": 3, "shap_fraction": 0.5, "shap_type": "cc"},
            },
        ],
    }
    assert list(validator.iter_errors(good)) == []
    load_config(config(tmp_path, **good))
    refused: list[dict[str, Any]] = [
        {"expriments": []},
        {"device": 3},
        {"generation": {"max_new_tokens": "a"}},
    ]
    for bad in refused:
        assert list(validator.iter_errors({**good, **bad}))

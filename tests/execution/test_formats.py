"""What a run leaves, field by field as formats.md says; and a run done again from its `spec.json` alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from small_study import ROOT, Study, results

from mllm_shapx.cli import main
from mllm_shapx.config.models import ExperimentSet
from mllm_shapx.reporting.reading import open_study

SAMPLE_FIELDS: dict[str, Any] = {
    "row_index": int,
    "language": str,
    "original_language": str,
    "runtime_sec": float,
    "n_calls": int,
    "model_calls": int,
    "prompt_texts": list,
    "input_modality": str,
    "output_modality": str,
    "attr_summary": dict,
    "conversation": list,
    "schema_version": int,
    "base_value": float,
    "grand_value": float,
    "response": str,
    "seed": int,
    "num_players": int,
    "raw_values": list,
    "neyman_steps": int | None,
}

SPEC_FIELDS: dict[str, Any] = {
    "experiment_set_id": str,
    "run_name": str,
    "run_slug": str,
    "connector": str,
    "connector_kwargs": dict,
    "device": str | None,
    "dataset": dict,
    "selection": dict,
    "generation": dict,
    "modality": dict,
    "audio_segmentation": dict,
    "shap": dict,
    "embedding": dict,
    "chat": dict,
    "variant": dict,
}

VARIANTS: list[dict[str, Any]] = [
    {"explainer_type": "exact"},
    {"explainer_type": "neyman", "fractions": [0.5], "name": "n"},
    {"explainer_type": "mc", "linear": [0.5], "seeds": [0, 1]},
    {
        "explainer_type": "standard_cc",
        "num_samples": [10],
        "shap_override": {"normalizer": "MinMaxNormalizer", "token_filter": "none", "seed": 3},
        "generation_override": {"max_new_tokens": 4},
    },
    {
        "explainer_type": "hierarchical",
        "name": "h",
        "hierarchical": {"ks": [2], "shap_type": "Neyman", "shap_fraction": 0.5, "first_layer_type": "exact"},
    },
    {"explainer_type": "hierarchical", "hierarchical": {"shap_type": "exact", "shap_num_samples": [4]}},
]

NAMES = {
    "exact",
    "n_limited_neyman_frac0_5",
    "limited_mc_lin0_5_seed0",
    "limited_mc_lin0_5_seed1",
    "standard_cc_ns10_seed3",
    "h_hier_neyman_k2_imp0_1_flexact_frac0_5",
    "hier_exact_k10_imp0_1_ns4",
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study with every kind of variant, without a system prompt, of paths relative to its config."""
    folder = tmp_path_factory.mktemp("formats")
    (folder / "model").symlink_to(ROOT / "demo" / "model")
    study = Study(
        folder,
        rows=3,
        words=4,
        settings={
            "connector_kwargs": {"model_id": "model", "dtype": "float32"},
            "dataset": {"source": "local_parquet", "path": "rows.parquet"},
            "selection": {"shuffle_seed": 5, "start_index": 1, "max_samples": 2},
            "chat": {"system_prompt": ""},
            "runtime": {"gc_interval": 2},
            "experiments": VARIANTS,
        },
    )
    end = study.call("--inline")
    assert end.code == 0, end.out
    return study


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def check_fields(data: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Hold that every field is there and of its type."""
    assert {name for name in fields if name not in data} == set()
    wrong = {name for name, kind in fields.items() if not isinstance(data[name], kind)}
    assert wrong == set()


def check_sample(data: Mapping[str, Any]) -> None:
    """Hold what formats.md says of one sample."""
    check_fields(data, SAMPLE_FIELDS)
    counts = data["attr_summary"]
    check_fields(counts, {"count_text_tokens": int, "count_audio_segments": int})
    assert len(data["raw_values"]) == data["num_players"]
    assert counts["count_text_tokens"] + counts["count_audio_segments"] == data["num_players"]
    first, *users, answer = data["conversation"]
    assert {role for entry in first for role in entry["roles"]} == {2}
    assert {role for entry in answer for role in entry["roles"]} == {1}
    for turn in data["conversation"]:
        for entry in turn:
            assert set(entry) == {"content_type", "roles", "content", "shap_values"}
            assert len(entry["roles"]) == len(entry["content"])
    texts = [entry for turn in users for entry in turn if entry["content_type"] == 0]
    if data["input_modality"] == "text":
        assert ["".join(entry["content"]) for entry in texts] == data["prompt_texts"]


def test_samples_and_checkpoints_have_every_field(study: Study) -> None:
    assert {path.name for path in study.output.iterdir() if path.is_dir()} == NAMES | {"generations"}
    for name in NAMES:
        samples = [read(path) for path in (study.output / name / "samples").iterdir()]
        assert len(samples) == 2
        for sample in samples:
            check_sample(sample)
            assert sample["conversation"][0] == [
                {"content_type": 0, "roles": [2], "content": [""], "shap_values": None}
            ]
            assert sample["neyman_steps"] == (2 if name == "n_limited_neyman_frac0_5" else None)
        checkpoint = read(study.output / name / "checkpoint.json")
        assert {"version", "completed_indices", "failed_indices", "next_index"} <= set(checkpoint)


def test_a_spec_has_the_resolved_values_in_the_configs_words(study: Study) -> None:
    specs = {name: read(study.output / name / "spec.json") for name in NAMES}
    for name, spec in specs.items():
        check_fields(spec, SPEC_FIELDS)
        assert (spec["run_name"], spec["run_slug"], spec["experiment_set_id"]) == (name, name, "study")
        assert {"explainer_type", "num_samples", "fraction", "linear", "hierarchical"} <= set(spec["variant"])
        assert (spec["embedding"], spec["chat"]["system_prompt"]) == ({}, "")
        assert spec["selection"]["start_index"] == 1
        assert spec["result_settings"]["connector_kwargs"]["model_id"] == "model"
    variants = {name: spec["variant"] for name, spec in specs.items()}
    assert variants["exact"]["explainer_type"] == "exact"
    assert (
        variants["n_limited_neyman_frac0_5"]["fraction"],
        variants["n_limited_neyman_frac0_5"]["name"],
    ) == (
        0.5,
        "n",
    )
    assert (variants["limited_mc_lin0_5_seed1"]["linear"], variants["limited_mc_lin0_5_seed1"]["seeds"]) == (
        0.5,
        [1],
    )
    assert variants["standard_cc_ns10_seed3"]["num_samples"] == 10
    assert specs["standard_cc_ns10_seed3"]["shap"]["normalizer"] == "MinMaxNormalizer"
    assert specs["standard_cc_ns10_seed3"]["generation"]["max_new_tokens"] == 4
    assert specs["exact"]["generation"]["max_new_tokens"] == 6
    hierarchical = variants["h_hier_neyman_k2_imp0_1_flexact_frac0_5"]["hierarchical"]
    assert (hierarchical["ks"], hierarchical["shap_type"], hierarchical["shap_fractions"]) == (
        [2],
        "Neyman",
        [0.5],
    )
    assert specs["limited_mc_lin0_5_seed0"]["result_settings"]["seed"] == 0
    assert "seed" not in specs["exact"]["result_settings"]


def test_an_experiment_set_built_from_a_spec_gives_equal_values(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = results(study.output)
    configs = []
    for number, name in enumerate(sorted(NAMES)):
        spec = read(study.output / name / "spec.json")
        blocks = {key: spec[key] for key in ExperimentSet.model_fields if key in spec}
        config = {
            **blocks,
            "experiments": [spec["variant"]],
            "experiment_set_id": f"again{number}",
            "output_root": str(tmp_path / "out"),
            "wandb": {"enabled": False},
        }
        configs.append(tmp_path / f"again{number}.json")
        configs[-1].write_text(json.dumps(config))
    named = [part for path in configs for part in ("--config", str(path))]
    end = CliRunner().invoke(main, ["run", "--inline", *named])
    assert end.exit_code == 0, end.output
    decisive = ("raw_values", "conversation", "seed", "n_calls", "base_value", "grand_value", "response")
    for number, name in enumerate(sorted(NAMES)):
        again = results(tmp_path / "out" / f"again{number}")
        assert {path for path in before if path.startswith(f"{name}/")} == set(again)
        for path in again:
            if "/samples/" in path:
                assert [again[path][key] for key in decisive] == [before[path][key] for key in decisive]


def test_repetitions_are_compared_with_the_exact_run(study: Study) -> None:
    files = open_study(str(study.output))
    references = {run.name: files.exact_run_for(run) for run in files.runs}
    assert {name for name, exact in references.items() if exact is not None and exact.name == "exact"} == (
        # It has other players, another normalizer and shorter answers.
        NAMES - {"standard_cc_ns10_seed3"}
    )


def test_the_plan_names_the_seeds(study: Study) -> None:
    told = CliRunner().invoke(main, ["plan", "--json", "--skip-data", "--config", str(study.config)])
    runs = json.loads(told.stdout)["runs"]
    assert {run["name"] for run in runs} == NAMES
    assert {run["name"]: run["seed"] for run in runs if run["seed"] is not None} == {
        "limited_mc_lin0_5_seed0": 0,
        "limited_mc_lin0_5_seed1": 1,
        "standard_cc_ns10_seed3": 3,
    }


def test_a_spoken_sample_has_every_field(tmp_path: Path) -> None:
    config = read(ROOT / "configs" / "demo_audio.json")
    config["output_root"] = str(tmp_path / "out")
    config["connector_kwargs"]["model_id"] = str(ROOT / "demo_audio" / "model")
    config["dataset"]["path"] = str(ROOT / "demo_audio" / "rows.parquet")
    config["experiments"] = [{"explainer_type": "mc", "num_samples": [-1]}]
    (tmp_path / "config.json").write_text(json.dumps(config))
    call = ["run", "--inline", "--max-samples", "1", "--config", str(tmp_path / "config.json")]
    end = CliRunner().invoke(main, call)
    assert end.exit_code == 0, end.output
    run = tmp_path / "out" / "demo_audio" / "limited_mc_ns-1"
    check_fields(read(run / "spec.json"), SPEC_FIELDS)
    (path,) = (run / "samples").iterdir()
    sample = read(path)
    check_sample(sample)
    assert sample["attr_summary"]["count_audio_segments"] == sample["num_players"]
    pieces = [piece for entry in sample["conversation"][1] for piece in entry["content"]]
    spoken = [piece for piece in pieces if isinstance(piece, dict)]
    assert len(spoken) == sample["num_players"]
    assert all(piece["_binary"] is True and piece["num_bytes"] > 0 for piece in spoken)
    assert (run / sample["audio_artifacts"]["inputs"][0]["path"]).is_file()

"""Studies with teacher-forced value functions: their values, and likelihoods that are read once."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mllm_shap import ExplainRunner, PluginContext, TransformersTextBackend, default_registry
from small_study import Study

from mllm_shapx.cli import main
from mllm_shapx.config.loading import load_config
from mllm_shapx.data.conversations import Row
from mllm_shapx.explaining.sample import open_row
from mllm_shapx.explaining.settings import GameSettings, explain_config
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.planning.sweep import expand

PROMPTS = ("please tell our tall sailor", "kindly remind my young painter")


def variant(value_function: str, **options: Any) -> dict[str, Any]:
    """Return an exact run by one value function."""
    chosen = {"value_function": value_function, "similarity": None, "value_options": options or None}
    return {"explainer_type": "exact", "name": value_function, "shap_override": chosen}


VARIANTS = [
    variant("tf_logprob"),
    {
        **variant("tf_logprob", reduce="sum"),
        "name": "sum",
        "explainer_type": "limited_cc",
        "num_samples": [14],
    },
    variant("tf_jsd", top_k=7),
    variant("contrastive", target="ready", foil="old stone"),
    variant("self_logprob"),
]


def study_in(folder: Path, *experiments: dict[str, Any], **settings: Any) -> Study:
    study = Study(folder, settings={"experiments": list(experiments), **settings})
    study.write_prompts(*PROMPTS)
    return study


def runs_of(study: Study) -> dict[str, RunSpec]:
    return {run.name: run for run in expand(load_config(study.config).experiment_set).runs}


def sample(study: Study, run: str, row: int = 0) -> dict[str, Any]:
    path = study.output / run / "samples" / f"sample_{row:05d}_result.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def outcome_of(printed: str) -> dict[str, Any]:
    """Return what `--json` printed, behind the lines of the progress."""
    found: dict[str, Any] = json.loads(
        printed[printed.index("{\n") :] if "{\n" in printed else printed.splitlines()[-1]
    )
    return found


def everything(study: Study) -> dict[str, Any]:
    """Return the numbers of all samples."""
    keys = ("raw_values", "base_value", "grand_value", "n_calls", "response")
    return {
        f"{run}/{row}": {key: sample(study, run, row)[key] for key in keys}
        for run in runs_of(study)
        for row in range(len(PROMPTS))
    }


def test_values_are_those_of_mllm_shaps_own_runner(
    tmp_path: Path, model_directory: Callable[[str], Path]
) -> None:
    """The model, the prompts and the forced texts are the library's: so are the values of every run."""
    model = str(model_directory("llama"))
    study = study_in(tmp_path, *VARIANTS, connector_kwargs={"model_id": model, "dtype": "float32"})
    study.write_prompts(prompt := "stone bridges near town")
    assert study.call("--inline").code == 0
    row = Row(0, (prompt,), (None,), (None,), "en", "unknown")
    backend: Any = None
    for run in runs_of(study).values():
        ours = sample(study, run.name)
        game = GameSettings(run.explainer_type, run.budget, run.seed_for(0))
        config = explain_config(run, game, ours["num_players"])
        backend = backend or TransformersTextBackend(
            PluginContext(config=config, registry=default_registry())
        )
        snapshot = open_row(row, run).snapshot
        theirs = asyncio.run(ExplainRunner(config, backend=backend).explain(snapshot)).result
        values = [
            value for turn in ours["conversation"] for entry in turn for value in entry["shap_values"] or ()
        ]
        # Probabilities of generated tokens come from other batches than the library's single prompts.
        near = 1e-5 if run.shap.reads == "log_probabilities" else 1e-6
        assert values == pytest.approx(list(theirs.values), abs=near), run.name
        assert max(map(abs, ours["raw_values"])) > 0.01, run.name
        assert ours["base_value"] == pytest.approx(theirs.base_value, abs=1e-5)
        assert ours["grand_value"] == pytest.approx(theirs.grand_value, abs=1e-5)


def test_coalitions_are_not_answered_and_their_likelihoods_are_read_once(tmp_path: Path) -> None:
    """Of 32 coalitions one is answered; the second run reads nothing, nor does a study that goes on."""
    logprob, jsd = variant("tf_logprob"), variant("tf_jsd")
    study = study_in(tmp_path, logprob, jsd)
    outcome = outcome_of(study.call("--inline", "--json").out)
    assert outcome["model_calls"] == len(PROMPTS) * (1 + 2**5)
    assert [sample(study, run)["n_calls"] for run in ("tf_logprob", "tf_jsd")] == [32, 32]
    assert [sample(study, run)["model_calls"] for run in ("tf_logprob", "tf_jsd")] == [33, 0]
    assert study.call(verb="verify").code == 0
    before = everything(study)

    mc = {
        **variant("tf_logprob", reduce="sum"),
        "name": "sum",
        "explainer_type": "limited_mc",
        "linear": [0.5],
    }
    study.write_config(experiments=[logprob, jsd, mc])
    resumed = study.call("--inline", "--resume")
    assert resumed.code == 0
    assert "no model is loaded" in resumed.out
    assert sample(study, "sum_limited_mc_lin0_5")["model_calls"] == 0
    whole = sample(study, "sum_limited_mc_lin0_5")["grand_value"] / sample(study, "tf_logprob")["grand_value"]
    assert whole == pytest.approx(round(whole)), "the sum is the mean times the number of tokens"

    study.write_config(experiments=[logprob, jsd])
    rescored = CliRunner().invoke(main, ["rescore", "--config", str(study.config), "--overwrite"])
    assert rescored.exit_code == 0, rescored.output
    assert everything(study) == before


def test_likelihoods_that_are_missing_are_counted_before_anything_is_written(tmp_path: Path) -> None:
    """Answers of every coalition are no likelihoods: rescore says how many the model would have to read."""
    study = study_in(tmp_path, {"explainer_type": "exact"})
    assert study.call("--inline").code == 0
    study.write_config(experiments=[{"explainer_type": "exact"}, variant("tf_logprob")])
    rescored = CliRunner().invoke(main, ["rescore", "--config", str(study.config)])
    assert rescored.exit_code == 2
    assert "64 likelihood(s) of 2 row(s) are not stored" in rescored.output
    assert not (study.output / "tf_logprob" / "samples").exists()


def test_a_top_k_that_was_not_stored_is_read_again_and_what_is_smaller_is_not(tmp_path: Path) -> None:
    """The distributions' first seven tokens are a part of the first twenty."""
    study = study_in(tmp_path, variant("tf_logprob"))
    assert study.call("--inline").code == 0
    study.write_config(experiments=[variant("tf_logprob"), variant("tf_jsd", top_k=20)])
    outcome = outcome_of(study.call("--inline", "--resume", "--json").out)
    assert outcome["model_calls"] == len(PROMPTS) * 2**5
    smaller = {**variant("tf_jsd", top_k=7), "name": "seven"}
    study.write_config(experiments=[variant("tf_logprob"), variant("tf_jsd", top_k=20), smaller])
    resumed = study.call("--inline", "--resume")
    assert "no model is loaded" in resumed.out
    alone = study_in(tmp_path / "alone", smaller)
    assert alone.call("--inline").code == 0
    assert sample(study, "seven")["raw_values"] == pytest.approx(
        sample(alone, "seven")["raw_values"], abs=1e-5
    )


def test_answers_without_probabilities_are_read_for_self_logprob(tmp_path: Path) -> None:
    """A similarity's answers are used again: their tokens are forced, and values are the same."""
    exact, confidence = {"explainer_type": "exact"}, variant("self_logprob")
    study = study_in(tmp_path, exact)
    assert study.call("--inline").code == 0
    study.write_config(experiments=[exact, confidence])
    outcome = outcome_of(study.call("--inline", "--resume", "--json").out)
    assert outcome["model_calls"] == len(PROMPTS) * 2**5
    together = study_in(tmp_path / "together", exact, confidence)
    outcome = outcome_of(together.call("--inline", "--json").out)
    assert outcome["model_calls"] == len(PROMPTS) * 2**5, "answers are generated with their probabilities"
    alone = study_in(tmp_path / "alone", confidence)
    assert outcome_of(alone.call("--inline", "--json").out)["model_calls"] == len(PROMPTS) * 2**5
    for key in ("raw_values", "base_value", "grand_value"):
        ours, expected = sample(study, "self_logprob")[key], sample(alone, "self_logprob")[key]
        assert ours == pytest.approx(expected, abs=1e-5)


def test_sampled_base_answers_have_likelihoods_of_their_own(tmp_path: Path) -> None:
    """Two runs draw two answers to the whole prompt; each is forced behind all coalitions."""
    # Seeds depend on the model's path. At this temperature six equal tokens are out of the question.
    hot = {"max_new_tokens": 6, "text_temperature": 50.0}
    first, second = variant("tf_logprob"), {**variant("tf_logprob"), "name": "other"}
    study = study_in(tmp_path, first, second, generation=hot)
    outcome = outcome_of(study.call("--inline", "--json").out)
    assert outcome["model_calls"] == 2 * len(PROMPTS) * (1 + 2**5)
    assert sample(study, "tf_logprob")["response"] != sample(study, "other")["response"]
    assert sample(study, "tf_logprob")["raw_values"] != sample(study, "other")["raw_values"]

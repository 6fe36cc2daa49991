"""`mllm-shapx bench` on the shipped model: what it reports, never how fast anything was."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from mllm_shap import ExplainRunOutput

from mllm_shapx.benchmark.library import LibraryRunner
from mllm_shapx.benchmark.ours import Explainer, Turn
from mllm_shapx.benchmark.subject import Subject
from mllm_shapx.cli import main
from mllm_shapx.config.loading import load_config
from mllm_shapx.planning.sweep import expand

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = {
    "coalitions_per_second", "library_coalitions_per_second", "ratio", "raw_coalitions_per_second",
    "raw_batch_size", "fraction_of_raw", "sharing_factor", "idle_fraction", "batch_size", "recommended",
    "rows", "coalitions", "model", "device", "threads",
}  # fmt: skip


def write_config(folder: Path, **changes: Any) -> Path:
    """Write the demo's config with fewer new tokens, and only its shortest rows."""
    config = json.loads((ROOT / "configs" / "demo.json").read_text())
    config["connector_kwargs"]["model_id"] = str(ROOT / "demo" / "model")
    config["dataset"]["path"] = str(ROOT / "demo" / "rows.parquet")
    config["generation"]["max_new_tokens"] = 4
    config["selection"]["max_prompt_tokens"] = 6
    config |= changes
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def bench(config: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["bench", "--config", str(config), *options], catch_exceptions=False)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the JSON of one run."""
    config = write_config(tmp_path_factory.mktemp("bench"))
    result = bench(config, "--rows", "2", "--seconds", "3", "--json")
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(result.stdout)
    return data


def test_it_prints_one_object_with_all_figures(found: dict[str, Any]) -> None:
    """Standard output is one JSON object; every figure of the contest is in it and is a positive number."""
    assert found.keys() >= REQUIRED
    numbers = REQUIRED - {"recommended", "model", "device", "idle_fraction"}
    assert all(found[key] > 0 for key in numbers)
    assert 0 <= found["idle_fraction"] <= 1
    assert found["device"] == "cpu"


def test_ratios_are_those_of_the_rates(found: dict[str, Any]) -> None:
    """`ratio` and `fraction_of_raw` are our rate over the others', as printed."""
    ours = found["coalitions_per_second"]
    assert found["ratio"] == pytest.approx(ours / found["library_coalitions_per_second"])
    assert found["fraction_of_raw"] == pytest.approx(ours / found["raw_coalitions_per_second"])


def test_coalition_counts_agree(found: dict[str, Any]) -> None:
    """Two rows of 6 players are 64 coalitions each, for us, for the library and for the bare model."""
    assert found["rows"] == 2
    turns = {name: [each["coalitions"] for each in rounds] for name, rounds in found["rounds"].items()}
    assert all(count % 128 == 0 for count in turns["ours"])
    assert turns["raw"] == turns["ours"]
    assert turns["library"][0] <= 128


def test_values_agree_with_the_librarys(found: dict[str, Any]) -> None:
    """Values of ours and of mllm_shap's own runner agree to 1e-9 on all games that the library played."""
    assert found["rows_compared"] in (1, 2)
    assert found["largest_value_difference"] < 1e-9


def test_the_library_is_run_as_it_is(tmp_path: Path) -> None:
    """One row explained through our engine and by mllm_shap's own runner and backend: equal to 1e-9."""
    subject = Subject(load_config(write_config(tmp_path)))

    library = LibraryRunner(subject.run, subject.model_path)

    async def both() -> tuple[Turn, ExplainRunOutput]:
        ours = Explainer(subject.load_model(), rows_in_flight=1)
        game = next(subject.games(ours.engine.model))
        try:
            return await ours.play([game]), await library.explain(game)
        finally:
            await library.aclose()
            await ours.engine.aclose()

    turn, output = asyncio.run(both())
    assert not library.makes_other_prompts
    assert turn.coalitions == output.metrics.requested == len(turn.prompts) == 64
    assert turn.samples[0].player_values() == pytest.approx(list(output.result.values), abs=1e-9)
    assert 0 < turn.busy_seconds <= turn.seconds


def test_sharing_is_what_the_plan_says(found: dict[str, Any]) -> None:
    """Of 6 players, the exact run asks for 64 coalitions, and three sampling runs evaluate some of them."""
    runs = expand(load_config(ROOT / "configs" / "demo.json").experiment_set).runs
    assert found["sharing_factor"] == pytest.approx(sum(run.coalitions(6) for run in runs) / 64)


def test_the_recommendation_is_one_of_what_was_tried(found: dict[str, Any]) -> None:
    """It tries the size that auto found first, its half and its double as rows and time allow."""
    probes = found["probes"]
    assert probes[0]["batch_size"] == min(found["batch_size"], 64 * found["rows"])
    assert probes[0]["rows_in_flight"] == found["rows_in_flight"] == 2
    tried = {probe["batch_size"] for probe in probes}
    assert found["recommended"]["batch_size"] in {*tried, found["batch_size"]}
    assert found["recommended"]["rows_in_flight"] == 2


def test_without_time_to_try_settings_the_automatic_ones_are_recommended(tmp_path: Path) -> None:
    """It says that nothing else was tried."""
    result = bench(write_config(tmp_path), "--rows", "1", "--seconds", "0.01", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["probes"] == []
    assert data["recommended"] == {"batch_size": data["batch_size"], "rows_in_flight": 2}
    assert any("--seconds" in note and "batch sizes" in note for note in data["notes"])


def test_sampled_answers_are_measured_but_not_compared(tmp_path: Path) -> None:
    """With a temperature the table still names all contestants and says why values were not compared."""
    config = write_config(tmp_path, generation={"max_new_tokens": 2, "text_temperature": 0.7})
    result = bench(config, "--rows", "1", "--seconds", "0.5")
    assert result.exit_code == 0, result.output
    assert "mllm_shap's own runner" in result.stdout
    assert "plain generate" in result.stdout
    assert "values were not compared" in result.stdout


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"connector": "hf_text", "connector_kwargs": {"model_id": "demo"}}, "demo"),
        ({"selection": {"min_prompt_tokens": 50}}, "no row"),
    ],
)
def test_what_the_user_can_mend_is_one_message(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    """A directory that is no model, and an empty selection, end with exit code 2 and no traceback."""
    (tmp_path / "demo").mkdir()
    result = bench(write_config(tmp_path, **changes), "--json")
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_two_configs_are_refused(tmp_path: Path) -> None:
    """It measures one config at a time and says so."""
    first = write_config(tmp_path)
    second = tmp_path / "other.json"
    second.write_text(first.read_text())
    result = bench(first, "--config", str(second))
    assert result.exit_code == 2
    assert "one config at a time" in result.stderr


FORCED = {"value_function": "tf_logprob", "similarity": None}


def test_a_config_that_has_no_coalition_answered_is_refused(tmp_path: Path) -> None:
    """Likelihoods of given texts are no answers per second; the message says what to give bench."""
    config = write_config(tmp_path, shap=FORCED)
    result = bench(config)
    assert result.exit_code == 2
    assert str(config) in result.output
    assert '"tf_logprob" reads the likelihood of a given text' in result.output
    assert 'a similarity in "shap"' in result.output


def test_runs_that_force_a_text_count_in_the_sweep_and_are_not_measured(tmp_path: Path) -> None:
    """Of an exact game with 6 players each is worth 64 coalitions; answers and likelihoods are 64 each."""
    variants = [
        {"explainer_type": "exact", "name": "forced", "shap_override": FORCED},
        {"explainer_type": "exact"},
    ]
    result = bench(write_config(tmp_path, experiments=variants), "--rows", "1", "--seconds", "0.01", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["ratio"] > 0
    assert found["sharing_factor"] == 1

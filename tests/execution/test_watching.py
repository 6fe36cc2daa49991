"""A study that is watched: events for programs, `status` from its files, trackers with all samples."""

import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from small_study import Sabotage, Study
from tracking_kit import silent_server
from wandb_files import check_history, read_records

from mllm_shapx.cli import main
from mllm_shapx.config.loading import load_config
from mllm_shapx.execution import messages
from mllm_shapx.execution.lifecycle import run_to_end
from mllm_shapx.execution.loading import load_study_model
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.run import run_config
from mllm_shapx.models.base import Model
from mllm_shapx.reporting.progress import ProgressReporter

TRACKED = {"wandb": {"mode": "offline", "tags": ["small"], "upload_samples": True}, "mlflow": {}}


def events_of(study: Study, *more: str) -> tuple[list[dict[str, Any]], str]:
    """Run a study with --json; return its events and what else was said."""
    call = ["run", "--config", str(study.config), "--inline", "--json", *more]
    found = CliRunner(catch_exceptions=False).invoke(main, call)
    assert found.exit_code == 0, found.output
    return [json.loads(line) for line in found.stdout.splitlines()], found.stderr


def taken(study: Study, run: str) -> tuple[int, int]:
    """Return coalitions and generated answers of a run's samples."""
    samples = [json.loads(path.read_text()) for path in (study.output / run / "samples").iterdir()]
    return sum(s["n_calls"] for s in samples), sum(s["model_calls"] for s in samples)


def test_events_tell_a_study_from_start_to_end_and_status_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every line on stdout is an event, whatever a library prints; `status` then has the samples' sums."""

    def chatty(*args: Any, **kwargs: Any) -> Any:
        print("a library's bar: 100%")
        return run_to_end(*args, **kwargs)

    monkeypatch.setattr("mllm_shapx.execution.run.run_to_end", chatty)
    study = Study(tmp_path, rows=3, words=3)
    events, said = events_of(study, "--max-samples", "2")
    assert "a library's bar" in said
    kinds = [event["event"] for event in events]
    assert (kinds[0], kinds[-1]) == ("started", "outcome")
    assert {"started", "progress", "message", "outcome"} >= set(kinds)
    last = [event for event in events if event["event"] == "progress"][-1]
    assert (last["samples_done"], last["samples_total"]) == (6, 6)
    assert [run["done"] for run in events[-1]["runs"]] == [2, 2, 2]
    assert events[-1]["exit_code"] == 0
    # Resumed, the samples of the first start still count.
    assert events_of(study, "--resume")[0][-1]["exit_code"] == 0
    told = json.loads(CliRunner().invoke(main, ["status", "--json", str(study.output)]).output)
    assert len(told["runs"]) == 3
    for run in told["runs"]:
        assert (run["done"], run["left"]) == (3, 0)
        assert (run["coalitions"], run["answers"]) == taken(study, run["name"])
    assert told["progress"]["workers"] <= 1
    (study.output / "exact" / "summary" / "aggregate_metrics.json").unlink()
    again = json.loads(CliRunner().invoke(main, ["status", "--json", str(study.output)]).output)
    assert [run["coalitions"] for run in again["runs"]] == [run["coalitions"] for run in told["runs"]]


@pytest.mark.slow
def test_trackers_whose_servers_stay_silent_delay_no_sample(tmp_path: Path) -> None:
    """All samples are done while W&B and MLflow still wait for their servers; each costs one warning."""
    with silent_server() as port:
        address = f"http://127.0.0.1:{port}"
        study = Study(tmp_path, rows=2, words=3, settings={"wandb": {}, "mlflow": {"tracking_uri": address}})
        study.env |= {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0123456789" * 4, "NO_PROXY": "127.0.0.1"}
        study.env |= {"WANDB_MODE": "online", "MLFLOW_HTTP_REQUEST_TIMEOUT": "90"}
        end = study.run("--inline", "--json")
    assert end.code == 0, end.out
    events = [json.loads(line) for line in end.out.splitlines() if line.startswith("{")]
    done = next(event for event in events if event.get("samples_done") == 6)
    outcome = events[-1]
    assert outcome["event"] == "outcome"
    assert outcome["at"] - done["at"] > 10, "the trackers waited, and the samples were there before"
    about = [warning for warning in outcome["warnings"] if "not affected" in warning]
    assert sorted(warning.split(":")[0] for warning in about) == ["MLflow", "Weights & Biases"]


def test_trackers_that_cannot_write_cost_a_warning_each(tmp_path: Path) -> None:
    """A file in the place of each tracker's folder leaves the study as it is."""
    study = Study(tmp_path, rows=1, words=3, settings=TRACKED)
    study.output.mkdir(parents=True)
    for name in ("wandb", "mlflow"):
        (study.output / name).write_text("no folder")
    end = study.call("--inline")
    assert end.code == 0, end.out
    assert study.samples_on_disk() == 3
    assert end.out.count("The results on disk are not affected") == 2


def summary_of(records: list[Any]) -> dict[str, Any]:
    return {
        (item.key or item.nested_key[0]): json.loads(item.value_json)
        for record in records
        if record.HasField("summary")
        for item in record.summary.update
    }


def test_hints_name_the_store_that_was_used_whatever_the_environment_says_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's own client sets MLFLOW_TRACKING_URI for moments, in another thread."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    study = Study(tmp_path, rows=1, words=2, settings={"mlflow": {}})

    def load(loaded: messages.Study) -> Model:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
        return load_study_model(loaded)

    with ProgressReporter(io.StringIO(), interactive=False) as reporter:
        outcome = run_config(load_config(study.config), RunOptions(), reporter, inline=True, load=load)
    assert f"mlflow ui --backend-store-uri sqlite:///{study.output}/mlflow/mlflow.db" in outcome.hints[0]


@pytest.mark.slow
def test_trackers_have_every_run_with_its_samples_summary_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline W&B and MLflow's SQLite: one run per run, one step per sample, the summary, and the files."""
    for name in ("WANDB_MODE", "WANDB_DIR", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    study = Study(tmp_path, rows=3, words=3, settings=TRACKED)
    assert study.call("--inline", "--max-samples", "2").code == 0
    end = study.call("--inline", "--resume")
    assert end.code == 0, end.out
    assert f"wandb sync {study.output}/wandb/offline-run-*" in end.out
    assert f"mlflow ui --backend-store-uri sqlite:///{study.output}/mlflow/mlflow.db" in end.out
    assert "not affected" not in end.out, "no tracker warns"
    runs = sorted(path.parent.name for path in study.output.glob("*/spec.json"))
    _check_wandb(study, runs)
    _check_mlflow(study, runs)


def _check_wandb(study: Study, runs: list[str]) -> None:
    by_run: dict[str, list[list[Any]]] = {}
    for folder in sorted((study.output / "wandb").glob("offline-run-*")):
        records = read_records(folder)
        (start,) = {record.run.display_name for record in records if record.HasField("run")}
        by_run.setdefault(start, []).append(records)
    assert sorted(by_run) == runs
    for name, starts in by_run.items():
        assert len({record.run.run_id for each in starts for record in each if record.HasField("run")}) == 1
        rows = Counter(
            json.loads(item.value_json)
            for records in starts
            for record in records
            if record.HasField("history")
            for item in record.history.item
            if (item.key or item.nested_key[0]) == "row_index"
        )
        assert rows == Counter(range(3))
        summary = summary_of(starts[-1])
        table = summary.pop("prompts")
        metrics = json.loads((study.output / name / "summary" / "aggregate_metrics.json").read_text())
        assert {key: value for key, value in summary.items() if not key.startswith("_")} == metrics
        assert (table["_type"], table["nrows"], table["ncols"]) == ("table-file", 3, 4)
        kinds = {
            record.artifact.type: [content.path for content in record.artifact.manifest.contents]
            for record in starts[-1]
            if record.HasField("artifact")
        }
        assert kinds["metrics"] == ["aggregate_metrics.json"]
        assert sorted(kinds["samples"]) == [f"sample_{row:05d}_result.json" for row in range(3)]


def _check_mlflow(study: Study, runs: list[str]) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{study.output}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("mllm_shapx")
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(found) == runs
    for name, run in found.items():
        history = client.get_metric_history(run.info.run_id, "row_index")
        assert Counter(int(metric.value) for metric in history) == Counter(range(3))
        metrics = json.loads((study.output / name / "summary" / "aggregate_metrics.json").read_text())
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        assert {key: run.data.metrics[key] for key in numbers} == numbers
        assert run.data.metrics["by_language.en.n_samples"] == 3
        names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
        assert names == {"spec.json", "summary", "prompts.html"}
        assert run.data.params["shap.similarity"] == "TfIdfCosineSimilarity"


def killed_midway(study: Study, look: Callable[[], None]) -> None:
    """Start the study on slow rows, call `look` once some samples are written, and kill it."""
    saboteur = Sabotage(study.folder)
    saboteur.set(slow=list(range(study.rows)), slow_s=1.0)
    run = study.start("--inline", env=saboteur.env)
    run.wait_for(lambda: study.samples_on_disk() >= 6)
    try:
        look()
    finally:
        run.kill()
        run.wait(60)


@pytest.mark.slow
def test_status_tells_of_a_real_run_while_it_works_and_after_its_death(tmp_path: Path) -> None:
    """Its process is named with what is done so far; killed, what is left and how to go on."""
    study = Study(tmp_path, rows=6, words=3)

    def told() -> Any:
        found = CliRunner().invoke(main, ["status", "--check", "--json", str(study.output)])
        assert found.exit_code == 0, found.output
        return json.loads(found.stdout)

    seen: list[Any] = []
    killed_midway(study, lambda: seen.append(told()))
    (during,) = seen
    assert during["running"] is not None
    assert during["next_steps"] == []
    assert 6 <= during["done"] < during["total"] == 18
    assert {run["state"] for run in during["runs"]} == {"under way"}
    after = told()
    assert after["running"] is None
    assert during["done"] <= after["done"] == study.samples_on_disk() < 18
    assert [run["left"] for run in after["runs"]] == [6 - run["done"] for run in after["runs"]]
    assert "to go on: mllm-shapx run --config CONFIG --resume" in after["next_steps"]
    assert study.call("--inline", "--resume").code == 0
    end = told()
    assert (end["done"], end["next_steps"]) == (18, [])


@pytest.mark.slow
def test_a_killed_study_goes_on_in_the_same_wandb_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After SIGKILL and --resume each run has one id, the config's entity and group, and each sample once."""
    for name in ("WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    block = {"mode": "offline", "entity": "my-team", "group": "pilot", "tags": ["small"]}
    study = Study(tmp_path, rows=6, words=3, settings={"wandb": block})
    killed_midway(study, lambda: None)
    assert study.samples_on_disk() < 18
    resumed = study.call("--inline", "--resume")
    assert resumed.code == 0, resumed.out
    starts: dict[str, list[Any]] = {}
    for folder in sorted((study.output / "wandb").glob("offline-run-*")):
        for record in read_records(folder):
            if record.HasField("run"):
                starts.setdefault(record.run.display_name, []).append(record.run)
    assert sorted(starts) == sorted(path.parent.name for path in study.output.glob("*/spec.json"))
    for runs in starts.values():
        assert len(runs) >= 2
        assert len({run.run_id for run in runs}) == 1
        assert {(run.entity, run.run_group, *run.tags) for run in runs} == {("my-team", "pilot", "small")}
    assert check_history(study.output, set()) == 18

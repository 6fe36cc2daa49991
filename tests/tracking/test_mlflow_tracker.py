"""MLflow with the real package: a SQLite file, a server on loopback, and what breaks it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from tracking_kit import TRACK_TWO_RUNS, make_sample, mlflow_tracker, records_of, silent_server

from mllm_shapx.config.models import MlflowConfig
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.storage import open_storage
from mllm_shapx.tracking.mlflow import located

HERE = [str(Path(__file__).parents[1] / "support")]
SPEC = {
    "experiment_set_id": "study",
    "run_name": "exact",
    "hf_token": "hf_verysecret",
    "rows_total": 3,
    "result_settings": {"shap": {"similarity": "TfIdf", "api_key": "verysecret"}, "budget": {"value": 1.0}},
}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No MLflow setting of this machine reaches the tests, and none of ours stays."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    for name in ("TRACKING_URI", "ALLOW_FILE_STORE", "HTTP_REQUEST_TIMEOUT", "HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(f"MLFLOW_{name}", "")
        monkeypatch.delenv(f"MLFLOW_{name}")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> MlflowConfig:
    """A SQLite file that the tests of this module share: making its tables takes seconds."""
    config = located(MlflowConfig(tags={"team": "a", "year": 2026}), str(tmp_path_factory.mktemp("store")))
    assert config is not None
    return config


@pytest.fixture
def records(tmp_path: Path) -> RunRecords:
    """The files of a run of its own."""
    return RunRecords(open_storage(str(tmp_path)), "exact")


def track(
    config: MlflowConfig, set_id: str, records: RunRecords, *rows: int, finish: bool = True
) -> list[str]:
    """Start the run, write and log these rows, end; return the warnings."""
    warnings: list[str] = []
    tracker = mlflow_tracker(config, set_id, warn=warnings.append)
    tracker.start("exact", SPEC, records=records, salt="1")
    for row in rows:
        records.write_sample(make_sample("exact", row))
        tracker.log_sample(make_sample("exact", row))
    if finish:
        tracker.finish("exact", {"n_samples": len(rows), "by_language": [{"language": "en", "n_samples": 2}]})
    tracker.close()
    return warnings


def client(config: MlflowConfig) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=config.tracking_uri)


def runs_of(config: MlflowConfig, set_id: str) -> list[Any]:
    there = client(config)
    experiment = there.get_experiment_by_name(config.experiment_name)
    found = there.search_runs(
        [experiment.experiment_id], filter_string=f"tags.experiment_set_id = '{set_id}'"
    )
    return list(found)


def steps_of(config: MlflowConfig, run: Any) -> list[tuple[int, int]]:
    """Return counter and row of each sample that a run holds, in order."""
    history = client(config).get_metric_history(run.info.run_id, "row_index")
    return sorted((metric.step, int(metric.value)) for metric in history)


def artifacts_of(config: MlflowConfig, run: Any, folder: Path) -> dict[str, str]:
    (folder / "downloaded").mkdir()
    place = client(config).download_artifacts(run.info.run_id, "", str(folder / "downloaded"))
    files = [path for path in Path(place).rglob("*") if path.is_file()]
    return {str(path.relative_to(place)): path.read_text(errors="replace") for path in files}


def test_a_run_holds_samples_settings_summary_and_files(
    store: MlflowConfig, records: RunRecords, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Metrics come one step a sample, settings as parameters, files as artifacts, and nothing secret."""
    records.write_summary({"n_samples": 2})
    asked = store.model_copy(update={"upload_samples": True})
    assert track(asked, "one", records, 7, 3) == []
    assert capfd.readouterr() == ("", "")
    (run,) = runs_of(store, "one")
    assert (run.info.run_name, run.info.status) == ("exact", "FINISHED")
    assert (run.data.tags["team"], run.data.tags["year"]) == ("a", "2026")
    assert Counter(row for _, row in steps_of(store, run)) == Counter([7, 3])
    metrics = run.data.metrics
    assert metrics["residual"] == pytest.approx(0.25)
    assert (metrics["n_samples"], metrics["by_language.en.n_samples"]) == (2, 2)
    assert {"runtime_sec", "n_calls", "model_calls", "frac_text", "frac_audio", "values_max"} <= set(metrics)
    assert run.data.params["shap.similarity"] == "TfIdf"
    assert run.data.params["budget.value"] == "1.0"
    files = artifacts_of(store, run, tmp_path)
    assert json.loads(files["summary/aggregate_metrics.json"]) == {"n_samples": 2}
    assert {"samples/sample_00003_result.json", "samples/sample_00007_result.json"} <= set(files)
    assert json.loads(files["spec.json"])["rows_total"] == 3
    assert '<span title="-0.25"' in files["prompts.html"]
    assert " &lt;car&gt;</span>" in files["prompts.html"]
    assert "verysecret" not in str(run.data) + str(files)


def test_resumed_runs_continue_and_complete_the_same_run(store: MlflowConfig, records: RunRecords) -> None:
    """A second start goes on in the first one's run, with each sample once, unlogged ones included."""
    assert track(store, "two", records, 5, finish=False) == []
    records.write_sample(make_sample("exact", 1))  # of a start without MLflow
    assert runs_of(store, "two")[0].info.status == "FAILED"
    warnings: list[str] = []
    tracker = mlflow_tracker(store, "two", warn=warnings.append)
    changed = {**SPEC, "rows_total": 9}
    tracker.start("exact", changed, records=records, salt="1")
    tracker.log_sample(replace(make_sample("exact", 5), runtime_sec=9.0))
    tracker.log_sample(make_sample("exact", 6))
    tracker.log_sample(make_sample("exact", 5, grand=2.0))
    tracker.finish("exact", {"n_samples": 3})
    tracker.close()
    assert warnings == []
    (run,) = runs_of(store, "two")
    assert run.info.status == "FINISHED"
    assert steps_of(store, run) == [(1, 5), (2, 1), (3, 6), (4, 5)]  # row 5 has other values at the end
    fresh = mlflow_tracker(store, "two")
    fresh.start("exact", SPEC, records=records, salt="2")
    fresh.close()
    assert len(runs_of(store, "two")) == 2


def test_runs_stand_below_one_parent_if_asked(store: MlflowConfig, tmp_path: Path) -> None:
    """With `nested_per_variant` the runs are children of one that is named after the set."""
    nested = store.model_copy(update={"nested_per_variant": True, "system_metrics_enabled": True})
    for _ in range(2):
        tracker = mlflow_tracker(nested, "nested")
        for name in ("exact", "mc"):
            tracker.start(name, {}, records=records_of(tmp_path, name))
            tracker.finish(name, {})
        tracker.close()
    by_name = {run.info.run_name: run for run in runs_of(store, "nested")}
    assert sorted(by_name) == ["exact", "mc", "nested"]
    parent = by_name["nested"].info.run_id
    assert all(by_name[name].data.tags["mlflow.parentRunId"] == parent for name in ("exact", "mc"))
    assert {run.info.status for run in by_name.values()} == {"FINISHED"}


DIE_WHILE_LOGGING = """
    import os, signal, sys, time
    sys.path[:0] = {path!r}
    from tracking_kit import make_sample, mlflow_tracker
    from mllm_shapx.config.models import MlflowConfig
    from mllm_shapx.records.runs import RunRecords
    from mllm_shapx.records.storage import open_storage
    records = RunRecords(open_storage({folder!r}), "exact")
    tracker = mlflow_tracker(MlflowConfig(tracking_uri={uri!r}), "killed")
    tracker.start("exact", {{}}, records=records, salt="1")
    for row in range(80):
        records.write_sample(make_sample("exact", row))
        tracker.log_sample(make_sample("exact", row))
        if row == 30:
            deadline = time.monotonic() + 60
            while tracker._session.open_runs == 0 and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(1.5)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_killed_trackers_lose_nothing_and_log_nothing_twice(
    store: MlflowConfig, records: RunRecords, tmp_path: Path
) -> None:
    """Killed with samples that wait to be sent, the run holds every row once in the end."""
    code = DIE_WHILE_LOGGING.format(path=HERE, folder=str(tmp_path), uri=store.tracking_uri)
    assert run_python(code).returncode == -signal.SIGKILL
    (run,) = runs_of(store, "killed")
    assert 30 <= len(steps_of(store, run)) < 80
    assert track(store, "killed", records, 80) == []
    (run,) = runs_of(store, "killed")
    steps = steps_of(store, run)
    assert sorted(row for _, row in steps) == list(range(81))
    assert [step for step, _ in steps] == list(range(1, 82))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


def test_switched_off_does_not_import_mlflow(tmp_path: Path) -> None:
    """With tracking off in the block, mlflow is never imported."""
    blocks = {"wandb": {"enabled": False}, "mlflow": {"enabled": False}}
    done = run_python(TRACK_TWO_RUNS.format(blocks=blocks, folder=str(tmp_path)))
    assert (done.stdout.split(), done.stderr) == (["IMPORTED"], "")


def test_missing_package_costs_one_warning(tmp_path: Path) -> None:
    """Where mlflow cannot be imported, two runs cost one warning that says what to install."""
    (tmp_path / "mlflow.py").write_text("raise ModuleNotFoundError(\"No module named 'mlflow'\")\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    code = TRACK_TWO_RUNS.format(blocks={"wandb": {"enabled": False}, "mlflow": {}}, folder=str(tmp_path))
    done = run_python(code, PYTHONPATH=path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("WARNED") == 1
    assert "install the extra `mlflow` or set mlflow.enabled to false" in done.stdout


def test_a_store_that_cannot_be_written_costs_one_warning(tmp_path: Path) -> None:
    """A file in the place of the store's folder is said once, and hides a password."""
    (tmp_path / "mlflow").write_text("no folder")
    config = located(MlflowConfig(), str(tmp_path))
    records = RunRecords(open_storage(str(tmp_path)), "exact")
    assert config is not None
    (warning,) = track(config, "study", records, 1)
    assert warning.startswith("MLflow: FileExistsError")
    assert warning.endswith("The results on disk are not affected")


@pytest.mark.slow
def test_a_server_that_does_not_answer_never_blocks(tmp_path: Path) -> None:
    """While a server stays silent, logging returns at once; after the timeout it is one warning."""
    with silent_server() as port:
        # A config with a login is refused; the environment's address may have one.
        config = MlflowConfig().model_copy(update={"tracking_uri": f"http://user:sesame@127.0.0.1:{port}"})
        warnings: list[str] = []
        tracker = mlflow_tracker(config, "study", warn=warnings.append, timeout_s=2.0, close_timeout_s=40.0)
        began = time.monotonic()
        for number in range(20):
            tracker.start(f"run{number}", {}, records=records_of(tmp_path, f"run{number}"))
            tracker.log_sample(make_sample(f"run{number}", 1))
        assert time.monotonic() - began < 1.0
        tracker.close()
        assert time.monotonic() - began < 40.0
    (warning,) = warnings
    assert "127.0.0.1" in warning
    assert "sesame" not in warning


@pytest.mark.parametrize(
    ("uri", "environment", "expected"),
    [
        (None, "", "sqlite:////data/study/mlflow/mlflow.db"),
        (None, "http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("http://127.0.0.1:6000", "http://127.0.0.1:5000", "http://127.0.0.1:6000"),
        ("sqlite:///runs.db", "", "sqlite:////here/runs.db"),
        ("sqlite:////abs/runs.db", "", "sqlite:////abs/runs.db"),
        ("mlruns", "", "file:///here/mlruns"),
        ("databricks", "", "databricks"),
    ],
)
def test_where_runs_are_kept(
    uri: str | None, environment: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config wins over the environment, and without either the store is beside the runs."""
    monkeypatch.setattr(Path, "absolute", lambda path: Path("/here") / path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", environment)
    found = located(MlflowConfig(tracking_uri=uri), "/data/study")
    assert found.tracking_uri == expected


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[str]:
    """Run `mlflow server` on loopback; yield its address."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/server.db"]
    command += ["--artifacts-destination", str(folder / "files")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("a") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, cwd=folder, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{address}/health", trust_env=False).text == "OK":
                    break
            assert process.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


@pytest.mark.slow
def test_a_real_server_gets_each_sample_once_also_when_it_goes_away(
    records: RunRecords, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is killed and comes back costs a warning; afterwards the run is complete."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    port = free_port()
    warnings: list[str] = []
    config = MlflowConfig(tracking_uri=f"http://127.0.0.1:{port}")
    tracker = mlflow_tracker(config, "study", warn=warnings.append, timeout_s=5.0)

    def log(row: int) -> None:
        records.write_sample(make_sample("exact", row))
        tracker.log_sample(make_sample("exact", row))

    with mlflow_server(tmp_path, port):
        tracker.start("exact", SPEC, records=records, salt="1")
        log(1)
        deadline = time.monotonic() + 60
        while not (found := _rows_there(config)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert found == [(1, 1)]
    for row in (2, 3):
        log(row)
    deadline = time.monotonic() + 60
    while not warnings and time.monotonic() < deadline:
        time.sleep(0.1)
    log(4)
    with mlflow_server(tmp_path, port):
        records.write_summary({"n_samples": 4})
        tracker.finish("exact", {"n_samples": 4})
        tracker.close()
        (run,) = runs_of(config, "study")
        assert run.info.status == "FINISHED"
        assert Counter(row for _, row in steps_of(config, run)) == Counter([1, 2, 3, 4])
        assert run.data.metrics["n_samples"] == 4
        files = artifacts_of(config, run, tmp_path)
    assert {"spec.json", "summary/aggregate_metrics.json", "prompts.html"} <= set(files)
    (warning,) = warnings
    assert "run exact gets the rest of its samples at its end" in warning


def _rows_there(config: MlflowConfig) -> list[tuple[int, int]]:
    there = client(config)
    if there.get_experiment_by_name(config.experiment_name) is None:
        return []
    return [step for run in runs_of(config, "study") for step in steps_of(config, run)]

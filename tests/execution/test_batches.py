"""Several configs in one call: one that fails is tried again and does not keep the others waiting."""

import io
import json
import os
import signal
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from small_study import Process, Sabotage, Study, model_that_does_not_load, results, untouched

from mllm_shapx.cli import main
from mllm_shapx.config.loading import load_config
from mllm_shapx.execution import messages
from mllm_shapx.execution.kept import Kept
from mllm_shapx.execution.loading import load_study_model
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.run import run_config
from mllm_shapx.models.base import Model
from mllm_shapx.reporting.progress import ProgressReporter

ONE_RUN = {"experiments": [{"explainer_type": "exact"}]}


def run(*words: str) -> Result:
    found = CliRunner().invoke(main, ["run", "--inline", *words])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found


@pytest.fixture
def three(tmp_path: Path) -> list[Study]:
    """Three studies, of which the second has no dataset."""
    studies = [Study(tmp_path / name, rows=2, words=3, settings=ONE_RUN) for name in ("a", "b", "c")]
    (tmp_path / "b" / "rows.parquet").rename(tmp_path / "b" / "later.parquet")
    (tmp_path / "all.txt").write_text("".join(f"{study.config}\n" for study in studies))
    return studies


def test_a_config_that_fails_is_tried_again_and_the_others_are_done(
    three: list[Study], tmp_path: Path
) -> None:
    words = ("--config-list", str(tmp_path / "all.txt"), "--max-retries", "2", "--retry-delay", "0")
    found = run(*words)
    assert found.exit_code == 2
    assert "retry 1 of 2 in 0 s" in found.output
    assert "retry 2 of 2 in 0 s" in found.output
    table = [line.split() for line in found.output.splitlines()[-4:]]
    assert table[0] == ["config", "outcome", "samples", "tries", "time"]
    assert [row[:-1] for row in table[1:]] == [
        [str(three[0].config), "done", "2/2", "1"],
        [str(three[1].config), "refused", "-", "3"],
        [str(three[2].config), "done", "2/2", "1"],
    ]
    assert all(row[-1].startswith("0:0") for row in table[1:])
    assert [study.samples_on_disk() for study in three] == [2, 0, 2]

    (tmp_path / "b" / "later.parquet").rename(tmp_path / "b" / "rows.parquet")
    found = run(*words, "--resume", "--json")
    assert found.exit_code == 0
    assert three[1].samples_on_disk() == 2


def test_a_failed_config_is_told_of_in_json(three: list[Study]) -> None:
    configs = [word for study in three for word in ("--config", str(study.config))]
    found = CliRunner(catch_exceptions=False).invoke(main, ["run", "--inline", "--json", *configs])
    events = [json.loads(line) for line in found.stdout.splitlines()]
    first, second, third = (event for event in events if event["event"] in {"outcome", "error"})
    assert (first["exit_code"], third["exit_code"]) == (0, 0)
    assert (second["config"], second["outcome"], second["exit_code"]) == (str(three[1].config), "refused", 2)
    assert second["event"] == "error"
    assert "rows.parquet" in second["error"]


def test_what_a_directory_forbids_is_not_tried_again(three: list[Study]) -> None:
    assert run("--config", str(three[0].config)).exit_code == 0
    found = run("--config", str(three[0].config), "--max-retries", "5", "--retry-delay", "60")
    assert found.exit_code == 2
    assert "already holds finished samples" in found.output
    assert "retry" not in found.output


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(three: list[Study], tmp_path: Path) -> None:
    assert run("--config", str(three[0].config), "--max-samples", "1").exit_code == 0
    with untouched(tmp_path):
        found = run("--config-list", str(tmp_path / "all.txt"), "--resume", "--dry-run")
    assert found.exit_code == 2
    first, second, third = found.output.splitlines()
    assert first.startswith(f"{three[0].config}: would make 1 of 2 samples, of 1 run(s) and 2 row(s), in ")
    assert second.startswith(f"{three[1].config}: would be refused: ")
    assert third.startswith(f"{three[2].config}: would make 2 of 2 samples")


def test_a_dry_run_refuses_what_run_refuses(three: list[Study], tmp_path: Path) -> None:
    study = three[0]
    assert run("--config", str(study.config), "--max-samples", "1").exit_code == 0
    study.write_config(generation={"max_new_tokens": 3, "text_temperature": 0.0})
    with untouched(tmp_path):
        found = run("--config", str(study.config), "--resume", "--dry-run")
    assert found.exit_code == 2
    assert "made with other settings" in found.output
    assert run("--config", str(study.config), "--resume").exit_code == 2
    hopeless = Study(tmp_path / "hopeless", rows=1, settings={"experiments": [{"explainer_type": "exact"}]})
    rows = {"prompt": [" ".join(f"word{number}" for number in range(60))], "language": ["en"]}
    pq.write_table(pa.table(rows), hopeless.folder / "rows.parquet")
    with untouched(tmp_path):
        found = run("--config", str(hopeless.config), "--dry-run")
    assert found.exit_code == 2
    assert "no row can be explained by exact" in found.output


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_configs_of_a_call_share_one_ray_until_one_fails_which_may_be_its_fault(tmp_path: Path) -> None:
    saboteur = Sabotage(tmp_path)
    saboteur.set(slow=[0, 1], slow_s=1.5)
    first, second, broken, last = (
        Study(tmp_path / name, rows=2, words=3, settings=ONE_RUN) for name in ("1", "2", "broken", "last")
    )
    broken.write_config(connector_kwargs={"model_id": str(model_that_does_not_load(tmp_path))})
    words = [word for study in (first, second, broken, last) for word in ("--config", str(study.config))]
    run = Process(["run", *words, "--num-workers", "1"], saboteur.env, tmp_path)
    heads: dict[str, set[int]] = {"1": set(), "2": set(), "last": set()}
    workers: dict[str, set[int]] = {"1": set(), "2": set(), "last": set()}

    def look() -> bool:
        for study in (first, second, last):
            if (study.output / ".lock").exists():
                heads[study.folder.name] |= _below(run.pid, "gcs_server")
                workers[study.folder.name] |= _below(run.pid, "ray::WorkerActor")
        return not run.is_running()

    while not look():
        time.sleep(0.1)
    ended = run.wait(10)
    assert ended.code == 2, ended.out
    assert "lacks 9 weights" in ended.out
    assert heads["1"] == heads["2"]
    assert len(heads["1"]) == len(heads["last"]) == 1
    assert heads["last"] != heads["1"]
    assert workers["1"] == workers["2"], "the worker keeps the model that both configs name"
    assert len(workers["1"]) == len(workers["last"]) == 1


def test_the_model_stays_while_configs_name_the_same_one(tmp_path: Path) -> None:
    first, second, third = (
        Study(tmp_path / name, rows=2, words=3, settings=ONE_RUN) for name in ("1", "2", "3")
    )
    second.write_config(experiments=[{"explainer_type": "standard_cc", "num_samples": [6]}])
    third.write_config(generation={"max_new_tokens": 5, "text_temperature": 0.0})
    models: list[Model] = []

    def load(study: messages.Study) -> Model:
        models.append(load_study_model(study))
        return models[-1]

    kept = Kept(workers=True)
    with kept, ProgressReporter(io.StringIO(), interactive=False) as reporter:
        for study in (first, second, third):
            loaded = load_config(study.config)
            outcome = run_config(loaded, RunOptions(), reporter, inline=True, load=load, kept=kept)
            assert outcome.exit_code == 0
            assert len(models) == (2 if study is third else 1)
    alone = Study(tmp_path / "alone", rows=2, words=3, settings=ONE_RUN)
    alone.write_config(experiments=[{"explainer_type": "standard_cc", "num_samples": [6]}])
    assert alone.call("--inline").code == 0
    assert results(alone.output) == results(second.output)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_kept_worker_that_died_between_two_configs_is_replaced(tmp_path: Path) -> None:
    first, second = (Study(tmp_path / name, rows=2, words=3, settings=ONE_RUN) for name in ("1", "2"))
    options = RunOptions(num_workers=1)
    kept = Kept(workers=True)
    with kept, ProgressReporter(io.StringIO(), interactive=False) as reporter:
        for study in (first, second):
            outcome = run_config(load_config(study.config), options, reporter, inline=False, kept=kept)
            assert outcome.exit_code == 0
            (worker,) = _below(os.getpid(), "ray::WorkerActor")
            os.kill(worker, signal.SIGKILL)
    assert second.samples_on_disk() == 2


def _below(pid: int, name: str) -> set[int]:
    """Return the processes below `pid` whose title holds `name`."""
    found = set()
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if name in process.name() or any(name in word for word in process.cmdline()):
                found.add(process.pid)
        except psutil.Error:
            continue
    return found

"""Rescoring ends as a run does: at a signal, when its lock is lost, and where a row fails in one run only."""

import dataclasses
import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_study import Process, Sabotage, Study, results

from mllm_shapx.cli import main
from mllm_shapx.config.loading import load_config
from mllm_shapx.errors import OutputError
from mllm_shapx.execution import preparation, rescoring
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.records.lock import LockHolder, OutputLock
from mllm_shapx.records.storage import encode_json
from mllm_shapx.reporting.progress import ProgressReporter
from mllm_shapx.reporting.study_progress import StudyProgress

ROWS = 5


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A finished study."""
    study = Study(tmp_path, rows=ROWS, words=3)
    assert study.call("--inline").code == 0
    return study


def test_a_signal_lets_the_running_row_end_and_says_how_to_go_on(study: Study) -> None:
    before = results(study.output)
    saboteur = Sabotage(study.folder)
    saboteur.set(slow=list(range(ROWS)), slow_s=0.7)
    run = Process(
        ["rescore", "--config", str(study.config), "--overwrite"], {**study.env, **saboteur.env}, study.folder
    )
    run.wait_for(lambda: len(list(study.output.glob("*/set_aside*"))) == 3 and study.samples_on_disk() >= 1)
    run.kill(signal.SIGTERM)
    ended = run.wait(60)
    assert ended.code == 143, ended.out
    assert "SIGTERM: finishing the rows under way" in ended.out
    assert f"to go on: mllm-shapx rescore --config {study.config}" in ended.out
    assert 3 <= study.samples_on_disk() < 3 * ROWS
    assert study.samples_on_disk() % 3 == 0, "the running row was finished by all of its runs"
    assert not (study.output / ".lock").exists()
    rest = CliRunner().invoke(main, ["rescore", "--config", str(study.config)])
    assert rest.exit_code == 0, rest.output
    assert results(study.output) == before


class _Usurper(ProgressReporter):
    """Takes the lock when the first row is done, as a driver elsewhere does that believes the holder dead."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def update(self, progress: StudyProgress) -> None:
        while progress.runs[0].done and not self.has_taken:  # a heartbeat of the holder may replace it
            other = dataclasses.replace(LockHolder.of_this_process(), pid=os.getppid(), host="elsewhere")
            self._file.write_bytes(encode_json(dataclasses.asdict(other)))
            time.sleep(0.3)  # the holder's heartbeats see it

    @property
    def has_taken(self) -> bool:
        return b"elsewhere" in self._file.read_bytes()

    def message(self, text: str) -> None:
        del text


def test_a_lost_lock_stops_the_work_and_is_left_to_its_new_holder(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "OutputLock", partial(OutputLock, heartbeat_s=0.05))
    monkeypatch.setattr(rescoring, "STEP_S", 0.0)
    usurper = _Usurper(study.output / ".lock")
    with pytest.raises(OutputError, match=r"was taken over by process \d+ on elsewhere"):
        rescoring.rescore_config(load_config(study.config), RunOptions(overwrite=True), usurper)
    assert study.samples_on_disk() == 3, "the first row and no other"
    assert usurper.has_taken


def test_a_run_that_cannot_explain_a_row_leaves_its_other_runs_alone(tmp_path: Path) -> None:
    """A row of 26 words is too long for `exact`; the sampling run has its sample, again after rescoring."""
    runs = [{"explainer_type": "exact"}, {"explainer_type": "limited_mc", "num_samples": [30]}]
    study = Study(tmp_path, settings={"experiments": runs})
    study.write_prompts(" ".join(f"word{place}" for place in range(26)))
    assert study.call("--inline").code == 3
    before = results(study.output)
    found = CliRunner().invoke(main, ["rescore", "--config", str(study.config), "--overwrite"])
    assert found.exit_code == 3, found.output
    assert results(study.output) == before
    assert [path.parts[-3] for path in study.output.glob("*/samples/*.json")] == ["limited_mc_ns30"]


def test_events_of_rescore_and_retry_are_those_of_run(tmp_path: Path) -> None:
    """With --json, stdout holds one event a line, from the start to the outcome with its exit code."""
    runs = [{"explainer_type": "exact"}, {"explainer_type": "limited_mc", "num_samples": [30]}]
    study = Study(tmp_path, settings={"experiments": runs})
    study.write_prompts("please help my teacher", " ".join(f"word{place}" for place in range(26)))
    assert study.call("--inline").code == 3
    config, directory = ["--config", str(study.config)], str(study.output)
    calls = (["rescore", *config, "--overwrite"], ["retry", directory, "--inline"])
    for call in calls:
        found = CliRunner().invoke(main, [*call, "--json"])
        assert found.exit_code == 3, found.output
        events = [json.loads(line) for line in found.stdout.splitlines()]
        assert [events[0]["event"], events[-1]["event"]] == ["started", "outcome"]
        assert "progress" in {event["event"] for event in events}
        assert [events[0]["config"], events[-1]["exit_code"]] == [events[-1]["config"], 3]
        done = {run["name"]: (run["done"], run["failed"]) for run in events[-1]["runs"]}
        assert done == {"exact": (1, 1), "limited_mc_ns30": (2, 0)}
    nothing = CliRunner().invoke(main, ["retry", directory, "--only", "worker_died", "--json"])
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert "no sample to try again" in nothing.stderr


def test_a_config_that_cannot_be_rescored_does_not_keep_the_next_from_it(
    study: Study, tmp_path: Path
) -> None:
    """Each config is named with what became of it, and the worst code ends the call, as of `run`."""
    other = Study(tmp_path / "other", rows=1, words=3)
    call = ["rescore", "--config", str(other.config), "--config", str(study.config), "--overwrite"]
    found = CliRunner().invoke(main, call)
    assert found.exit_code in {1, 2}, found.output
    assert len(list(study.output.glob("*/set_aside*"))) == 3
    assert study.samples_on_disk() == 3 * ROWS

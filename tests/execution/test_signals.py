"""Signals without Ray: a drain that says how to go on, no wait at the second, no thread that holds it up."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_study import LONG_PROMPTS, SABOTAGE, Process, Sabotage, Study, results

from mllm_shapx.records.storage import open_storage
from mllm_shapx.records.store import CoalitionStore

ROWS = 6


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = Study(tmp_path_factory.mktemp("undisturbed"), rows=ROWS)
    assert study.call("--inline").code == 0
    return study


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_lets_rows_under_way_end_and_says_how_to_go_on(
    undisturbed: Study, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    saboteur = Sabotage(tmp_path)
    saboteur.set(slow=list(range(ROWS)), slow_s=1.5)
    study = Study(tmp_path, rows=ROWS, env=saboteur.env)
    run = study.start("--inline", "--rows-in-flight", "1")
    run.wait_for(lambda: study.samples_on_disk() >= 3)
    run.kill(number)
    ended = run.wait(60)
    assert ended.code == code, ended.out
    assert f"{number.name}: finishing the rows under way" in ended.out
    assert f"to go on: mllm-shapx run --config {study.config} --resume --rows-in-flight 1" in ended.out
    assert 3 <= study.samples_on_disk() < 3 * ROWS
    assert json.loads((study.output / "exact" / "checkpoint.json").read_text())["completed_indices"]
    saboteur.set()
    assert study.call("--inline", "--resume").code == 0
    assert results(study.output) == results(undisturbed.output)


@pytest.mark.slow
def test_a_second_signal_ends_at_once_and_partial_answers_of_a_long_row_are_kept(tmp_path: Path) -> None:
    """A row of 2,048 coalitions is cut short; what was flushed is not asked again."""
    study = Study(tmp_path, settings={"experiments": [{"explainer_type": "exact"}]})
    study.write_prompts(LONG_PROMPTS[0])
    run = study.start("--inline", "--flush-every", "0.2")
    run.wait_for(lambda: len(list(study.output.glob("generations/*.parts/*.parquet"))) >= 1)
    run.kill(signal.SIGTERM)
    run.wait_for(lambda: "SIGTERM: finishing" in run.out)
    started = time.monotonic()
    run.kill(signal.SIGTERM)
    ended = run.wait(30)
    assert time.monotonic() - started < 5
    assert ended.code == 143
    assert "stopped at once" in ended.out
    assert study.samples_on_disk() == 0
    (entry,) = CoalitionStore(open_storage(str(study.output))).info()
    assert 0 < entry.answers < 2048
    ended = study.call("--inline", "--resume")
    assert ended.code == 0
    assert f"({2048 - entry.answers:,} model calls" in ended.out
    sample = json.loads(next(study.output.glob("exact/samples/*.json")).read_text())
    assert sample["model_calls"] == 2048, "those of the earlier try count"
    assert not list(study.output.glob("generations/*.parts"))


@pytest.mark.slow
def test_a_thread_that_does_not_return_holds_nothing_up(tmp_path: Path) -> None:
    saboteur = Sabotage(tmp_path)
    saboteur.set(slow=[0, 1, 2], slow_s=600)
    study = Study(tmp_path, rows=3, env=saboteur.env)
    run = study.start("--inline", "--grace", "1")
    run.wait_for(lambda: "1/1 workers busy" in run.out)
    started = time.monotonic()
    run.kill(signal.SIGTERM)
    ended = run.wait(60)
    assert time.monotonic() - started < 15
    assert ended.code == 143
    assert "SIGTERM: finishing the rows under way, for 1 s at most" in ended.out
    assert f"to go on: mllm-shapx run --config {study.config} --resume" in ended.out
    assert not (study.output / ".lock").exists()


STUCK = """
import ctypes, signal, sys
from pathlib import Path
from mllm_shapx.execution import signals
signals.ABORT_S = signals.LATE_S = 0.3
request = signals.StopRequest()
request.again = "the same command"
with signals.stop_requests(request), request.at_the_last(Path(sys.argv[1]).touch):
    # A call into C that no signal reaches.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    print("stuck", flush=True)
    ctypes.CDLL(None).sleep(600)
"""


def test_a_main_thread_that_does_not_return_holds_nothing_up(tmp_path: Path) -> None:
    released = tmp_path / "released"
    command = [sys.executable, "-c", STUCK, str(released)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stuck\n"
        time.sleep(1.0)  # it says so just before it calls into C
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "did not end in time" in said
    assert "to go on: the same command" in said
    assert released.exists()


@pytest.mark.slow
def test_a_signal_before_the_first_config_and_between_two_names_what_is_left(tmp_path: Path) -> None:
    saboteur = Sabotage(tmp_path)
    one_run = {"experiments": [{"explainer_type": "exact"}]}
    first = Study(tmp_path / "first", rows=1, settings=one_run, env=saboteur.env)
    second = Study(tmp_path / "second", rows=1, settings=one_run)
    args = ("--config", str(second.config), "--inline", "--grace", "60")

    run = first.start(*args)
    run.wait_for(lambda: run.catches(signal.SIGTERM))
    run.kill(signal.SIGTERM)
    ended = run.wait(30)
    assert ended.code == 143
    both = f"--config {first.config} --config {second.config}"
    assert f"to go on: mllm-shapx run {both}" in ended.out
    assert not first.output.exists()

    saboteur.set(slow=[0], slow_s=3.0)
    run = first.start(*args)
    run.wait_for(lambda: "1/1 workers busy" in run.out)
    run.kill(signal.SIGTERM)
    ended = run.wait(60)
    assert ended.code == 143, ended.out
    assert "1 of 1 samples" in ended.out, "the row under way was finished, and with it the first config"
    last = ended.out.splitlines()[-1]
    assert last.endswith(f"to go on: mllm-shapx run --config {second.config} --resume --grace 60.0 --inline")
    assert not second.output.exists()


@pytest.mark.slow
@pytest.mark.parametrize("option", ["", "--overwrite"])
def test_a_signal_in_the_middle_of_the_first_config_names_it_too(tmp_path: Path, option: str) -> None:
    saboteur = Sabotage(tmp_path)
    saboteur.set(batch_s=1.0)
    one_run = {"experiments": [{"explainer_type": "exact"}]}
    first = Study(tmp_path / "first", rows=1, settings=one_run, env=saboteur.env)
    first.write_prompts(*LONG_PROMPTS)
    second = Study(tmp_path / "second", rows=1, settings=one_run)
    run = first.start("--config", str(second.config), "--inline", "--grace", "0.5", *filter(None, [option]))
    run.wait_for(lambda: "1/1 workers busy" in run.out)
    run.kill(signal.SIGTERM)
    ended = run.wait(60)
    assert ended.code == 143, ended.out
    last = ended.out.splitlines()[-1]
    if option:
        assert f"to go on: mllm-shapx run --config {first.config} --resume" in ended.out
        assert f"to go on: mllm-shapx run --config {second.config} --overwrite" in last
    else:
        assert f"run --config {first.config} --config {second.config} --resume" in last


@pytest.mark.slow
def test_nohup_keeps_a_run_alive_when_its_terminal_closes(tmp_path: Path) -> None:
    saboteur = Sabotage(tmp_path)
    saboteur.set(slow=[0, 1, 2], slow_s=0.5)
    study = Study(tmp_path, rows=3, env=saboteur.env)
    run = Process(["run", "--config", str(study.config), "--inline"], study.env, tmp_path, prefix=("nohup",))
    run.wait_for(lambda: study.samples_on_disk() >= 1)
    run.kill_group(signal.SIGHUP)
    ended = run.wait(60)
    assert ended.code == 0, ended.out
    assert study.samples_on_disk() == 9


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_with_the_reason_and_resumes_once_there_is_room(
    undisturbed: Study, tmp_path: Path
) -> None:
    room = sum(file.stat().st_size for file in undisturbed.output.rglob("*") if file.is_file()) // 2
    root = tmp_path / "disk"
    root.mkdir()
    study = Study(tmp_path, rows=ROWS, settings={"output_root": f"smalldisk://{root}"})
    disk = {"PYTHONPATH": str(SABOTAGE), "SMALL_DISK_ROOT": str(root), "SMALL_DISK_BYTES": str(room)}
    ended = study.run("--inline", env=disk)
    assert ended.code == 1, ended.out
    assert "No space left on device" in ended.out
    assert "--resume" in ended.out
    ended = study.run("--inline", "--resume", env={**disk, "SMALL_DISK_BYTES": "1000000"})
    assert ended.code == 0, ended.out
    assert results(root / "study") == results(undisturbed.output)

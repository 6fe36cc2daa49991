"""`status` and `failures` from the files alone, with the job alive, dead, or never begun."""

import io
import json
import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from results_on_disk import make_failure, make_sample, write_study

from mllm_shapx.cli import main
from mllm_shapx.errors import UsageError
from mllm_shapx.records.lock import OutputLock
from mllm_shapx.records.progress import ProgressNote, RunPace, write_progress
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.storage import encode_json, open_storage
from mllm_shapx.reporting.failures import failures
from mllm_shapx.reporting.status import status
from mllm_shapx.reporting.watch import watch

FAILED = {"exact": {6: "worker_died", 7: "no_players"}, "limited_mc_frac0_3": {6: "worker_died"}}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study of three runs and eight rows: six done, three samples given up, three left."""
    return write_study(tmp_path / "study", range(6), planned=range(8), failed=FAILED)


def test_counts_per_run_come_from_the_files(study: Path) -> None:
    """Done, failed and left stand for each run, and what to do next is said."""
    found = status(str(study))
    counts = {run.name: (run.done, run.failed, run.left, run.total, run.state) for run in found.runs}
    assert counts == {
        "exact": (6, 2, 0, 8, "done, some failed"),
        "limited_mc_frac0_3": (6, 1, 1, 8, "stopped"),
        "standard_cc_ns32": (6, 0, 2, 8, "stopped"),
    }
    assert any("--resume" in step for step in found.next_steps)
    assert any(f"failures {study}" in step for step in found.next_steps)
    assert all(run.last_activity is not None and time.time() - run.last_activity < 60 for run in found.runs)


def test_one_run_can_be_asked_for(study: Path) -> None:
    """The directory of one run gives that run alone."""
    found = status(str(study / "exact"))
    assert [run.name for run in found.runs] == ["exact"]
    assert [failure.record.row_index for failure in failures(str(study / "exact")).failures] == [6, 7]


def test_finished_study_has_no_next_step(tmp_path: Path) -> None:
    """When all is done nothing is left to say."""
    found = status(str(write_study(tmp_path / "study")))
    assert found.next_steps == ()
    assert {run.state for run in found.runs} == {"done"}


def test_a_living_driver_is_named(study: Path) -> None:
    """While a driver holds the directory it is named, and no command is suggested."""
    with OutputLock(open_storage(str(study))):
        found = status(str(study))
    assert found.holder is not None
    assert str(os.getpid()) in found.holder
    assert found.next_steps == ()
    assert {run.state for run in found.runs} == {"done, some failed", "under way"}
    assert status(str(study)).holder is None


def test_unknown_totals_are_said_to_be_unknown(tmp_path: Path) -> None:
    """A run without a readable spec shows a question mark instead of a guess."""
    directory = write_study(tmp_path / "study", runs={"exact": 0.0})
    (directory / "exact" / "spec.json").write_text("{")
    (run,) = status(str(directory)).runs
    assert (run.total, run.done, run.left, run.state) == (None, 6, None, "unknown")
    assert "6/?" in status(str(directory)).to_text()


def test_samples_outside_the_plan_do_not_count(tmp_path: Path) -> None:
    """Samples of rows that are no longer selected are not counted as progress."""
    directory = write_study(tmp_path / "study", range(6), runs={"exact": 0.0}, planned=[4, 5, 6])
    (run,) = status(str(directory)).runs
    assert (run.done, run.total, run.left) == (2, 3, 1)


def test_rows_that_are_still_tried_or_done_by_now_are_not_given_up(tmp_path: Path) -> None:
    """A failure counts only while it is quarantined and the row has no sample."""
    directory = write_study(tmp_path / "study", range(2), runs={"exact": 0.0}, planned=range(4))
    records = RunRecords(open_storage(str(directory)), "exact")
    records.write_failure(make_failure("exact", 2, "worker_died", quarantined=False))
    records.write_failure(make_failure("exact", 1, "worker_died"))
    assert [run.failed for run in status(str(directory)).runs] == [0]
    assert failures(str(directory)).failures == ()


def test_text_fits_the_width_and_totals_add_up(study: Path) -> None:
    """The table has a line of sums and no line is wider than asked, the names of runs giving way."""
    for width in (50, 80, 120):
        text = status(str(study)).to_text(width)
        lines = text.splitlines()[2:7]
        assert all(len(line) <= width for line in lines)
        assert lines[-1].split()[:5] == ["in", "all", "18/24", "3", "3"]


def test_status_is_the_same_as_data(study: Path) -> None:
    """The JSON form holds the same numbers and can be written as JSON."""
    data = json.loads(json.dumps(status(str(study)).to_json()))
    assert (data["done"], data["failed"], data["total"], data["running"]) == (18, 3, 24, None)
    assert data["runs"][0]["left"] == 0


def test_failures_list_reason_message_and_file(study: Path) -> None:
    """Each failure shows row, run, reason, tries, node, the message's first line and its file."""
    found = failures(str(study))
    assert found.by_reason() == {"worker_died": 2, "no_players": 1}
    text = found.to_text(80)
    for failure in found.failures:
        assert Path(failure.path).is_file()
        assert failure.path in text
    assert "node7.cluster" in text
    assert "row 7 failed because of no_players" in text
    assert "a second line" not in text
    assert json.loads(json.dumps(found.to_json()))["failures"][0]["message"].endswith("a second line")


def test_failures_can_be_narrowed_to_a_reason(study: Path) -> None:
    """With a reason given the list holds it alone, and the command to retry names it."""
    found = failures(str(study), reasons=["no_players"])
    assert [failure.record.row_index for failure in found.failures] == [7]
    assert f"mllm-shapx retry {study} --only no_players" in found.to_text()
    assert "because of out_of_disk" in failures(str(study), reasons=["out_of_disk"]).to_text()


def test_damaged_failure_does_not_hide_the_others(study: Path) -> None:
    """A failure file that cannot be read costs neither the list nor the status."""
    (study / "exact" / "failures" / "sample_00006.json").write_text("{")
    assert len(failures(str(study)).failures) == 2
    assert status(str(study)).runs[0].failed == 1


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_other_directories_are_refused_with_what_was_looked_for(kind: str, tmp_path: Path) -> None:
    """A directory that is neither an experiment set's nor a run's is refused in words."""
    place = tmp_path / "place"
    if kind == "empty":
        (place / "something").mkdir(parents=True)
    elif kind == "file":
        place.write_text("text")
    for ask in (status, failures):
        with pytest.raises(UsageError) as caught:
            ask(str(place))
        assert str(place) in str(caught.value)


def test_large_studies_answer_at_once(tmp_path: Path) -> None:
    """Samples are counted by name: a file that holds no JSON at all still counts, and none is opened."""
    directory = write_study(tmp_path / "study", [0], runs={"exact": 0.0}, planned=range(3000))
    samples = directory / "exact" / "samples"
    for row in range(1, 3000):
        (samples / f"sample_{row:05d}_result.json").touch()
    began = time.perf_counter()
    (run,) = status(str(directory)).runs
    assert run.done == 3000
    assert time.perf_counter() - began < 2.0


def test_sample_of_the_helper_is_what_a_run_writes() -> None:
    """The samples these tests stand on survive the trip through their file."""
    sample = make_sample("exact", 3)
    assert type(sample).from_bytes("exact", encode_json(sample.to_json())) == sample


def test_samples_are_counted_by_name_and_read_when_asked(tmp_path: Path) -> None:
    """By name a truncated sample is done, and that names were counted is said; reading finds it."""
    directory = write_study(tmp_path / "study", range(6), runs={"exact": 0.0})
    path = directory / "exact" / "samples" / "sample_00003_result.json"
    path.write_bytes(path.read_bytes()[:-40])
    named = status(str(directory))
    assert "6/6" in named.to_text()
    assert "counted by the names of their files; --check reads them" in named.to_text()
    assert named.to_json()["damaged"] is None
    before = path.read_bytes()
    read = status(str(directory), check=True)
    assert [(run.done, run.damaged, run.left) for run in read.runs] == [(5, 1, 1)]
    assert "1 sample(s) are damaged: exact (1)" in read.to_text()
    assert path.read_bytes() == before
    called = CliRunner().invoke(main, ["status", str(directory), "--check"])
    assert called.exit_code == 1
    assert CliRunner().invoke(main, ["status", str(directory)]).exit_code == 0


NOTE = ProgressNote(
    at=1000.0,
    elapsed_s=60.0,
    workers=2,
    store_hits=40,
    coalitions_per_second=12.5,
    seconds_left=90.0,
    runs={"exact": RunPace(6, 384, 300, 0.1), "standard_cc_ns32": RunPace(6, 192, 0, 0.02)},
)


def test_a_study_being_written_shows_calls_rates_and_time_left(study: Path) -> None:
    """While a driver works, what it wrote last stands beside what the files hold; dead, the rates stay."""
    storage = open_storage(str(study))
    write_progress(storage, NOTE)
    with OutputLock(storage):
        found = status(str(study))
        text = found.to_text(120, now=1005.0)
    assert "2 workers, 12/s coalitions, 40 answers from the store, 1m 30s left (5s ago)" in text
    cc = next(line.split() for line in text.splitlines() if line.startswith("standard_cc_ns32"))
    assert cc[:9] == ["standard_cc_ns32", "6/8", "0", "2", "under", "way", "192", "0", "1.2/min"]
    assert "1m 40s" in " ".join(cc), "two samples at one in 50 seconds"
    data = status(str(study)).to_json()
    assert (data["progress"]["workers"], data["progress"]["store_hits"]) == (2, 40)
    runs = {run["name"]: run for run in data["runs"]}
    assert (runs["exact"]["coalitions"], runs["exact"]["answers"], runs["exact"]["left"]) == (384, 300, 0)
    assert runs["exact"]["seconds_left"] is None
    assert runs["standard_cc_ns32"]["seconds_left"] == 100.0
    assert runs["limited_mc_frac0_3"]["coalitions"] == 240, "the driver does not know of it, its summary does"


def test_a_finished_study_counts_by_its_summaries(tmp_path: Path) -> None:
    """Without a driver's note, as in older directories, the summaries say what the samples took."""
    directory = write_study(tmp_path / "study", runs={"exact": 0.0})
    (directory / "exact" / "summary").mkdir(exist_ok=True)
    summary = {"n_samples": 6, "n_calls_total": 384, "model_calls_total": 100}
    (directory / "exact" / "summary" / "aggregate_metrics.json").write_text(json.dumps(summary))
    (run,) = status(str(directory)).runs
    assert (run.coalitions, run.answers, run.samples_per_second) == (384, 100, None)
    older = {"n_samples": 6, "runtime_sec_total": 1.0}
    (directory / "exact" / "summary" / "aggregate_metrics.json").write_text(json.dumps(older))
    (run,) = status(str(directory)).runs
    assert (run.coalitions, run.answers) == (None, None)
    assert "?" in status(str(directory)).to_text(120)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"at": "x"}', '{"at": 1, "runs": {"exact": 5}}'])
def test_a_damaged_note_is_as_none(study: Path, content: str) -> None:
    """What cannot be read of a driver's note costs its figures and nothing else."""
    before = status(str(study)).to_json()
    (study / "progress.json").write_text(content)
    assert status(str(study)).to_json() == before


def test_watching_ends_with_the_driver_and_writes_what_changed(study: Path) -> None:
    """Each change is one line of data; once nobody works on it, the watch ends."""
    storage = open_storage(str(study))
    lock = OutputLock(storage)
    stream = io.StringIO()
    looks = iter(["nothing", "sample", "end"])

    def wait(_: float) -> None:
        match next(looks):
            case "sample":
                RunRecords(storage, "standard_cc_ns32").write_sample(make_sample("standard_cc_ns32", 6))
            case "end":
                lock.release()

    with lock:
        watch(lambda: status(str(study)), stream, as_json=True, sleep=wait)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["done"], line["running"] is not None) for line in lines] == [
        (18, True),
        (19, True),
        (19, False),
    ]


def test_watch_shows_a_study_at_rest_once(study: Path) -> None:
    """Without a driver `--watch` is `status`; with --json, in one line."""
    once = CliRunner().invoke(main, ["status", "--watch", str(study)])
    assert once.exit_code == 0
    assert once.output.count("no driver is working on it") == 1
    data = CliRunner().invoke(main, ["status", "--watch", "--json", str(study)])
    assert json.loads(data.output)["done"] == 18
    assert len(data.output.splitlines()) == 1
    assert CliRunner().invoke(main, ["status", "--watch", str(study / "nothing")]).exit_code == 2


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_watch_with_check_ends_as_its_last_look_says(study: Path, form: list[str]) -> None:
    """A sample that is damaged when the driver ends gives 1, and one that was made again by then 0."""
    call = ["status", "--watch", "--check", *form, str(study)]
    assert CliRunner().invoke(main, call).exit_code == 0
    records = RunRecords(open_storage(str(study)), "exact")
    path = study / "exact" / "samples" / "sample_00002_result.json"
    path.write_text("{")
    assert CliRunner().invoke(main, call).exit_code == 1
    without = CliRunner().invoke(main, ["status", "--watch", str(study)])
    assert without.exit_code == 0
    stream, lock = io.StringIO(), OutputLock(open_storage(str(study)))

    def make_again(_: float) -> None:
        records.write_sample(make_sample("exact", 2))
        lock.release()

    with lock:
        last = watch(lambda: status(str(study), check=True), stream, as_json=bool(form), sleep=make_again)
    assert (last.holder, last.damaged) == (None, 0)
    assert CliRunner().invoke(main, call).exit_code == 0


def test_a_narrow_terminal_gets_the_short_table(study: Path) -> None:
    """At 80 columns the table keeps to counts and state, and no line is longer."""
    write_progress(open_storage(str(study)), NOTE)
    text = status(str(study)).to_text(80)
    assert "coalitions" not in text
    assert all(len(line) <= 80 for line in text.splitlines()[2:7])
    few = status(str(study)).to_text(120, most_runs=1)
    assert "... and 2 more" in few

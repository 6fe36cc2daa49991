"""The coordinator as a plain class: messages that come twice, late or after a restart do no harm."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from results_on_disk import make_sample
from small_study import Study as Folder

from mllm_shapx.config.loading import load_config
from mllm_shapx.errors import StorageError
from mllm_shapx.execution.coordinator import Coordinator
from mllm_shapx.execution.helping import HelpOffer
from mllm_shapx.execution.messages import Answers, Beat, Lease, LeaseReply, Study, UnitFailure, WorkerInfo
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.preparation import open_output, prepare
from mllm_shapx.models.base import Answer
from mllm_shapx.planning.units import WorkUnit
from mllm_shapx.records.storage import LocalStorage
from mllm_shapx.reporting.failures import failures
from mllm_shapx.reporting.verify import verify

ROWS = 4


class Desk:
    """A study's directory, and coordinators over it, one after the other."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = Folder(folder, rows=ROWS, settings={"shap": {"normalizer": "IdentityNormalizer"}})
        self.folder.write_prompts(*(make_sample("exact", row).prompt_texts[0] for row in range(ROWS)))
        self.study, _ = prepare(load_config(self.folder.config), RunOptions(**options))
        opened = open_output(self.study)
        opened.lock.release()
        self.logged: list[tuple[str, int]] = []
        self.coordinator = Coordinator(self.study, opened.inspections, self._log)

    def restart(self, study: Study | None = None) -> Coordinator:
        """Build the coordinator anew over the same directory, as after its death."""
        self.study = study or self.study
        self.coordinator = Coordinator(self.study, None, self._log)
        return self.coordinator

    def lease(self, worker: WorkerInfo, *held: str) -> WorkUnit:
        reply = self.coordinator.lease(worker, held)
        assert reply.lease is not None
        return reply.lease.unit

    def lease_of(self, row_index: int, worker: str = "worker-2") -> Lease:
        """Lease units until a row comes: what is left of a unit decides its place in the queue."""
        held: list[str] = []
        while (reply := self.coordinator.lease(me(worker), tuple(held))).lease is not None:
            if reply.lease.unit.row_index == row_index:
                return reply.lease
            held.append(reply.lease.unit.unit_id)
        raise AssertionError(f"row {row_index} is not to be had")

    def explain(self, worker: WorkerInfo, unit: WorkUnit) -> None:
        """Report every run of a unit."""
        for name in unit.run_names:
            self.coordinator.report(worker, unit.unit_id, make_sample(name, unit.row_index), answers(name))

    def explain_all(self, worker: WorkerInfo) -> None:
        while (reply := self.coordinator.lease(worker, ())).lease is not None:
            self.explain(worker, reply.lease.unit)

    def sample_file(self, name: str, row: int) -> Path:
        return self.folder.output / name / "samples" / f"sample_{row:05d}_result.json"

    def failure(self, name: str, row: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            (self.folder.output / name / "failures" / f"sample_{row:05d}.json").read_text()
        )
        return found

    def _log(self, sample: Any) -> None:
        self.logged.append((sample.run_name, sample.row_index))


def me(name: str = "worker-1") -> WorkerInfo:
    return WorkerInfo(name, f"host-of-{name}", 4711, "cpu", "float32")


def answers(asked_by: str, *masks: int) -> Answers:
    by_mask = {mask: Answer(f"answer {mask}", (mask,), asked_by=asked_by) for mask in masks or (1, 2)}
    return Answers(by_mask, "conversation", 5)


def raised(unit: WorkUnit, *run_names: str, final: bool = False) -> UnitFailure:
    return UnitFailure(
        unit.unit_id, run_names or unit.run_names, "ArithmeticError", "no way", "Traceback: here", final
    )


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_a_dtype_that_auto_turns_out_to_be_is_told_once(desk: Desk) -> None:
    runs = tuple(
        replace(run, connector_kwargs=run.connector_kwargs.model_copy(update={"dtype": "auto"}), device=None)
        for run in desk.study.runs
    )
    desk.restart(replace(desk.study, runs=runs))
    for name in ("worker-1", "worker-2"):
        desk.coordinator.lease(replace(me(name), device="cuda", dtype="bfloat16"), ())
    told = [note for note in desk.coordinator.state().notes if "connector_kwargs.dtype" in note]
    assert len(told) == 1
    assert '"auto", which is bfloat16 here' in told[0]


def test_a_report_that_arrives_twice_is_written_and_counted_once(desk: Desk) -> None:
    unit = desk.lease(me())
    desk.explain(me(), unit)
    stamp = desk.sample_file("exact", unit.row_index).stat().st_mtime_ns
    desk.explain(me(), unit)
    assert desk.sample_file("exact", unit.row_index).stat().st_mtime_ns == stamp
    assert desk.coordinator.state().done == {"exact": 1, "limited_mc_frac0_5": 1, "standard_cc_ns16": 1}
    assert len(desk.logged) == 3


def test_a_restarted_coordinator_gives_out_only_the_runs_that_are_open(desk: Desk) -> None:
    unit = desk.lease(me())
    desk.coordinator.report(me(), unit.unit_id, make_sample("exact", unit.row_index), answers("exact"))
    desk.coordinator.worker_lost("worker-1", innocent=True, detail="preempted", log_tail=())
    again = desk.lease(me("worker-2"))
    assert (again.row_index, again.run_names) == (unit.row_index, unit.run_names[1:])
    desk.restart()
    after = desk.lease_of(unit.row_index).unit
    assert after.run_names == unit.run_names[1:]


def test_workers_announce_to_a_restarted_coordinator_what_they_hold(desk: Desk) -> None:
    """Neither a beat nor a lease loses a unit, and nobody else gets it."""
    first, second = desk.lease(me("worker-1")), desk.lease(me("worker-2"))
    coordinator = desk.restart()
    coordinator.beat(me("worker-1"), Beat((first.unit_id,), 0, 0.0))
    third = desk.lease(me("worker-2"), second.unit_id)
    assert third.unit_id not in {first.unit_id, second.unit_id}
    for worker, unit in (("worker-1", first), ("worker-2", second), ("worker-2", third)):
        desk.explain(me(worker), unit)
    assert coordinator.state().done["exact"] == 3


@pytest.mark.parametrize("word", ["report", "flush", "fail"])
def test_the_first_word_after_a_restart_counts_as_an_announcement(desk: Desk, word: str) -> None:
    unit = desk.lease(me())
    coordinator = desk.restart()
    if word == "report":
        coordinator.report(me(), unit.unit_id, make_sample("exact", unit.row_index), answers("exact"))
    elif word == "flush":
        coordinator.flush(me(), unit.unit_id, answers("exact", 7))
    else:
        coordinator.fail(me(), raised(unit, final=True))
        assert coordinator.state().failed["exact"] == 1
        return
    assert desk.lease(me("worker-2")).unit_id != unit.unit_id


def test_words_about_a_unit_that_was_done_before_a_restart_are_harmless(desk: Desk) -> None:
    """The coordinator may die between writing the last sample and saying so: the worker says it all again."""
    unit = desk.lease(me())
    desk.explain(me(), unit)
    coordinator = desk.restart()
    coordinator.report(me(), unit.unit_id, make_sample("standard_cc_ns16", unit.row_index), answers("exact"))
    coordinator.flush(me(), unit.unit_id, answers("exact"))
    coordinator.fail(me(), raised(unit))
    assert coordinator.beat(me(), Beat((unit.unit_id,), 0, 0.0)).drop == (unit.unit_id,)
    assert coordinator.state().done["exact"] == 1


def test_answers_are_kept_for_the_next_worker_whether_flushed_or_reported(desk: Desk) -> None:
    unit = desk.lease(me())
    desk.coordinator.flush(me(), unit.unit_id, answers("exact", 1, 2))
    desk.coordinator.report(me(), unit.unit_id, make_sample("exact", unit.row_index), answers("exact", 3))
    desk.restart()
    lease = desk.lease_of(unit.row_index)
    assert sorted(lease.known.by_mask) == [1, 2, 3]
    desk.explain(me("worker-2"), lease.unit)
    files = [path.name for path in (desk.folder.output / "generations").iterdir()]
    assert len(files) == 1, "packed into one file with the last sample"
    assert files[0].endswith(".parquet")


def test_the_last_words_of_a_dead_worker_lease_nothing(desk: Desk) -> None:
    unit = desk.lease(me())
    desk.coordinator.worker_lost("worker-1", innocent=True, detail="its node was lost", log_tail=())
    assert desk.coordinator.beat(me(), Beat((unit.unit_id,), 0, 0.0)).order == "stop"
    assert desk.coordinator.lease(me(), (unit.unit_id,)) == LeaseReply(None, order="stop")
    assert desk.coordinator.exchange(me(), HelpOffer(unit.unit_id, "exact")).session == ""
    assert desk.coordinator.state().workers == ()
    assert desk.lease(me("worker-2")).unit_id == unit.unit_id
    desk.coordinator.report(me(), unit.unit_id, make_sample("exact", unit.row_index), answers("exact"))
    assert desk.coordinator.state().done["exact"] == 1, "a sample is welcome from whomever"


def test_a_unit_that_kills_its_worker_alone_is_given_up_after_three_times(desk: Desk) -> None:
    """The failure names attempts, node, worker and its last log lines; it is there from the first time."""
    for attempt in range(1, 4):
        worker = f"worker-{attempt}"
        unit = desk.lease(me(worker))
        desk.coordinator.worker_lost(worker, innocent=False, detail="exit code 9", log_tail=("last words",))
        failure = desk.failure("exact", unit.row_index)
        assert (failure["attempts"], failure["quarantined"]) == (attempt, attempt == 3)
        assert (failure["node"], failure["worker"]) == (f"host-of-{worker}", worker)
        assert (failure["reason"], failure["log_tail"]) == ("worker_died", ["last words"])
        assert "exit code 9" in failure["message"]
    state = desk.coordinator.state()
    assert state.failed == dict.fromkeys(state.failed, 1)
    assert any("alone in worker worker-2" in note and "attempt 2 of 3" in note for note in state.notes)
    assert desk.lease(me("worker-4")).unit_id != unit.unit_id


def test_attempts_outlive_the_coordinator(desk: Desk) -> None:
    for worker in ("worker-1", "worker-2"):
        unit = desk.lease(me(worker))
        desk.coordinator.worker_lost(worker, innocent=False, detail="killed", log_tail=())
    desk.restart()
    assert desk.lease(me("worker-3")).unit_id == unit.unit_id
    desk.coordinator.worker_lost("worker-3", innocent=False, detail="killed", log_tail=())
    assert desk.failure("exact", unit.row_index)["quarantined"]


def test_an_error_is_tried_again_and_its_failure_vanishes_with_success(desk: Desk) -> None:
    unit = desk.lease(me())
    desk.coordinator.fail(me(), raised(unit))
    failure = desk.failure("exact", unit.row_index)
    assert (failure["attempts"], failure["quarantined"]) == (1, False)
    assert (failure["reason"], failure["traceback"]) == ("ArithmeticError", "Traceback: here")
    desk.explain_all(me())
    desk.coordinator.finish()
    assert not list(desk.folder.output.glob("*/failures/*"))
    assert desk.coordinator.state().finished


def test_an_error_that_is_final_for_one_run_leaves_the_others_alone(desk: Desk) -> None:
    unit = desk.lease(me())
    desk.coordinator.fail(me(), raised(unit, "exact", final=True))
    for name in unit.run_names[1:]:
        desk.coordinator.report(me(), unit.unit_id, make_sample(name, unit.row_index), answers(name))
    state = desk.coordinator.state()
    assert state.failed == {"exact": 1, "limited_mc_frac0_5": 0, "standard_cc_ns16": 0}
    assert state.done["limited_mc_frac0_5"] == 1
    assert desk.lease(me()).unit_id != unit.unit_id


def test_retry_runs_the_quarantined_rows_and_nothing_else(desk: Desk) -> None:
    poisoned = desk.lease(me())
    desk.coordinator.fail(me(), raised(poisoned, final=True))
    done = desk.lease(me())
    desk.explain(me(), done)
    desk.coordinator.finish()
    found = failures(str(desk.folder.output)).failures
    assert {failure.record.row_index for failure in found} == {poisoned.row_index}
    rows = {failure.record.run_name: (failure.record.row_index,) for failure in found}
    study, _ = prepare(load_config(desk.folder.config), RunOptions(retry_rows=rows))
    coordinator = desk.restart(study)
    assert coordinator.state().unfinished_units == 1
    assert desk.lease(me("worker-2")).unit_id == poisoned.unit_id
    desk.explain(me("worker-2"), poisoned)
    assert coordinator.state().finished
    assert not list(desk.folder.output.glob("*/failures/*"))
    assert coordinator.state().failed["exact"] == 0


def test_nothing_is_handed_out_while_draining(desk: Desk) -> None:
    unit = desk.lease(me())
    desk.coordinator.drain()
    assert desk.coordinator.lease(me("worker-2"), ()).order == "drain"
    assert desk.coordinator.beat(me(), Beat((unit.unit_id,), 0, 0.0)).order == "drain"
    desk.explain(me(), unit)
    state = desk.coordinator.state()
    assert (state.draining, state.finished, state.done["exact"]) == (True, False, 1)


class FullDisk:
    """Makes writing below a folder fail, as on a full disk, until there is room again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free: int | None = None
        write = LocalStorage.write_bytes

        def limited(storage: LocalStorage, path: str, data: bytes) -> None:
            if self.free is not None:
                self.free -= len(data)
                if self.free < 0:
                    raise StorageError(f"cannot write {path}: No space left on device")
            write(storage, path, data)

        monkeypatch.setattr(LocalStorage, "write_bytes", limited)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    return FullDisk(monkeypatch)


@pytest.mark.parametrize("free", [0, 700, 2000, 3500])
def test_a_full_disk_ends_the_study_and_leaves_it_valid(desk: Desk, disk: FullDisk, free: int) -> None:
    """Workers are told to stop, the message is kept for the user, and the rest is done once there is room."""
    disk.free = free
    unit = desk.lease(me())
    desk.explain(me(), unit)
    state = desk.coordinator.state()
    assert state.fatal is not None
    assert "No space left on device" in state.fatal
    assert desk.coordinator.lease(me(), ()).order == "stop"
    assert desk.coordinator.beat(me(), Beat((), 0, 0.0)).order == "stop"
    desk.coordinator.finish()
    disk.free = None
    desk.restart()
    desk.explain_all(me("worker-2"))
    desk.coordinator.finish()
    assert desk.coordinator.state().finished
    report = verify([str(desk.folder.output)])
    assert {str(problem.message) for problem in report.problems} == {"it is missing"}, "the summaries alone"


def test_a_store_that_cannot_be_read_ends_the_study_instead_of_the_worker(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> bytes:
        raise StorageError("cannot read generations: Input/output error")

    monkeypatch.setattr(LocalStorage, "read_bytes", broken)
    reply = desk.coordinator.lease(me(), ())
    assert (reply.lease, reply.order) == (None, "stop")
    assert desk.coordinator.state().fatal == "cannot read generations: Input/output error"


def test_a_worker_without_progress_is_stalled_and_one_that_had_nothing_to_do_is_not(desk: Desk) -> None:
    coordinator = desk.restart(replace(desk.study, options=RunOptions(stall_s=0.2)))
    unit = desk.lease(me("worker-1"))
    time.sleep(0.3)
    coordinator.beat(me("worker-2"), Beat((), 0, 0.0))
    time.sleep(0.3)
    second = desk.lease(me("worker-2"))
    assert coordinator.state().stalled == ("worker-1",)
    coordinator.exchange(me("worker-1"), HelpOffer(unit.unit_id, "exact", (1, 2, 3)))
    assert coordinator.state().stalled == ("worker-1",), "offering coalitions is no progress"
    coordinator.beat(me("worker-1"), Beat((unit.unit_id,), 5, 1.0))
    assert coordinator.state().stalled == (), "answers are"
    time.sleep(0.3)
    coordinator.flush(me("worker-2"), second.unit_id, answers("exact"))
    assert coordinator.state().stalled == ("worker-1",)


def test_counts_are_of_selected_rows_alone(desk: Desk) -> None:
    """A directory may hold samples of rows that a smaller selection leaves out."""
    desk.explain_all(me())
    study, _ = prepare(load_config(desk.folder.config), RunOptions(max_samples=2))
    state = desk.restart(study).state()
    assert (state.done["exact"], state.total["exact"], state.finished) == (2, 2, True)
    assert len(list((desk.folder.output / "exact" / "samples").iterdir())) == ROWS, "the others are kept"


def test_a_worker_that_fills_its_batches_leaves_the_others_their_share(desk: Desk) -> None:
    """Two rows each are taken in any case; a third one only while everybody else could have as many."""
    coordinator, one, other = desk.coordinator, me("worker-1"), me("worker-2")
    held = [desk.lease(one).unit_id]
    coordinator.beat(other, Beat((), 0, 0.0))
    held.append(desk.lease(one, *held).unit_id)
    queued = coordinator.state().unfinished_units - len(held)
    assert queued == 2, "as many as the other worker may have"
    held.append(desk.lease(one, *held).unit_id)
    assert coordinator.lease(one, tuple(held)).lease is None
    assert coordinator.lease(other, ()).lease is not None


def test_rows_in_flight_that_are_asked_for_are_had(tmp_path: Path) -> None:
    desk = Desk(tmp_path, rows_in_flight=4)
    coordinator, one = desk.coordinator, me("worker-1")
    coordinator.beat(me("worker-2"), Beat((), 0, 0.0))
    held: list[str] = []
    for _ in range(ROWS):
        held.append(desk.lease(one, *held).unit_id)
    assert len(set(held)) == ROWS

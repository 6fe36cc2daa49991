"""A run's directory tells what is done, whatever was damaged, and says what it healed."""

import json
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from records_kit import files_below, make_finished_run, make_sample

from mllm_shapx.errors import StorageError
from mllm_shapx.records.checkpoint import Checkpoint, CheckpointWriter
from mllm_shapx.records.failures import FailureRecord
from mllm_shapx.records.results import SampleFile, SampleResult
from mllm_shapx.records.runs import RunInspection, RunRecords, find_runs
from mllm_shapx.records.storage import FsspecStorage, LocalStorage
from mllm_shapx.records.summary import RunSummary

ROWS = [4, 2, 9, 7]


def inspect_and_heal(
    records: RunRecords, rows: list[int], on_sample: Callable[[SampleFile], None] | None = None
) -> tuple[RunInspection, tuple[str, ...]]:
    """Do what the start of a study does; return what was found, and all notes."""
    inspection = records.inspect(rows, on_sample)
    return inspection, (*records.heal(inspection), *inspection.notes)


def _failure(row: int, *, quarantined: bool = True, attempts: int = 3) -> FailureRecord:
    return FailureRecord(row, "exact", "worker_died", "killed", attempts, quarantined=quarantined)


def test_the_checkpoint_holds_the_contracts_fields(tmp_path: Path) -> None:
    writer = CheckpointWriter(LocalStorage(tmp_path), "run/checkpoint.json", ROWS)
    writer.complete(2)
    writer.fail(9)
    writer.complete(4)
    writer.write()
    data = json.loads((tmp_path / "run" / "checkpoint.json").read_text())
    assert data.pop("created_at") <= data.pop("updated_at") <= time.time()
    assert data == {"version": 2, "completed_indices": [2, 4], "failed_indices": [9], "next_index": 2}


def test_next_index_is_the_first_row_in_selection_order_that_is_not_done(tmp_path: Path) -> None:
    writer = CheckpointWriter(LocalStorage(tmp_path), "c", ROWS)
    seen = [writer.next_index]
    for row in (2, 4, 7, 9):
        writer.complete(row)
        seen.append(writer.next_index)
    assert seen == [0, 0, 2, 2, 4]


def test_a_quarantined_row_that_succeeds_later_is_completed_and_not_failed(tmp_path: Path) -> None:
    writer = CheckpointWriter(LocalStorage(tmp_path), "c", ROWS)
    writer.fail(4)
    writer.complete(4)
    writer.fail(4)
    snapshot = writer.snapshot()
    assert (snapshot.completed_indices, snapshot.failed_indices) == ((4,), ())


def test_completions_are_written_every_few_seconds_only_and_less_often_when_there_are_many(
    tmp_path: Path,
) -> None:
    writer = CheckpointWriter(LocalStorage(tmp_path), "c", range(200_000))
    written = []
    for row in range(1000):
        writer.complete(row)
        written.append(writer.maybe_write(now=1000 + row * 0.01))
    assert written[0]
    assert 3 <= sum(written) <= 6
    few = writer.interval_s
    for row in range(200_000):
        writer.complete(row)
    assert writer.interval_s > 5 * few
    assert writer.maybe_write(now=5000)
    assert not writer.maybe_write(now=9000), "nothing changed since"


def test_a_completion_costs_the_same_at_sample_100_as_at_sample_100_000(tmp_path: Path) -> None:
    def cost(done: int) -> float:
        writer = CheckpointWriter(LocalStorage(tmp_path), "c", range(300_000), completed=range(done))
        writer.maybe_write(now=0.0)
        best = float("inf")
        for attempt in range(5):
            start = time.perf_counter()
            for row in range(done + attempt * 1000, done + attempt * 1000 + 1000):
                writer.complete(row)
                writer.maybe_write(now=0.001)
                _ = writer.next_index
            best = min(best, time.perf_counter() - start)
        return best

    cost(10)
    # Rewriting the file each time would make it some thousand times dearer.
    assert cost(100_000) < 20 * cost(100)


def test_a_checkpoint_is_the_same_after_its_file() -> None:
    checkpoint = Checkpoint((1, 2), (), 2, 1.5, 2.5)
    assert Checkpoint.from_bytes(checkpoint.to_bytes()) == checkpoint


def test_a_finished_run_is_found_done_without_a_note(tmp_path: Path) -> None:
    records = make_finished_run(tmp_path, ROWS)
    before = files_below(tmp_path)
    inspection = records.inspect(ROWS)
    assert inspection.completed == frozenset(ROWS)
    assert inspection.failed == frozenset()
    assert inspection.notes + inspection.faults == ()
    assert inspection.created_at is not None
    assert files_below(tmp_path) == before


def test_an_empty_directory_is_empty_and_stays_so(tmp_path: Path) -> None:
    records = RunRecords(LocalStorage(tmp_path / "set"), "exact")
    assert records.state() == "empty"
    inspection = records.inspect(ROWS)
    assert (inspection.completed, inspection.notes, inspection.created_at) == (frozenset(), (), None)
    assert not (tmp_path / "set").exists()


def test_samples_without_a_checkpoint_are_an_abandoned_run_that_is_set_aside_whole(tmp_path: Path) -> None:
    records = make_finished_run(tmp_path, ROWS)
    assert records.state() == "started"
    records.storage.remove(records.layout.checkpoint)
    assert records.state() == "abandoned"
    assert records.sample_count() == 4
    before = files_below(tmp_path / "exact")
    folders = [records.set_aside()]
    assert records.state() == "empty"
    assert files_below(tmp_path / "exact" / folders[0]) == before
    records.write_sample(make_sample(2))
    folders.append(records.set_aside())
    assert folders[0] != folders[1]
    assert files_below(tmp_path / "exact" / folders[0]) == before


def test_every_readable_sample_feeds_the_summary_once(tmp_path: Path) -> None:
    records = make_finished_run(tmp_path, ROWS)
    summary = RunSummary()
    records.inspect(ROWS, summary.add)
    assert summary.to_json() == json.loads((tmp_path / records.layout.summary).read_text())


def test_failures_give_attempts_and_quarantine_and_end_when_the_row_has_a_sample(tmp_path: Path) -> None:
    records = make_finished_run(tmp_path, ROWS)
    records.write_failure(_failure(11))
    records.write_failure(_failure(12, quarantined=False, attempts=1))
    records.write_failure(_failure(2))
    found, _ = inspect_and_heal(records, [*ROWS, 11, 12])
    writer = records.checkpoint_writer([*ROWS, 11, 12], found)
    writer.write()
    inspection = records.inspect([*ROWS, 11, 12])
    assert inspection.failed == {11}
    assert inspection.attempts == {11: 3, 12: 1}
    assert inspection.notes == ()
    assert [failure.row_index for failure in records.read_failures()] == [11, 12]
    records.clear_failure(11)
    assert records.inspect([*ROWS, 11, 12]).failed == frozenset()


def test_rows_that_are_no_longer_selected_stay_done_and_are_said(tmp_path: Path) -> None:
    inspection = make_finished_run(tmp_path, ROWS).inspect([4, 2])
    assert inspection.completed == frozenset(ROWS)
    assert any("2 sample(s) of rows that are not selected now are kept" in note for note in inspection.notes)


WRONG_SAMPLES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "one byte": lambda data: data[:1],
    "half": lambda data: data[: len(data) // 2],
    "all but the closing brace": lambda data: data[:-2],
    "zeros after a power loss": lambda data: bytes(len(data)),
    "not JSON": lambda _: b"<html></html>",
    "a list": lambda _: b"[]",
    "wrong schema": lambda data: data.replace(b'"n_calls": 8', b'"n_calls": "eight"'),
    "a field missing": lambda data: data.replace(b'"response"', b'"answer"'),
    "another row": lambda data: data.replace(b'"row_index": 9', b'"row_index": 2'),
    "wrong bytes": lambda data: data.replace(b"blue", b"\xff\xfe\xfd\xfc"),
}


@pytest.mark.parametrize("damage", WRONG_SAMPLES)
def test_a_damaged_sample_is_moved_aside_and_its_row_done_again(tmp_path: Path, damage: str) -> None:
    records = make_finished_run(tmp_path, ROWS)
    path = tmp_path / records.layout.sample(9)
    wrong = WRONG_SAMPLES[damage](path.read_bytes())
    path.write_bytes(wrong)
    seen: list[SampleFile] = []
    inspection = records.inspect(ROWS, seen.append)
    assert path.read_bytes() == wrong
    notes = (*records.heal(inspection), *inspection.notes)
    assert inspection.completed == {4, 2, 7}
    assert sorted(one.row_index for one in seen) == [2, 4, 7]
    assert not path.exists()
    assert (tmp_path / "exact/damaged/sample_00009_result.json.1").read_bytes() == wrong
    assert len(notes) == 1
    assert "exact: 1 damaged sample(s) moved to damaged/, to be done again" in notes[0]
    assert "sample_00009_result.json.1 (" in notes[0]


def test_a_sample_that_lost_only_its_last_newline_is_still_done(tmp_path: Path) -> None:
    records = make_finished_run(tmp_path, ROWS)
    path = tmp_path / records.layout.sample(9)
    path.write_bytes(path.read_bytes()[:-1])
    assert records.inspect(ROWS).completed == frozenset(ROWS)


def test_files_damaged_twice_are_both_kept(tmp_path: Path) -> None:
    records = make_finished_run(tmp_path, ROWS)
    for content in (b"first", b"second"):
        (tmp_path / records.layout.sample(9)).write_bytes(content)
        inspect_and_heal(records, ROWS)
    kept = files_below(tmp_path / "exact" / "damaged")
    assert kept == {"sample_00009_result.json.1": b"first", "sample_00009_result.json.2": b"second"}


def test_a_folder_in_the_place_of_a_sample_is_moved_aside(tmp_path: Path) -> None:
    records = make_finished_run(tmp_path, ROWS)
    path = tmp_path / records.layout.sample(9)
    path.unlink()
    path.mkdir()
    inspection, notes = inspect_and_heal(records, ROWS)
    assert inspection.completed == {4, 2, 7}
    assert "it is a folder" in notes[0]


def test_a_sample_that_the_checkpoint_does_not_name_is_done_and_said(tmp_path: Path) -> None:
    records = make_finished_run(tmp_path, ROWS)
    records.write_sample(make_sample(11))
    inspection = records.inspect([*ROWS, 11])
    assert inspection.completed == {*ROWS, 11}
    assert inspection.notes == ("exact: 1 sample(s) that the checkpoint does not name taken as done: row 11",)


def test_a_sample_that_is_named_and_not_there_is_done_again_and_said(tmp_path: Path) -> None:
    records = make_finished_run(tmp_path, ROWS)
    (tmp_path / records.layout.sample(4)).unlink()
    inspection = records.inspect(ROWS)
    assert inspection.completed == {2, 9, 7}
    assert inspection.notes == (
        "exact: 1 row(s) that the checkpoint names as completed have no sample, to be done again: row 4",
    )


def test_a_row_failed_by_the_checkpoint_alone_is_done_again_and_said(tmp_path: Path) -> None:
    records = make_finished_run(tmp_path, ROWS)
    writer = records.checkpoint_writer([*ROWS, 11], records.inspect(ROWS))
    writer.fail(11)
    writer.write()
    inspection = records.inspect([*ROWS, 11])
    assert inspection.failed == frozenset()
    assert "names as failed have no failure file, to be done again: row 11" in inspection.notes[0]


def test_leftover_temporary_files_are_removed_and_said(tmp_path: Path) -> None:
    records = make_finished_run(tmp_path, ROWS)
    before = files_below(tmp_path)
    for folder in ("", "samples", "failures", "summary", "audio/sample_00099"):
        (tmp_path / "exact" / folder).mkdir(exist_ok=True, parents=True)
        (tmp_path / "exact" / folder / ".tmp-0123456789abcdef").write_bytes(b'{"row_ind')
    inspection, notes = inspect_and_heal(records, ROWS)
    assert inspection.completed == frozenset(ROWS)
    assert "exact: 5 unfinished file(s) of a write that was cut short removed" in notes[0]
    assert files_below(tmp_path) == before


def test_many_findings_of_one_kind_make_one_note(tmp_path: Path) -> None:
    rows = list(range(50))
    records = make_finished_run(tmp_path, rows)
    for row in rows[10:]:
        (tmp_path / records.layout.sample(row)).write_bytes(b"")
    _, notes = inspect_and_heal(records, rows)
    assert len(notes) == 1
    assert notes[0].startswith("exact: 40 damaged sample(s)")
    assert notes[0].endswith("and 37 more")
    assert "sample_00010_result.json.1 (it is empty)" in notes[0]


CUTS = {"0": 0, "1": 1, "half": None, "-1": -1}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(
    "path",
    [
        "checkpoint.json",
        "samples/sample_00009_result.json",
        "failures/sample_00011.json",
        "summary/aggregate_metrics.json",
        "spec.json",
    ],
)
def test_any_file_cut_anywhere_leaves_a_run_that_ends_complete_and_equal(
    tmp_path: Path, path: str, cut: str
) -> None:
    """The resumed run is played by hand: what inspection calls undone is written again."""
    rows = [*ROWS, 11]
    sound = make_finished_run(tmp_path / "sound", ROWS)
    records = make_finished_run(tmp_path / "cut", ROWS)
    for one in (sound, records):
        one.write_failure(_failure(11))
        one.checkpoint_writer(rows, one.inspect(rows)).write()
    file = tmp_path / "cut" / "exact" / path
    data = file.read_bytes()
    position = len(data) // 2 if CUTS[cut] is None else CUTS[cut]
    file.write_bytes(data[:position])

    spec, spec_notes = records.heal_spec()
    summary = RunSummary()
    inspection, notes = inspect_and_heal(records, rows, summary.add)
    assert cut == "-1" or spec_notes + notes
    if spec is None:
        records.write_spec(sound.read_spec() or {})
    writer = records.checkpoint_writer(rows, inspection)
    for row in rows:
        if row in inspection.completed | inspection.failed:
            continue
        if row == 11:
            records.write_failure(_failure(11))
            writer.fail(row)
            continue
        sample = make_sample(row)
        records.write_sample(sample)
        summary.add(sample)
        writer.complete(row)
    writer.write()
    records.write_summary(summary.to_json())

    again = records.inspect(rows)
    assert again.notes + again.faults == ()
    shutil.rmtree(tmp_path / "cut" / "exact" / "damaged", ignore_errors=True)
    ours, theirs = files_below(tmp_path / "cut"), files_below(tmp_path / "sound")
    for files in (ours, theirs):
        checkpoint = Checkpoint.from_bytes(files.pop("exact/checkpoint.json"))
        assert set(checkpoint.completed_indices) == set(ROWS)
        assert checkpoint.failed_indices == (11,)
        assert checkpoint.next_index == 4
    for name in theirs:
        # A file that lost its last newline alone is sound as it is.
        assert ours[name].strip() == theirs[name].strip()
    assert ours.keys() == theirs.keys()


def test_a_directory_that_cannot_be_read_is_an_error_and_nothing_is_called_undone(tmp_path: Path) -> None:
    records = make_finished_run(tmp_path, ROWS)
    shutil.rmtree(tmp_path / "exact" / "samples")
    (tmp_path / "exact" / "samples").write_text("a file")
    with pytest.raises(StorageError, match="a file stands where a directory is needed"):
        records.inspect(ROWS)


def test_a_run_works_the_same_on_a_remote_storage() -> None:
    storage = FsspecStorage(f"memory://{uuid.uuid4().hex}")
    records = RunRecords(storage, "exact")
    writer = records.checkpoint_writer(ROWS)
    writer.write()
    for row in ROWS:
        records.write_sample(make_sample(row))
        writer.complete(row)
    storage.write_bytes(records.layout.sample(9), b"{")
    inspection, notes = inspect_and_heal(records, ROWS)
    assert inspection.completed == {4, 2, 7}
    assert len(notes) == 2
    assert records.read_sample(4) == make_sample(4)
    assert isinstance(records.read_sample(4), SampleResult)
    assert records.sample_rows() == [2, 4, 7]


def test_runs_are_found_from_the_sets_directory_and_from_a_runs(tmp_path: Path) -> None:
    for name in ("exact", "limited_mc_ns8"):
        make_finished_run(tmp_path / "set", [1], name)
    (tmp_path / "set" / "generations").mkdir()
    (tmp_path / "set" / "notes.txt").write_text("mine")
    storage, names = find_runs(str(tmp_path / "set") + "/")
    assert (storage.uri, names) == (str(tmp_path / "set"), ("exact", "limited_mc_ns8"))
    storage, names = find_runs(str(tmp_path / "set" / "exact"))
    assert (storage.uri, names) == (str(tmp_path / "set"), ("exact",))
    assert find_runs(str(tmp_path / "nowhere"))[1] == ()

"""Each kind of file, damaged in each way: a resumed study ends complete and equal, and says so."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_study import Study, results

ROWS = 3
RUN = "exact"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = Study(tmp_path_factory.mktemp("finished"), rows=ROWS, words=4)
    assert study.call("--inline").code == 0
    return study


def copied(study: Study, folder: Path) -> Study:
    """Return a copy of a study that reads the same rows."""
    rows = {"source": "local_parquet", "path": str(study.folder / "rows.parquet")}
    copy = Study(folder, rows=study.rows, settings={"dataset": rows})
    shutil.rmtree(copy.output, ignore_errors=True)
    shutil.copytree(study.output, copy.output)
    return copy


def resumed(study: Study) -> str:
    """Resume a study, hold that it ends sound, and return what it said."""
    end = study.call("--inline", "--resume")
    assert end.code == 0, end.out
    check = study.call(verb="verify")
    assert check.code == 0, check.out
    return end.out


KINDS = {
    "sample": f"{RUN}/samples/sample_00001_result.json",
    "checkpoint": f"{RUN}/checkpoint.json",
    "spec": f"{RUN}/spec.json",
    "summary": f"{RUN}/summary/aggregate_metrics.json",
    "config": "config.json",
    "answers": "generations/00001-*.parquet",
    "lock": ".lock",
}


def cuts(size: int) -> list[int]:
    """Return where files are cut: at nothing, near the start, in the middle, short of the end."""
    return sorted({0, 1, size // 3, size // 2, max(size - 2, 0)})


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_short_anywhere_is_mended(finished: Study, tmp_path: Path, kind: str) -> None:
    expected = results(finished.output)
    study = copied(finished, tmp_path)
    if kind == "lock":
        (study.output / ".lock").write_text('{"token": "of somebody", "host": "elsewhere", "pid": 1}\n')
    (path,) = study.output.glob(KINDS[kind])
    whole = path.read_bytes()
    for length in cuts(len(whole)):
        path.write_bytes(whole[:length])
        if kind == "answers":
            # They are looked at only when a row is explained.
            (study.output / KINDS["sample"]).unlink()
        said = resumed(study)
        assert results(study.output) == expected, f"cut at {length}"
        assert kind == "config" or "moved to" in said or "damaged" in said or kind == "lock", said


@pytest.mark.parametrize(
    "content", [b"\0" * 4096, b"[]\n", b'{"row_index": 1}\n', b"\xff\xfe not text", b"null"]
)
@pytest.mark.parametrize("kind", ["sample", "checkpoint", "spec", "summary"])
def test_a_file_of_something_else_is_mended(
    finished: Study, tmp_path: Path, kind: str, content: bytes
) -> None:
    study = copied(finished, tmp_path)
    (study.output / KINDS[kind]).write_bytes(content)
    said = resumed(study)
    assert "damaged" in said
    assert results(study.output) == results(finished.output)


def lose_checkpoint_of_one(study: Study) -> None:
    (study.output / KINDS["checkpoint"]).unlink()


def lose_sample(study: Study) -> None:
    (study.output / KINDS["sample"]).unlink()


def leave_temporary_files(study: Study) -> None:
    from mllm_shapx.records.local_storage import TEMP_PREFIX

    for folder in (RUN, f"{RUN}/samples", f"{RUN}/summary", "generations"):
        (study.output / folder / f"{TEMP_PREFIX}0123").write_bytes(b"half a fi")


def leave_parts(study: Study) -> None:
    """Leave what a crash in the middle of a row leaves: parts that are not packed, and no sample."""
    (answers,) = study.output.glob(KINDS["answers"])
    parts = answers.with_suffix(".parts")
    parts.mkdir()
    answers.rename(parts / "000001.parquet")
    for sample in study.output.glob("*/samples/sample_00001_result.json"):
        sample.unlink()


def lose_summary(study: Study) -> None:
    shutil.rmtree(study.output / RUN / "summary")


def lose_run(study: Study) -> None:
    shutil.rmtree(study.output / RUN)


def make_sample_a_folder(study: Study) -> None:
    (study.output / KINDS["sample"]).unlink()
    (study.output / KINDS["sample"]).mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        lose_checkpoint_of_one,
        lose_sample,
        leave_temporary_files,
        leave_parts,
        lose_summary,
        lose_run,
        make_sample_a_folder,
    ],
)
def test_whatever_is_missing_or_left_over_is_mended(
    finished: Study, tmp_path: Path, damage: Callable[[Study], None]
) -> None:
    study = copied(finished, tmp_path)
    damage(study)
    resumed(study)
    assert results(study.output) == results(finished.output)

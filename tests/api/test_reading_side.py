"""Commands that read a study leave it alone: they work without write permission, and few modules write."""

import ast
import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_study import Study

import mllm_shapx
from mllm_shapx.cli import main
from mllm_shapx.records.results import SampleFile
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.storage import open_storage
from mllm_shapx.reporting.comparison import AGAINST_EXACT, against_exact
from mllm_shapx.reporting.reading import open_study

SOURCE = Path(mllm_shapx.__file__).parent
NOBODY = 65534


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """A finished study that nobody may write to, where other users can enter."""
    folder = Path(tempfile.mkdtemp(prefix="shapx-reading-"))
    folder.chmod(0o755)
    try:
        small = Study(folder, rows=2, words=3)
        assert small.call("--inline").code == 0
        # Everything is imported and used once, as this user: others may not read the sources.
        small.call(verb="status")
        small.call(verb="verify")
        small.call("--output", str(tmp_path_factory.mktemp("page") / "page.html"), verb="report")
        for call in writing_elsewhere(small, tmp_path_factory.mktemp("elsewhere")):
            assert CliRunner().invoke(main, call).exit_code == 0
        mllm_shapx.load(small.output).values()
        set_modes(folder, writable=False)
        yield small
    finally:
        set_modes(folder, writable=True)
        shutil.rmtree(folder)


def writing_elsewhere(study: Study, folder: Path) -> list[list[str]]:
    """Return the commands that show results to others, writing to a folder of the caller's."""
    output = str(study.output)
    return [
        ["report", output, "--output", str(folder / "report.html")],
        ["report", output, "--figures", str(folder)],
        ["compare", output, "--html", str(folder / "comparison.html")],
        ["export", output, "--format", "csv", "--output", str(folder / "values.csv")],
        ["export", output, "--format", "parquet", "--output", str(folder / "values.parquet")],
        ["store", "export", output, "--format", "csv", "--output", str(folder / "coalitions.csv")],
    ]


def set_modes(folder: Path, *, writable: bool) -> None:
    for path in [folder, *folder.rglob("*")]:
        folders, files = (0o755, 0o644) if writable else (0o555, 0o444)
        path.chmod(folders if path.is_dir() else files)


@contextlib.contextmanager
def as_another_user() -> Iterator[None]:
    """Take the rights of root away, to which no permission applies; other users have none to lose."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (stat.S_IMODE(path.stat().st_mode), path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_study_without_write_permission_can_be_read(study: Study) -> None:
    """All commands that read a study, and `load`, need no right to write to it."""
    before = tree(study.output)
    page = Path(tempfile.mkdtemp(prefix="shapx-page-"))
    page.chmod(0o777)
    calls = (
        ["status", str(study.output)],
        ["status", "--check", str(study.output)],
        ["failures", str(study.output)],
        ["verify", str(study.output)],
        ["plan", "--config", str(study.config)],
        ["store", "info", str(study.output)],
        *writing_elsewhere(study, page),
    )
    try:
        with as_another_user():
            with pytest.raises(PermissionError):
                (study.output / "new").touch()
            for call in calls:
                found = CliRunner().invoke(main, call)
                assert found.exit_code == 0, (call, found.output, found.exception)
            values = mllm_shapx.load(study.output).values()
            assert len(values) == 2 * 3 * 3
        assert "exact" in (page / "report.html").read_text()
    finally:
        shutil.rmtree(page)
    assert tree(study.output) == before


def test_what_cannot_be_written_is_said(study: Study) -> None:
    """`report` without --output and a resume name the directory and end with exit code 2 or 1."""
    with as_another_user():
        report = CliRunner().invoke(main, ["report", str(study.output)])
        resume = CliRunner().invoke(main, ["run", "--inline", "--resume", "--config", str(study.config)])
    assert report.exit_code in {1, 2}
    assert resume.exit_code in {1, 2}
    for found in (report, resume):
        assert str(study.output) in found.output
        assert "Permission denied" in found.output


def test_the_aggregator_sums_a_study_up_without_writing(study: Study) -> None:
    """What preparation and the aggregator learn from the files, they learn by reading."""
    runs = open_study(str(study.output)).runs
    for run in runs:
        with as_another_user():
            storage = open_storage(str(study.output))
            errors = against_exact(storage, [each.name for each in runs])[run.name]
            records = RunRecords(storage, run.name)
            seen: list[SampleFile] = []
            found = records.inspect([0, 1], seen.append)
            summary = records.summarize([0, 1])
        assert found.completed == {0, 1}
        assert sorted(metrics.row_index for metrics in seen) == [0, 1]
        assert not found.notes
        assert not found.faults
        assert {**summary, AGAINST_EXACT: errors} == run.records.read_summary()


def test_a_damaged_study_is_summed_up_without_healing_it(study: Study, tmp_path: Path) -> None:
    """The aggregator leaves damaged and unfinished files alone; the next start of the study heals them."""
    copy = tmp_path / "copy"
    shutil.copytree(study.output, copy)
    set_modes(copy, writable=True)
    samples = copy / "exact" / "samples"
    (samples / "sample_00001_result.json").write_bytes(b"{")
    (samples / ".tmp-0123456789abcdef").write_bytes(b"{")
    before = tree(copy)
    records = RunRecords(open_storage(str(copy)), "exact")
    assert records.summarize([0, 1])["n_samples"] == 1
    CliRunner().invoke(main, ["verify", str(copy)])
    assert tree(copy) == before
    found = records.inspect([0, 1])
    assert [fault.kind for fault in found.faults] == ["leftover", "damaged sample"]
    assert tree(copy) == before
    notes = records.heal(found)
    assert [note.partition(": ")[2].partition(" ")[0] for note in notes] == ["1", "1"]
    assert sorted(path.name for path in samples.iterdir()) == ["sample_00000_result.json"]


BELOW_AN_OUTPUT = {
    "execution/preparation.py": "config.json",
    "records/checkpoint.py": "checkpoint.json",
    "records/lock.py": ".lock",
    "records/shards.py": "shards/, and what `merge` moves out of it",
    "execution/merging.py": "RUN/spec.json of merged shards",
    "records/pace.py": "pace.json",
    "records/progress.py": "progress.json",
    "records/runs.py": "specs, samples, failures, summaries; moves what is damaged or replaced",
    "records/fsspec_storage.py": "how an object is written behind a URI",
    "records/local_storage.py": "how a file is written in a directory",
    "records/storage.py": "how JSON is written",
    "records/store.py": "generations/",
    "reporting/output.py": "report.html, and files outside that a user asks for",
    "tracking/mlflow.py": "the folder mlflow/",
    "tracking/staging.py": "copies in the folder wandb/",
    "tracking/wandb.py": "the folder wandb/",
}
"""Modules that write below an output directory, and what."""

ELSEWHERE = {
    "execution/cluster.py": "the token of a Ray instance, in a private folder",
    "execution/driver.py": "what actors are started with, in the same folder",
    "execution/scratch.py": "that private folder",
}
"""Modules that write files of other places."""

WRITING = {
    "create_exclusive",
    "mkdir",
    "move",
    "rename",
    "rmtree",
    "touch",
    "unlink",
    "write_bytes",
    "write_json",
    "write_text",
}
"""Calls that change files; `remove` too, where it is not a list's."""


def writes(module: Path) -> bool:
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        if name in WRITING or (name == "remove" and "storage" in ast.unparse(node.func).lower()):
            return True
    return False


def test_only_named_modules_write_files() -> None:
    """Whoever asks what may change a result finds every place in one list."""
    found = {
        str(module.relative_to(SOURCE))
        for module in SOURCE.rglob("*.py")
        if module.relative_to(SOURCE).parts[0] != "benchmark" and writes(module)
    }
    assert found == BELOW_AN_OUTPUT.keys() | ELSEWHERE.keys()

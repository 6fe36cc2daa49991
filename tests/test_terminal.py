"""The edge of the command line: what is shown is safe, and an unexpected error ends in one line."""

import json
import logging
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import mllm_shapx.reporting.status as status_module
from mllm_shapx.cli import main
from mllm_shapx.plaintext import ShownFormatter, printable, redacted
from mllm_shapx.records.failures import FailureRecord
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.storage import open_storage

EVIL = "\x1b]0;owned\x07\x1b[31mred\x1b[2J\rback\x9b31m\u202egnp.exe"
"""Sets the window's title, colours, clears the screen, goes back to the line's start, reverses the rest."""

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


def called(*args: str, **environment: str) -> Result:
    found = CliRunner().invoke(main, list(args), env=environment)
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found


@pytest.fixture
def evil_study(tmp_path: Path) -> Path:
    """Return a study whose failure, spec and language are full of terminal escapes."""
    records = RunRecords(open_storage(str(tmp_path / "study")), "exact")
    records.write_spec({"experiment_set_id": EVIL, "rows_total": 2})
    failure = FailureRecord(
        3, "exact", EVIL, f"{EVIL}\nsecond line", 1, True, node=EVIL, worker=EVIL, traceback=EVIL
    )
    records.write_failure(failure)
    return tmp_path / "study"


@pytest.mark.parametrize(
    "command", ["failures", "failures --json", "status", "status --json", "verify", "report"]
)
def test_escapes_in_results_are_written_out(evil_study: Path, command: str) -> None:
    found = called(*command.split(), str(evil_study))
    assert CONTROL.search(found.output) is None, repr(found.output)
    if command == "failures":
        assert "\\x1b[31mred" in found.output
        assert all(len(line) < 200 for line in found.output.splitlines())
    if "--json" in command:
        json.loads(found.output)
    if command == "failures --json":
        assert json.loads(found.output)["failures"][0]["message"] == f"{EVIL}\nsecond line"


def test_escapes_in_configs_and_data_are_written_out(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(f"{EVIL},b\na,b\n".replace("\r", ""), newline="")
    config: dict[str, Any] = {
        "experiment_set_id": EVIL,
        EVIL: EVIL,
        "connector": EVIL,
        "experiments": [{"explainer_type": EVIL, "name": EVIL}],
    }
    path = tmp_path / "study.json"
    path.write_text(json.dumps(config))
    found = called("validate", "--config", str(path))
    assert found.exit_code == 2
    assert CONTROL.search(found.output) is None, repr(found.output)
    config = {
        "experiment_set_id": "study",
        "connector": "hf_text",
        "dataset": {"source": "local_csv", "path": "rows.csv"},
        "experiments": [{"explainer_type": "exact"}],
    }
    path.write_text(json.dumps(config))
    found = called("validate", "--check-dataset", "--config", str(path))
    assert found.exit_code == 2
    assert "\\x1b" in found.output
    assert CONTROL.search(found.output) is None, repr(found.output)


def test_escapes_in_the_log_are_written_out() -> None:
    record = logging.LogRecord("a", logging.WARNING, "a.py", 1, EVIL, None, None)
    assert CONTROL.search(ShownFormatter("%(message)s").format(record)) is None


def test_what_a_terminal_shows_as_it_is_stays() -> None:
    text = "tab\tline\nünïcödé 你好 😀 عربي e\u0301"
    assert printable(text) == text
    assert printable("a\x1b[1mb\u202e\ud800") == "a\\x1b[1mb\\u202e\\ud800"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cannot read s3://key:secret@bucket/x: gone", "cannot read s3://***@bucket/x: gone"),
        ("https://hf_abc@huggingface.co/x", "https://***@huggingface.co/x"),
        ("GET https://h/x?X-Amz-Signature=abc&a=1", "GET https://h/x?X-Amz-Signature=***&a=1"),
        ("mail a@b.org about s3://bucket/x", "mail a@b.org about s3://bucket/x"),
        ("https://host/path@version", "https://host/path@version"),
    ],
)
def test_logins_are_hidden(text: str, expected: str) -> None:
    assert redacted(text) == expected


def test_an_unexpected_error_ends_in_one_line_with_a_private_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("s3://user:hunter2@host/\x1b[31m")

    monkeypatch.setattr(status_module, "status", fail)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    found = called("status", str(tmp_path))
    assert found.exit_code == 1
    (line,) = found.output.splitlines()
    assert line.startswith("error: unexpected KeyError: ")
    assert "Traceback" not in found.output
    (report,) = tmp_path.glob("mllm-shapx-error-*.txt")
    assert str(report) in line
    assert stat.S_IMODE(report.stat().st_mode) == 0o600
    written = report.read_text()
    assert "Traceback (most recent call last)" in written
    assert "in fail" in written
    assert "hunter2" not in written + found.output
    assert "\x1b" not in written + found.output


def test_debug_shows_the_traceback_of_an_unexpected_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(status_module, "status", fail)
    found = called("status", str(tmp_path), LOG_LEVEL="DEBUG")
    assert found.exit_code == 1
    assert "Traceback (most recent call last)" in found.output
    assert "in fail" in found.output


def test_an_unexpected_error_is_told_where_no_report_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RecursionError

    monkeypatch.setattr(status_module, "status", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    found = called("status", str(tmp_path))
    assert found.exit_code == 1
    assert found.output.startswith("error: unexpected RecursionError")
    assert "No report could be written" in found.output


def test_an_output_that_lacks_a_character_gets_an_escape(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    found = subprocess.run(
        [sys.executable, "-m", "mllm_shapx.cli", "status", str(tmp_path / "你")],
        env=env,
        capture_output=True,
        check=False,
    )
    assert found.returncode == 2
    assert b"\\u4f60" in found.stderr
    assert b"Traceback" not in found.stderr


@pytest.mark.parametrize("target", ["link", "dangling", "folder", "pipe"])
@pytest.mark.parametrize("named", [False, True])
def test_report_writes_over_a_file_only(evil_study: Path, tmp_path: Path, target: str, named: bool) -> None:
    page = tmp_path / "page.html" if named else evil_study / "report.html"
    victim = tmp_path / "victim"
    if target == "link":
        victim.write_text("precious")
        page.symlink_to(victim)
    elif target == "dangling":
        page.symlink_to(victim)
    elif target == "folder":
        page.mkdir()
    else:
        os.mkfifo(page)
    found = called("report", str(evil_study), *(["--output", str(page)] if named else []))
    assert found.exit_code == 2
    assert "page.html" in found.output or "report.html" in found.output
    assert "--output" in found.output
    assert (victim.read_text() == "precious") if target == "link" else not victim.exists()


def test_report_replaces_the_page_that_it_wrote(evil_study: Path) -> None:
    assert called("report", str(evil_study)).exit_code == 0
    assert called("report", str(evil_study)).exit_code == 0
    assert sorted(path.name for path in evil_study.iterdir()) == ["exact", "report.html"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_the_imports_ends_with_its_code_and_the_command_that_goes_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "click.py").write_text(f"import os, time\nos.kill(os.getpid(), {number:d})\ntime.sleep(60)\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, "-m", "mllm_shapx", "run", "--config", "my study.json"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert ended.returncode == 128 + number
    said = f"{number.name}: stopped; to go on: mllm-shapx run --config 'my study.json'"
    assert ended.stderr.strip() == said

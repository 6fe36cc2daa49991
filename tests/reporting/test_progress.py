"""The progress display: plain lines with a clock of their own, and the live one in a real terminal."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import time
from dataclasses import replace
from datetime import datetime
from typing import TextIO

from mllm_shapx.reporting.events import Events
from mllm_shapx.reporting.progress import ProgressReporter, is_interactive
from mllm_shapx.reporting.study_progress import (
    RunProgress,
    StudyProgress,
    WorkerProgress,
    choose_runs,
    plain_line,
)

STUDY = StudyProgress(
    runs=(RunProgress("exact", 30, 10), RunProgress("mc", 30, 8), RunProgress("cc", 60, 16)),
    coalitions_done=5120,
    coalitions_total=20480,
    model_calls=4000,
    workers=4,
    busy_workers=3,
    elapsed_s=24.0,
    eta_s=72.0,
)


class CountingStream(io.StringIO):
    """Keeps every write apart."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)


class Setup:
    """A reporter of plain lines and the clock that it looks at."""

    def __init__(self, every_s: float = 5.0) -> None:
        self.stream = CountingStream()
        self.seconds = 0.0
        self.reporter = ProgressReporter(
            self.stream,
            interactive=False,
            every_s=every_s,
            clock=lambda: self.seconds,
            now=lambda: datetime(2026, 1, 2, 12, 3, 41),  # noqa: DTZ001 -- the user's own time
        )

    def update(self, seconds: float, progress: StudyProgress) -> None:
        self.seconds = seconds
        self.reporter.update(progress)


def test_line_says_all() -> None:
    """One line holds samples, coalitions, rate, time left, workers and the runs."""
    assert plain_line(STUDY, 212.0, width=200) == (
        "34/120 samples (28%) · 5,120/20,480 coalitions · 212/s · 1m 12s left · 3/4 workers busy"
        " · exact 10/30, mc 8/30, cc 16/60"
    )


def test_start_up_is_not_called_slow() -> None:
    """Before there is a worker the line says so, without a rate of nought or a time left."""
    study = replace(STUDY, coalitions_done=0, workers=0, busy_workers=0, eta_s=None)
    assert "0/20,480 coalitions · no worker ready · exact" in plain_line(study, 0.0)


def test_failed_samples_are_said_and_not_counted_as_done() -> None:
    """Failed samples stand apart, and 100% is not said while one is missing."""
    study = replace(STUDY, runs=(RunProgress("exact", 1000, 999, 1),))
    line = plain_line(study, None)
    assert line.startswith("999/1,000 samples (99%) · 1 failed · ")


def test_long_lists_are_cut_and_the_rest_is_counted() -> None:
    """Of forty runs those under way are shown, the others are summed up in words."""
    runs = tuple(RunProgress(f"run{i}", 10, 10 if i < 20 else 3 if i < 22 else 0) for i in range(40))
    shown, rest = choose_runs(runs, 4)
    assert [run.name for run in shown] == ["run20", "run21", "run22", "run23"]
    assert len(rest) == 36
    assert plain_line(replace(STUDY, runs=runs), None, width=200).endswith(
        "run20 3/10, run21 3/10, run22 0/10, run23 0/10 … and 36 more (20 done, 16 waiting)"
    )


def test_a_plain_line_fits_120_columns_with_thirty_runs() -> None:
    """However many runs there are and however large the figures, a line with its time has 120 columns."""
    for names in ("run{}", "hier_limited_neyman_k10_imp0_1_fllimited_cc_ns{}", "x" * 200 + "{}"):
        runs = tuple(
            RunProgress(names.format(i), 50_000, 50_000 if i < 3 else 4321, 17 if i == 5 else 0)
            for i in range(30)
        )
        setup = Setup()
        large = replace(STUDY, runs=runs, coalitions_done=1_234_567_890, coalitions_total=9_876_543_210)
        setup.update(0.0, replace(large, eta_s=300_000.0))
        setup.update(40.0, replace(large, coalitions_done=2_234_567_890, eta_s=3e7, elapsed_s=60.0))
        for line in setup.stream.writes:
            assert len(line.rstrip("\n")) <= 120, line
            assert "266,667/1,500,000 samples" in line
    assert "30 runs (3 done, 27 under way)" in plain_line(replace(STUDY, runs=runs), None)


WORKERS = (
    WorkerProgress("worker-1", "node1", "cuda:0", (3, 7), 42.0, (30 << 30, 80 << 30)),
    WorkerProgress("worker-2", "node1", "cuda:1", (), None, None, waiting_for="the server is away"),
)


def test_the_panel_shows_workers_with_what_they_hold() -> None:
    """Each worker has its rate, its GPU's memory and its rows, or what it waits for; store hits are told."""
    from rich.console import Console

    from mllm_shapx.reporting.live import render

    stream = io.StringIO()
    console = Console(file=stream, width=100)
    console.print(render(replace(STUDY, worker_list=WORKERS, store_hits=1234), 212.0, 40))
    text = stream.getvalue()
    assert re.search(r"worker-1 cuda:0 +42/s +30.0/80 GiB +rows 3, 7", text)
    assert re.search(r"worker-2 cuda:1 +the server is away", text)
    assert "1,234 from the store" in text
    many = replace(STUDY, worker_list=WORKERS * 20)
    stream.truncate(0)
    console.print(render(many, 212.0, 24))
    assert len(stream.getvalue().splitlines()) <= 24
    assert "more workers" in stream.getvalue()


def test_events_are_one_object_a_line() -> None:
    """With events, progress comes at intervals and messages at once, each line whole JSON; nothing else."""
    stream, shown = CountingStream(), CountingStream()
    seconds = 0.0
    events = Events(stream, now=lambda: 1700000000.0)
    reporter = ProgressReporter(shown, events=events, clock=lambda: seconds)
    reporter.update(replace(STUDY, worker_list=WORKERS))
    seconds = 1.0
    reporter.update(replace(STUDY, coalitions_done=5200))
    reporter.message("a \x1b[31mred\u2028 message\nof s3://user:pass@bucket")
    seconds = 6.0
    reporter.update(replace(STUDY, coalitions_done=5300))
    reporter.close()
    assert shown.writes == []
    lines = [json.loads(line) for line in stream.writes]
    assert all(line.endswith("\n") and line.count("\n") == 1 for line in stream.writes)
    assert [line["event"] for line in lines] == ["progress", "message", "progress"]
    first, message, last = lines
    assert "pass" not in message["text"]
    assert "\x1b" not in stream.getvalue()
    assert (first["at"], first["samples_done"], first["samples_total"]) == (1700000000.0, 34, 120)
    assert (first["seconds_left"], last["coalitions_done"]) == (72.0, 5300)
    assert first["workers"][0]["rows"] == [3, 7]
    assert first["workers"][0]["gpu_memory_total"] == 80 << 30
    assert first["runs"][0] == {"name": "exact", "done": 10, "failed": 0, "total": 30}


def test_plain_lines_come_at_intervals_and_only_with_news() -> None:
    """The first update shows at once, then one line every five seconds with news, or every thirty without."""
    setup = Setup()
    setup.update(0.0, STUDY)
    setup.update(1.0, replace(STUDY, coalitions_done=5200))
    assert len(setup.stream.writes) == 1
    setup.update(5.0, replace(STUDY, coalitions_done=5300))
    assert len(setup.stream.writes) == 2
    setup.update(12.0, replace(STUDY, coalitions_done=5300, elapsed_s=99.0, eta_s=1.0))
    assert len(setup.stream.writes) == 2
    setup.update(35.0, replace(STUDY, coalitions_done=5300, elapsed_s=120.0))
    assert len(setup.stream.writes) == 3


def test_each_line_is_one_write_with_its_time() -> None:
    """A line is written whole, newline included, so that lines of other processes do not cut it."""
    setup = Setup()
    setup.reporter.message("resumed: 3 samples were damaged")
    setup.update(0.0, STUDY)
    setup.reporter.message("worker 2 died")
    assert len(setup.stream.writes) == 3
    for line in setup.stream.writes:
        assert re.fullmatch(r"\[12:03:41\] [^\n]+\n", line)
    assert "worker 2 died" in setup.stream.writes[2]


def test_last_update_is_always_shown() -> None:
    """What came just before the end is printed by close, once."""
    setup = Setup()
    setup.update(0.0, STUDY)
    last = replace(STUDY, coalitions_done=20480, eta_s=0.0, busy_workers=0)
    setup.update(0.5, last)
    setup.reporter.close()
    setup.reporter.close()
    setup.reporter.update(last)
    assert len(setup.stream.writes) == 2
    assert "20,480/20,480 coalitions" in setup.stream.writes[1]
    assert "24s in all" in setup.stream.writes[1]


def test_the_end_is_not_written_twice() -> None:
    """Between the last sample and the end only times and rates change."""
    setup = Setup()
    runs = tuple(replace(run, done=run.total) for run in STUDY.runs)
    setup.update(0.0, replace(STUDY, runs=runs, elapsed_s=24.0, worker_list=WORKERS))
    setup.update(0.5, replace(STUDY, runs=runs, elapsed_s=25.2))
    setup.reporter.close()
    assert len(setup.stream.writes) == 1


def test_rate_is_measured_from_the_updates() -> None:
    """The rate in the line is that of the coalitions between updates, not of those done before."""
    setup = Setup()
    for second in range(31):
        setup.update(
            float(second), replace(STUDY, coalitions_done=5000 + 50 * second, elapsed_s=float(second))
        )
    assert " 50/s " in setup.stream.writes[-1]


def test_ascii_streams_get_ascii() -> None:
    """On a stream that cannot write the separators the line comes in ASCII instead of an error."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    reporter = ProgressReporter(stream, interactive=False)
    reporter.update(STUDY)
    reporter.message("ł")
    reporter.close()
    text = raw.getvalue().decode("ascii")
    assert "34/120 samples (28%) | 5,120" in text
    assert "\\u0142" in text


def test_closed_pipe_does_not_stop_the_work() -> None:
    """When the reader of the log is gone, updates go on without an error."""
    reading, writing = os.pipe()
    os.close(reading)
    # Closing the stream fails once more: what could not be written is still in its buffer.
    with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "w") as stream:
        reporter = ProgressReporter(stream, interactive=False)
        reporter.update(STUDY)
        reporter.message("nobody reads this")
        reporter.close()
        said_all = True
    assert said_all


def test_threads_do_not_mix_their_lines() -> None:
    """Messages from several threads stay whole lines."""
    setup = Setup()

    def talk() -> None:
        for _ in range(50):
            setup.reporter.message("x" * 50)

    threads = [threading.Thread(target=talk) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = setup.stream.getvalue().splitlines()
    assert len(lines) == 200
    assert set(lines) == {"[12:03:41] " + "x" * 50}


LIVE = """
    import logging, sys, time
    from mllm_shapx.reporting.progress import ProgressReporter
    from mllm_shapx.reporting.study_progress import RunProgress, StudyProgress
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with ProgressReporter(sys.stderr, every_s=0.2) as reporter:
        for step in range(101):
            runs = tuple(RunProgress(f"run{number}", 10, step // 10) for number in range(20))
            reporter.update(StudyProgress(runs, step * 10, 1000, step, 2, 2, step / 50, 1.0))
            if step == 50:
                reporter.message("message [red]as written[/red]")
                logging.info("logged line")
                print("printed line")
            time.sleep(0.02)
    print("after")
"""


def run_in_terminal(code: str, columns: int = 80, **environment: str) -> str:
    """Run Python code with a terminal as its standard streams and return all that reached it."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    inherited = {key: value for key, value in os.environ.items() if key not in {"NO_COLOR", "FORCE_COLOR"}}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=child,
        stdout=child,
        stderr=child,
        env={**inherited, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **environment},
    )
    os.close(child)
    chunks = []
    with contextlib.suppress(OSError):  # Linux says so when the last writer is gone.
        while chunk := os.read(parent, 65536):
            chunks.append(chunk)
    os.close(parent)
    assert process.wait(30) == 0
    return b"".join(chunks).decode()


def test_live_display_redraws_calmly_and_keeps_messages_whole() -> None:
    """Two seconds of a hundred updates are drawn about eight times; messages, logs and prints stay whole."""
    began = time.monotonic()
    output = run_in_terminal(LIVE)
    seconds = time.monotonic() - began
    assert output.count("workers busy") <= 4 * seconds + 6
    assert output.count("workers busy") >= 4
    for line in ("message [red]as written[/red]", "logged line", "printed line", "after"):
        # Each begins on a line that is new or was erased, and ends it.
        assert len(re.findall(rf"(?:\x1b\[2K|\n|\x1b\[\?25h){re.escape(line)}\r\n", output)) == 1
    last = output[output.rindex("samples") - 20 :]
    assert "200/200 samples" in last
    assert "1,000/1,000 coalitions" in last
    assert "… and 12 more" in last
    assert output.rstrip().endswith("after")
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h")  # the cursor is given back


INSIDE_A_REDIRECT = """
    import contextlib, io, sys
    from mllm_shapx.reporting.progress import ProgressReporter
    from mllm_shapx.reporting.study_progress import RunProgress, StudyProgress
    with ProgressReporter(sys.stderr) as reporter:
        with contextlib.redirect_stdout(io.StringIO()):
            reporter.update(StudyProgress((RunProgress("exact", 10, 10),), 10, 10, 5, 1, 0, 2.0, 0.0))
    print("the outcome")
"""


def test_what_follows_a_panel_that_began_inside_a_redirect_is_shown() -> None:
    """A panel that starts while a cluster is connected leaves stdout as it is after the cluster's end."""
    assert run_in_terminal(INSIDE_A_REDIRECT).rstrip().endswith("the outcome")


def test_no_color_is_respected() -> None:
    """With NO_COLOR the display lives, without a colour."""
    output = run_in_terminal(LIVE, NO_COLOR="1")
    assert "200/200 samples" in output
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|38;|9[0-7])[0-9;]*m", output)


def test_dumb_terminal_gets_plain_lines() -> None:
    """In a terminal that cannot move its cursor there are plain lines and no control sequence."""
    output = run_in_terminal(LIVE, TERM="dumb")
    assert "\x1b" not in output
    assert re.search(r"(?m)^\[\d\d:\d\d:\d\d\] 200/200 samples", output)


def test_files_and_closed_streams_are_not_interactive() -> None:
    """A file, a string and a closed stream get plain lines."""
    closed = io.StringIO()
    closed.close()
    with open(os.devnull, "w") as file:  # noqa: PTH123 -- the stream is what is tested
        streams: list[TextIO] = [file, io.StringIO(), closed]
        assert not any(is_interactive(stream) for stream in streams)

"""Weights & Biases with the real package, offline, and with what breaks it."""

import gzip
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from tracking_kit import TRACK_TWO_RUNS, make_sample, records_of, silent_server, wandb_tracker
from wandb_files import history_of, read_records, whole_history

from mllm_shapx.config.models import WandbConfig
from mllm_shapx.data.audio import encode_wav
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.storage import open_storage
from mllm_shapx.tracking.content import run_id, sample_metrics, without_secrets
from mllm_shapx.tracking.wandb import effective_mode

HERE = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
OFFLINE = WandbConfig(mode="offline", tags=("a-tag",))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a key nor a W&B setting of this machine reaches the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))


@pytest.mark.slow
def test_offline_runs_side_by_side(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Runs open at once in one process each leave a folder with config, samples, summary and artifact."""
    warnings: list[str] = []
    tracker = wandb_tracker(OFFLINE, tmp_path, warn=warnings.append)
    names = ["exact", "limited_mc_ns50", "limited_cc_frac0_1"]
    for name in names:
        spec = {"name": name, "hf_token": "hf_verysecret", "budget": {"value": 1.0}}
        tracker.start(name, spec, records=records_of(tmp_path, name))
    for row in (7, 3):
        for name in names:
            tracker.log_sample(make_sample(name, row))
    for name in names:
        summary = {"n_samples": 2, "runtime_sec_total": 1.0}
        records_of(tmp_path, name).write_summary(summary)
        tracker.finish(name, summary)
    tracker.close()

    assert warnings == []
    assert capfd.readouterr() == ("", "")
    for name in names:
        (folder,) = (tmp_path / "wandb").glob(f"offline-run-*-{run_id('study', name)}")
        records = read_records(folder)
        run = next(record.run for record in records if record.HasField("run"))
        assert (run.run_group, run.display_name, list(run.tags)) == ("study", name, ["a-tag"])
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert config["budget"] == {"value": 1.0}
        assert b"verysecret" not in next(folder.glob("run-*.wandb")).read_bytes()
        history = history_of(records)
        assert [row["sample"] for row in history] == [1, 2]
        assert [row["row_index"] for row in history] == [7, 3]
        assert history[0]["residual"] == pytest.approx(0.25)
        assert {"runtime_sec", "n_calls", "model_calls", "frac_text", "frac_audio", "values_max"} <= set(
            history[0]
        )
        summary = {
            item.key: json.loads(item.value_json)
            for record in records
            if record.HasField("summary")
            for item in record.summary.update
        }
        assert summary["n_samples"] == 2
        artifact = next(record.artifact for record in records if record.HasField("artifact"))
        (content,) = artifact.manifest.contents
        assert content.path == "aggregate_metrics.json"
        assert json.loads(Path(content.local_path).read_text())["n_samples"] == 2
        assert folder in Path(content.local_path).parents
        assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]


@pytest.fixture
def records(tmp_path: Path) -> RunRecords:
    """The files of a run of its own."""
    return RunRecords(open_storage(str(tmp_path)), "exact")


def track(folder: Path, records: RunRecords, *rows: int, finish: bool = False) -> list[str]:
    """Start the run, write and log these rows, end; return the warnings."""
    warnings: list[str] = []
    tracker = wandb_tracker(OFFLINE, folder, warn=warnings.append)
    tracker.start("exact", {}, records=records)
    for row in rows:
        records.write_sample(make_sample("exact", row))
        tracker.log_sample(make_sample("exact", row))
    if finish:
        tracker.finish("exact", {})
    tracker.close()
    return warnings


@pytest.mark.slow
def test_resumed_run_keeps_its_id_and_counts_on(tmp_path: Path, records: RunRecords) -> None:
    """A second start of a run has the first one's id, and its counter goes on, even in the same second."""
    assert track(tmp_path, records, 5) == []
    assert track(tmp_path, records, 6) == []
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{run_id('study', 'exact')}"))) == 2
    lines = whole_history(tmp_path)["exact"]
    assert [(line["sample"], line["row_index"]) for line in lines] == [(1, 5), (2, 6)]


@pytest.mark.slow
def test_samples_that_no_history_has_are_logged_once(tmp_path: Path, records: RunRecords) -> None:
    """Samples of a start without W&B, and such as were never handed over, are read from their files."""
    for row in (3, 1):
        records.write_sample(make_sample("exact", row))
    tracker = wandb_tracker(OFFLINE, tmp_path)
    tracker.start("exact", {}, records=records)
    tracker.log_sample(make_sample("exact", 3))  # known from its file already
    records.write_sample(make_sample("exact", 7))  # and never said
    tracker.finish("exact", {})
    tracker.close()
    assert track(tmp_path, records, finish=True) == []
    lines = whole_history(tmp_path)["exact"]
    assert [(line["sample"], line["row_index"]) for line in lines] == [(1, 1), (2, 3), (3, 7)]


@pytest.mark.slow
def test_a_row_with_other_values_is_logged_again(tmp_path: Path, records: RunRecords) -> None:
    """A row done again is logged again when its values differ, not when only its time does."""
    assert track(tmp_path, records, 4) == []
    again = wandb_tracker(OFFLINE, tmp_path)
    again.start("exact", {}, records=records)
    again.log_sample(replace(make_sample("exact", 4), runtime_sec=9.0, model_calls=0))
    again.log_sample(make_sample("exact", 4, grand=2.0))
    again.close()
    lines = whole_history(tmp_path)["exact"]
    assert [(line["sample"], line["row_index"], line["residual"]) for line in lines] == [
        (1, 4, 0.25),
        (2, 4, 1.25),
    ]


DIE_WHILE_LOGGING = """
    import os, signal, sys, time
    sys.path[:0] = {path!r}
    from test_wandb_tracker import *
    records = RunRecords(open_storage({folder!r}), "exact")
    tracker = wandb_tracker(OFFLINE, Path({folder!r}))
    tracker.start("exact", {{}}, records=records)
    deadline = time.monotonic() + 60
    while tracker._session.open_runs == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    for row in range({first}, {first} + 60):
        records.write_sample(make_sample("exact", row))
        tracker.log_sample(make_sample("exact", row))
        time.sleep(0.03)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_killed_trackers_lose_nothing_and_log_nothing_twice(tmp_path: Path, records: RunRecords) -> None:
    """Killed twice with lines that wandb has not written yet, the histories together hold every row once."""
    for first in (0, 60):
        code = DIE_WHILE_LOGGING.format(path=HERE, folder=str(tmp_path), first=first)
        assert run_python(code).returncode == -signal.SIGKILL
    written = [line["row_index"] for line in whole_history(tmp_path)["exact"]]
    assert 20 < len(written) < 120  # W&B's log is written often, but not for every line
    assert track(tmp_path, records, 120, finish=True) == []
    lines = whole_history(tmp_path)["exact"]
    assert sorted(line["row_index"] for line in lines) == list(range(121))
    assert [line["sample"] for line in lines] == list(range(1, 122))


def test_files_of_the_artifact_are_copied(tmp_path: Path, records: RunRecords) -> None:
    """The artifact keeps the file as it was at the end of the run, whatever happens to the original later."""
    records.write_summary({"n_samples": 1})
    track(tmp_path, records, finish=True)
    records.write_summary({"n_samples": 2})
    (copy,) = tmp_path.glob("wandb/offline-run-*/artifact/summary/aggregate_metrics.json")
    assert json.loads(copy.read_text()) == {"n_samples": 1}


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("config", [{"enabled": False}, {"mode": "disabled"}])
def test_switched_off_does_not_import_wandb(config: dict[str, Any], tmp_path: Path) -> None:
    """With tracking off in the config, wandb is never imported."""
    done = run_python(TRACK_TWO_RUNS.format(blocks={"wandb": config}, folder=str(tmp_path)))
    assert (done.stdout.split(), done.stderr) == (["IMPORTED"], "")


def test_missing_package_costs_one_warning(tmp_path: Path) -> None:
    """Where wandb cannot be imported, two runs cost one warning that says what to install."""
    (tmp_path / "wandb.py").write_text("raise ModuleNotFoundError(\"No module named 'wandb'\")\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    code = TRACK_TWO_RUNS.format(blocks={"wandb": {"mode": "offline"}}, folder=str(tmp_path))
    done = run_python(code, PYTHONPATH=path)
    assert done.returncode == 0
    assert done.stdout.count("WARNED") == 1
    assert "install the extra `wandb`" in done.stdout
    assert done.stderr == ""


def test_no_key_costs_one_warning(tmp_path: Path) -> None:
    """Online without a key: one warning, no prompt, nothing printed by wandb."""
    code = TRACK_TWO_RUNS.format(blocks={"wandb": {}}, folder=str(tmp_path))
    done = run_python(code, HOME=str(tmp_path))
    assert done.returncode == 0
    assert done.stdout.count("WARNED") == 1
    assert "API key" in done.stdout
    assert done.stderr == ""


@pytest.fixture
def silent_port() -> Iterator[int]:
    """The port of a server on loopback that takes connections and never answers."""
    with silent_server() as port:
        yield port


@pytest.mark.slow
def test_unreachable_server_never_blocks(silent_port: int, tmp_path: Path) -> None:
    """While W&B does not answer, logging returns at once; after its timeout it is one warning."""
    code = f"""
        import sys, time
        sys.path[:0] = {HERE!r}
        from test_wandb_tracker import *
        def warn(text):
            print("WARNED", text)
        folder = Path({str(tmp_path)!r})
        tracker = wandb_tracker(WandbConfig(), folder, warn=warn, timeout_s=2, close_timeout_s=20)
        began = time.monotonic()
        for number in range(20):
            name = "run" + str(number)
            tracker.start(name, {{}}, records=records_of(folder, name))
        print("STARTED", time.monotonic() - began < 2)
        tracker.close()
        print("CLOSED", time.monotonic() - began < 40)
    """
    done = run_python(
        code,
        WANDB_BASE_URL=f"http://127.0.0.1:{silent_port}",
        WANDB_API_KEY="0123456789" * 4,
    )
    assert done.stderr == ""
    assert "STARTED True" in done.stdout
    assert "CLOSED True" in done.stdout
    assert done.stdout.count("WARNED") == 1


class FakeWandb(BaseHTTPRequestHandler):
    """As much of a W&B server as runs need; keeps the lines of their histories by place."""

    protocol_version = "HTTP/1.1"
    streamed: ClassVar[list[Any]] = []
    lines: ClassVar[dict[str, dict[int, dict[str, Any]]]] = {}
    """Run id -> place in its history -> line."""
    asked: ClassVar[list[str]] = []
    """Names of the queries."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        reply: dict[str, Any] = {}
        if self.path.startswith("/graphql"):
            reply = {"data": self.answer(json.loads(body))}
        elif self.path.endswith("/file_stream"):
            self.take(json.loads(body))
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_PUT = do_POST  # noqa: N815 -- the base class's way of naming

    def take(self, stream: dict[str, Any]) -> None:
        self.streamed.append(stream)
        history = (stream.get("files") or {}).get("wandb-history.jsonl")
        if history is not None:
            lines = self.lines.setdefault(self.path.split("/")[-2], {})
            lines.update(enumerate(map(json.loads, history["content"]), history["offset"]))

    def answer(self, query: dict[str, Any]) -> dict[str, Any]:
        variables = query.get("variables") or {}
        self.asked.append(query.get("operationName") or "")
        match query.get("operationName"):
            case "UpsertBucket":
                project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
                bucket = {"id": "b", "name": variables["name"], "config": "{}", "project": project}
                return {"upsertBucket": {"bucket": bucket, "inserted": True}}
            case "RunResumeStatus" if variables["name"] in self.lines:
                return {"model": {"id": "p", "name": "p", "bucket": self.standing(variables["name"])}}
            case "CreateRunFiles":
                address = f"http://127.0.0.1:{self.server.server_port}/"  # type: ignore[attr-defined]
                files = [{"name": name, "uploadUrl": address + name} for name in variables["files"]]
                return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
            case _:
                return {"model": None}

    def standing(self, name: str) -> dict[str, Any]:
        """Return what a run that is resumed is told of itself."""
        lines = self.lines[name]
        return {
            "id": "b",
            "name": name,
            "config": "{}",
            "summaryMetrics": "{}",
            "displayName": name,
            "historyLineCount": len(lines),
            "historyTail": json.dumps([json.dumps(lines[max(lines)])]),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "tags": [],
            "wandbConfig": '{"t": 1}',
        }

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    """A W&B server on loopback; its address."""
    for kept in (FakeWandb.streamed, FakeWandb.lines, FakeWandb.asked):
        kept.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeWandb)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def logged_lines(run_name: str) -> list[tuple[int, int]]:
    """Return counter and row of each line that the server has of a run."""
    lines = FakeWandb.lines[run_id("study", run_name)]
    return [(lines[place]["sample"], lines[place]["row_index"]) for place in sorted(lines)]


TRACK_ONLINE = """
    import sys
    sys.path[:0] = {path!r}
    from test_wandb_tracker import *
    records = RunRecords(open_storage({folder!r}), "exact")
    tracker = wandb_tracker(WandbConfig(), Path({folder!r}), warn=lambda text: print("WARNED", text))
    tracker.start("exact", {{}}, records=records)
    for row in {rows}:
        records.write_sample(make_sample("exact", row))
        tracker.log_sample(make_sample("exact", row))
    tracker.close()
"""


@pytest.mark.slow
def test_online_samples_reach_the_server(tmp_path: Path, server: str) -> None:
    """Online, the samples of a run arrive at a server with their counter, and nothing is printed.

    A second start goes on behind them, also where the server does not tell its history.
    """
    for rows in ((4, 2, 9), (5,)):
        done = run_python(
            TRACK_ONLINE.format(path=HERE, folder=str(tmp_path), rows=rows),
            WANDB_BASE_URL=server,
            WANDB_API_KEY="0123456789" * 4,
        )
        assert (done.stdout, done.stderr) == ("", "")
    lines = logged_lines("exact")
    assert [counter for counter, _ in lines] == [1, 2, 3, 4]
    assert sorted(row for _, row in lines[:3]) == [2, 4, 9]
    assert lines[3] == (4, 5)
    assert any(stream.get("complete") and stream.get("exitcode") == 1 for stream in FakeWandb.streamed)


@pytest.mark.slow
def test_wandb_sync_joins_the_starts_of_a_run(tmp_path: Path, records: RunRecords, server: str) -> None:
    """`wandb sync` puts a resumed start behind the one before, not over it."""
    track(tmp_path, records, 5, 3)
    track(tmp_path, records, 6)
    done = subprocess.run(
        [str(Path(sys.executable).with_name("wandb")), "sync", "--yes"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "WANDB_BASE_URL": server, "WANDB_API_KEY": "0123456789" * 4},
    )
    assert done.returncode == 0, done.stderr
    assert [row for _, row in logged_lines("exact")] == [3, 5, 6]
    assert "RunResumeStatus" in FakeWandb.asked


def test_raising_wandb_drops_one_run_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose logging raises is dropped with one warning; the other run is finished."""
    from wandb.sdk.wandb_run import Run

    real_log = Run.log

    def log(self: Any, data: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if self.name == "bad":
            msg = "disk gone"
            raise OSError(msg)
        real_log(self, data, *args, **kwargs)

    monkeypatch.setattr(Run, "log", log)
    warnings: list[str] = []
    tracker = wandb_tracker(OFFLINE, tmp_path, warn=warnings.append)
    for name in ("bad", "good"):
        tracker.start(name, {}, records=records_of(tmp_path, name))
    for row in range(3):
        for name in ("bad", "good"):
            tracker.log_sample(make_sample(name, row))
    tracker.finish("good", {"n_samples": 3})
    tracker.close()
    assert len(warnings) == 1
    assert "run bad is no longer tracked: OSError: disk gone" in warnings[0]
    (folder,) = (tmp_path / "wandb").glob(f"offline-run-*-{run_id('study', 'good')}")
    assert len(history_of(read_records(folder))) == 3


def test_run_ids_are_stable_short_and_distinct() -> None:
    """An id hangs on set, run and salt alone, holds no forbidden sign and is at most 64 characters."""
    ids = {run_id("study", "a"), run_id("study", "b"), run_id("study", "a", "2"), run_id("s" * 200, "a.b")}
    assert len(ids) == 4
    assert run_id("study", "a") in ids
    for identity in ids:
        assert len(identity) <= 64
        assert not set(identity) & set("/\\#?%:. ")


def test_secrets_are_left_out_and_settings_kept() -> None:
    """Keys that name secrets and logins in URIs go; settings whose names merely contain `token` stay."""
    spec = {
        "max_new_tokens": 8,
        "token_filter": "none",
        "connector_kwargs": {"api_key": "x", "hf_token": "y", "dtype": "auto"},
        "list": [{"password": "z", "min_prompt_tokens": 2}],
        "output_root": "s3://user:pass@bucket/path",
    }
    assert without_secrets(spec) == {
        "max_new_tokens": 8,
        "token_filter": "none",
        "connector_kwargs": {"dtype": "auto"},
        "list": [{"min_prompt_tokens": 2}],
        "output_root": "s3://bucket/path",
    }


def test_metrics_leave_out_what_is_not_finite() -> None:
    """A sample without a defined residual is logged without it."""
    metrics = sample_metrics(make_sample("exact", 4, grand=float("nan")))
    assert "residual" not in metrics
    assert (metrics["row_index"], metrics["values_max"]) == (4, 0.75)


@pytest.mark.parametrize(
    ("config", "environment", "expected"),
    [
        (WandbConfig(), "", "online"),
        (WandbConfig(), "offline", "offline"),
        (WandbConfig(mode="offline"), "disabled", "disabled"),
        (WandbConfig(enabled=False), "online", "disabled"),
        (WandbConfig(mode="disabled"), "online", "disabled"),
    ],
)
def test_environment_wins_over_the_mode_but_switches_nothing_on(
    config: WandbConfig, environment: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`WANDB_MODE` replaces the config's mode, and a config that says off stays off."""
    monkeypatch.setenv("WANDB_MODE", environment)
    assert effective_mode(config) == expected


@pytest.mark.slow
def test_the_table_of_prompts_holds_colours_and_recordings(tmp_path: Path, records: RunRecords) -> None:
    """Each sample is a row with its coloured prompt and its recording; one that was removed is empty."""
    wav = encode_wav(np.zeros(160, np.float32), 16_000)
    for row in (1, 2):
        path = f"audio/sample_{row:05d}/input_01.wav"
        sound = {"inputs": [{"path": path}], "answer": None}
        sample = replace(make_sample("exact", row), audio_artifacts=sound, audio_files={path: wav})
        records.write_sample(sample)
    (tmp_path / "exact" / "audio" / "sample_00002" / "input_01.wav").unlink()
    assert track(tmp_path, records, finish=True) == []
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    artifacts = [record.artifact for record in read_records(folder) if record.HasField("artifact")]
    (table_files,) = [found.manifest.contents for found in artifacts if found.type == "run_table"]
    files = {content.path: Path(content.local_path) for content in table_files}
    assert all(folder in file.parents for file in files.values()), "nothing of it is in the home directory"
    table = json.loads(files["prompts.table.json"].read_text())
    assert table["columns"] == ["row", "language", "prompt", "answer", "recording 1"]
    (first, second) = table["data"]
    assert (first[0], first[1], first[3]) == (1, "en", "stop")
    assert (first[4]["_type"], second[4]) == ("audio-file", None)
    assert files[first[4]["path"]].read_bytes() == wav
    html = files[first[2]["path"]].read_text()
    assert 'title="+0.75" style="background: rgba(214, 69, 65, 1.00)">red</span>' in html
    assert 'title="-0.25" style="background: rgba(49, 116, 181, 0.33)"> &lt;car&gt;</span>' in html

"""Studies of a model behind a server that misbehaves: what is kept, what is said, whom nobody blames."""

import asyncio
import contextlib
import json
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from chat_server import Act, Ask, ChatServer
from click.testing import CliRunner
from small_study import MODEL, Process, Study, results

from mllm_shapx.cli import main
from mllm_shapx.config.loading import load_config
from mllm_shapx.errors import UsageError
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.worker import BEAT_S
from mllm_shapx.models import server_engine, server_throttle
from mllm_shapx.models.flight import MOST_ROWS
from mllm_shapx.models.server_budget import TEMPLATE_TOKENS, CallBudget, ServerLimits
from mllm_shapx.models.server_identity import served_model
from mllm_shapx.planning.sweep import expand

EXACT: list[dict[str, Any]] = [{"explainer_type": "exact"}]
ANSWERS = 2 * 16


def study_on(server: ChatServer, folder: Path, **settings: Any) -> Study:
    more = settings.pop("kwargs", {})
    kwargs = {"base_url": server.url, "model_id": "tiny", "timeout_s": 0.5, **more}
    usual = {"connector": "openai", "connector_kwargs": kwargs, "experiments": EXACT}
    return Study(folder, rows=2, words=4, settings={**usual, **settings})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of a server that answers at once."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with ChatServer() as server:
        study = study_on(server, folder)
        found = study.call("--inline")
        assert found.code == 0, found.out
        assert len(server.answered) == len(server.asked) == ANSWERS
    return results(study.output)


def stored(study: Study) -> list[dict[str, Any]]:
    """Return all stored answers, each once: a kill may leave parts beside the file that has them."""
    folder = study.output / "generations"
    found: dict[tuple[str, bytes], dict[str, Any]] = {}
    for file in sorted(folder.rglob("*.parquet")):
        place = file.relative_to(folder).parts[0].rpartition(".")[0]
        with contextlib.suppress(FileNotFoundError):  # parts are packed into one file as a row ends
            found |= {(place, row["mask"].rstrip(b"\0")): row for row in pq.read_table(file).to_pylist()}
    return list(found.values())


SETBACKS: dict[str, Act] = {
    "429 and how long to wait": Act(status=429, headers={"Retry-After": "0.3"}),
    "429": Act(status=429),
    "503": Act(status=503),
    "500": Act(status=500),
    "hang": Act(hang_s=0.8),
    "reset": Act(reset=True),
    "half": Act(half=True),
    "no JSON": Act(raw=b"<html>gateway</html>"),
    "JSON of another kind": Act(raw=b'{"choices": []}'),
    "error in a 200": Act(raw=b'{"error": {"message": "overloaded", "code": 502}}'),
}


@pytest.mark.parametrize("setback", SETBACKS)
def test_a_setback_costs_time_and_nothing_else(
    setback: str, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    with ChatServer() as server:
        server.script = lambda ask: SETBACKS[setback] if ask.number % 8 == 3 else Act()
        study = study_on(server, tmp_path)
        found = study.call("--inline")
        assert found.code == 0, found.out
        assert len(server.asked) > ANSWERS
        assert len(server.answered) == ANSWERS, "something that was answered was asked again"
    assert results(study.output) == undisturbed
    assert not list(study.output.glob("*/failures/*"))


def in_seconds() -> str:
    return "1"


def as_date() -> str:
    return formatdate(time.time() + 2, usegmt=True)


@pytest.mark.parametrize(
    ("status", "retry_after"),
    [(status, in_seconds) for status in (408, 425, 429, 500, 502, 503, 504)]
    + [(status, as_date) for status in (429, 502, 503)],
)
def test_retry_after_is_obeyed_by_every_request(
    status: int, retry_after: Callable[[], str], tmp_path: Path
) -> None:
    with ChatServer() as server:

        def script(ask: Ask) -> Act:
            if ask.number != 9:
                return Act(delay_s=0.1)
            return Act(status=status, headers={"Retry-After": retry_after()})

        server.script = script
        study = study_on(server, tmp_path, kwargs={"max_concurrency": 2, "timeout_s": 30})
        assert study.call("--inline").code == 0
        told, text = server.asked[9].at, server.asked[9].text
        assert not [ask for ask in server.asked[10:] if told + 0.2 < ask.at < told + 0.99]
        assert min(ask.at for ask in server.asked[10:] if ask.text == text) >= told + 0.99
        assert len(server.answered) == ANSWERS
        assert len(server.asked) == ANSWERS + 1


def test_retry_after_of_no_seconds_still_leaves_a_pause(tmp_path: Path) -> None:
    with ChatServer() as server:
        failed = Act(status=500, headers={"Retry-After": "0"})
        times: list[float] = []

        def script(ask: Ask) -> Act:
            if ask.text != "two three":
                return Act()
            times.append(ask.at)
            return failed if len(times) < 4 else Act()

        server.script = script
        study = study_on(server, tmp_path)
        study.write_prompts("one two three four")
        assert study.call("--inline").code == 0
    assert len(times) == 4
    assert times[-1] - times[0] > 0.125 + 0.25 + 0.5


def test_a_server_that_comes_back_is_waited_for(
    undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_engine, "QUIET_S", 0.2)
    with ChatServer() as server:

        def restart() -> None:
            server.stop()
            time.sleep(2.0)
            server.start()

        def script(ask: Ask) -> Act:
            if ask.number == 10:
                threading.Thread(target=restart).start()
            return Act(delay_s=0.05)

        server.script = script
        study = study_on(server, tmp_path)
        found = study.call("--inline")
        assert found.code == 0, found.out
        assert f"the server at {server.url} gives no answers: " in found.out
        assert "the server answers again" in found.out
        assert max(Counter(server.answered).values()) <= 2  # the two rows share some prompts
    assert results(study.output) == undisturbed


def test_requests_that_break_together_are_one_setback(
    undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pause grows with each try that fails, not with the number of requests in flight."""
    together = 8
    monkeypatch.setattr(server_throttle, "START", together)
    pauses: list[float] = []
    pause = server_throttle.Throttle.pause

    def noted(throttle: server_throttle.Throttle, seconds: float) -> None:
        pauses.append(seconds)
        pause(throttle, seconds)

    monkeypatch.setattr(server_throttle.Throttle, "pause", noted)
    all_there = threading.Barrier(together, timeout=30.0)

    def script(ask: Ask) -> Act:
        if ask.number < together:
            all_there.wait()
            return Act(reset=True)
        return Act()

    with ChatServer() as server:
        server.script = script
        study = study_on(server, tmp_path, kwargs={"timeout_s": 60})
        found = study.call("--inline")
        assert found.code == 0, found.out
    assert len(pauses) == together
    assert max(pauses) <= server_engine.FIRST_PAUSE_S
    assert results(study.output) == undisturbed


def test_a_server_that_stays_away_stops_the_study_and_resuming_asks_nothing_twice(
    undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    with ChatServer() as server:

        def script(ask: Ask) -> Act:
            return Act(delay_s=0.02) if ask.number < 12 else Act(hang_s=0.6)

        server.script = script
        study = study_on(server, tmp_path)
        found = study.call("--inline", "--server-patience", "1")
        assert found.code == 1
        assert "has given no answer for" in found.out
        assert "go on with --resume" in found.out
        assert not list(study.output.glob("*/failures/*")), "a row was blamed"
        assert len(stored(study)) == len(server.answered) == 12
        server.script = lambda _: Act()
        assert study.call("--inline", "--resume").code == 0
        assert len(server.answered) == ANSWERS
    assert results(study.output) == undisturbed


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Act(model="tiny-2"), "model was 'tiny' and is 'tiny-2'"),
        (Act(fingerprint="fp_2"), "system_fingerprint was 'fp_1' and is 'fp_2'"),
    ],
)
def test_a_server_that_changes_its_model_stops_the_study(other: Act, said: str, tmp_path: Path) -> None:
    with ChatServer() as server:
        server.fingerprint = "fp_1"
        server.script = lambda ask: Act() if ask.number < 10 else other
        study = study_on(server, tmp_path)
        found = study.call("--inline")
        assert found.code == 1
        assert said in found.out
        kept = stored(study)
        assert 0 < len(kept) <= 10
        server.fingerprint = "fp_2"
        found = study.call("--inline", "--resume")
        assert found.code == 2, "another model's answers would be mixed in"
        assert "model_commit" in found.out
        server.fingerprint = "fp_1"
        server.script = lambda _: Act()
        assert study.call("--inline", "--resume").code == 0


def test_a_server_that_comes_back_with_another_model_is_noticed_before_its_first_answer(
    tmp_path: Path,
) -> None:
    with ChatServer() as server:

        def restart() -> None:
            server.stop()
            server.listed = [{"id": "tiny", "owned_by": "us", "meta": {"n_params": 7}}]
            server.start()

        def script(ask: Ask) -> Act:
            if ask.number == 10:
                threading.Thread(target=restart).start()
            return Act(delay_s=0.1)

        server.script = script
        found = study_on(server, tmp_path).call("--inline")
        assert found.code == 1
        assert "entry in /models was" in found.out


@pytest.mark.parametrize(
    ("act", "ending", "text"),
    [
        (Act(message={"content": None, "refusal": "I cannot say"}), "refusal", "I cannot say"),
        (Act(message={"content": "so far"}, finish_reason="content_filter"), "content_filter", "so far"),
        (Act(message={"content": "  "}), "empty", ""),
        (Act(message={"content": "cut off"}, finish_reason="length"), None, "cut off"),
    ],
)
def test_unusual_endings_are_recorded_and_a_cut_off_answer_is_none(
    act: Act, ending: str | None, text: str, tmp_path: Path
) -> None:
    with ChatServer() as server:
        server.script = lambda ask: act if ask.number % 2 else Act()
        study = study_on(server, tmp_path)
        assert study.call("--inline").code == 0
    rows = [row for row in stored(study) if row["text"] == text]
    assert rows
    assert {row.get("ending") for row in rows} == {ending}
    assert all(row.get("ending") is None for row in stored(study) if row["text"] != text)
    notes = json.loads((study.output / "exact" / "spec.json").read_text())["model"]["notes"]
    assert bool(notes) == (ending is not None)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_reasoning_is_kept_apart_and_not_scored(
    key: str, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    with ChatServer() as server:

        def script(ask: Ask) -> Act:
            return Act(message={"content": server.answer(ask.text), key: f"about {ask.number}"})

        server.script = script
        study = study_on(server, tmp_path)
        assert study.call("--inline").code == 0
    assert results(study.output) == undisturbed
    assert all(row["reasoning"].startswith("about ") for row in stored(study) if row["asked_by"])


def test_reasoning_between_tags_is_cut_on_request(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    with ChatServer() as server:
        server.script = lambda ask: Act(
            message={"content": f"<think>{ask.number}</think>{server.answer(ask.text)}"}
        )
        study = study_on(server, tmp_path, kwargs={"strip_reasoning": True})
        assert study.call("--inline").code == 0
    assert results(study.output) == undisturbed


@pytest.mark.parametrize(
    ("act", "reason", "said"),
    [
        (Act(status=400), "prompt_refused", "refused the prompt (HTTP 400: status 400)"),
        (Act(status=500), "server_failed", "failed 6 times at one of its prompts while it answered others"),
    ],
)
def test_a_prompt_that_the_server_never_takes_puts_its_row_aside(
    act: Act, reason: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_engine, "FIRST_PAUSE_S", 0.01)
    with ChatServer() as server:
        study = study_on(server, tmp_path)
        study.write_prompts("one two three four", "five six seven eight nine ten")
        server.script = lambda ask: act if ask.text == "two three" else Act(delay_s=0.02)
        found = study.call("--inline")
        assert found.code == 3, found.out
        (failure,) = study.output.glob("exact/failures/*.json")
        data = json.loads(failure.read_text())
        assert (data["row_index"], data["reason"]) == (0, reason)
        assert said in data["message"]
        assert study.samples_on_disk() == 1
        server.script = lambda _: Act()
        found = study.call("--inline", verb="retry")
        assert found.code == 0, found.out
        assert study.samples_on_disk() == 2


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_is_busy_for_all_blames_no_row(
    status: int, undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Retry-After some prompts are refused many times while others get their turn."""
    monkeypatch.setattr(server_engine, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(server_engine, "LONGEST_PAUSE_S", 0.01)
    with ChatServer() as server:
        refused: Counter[str] = Counter()

        def script(ask: Ask) -> Act:
            refused[ask.text] += 1
            is_unlucky = len(ask.text) % 2 and refused[ask.text] <= 2 * server_engine.TRIES
            return Act(status=status) if is_unlucky else Act()

        server.script = script
        study = study_on(server, tmp_path)
        assert study.call("--inline").code == 0
    assert results(study.output) == undisturbed


STARTS: dict[str, tuple[Callable[[ChatServer], Any], str]] = {
    "another model": (
        lambda server: setattr(server, "script_probe", Act(model="llama")),
        "was asked for 'tiny' and answers as 'llama'",
    ),
    "a key that is not let in": (
        lambda server: setattr(server, "script_probe", Act(status=401)),
        "does not let this key in",
    ),
    "a model that is not there": (
        lambda server: setattr(server, "script_probe", Act(status=404)),
        "/models lists: other",
    ),
    "requests that are not taken": (
        lambda server: setattr(server, "script_probe", Act(status=422)),
        "does not take the study's requests",
    ),
    "nobody": (lambda server: server.stop(), "it cannot be reached"),
}


@pytest.mark.parametrize("start", STARTS)
def test_a_study_that_cannot_start_says_why_and_writes_nothing(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mllm_shapx.models.server_identity.PAUSE_S", 0.01)
    break_it, said = STARTS[start]
    with ChatServer() as server:
        if start == "a model that is not there":
            server.listed = [{"id": "other"}]
        break_it(server)
        study = study_on(server, tmp_path)
        found = study.call("--inline")
        if start == "nobody":
            server.start()
    assert found.code == 2
    assert said in found.out
    assert not study.output.exists()


def test_no_key_reaches_a_file_or_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_API_KEY", "quite-secret-1")
    monkeypatch.setenv("GATEWAY_AUTH", "quite-secret-2")
    monkeypatch.setenv("LOG_LEVEL", "DEBUG")
    kwargs = {"api_key_env": "TINY_API_KEY", "headers_env": {"X-Gateway": "GATEWAY_AUTH"}}
    with ChatServer() as server:
        echo = json.dumps({"error": {"message": "wrong key quite-secret-1 or quite-secret-2"}}).encode()
        server.script = lambda ask: (
            Act(status=500 if ask.number % 8 else 400, raw=echo) if ask.number < 9 else Act()
        )
        study = study_on(server, tmp_path, kwargs=kwargs)
        found = study.call("--inline")
        assert found.code == 3, found.out
        assert {ask.headers["Authorization"] for ask in server.asked} == {"Bearer quite-secret-1"}
        assert {ask.headers["X-Gateway"] for ask in server.asked} == {"quite-secret-2"}
    told = "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())
    assert "wrong key *** or ***" in told
    assert "quite-secret" not in told + found.out


def test_a_variable_that_is_not_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINY_API_KEY", raising=False)
    with ChatServer() as server:
        found = study_on(server, tmp_path, kwargs={"api_key_env": "TINY_API_KEY"}).call("--inline")
    assert found.code == 2
    assert "connector_kwargs.api_key_env: the environment variable TINY_API_KEY is not set" in found.out


def test_requests_say_what_the_config_says(tmp_path: Path) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    with ChatServer() as server:
        assert study_on(server, tmp_path, kwargs={"extra_body": extra}).call("--inline").code == 0
        body = server.asked[0].body
    assert body["messages"][0] == {"role": "system", "content": "You are a helpful assistant."}
    assert [each["role"] for each in body["messages"]] == ["system", "user"]
    rest = {key: value for key, value in body.items() if key != "messages"}
    assert rest == {
        "model": "tiny", "temperature": 0.0, "max_tokens": 6, "seed": 0, "stream": False, **extra
    }  # fmt: skip


def test_a_service_that_wants_max_completion_tokens_gets_it(
    undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    with ChatServer() as server:
        server.wants_newer_limit = True
        study = study_on(server, tmp_path)
        found = study.call("--inline")
        assert found.code == 0, found.out
        assert {ask.body["max_completion_tokens"] for ask in server.asked} == {6}
        assert len(server.asked) == ANSWERS
    assert results(study.output) == undisturbed


def test_log_probabilities_are_kept_where_the_server_gives_them(
    undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    with ChatServer() as server:
        server.gives_logprobs = True
        study = study_on(server, tmp_path)
        assert study.call("--inline").code == 0
        assert {ask.body["logprobs"] for ask in server.asked} == {True}
    assert {tuple(row["logprobs"]) for row in stored(study)} == {(-0.5, -1.5)}
    assert results(study.output) == undisturbed


def test_a_config_of_the_older_runner_for_lm_studio_runs(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    with ChatServer() as server:
        host = server.url.removeprefix("http://").removesuffix("/v1")
        kwargs = {"lm_studio": {"model_key": "tiny", "api_host": host}}
        settings = {"connector": "lm_studio_text", "connector_kwargs": kwargs, "experiments": EXACT}
        study = Study(tmp_path, rows=2, words=4, settings=settings)
        found = study.call("--inline")
        assert found.code == 0, found.out
        assert len(server.answered) == ANSWERS
    assert results(study.output) == undisturbed


def test_what_is_finished_needs_no_server(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """Resuming what is done, and a new run on stored answers, work while nobody listens."""
    with ChatServer() as server:
        study = study_on(server, tmp_path)
        assert study.call("--inline").code == 0
    found = study.call("--inline", "--resume")
    assert found.code == 0, found.out
    assert "its model is taken to be the one that the results record" in found.out
    study.write_config(experiments=[*EXACT, {"explainer_type": "limited_mc", "num_samples": [8]}])
    rescored = CliRunner().invoke(main, ["rescore", "--config", str(study.config)])
    assert rescored.exit_code == 0, rescored.output
    assert study.samples_on_disk() == 4
    exact = {path: data for path, data in results(study.output).items() if path.startswith("exact")}
    assert exact == undisturbed
    found = study.call("--inline", "--overwrite")
    assert found.code == 2, "a study that begins must know its model"
    assert "cannot be reached" in found.out


def test_resuming_waits_for_a_server_that_is_away_and_refuses_another_model(tmp_path: Path) -> None:
    with ChatServer() as server:
        server.script = lambda ask: Act(delay_s=0.02) if ask.number < 12 else Act(hang_s=0.6)
        study = study_on(server, tmp_path)
        assert study.call("--inline", "--server-patience", "1").code == 1
        server.stop()
        found = study.call("--inline", "--resume", "--server-patience", "1")
        assert found.code == 1
        assert "has given no answer for" in found.out
        assert len(stored(study)) == 12
        server.listed = [{"id": "tiny", "owned_by": "us", "meta": {"n_params": 7}}]
        server.script = lambda _: Act()
        timer = threading.Timer(6.0, server.start)
        timer.start()
        found = study.call("--inline", "--resume", "--server-patience", "30")
        timer.join()
        assert found.code == 1
        assert "is not what the study began with" in found.out
        assert len(stored(study)) == 12


def test_as_many_requests_are_in_flight_as_the_server_takes(tmp_path: Path) -> None:
    """More than eight at a time are refused; the study finds that out, and the cap of the config holds."""
    with ChatServer() as server:
        server.script = lambda ask: Act(status=429) if ask.in_flight > 8 else Act(delay_s=0.01)
        study = study_on(server, tmp_path / "free")
        study.write_prompts("one two three four five six seven eight")
        assert study.call("--inline").code == 0
        refused = len(server.asked) - len(server.answered)
        assert len(server.answered) == 256
        assert server.most_in_flight > 4
        assert refused < 64
    with ChatServer() as server:
        server.script = lambda _: Act(delay_s=0.05)
        study = study_on(server, tmp_path / "capped", kwargs={"max_concurrency": 3})
        assert study.call("--inline").code == 0
        assert server.most_in_flight == 3


def test_requests_come_in_the_order_that_shares_prefixes(tmp_path: Path) -> None:
    with ChatServer() as server:
        study = study_on(server, tmp_path, kwargs={"max_concurrency": 1})
        study.write_prompts("one two three four five six")
        assert study.call("--inline").code == 0
        asked = [ask.body["messages"][-1]["content"] for ask in server.asked]
    assert len(asked) == 64
    assert asked == sorted(asked)


def test_many_short_rows_are_in_flight_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a device would take at once: one worker keeps a server busy with rows of four coalitions."""
    monkeypatch.setattr(server_throttle, "START", 8 * MOST_ROWS)
    rows: set[str] = set()
    enough = threading.Event()
    in_time: list[bool] = []

    def script(ask: Ask) -> Act:
        """Answer nothing before so many rows have asked, or it took too long."""
        rows.update(filter(None, ["".join(filter(str.isdigit, ask.text))]))
        if len(rows) > MOST_ROWS:
            enough.set()
        in_time.append(enough.wait(30.0))
        return Act()

    with ChatServer() as server:
        server.script = script
        study = study_on(server, tmp_path, kwargs={"timeout_s": 60})
        study.write_prompts(*(f"a{row} b" for row in range(120)))
        found = study.call("--inline")
        assert found.code == 0, found.out
        assert len(server.answered) == len(server.asked)
    assert all(in_time)


def test_workers_of_ray_share_a_server_and_a_stop_of_it_blames_no_row(
    undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    key = {"TINY_API_KEY": "quite-secret-1"}
    with ChatServer() as server:
        server.script = lambda ask: Act(delay_s=0.05) if ask.number < 12 else Act(hang_s=0.6)
        study = study_on(server, tmp_path, kwargs={"api_key_env": "TINY_API_KEY"})
        found = study.run("--num-workers", "2", "--server-patience", "2", env=key)
        assert found.code == 1, found.out
        assert "has given no answer for" in found.out
        assert "quite-secret" not in found.out
        assert not list(study.output.glob("*/failures/*")), "a row was blamed"
        assert len(stored(study)) == len(server.answered) == 12
        server.script = lambda _: Act()
        found = study.run("--num-workers", "2", "--resume", env=key)
        assert found.code == 0, found.out
        assert len(server.answered) == ANSWERS
        assert {ask.headers["Authorization"] for ask in server.asked} == {"Bearer quite-secret-1"}
    assert results(study.output) == undisturbed


def test_connections_are_kept_and_are_no_more_than_requests_in_flight(tmp_path: Path) -> None:
    with ChatServer() as server:
        server.script = lambda _: Act(delay_s=0.01)
        study = study_on(server, tmp_path, kwargs={"max_concurrency": 3, "timeout_s": 30})
        assert study.call("--inline").code == 0
        assert len(server.asked) == ANSWERS
        assert server.most_in_flight == 3
        assert server.connections <= 3 + 1  # one for the question which model it is, before the study


def test_the_version_of_the_server_is_part_of_which_model_it_is(tmp_path: Path) -> None:
    with ChatServer() as server:
        server.version = "0.9.1"
        server.script = lambda ask: Act(delay_s=0.02) if ask.number < 12 else Act(hang_s=0.6)
        study = study_on(server, tmp_path)
        settings = load_config(study.config)
        asked = expand(settings.experiment_set).runs[0].model_settings
        told = served_model(asked)
        assert told.version == "0.9.1"
        assert study.call("--inline", "--server-patience", "1").code == 1
        spec = json.loads((study.output / "exact" / "spec.json").read_text())
        assert spec["result_settings"]["model_commit"] == told.commit
        server.script = lambda _: Act()
        server.version = "0.9.2"
        assert served_model(asked).commit != told.commit
        found = study.call("--inline", "--resume")
        assert found.code == 2
        assert "model_commit" in found.out
        server.version = "0.9.1"
        assert study.call("--inline", "--resume").code == 0


def test_validate_says_what_similarity_needs_and_an_encoder_gives_it(
    undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    with ChatServer() as server:
        study = study_on(server, tmp_path, shap={"similarity": "CosineSimilarity"})
        refused = CliRunner().invoke(main, ["validate", "--config", str(study.config)])
        assert refused.exit_code == 2
        assert "compares the model's own states, which a server does not give" in refused.output
        assert "name an encoder in embedding.model_id, or use TfIdfCosineSimilarity" in refused.output
        study.write_config(embedding={"model_id": str(MODEL)})
        validated = CliRunner().invoke(main, ["validate", "--config", str(study.config)])
        assert validated.exit_code == 0, validated.output
        found = study.call("--inline")
        assert found.code == 0, found.out
        assert len(server.answered) == ANSWERS
    spec = json.loads((study.output / "exact" / "spec.json").read_text())
    assert len(spec["result_settings"]["embedding_commit"]) == 64
    ours, by_words = results(study.output), undisturbed
    samples = [name for name in ours if "/samples/" in name]
    assert len(samples) == 2
    for name in samples:
        assert ours[name]["grand_value"] == pytest.approx(1.0, abs=1e-5)
        assert ours[name]["response"] == by_words[name]["response"]
        assert ours[name]["base_value"] != pytest.approx(by_words[name]["base_value"], abs=1e-3)


def test_a_driver_that_drains_asks_nothing_twice(undisturbed_rows: dict[str, Any], tmp_path: Path) -> None:
    """SIGTERM, then --resume: by the server's own log each coalition of each row is asked for once."""
    with ChatServer() as server:
        server.script = lambda _: Act(delay_s=0.05)
        study = rows_on(server, tmp_path)
        driver = study.start("--inline")
        driver.wait_for(lambda: len(server.answered) >= 20)
        driver.kill(signal.SIGTERM)
        assert driver.wait().code == 143
        assert 20 <= len(server.answered) < 8 * 16, "the study is not over"
        assert study.call("--inline", "--resume").code == 0
        assert len(server.asked) == len(server.answered) == 8 * 16
    assert results(study.output) == undisturbed_rows


def test_a_row_that_outlasts_the_grace_keeps_its_answers(tmp_path: Path) -> None:
    """SIGTERM in the middle of a long row: --resume asks again only for what was in flight."""
    with ChatServer() as server:
        server.script = lambda _: Act(delay_s=0.3)
        study = study_on(server, tmp_path, kwargs={"max_concurrency": 2, "timeout_s": 30})
        study.write_prompts("one two three four five six")
        driver = study.start("--inline", "--grace", "1")
        driver.wait_for(lambda: len(server.answered) >= 6)
        driver.kill(signal.SIGTERM)
        assert driver.wait().code == 143
        before, kept = len(server.asked), len(stored(study))
        assert 6 <= kept < 64
        assert before - kept <= 2
        server.script = lambda _: Act()
        assert study.call("--inline", "--resume").code == 0
        assert len(server.asked) == before + 64 - kept


def test_a_driver_that_is_killed_asks_again_only_what_was_not_written(
    undisturbed_rows: dict[str, Any], tmp_path: Path
) -> None:
    """SIGKILL, then --resume: answers of the last moments, and what was in flight, are asked for again."""
    with ChatServer() as server:
        server.script = lambda _: Act(delay_s=0.05)
        study = rows_on(server, tmp_path)
        driver = study.start("--inline", "--flush-every", "0.5")
        driver.wait_for(lambda: len(stored(study)) >= 20)
        driver.kill(signal.SIGKILL)
        killed_at = time.monotonic()
        with pytest.raises(AssertionError):
            driver.wait_for(lambda: False)
        time.sleep(0.2)
        before, kept = len(server.asked), len(stored(study))
        # Answers are written --flush-every seconds after the last time, looked at with each heartbeat.
        written_by = killed_at - 0.5 - 2 * BEAT_S - 1.0
        assert kept >= sum(ask.at + 0.05 < written_by for ask in server.asked)
        assert study.call("--inline", "--resume").code == 0
        assert len(server.asked) == before + 8 * 16 - kept
    assert results(study.output) == undisturbed_rows


def rows_on(server: ChatServer, folder: Path) -> Study:
    """Return a study of eight rows that takes two requests at a time."""
    study = study_on(server, folder, kwargs={"max_concurrency": 2, "timeout_s": 30})
    study.write_prompts(*(f"first{row} second{row} third{row} fourth{row}" for row in range(8)))
    return study


@pytest.fixture(scope="module")
def undisturbed_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with ChatServer() as server:
        study = rows_on(server, tmp_path_factory.mktemp("rows"))
        assert study.call("--inline").code == 0
    return results(study.output)


def test_tokens_are_summed_per_run_and_a_shared_answer_counts_once(tmp_path: Path) -> None:
    variants = [*EXACT, {"explainer_type": "limited_mc", "num_samples": [8]}]
    with ChatServer() as server:
        study = study_on(server, tmp_path, experiments=variants)
        assert study.call("--inline").code == 0
        words = sum(len(text.split()) for text in server.answered)
    exact = json.loads((study.output / "exact" / "summary" / "aggregate_metrics.json").read_text())
    assert (exact["tokens_in_total"], exact["tokens_out_total"]) == (words, 3 * ANSWERS)
    assert sum(group["tokens_out_total"] for group in exact["by_language"]) == 3 * ANSWERS
    (shared,) = study.output.glob("limited_mc*/summary/aggregate_metrics.json")
    assert json.loads(shared.read_text())["model_calls_total"] == 0
    assert "tokens_in_total" not in json.loads(shared.read_text())


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (("--max-requests", "12"), "--max-requests 12: 12 request(s) were sent; stopping early"),
        (("--max-tokens", "130"), "--max-tokens 130: "),
    ],
)
def test_a_limit_stops_in_time_and_resuming_asks_for_the_rest(
    limit: tuple[str, str], said: str, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    with ChatServer() as server:
        server.script = lambda _: Act(delay_s=0.02)
        study = study_on(server, tmp_path)
        found = study.call("--inline", *limit)
        assert found.code == 1
        assert said in found.out
        assert "go on with --resume" in found.out
        assert len(stored(study)) == len(server.answered) == len(server.asked)
        used = sum(len(text.split()) + 3 for text in server.answered)
        if limit[0] == "--max-requests":
            assert len(server.asked) == 12
        else:
            assert 130 - 12 <= used <= 130
        assert not list(study.output.glob("*/failures/*")), "a row was blamed"
        assert study.call("--inline", "--resume").code == 0
        assert len(server.answered) == ANSWERS
    assert results(study.output) == undisturbed


def test_what_is_reserved_is_never_below_what_was_counted() -> None:
    """Whatever the lengths, and in whatever order they come."""
    rng = random.Random(5)

    async def play() -> None:
        budget, template, share = CallBudget(ServerLimits()), rng.randrange(300), rng.random()
        seen: list[tuple[int, int]] = []
        for _ in range(20):
            size = rng.randrange(2000)
            tokens = template + int(size * share * rng.random())
            reserved = await budget.enter(size, 8)
            budget.leave(reserved)
            budget.count(size, reserved, tokens, 8)
            seen.append((size, tokens))
            for size, tokens in seen:
                assert await budget.enter(size, 8) >= tokens + 8

    for _ in range(200):
        asyncio.run(play())


@pytest.mark.parametrize("template_tokens", [5, 100])
def test_a_limit_of_tokens_holds_whatever_the_template_adds(template_tokens: int, tmp_path: Path) -> None:
    """Also when a long prompt comes first, whose share of the template is small."""
    most = 8 * (template_tokens + 10)
    with ChatServer() as server:
        server.template_tokens = template_tokens
        server.script = lambda ask: Act(delay_s=0.02 * (8 - len(ask.text.split())))
        study = study_on(server, tmp_path, kwargs={"timeout_s": 30})
        study.write_prompts("one two three four five six seven", "eight nine ten")
        found = study.call("--inline", "--max-tokens", str(most))
        assert found.code == 1
        used = sum(template_tokens + len(text.split()) + 3 for text in server.answered)
        assert most / 3 <= used <= most
        assert len(stored(study)) == len(server.answered) == len(server.asked)


def test_answers_without_a_count_cost_as_much_as_they_may(tmp_path: Path) -> None:
    with ChatServer() as server:
        server.gives_usage = False
        study = study_on(server, tmp_path)
        found = study.call("--inline", "--max-tokens", "1000")
        assert found.code == 1
        assert 0 < len(server.answered) < ANSWERS
        assert f"as {len(server.answered)} answer(s) came without a count" in found.out
        most = max(
            sum(len(each["content"].encode()) for each in ask.body["messages"]) for ask in server.asked
        )
        assert len(server.answered) >= 1000 // (most + TEMPLATE_TOKENS + 6)
        assert study.call("--inline", "--resume").code == 0
        notes = json.loads((study.output / "exact" / "spec.json").read_text())["model"]["notes"]
        assert len([note for note in notes if "no count of tokens" in note]) == 1
        assert len(server.answered) == ANSWERS


def test_limits_are_refused_where_they_cannot_hold(tmp_path: Path) -> None:
    found = Study(tmp_path, rows=1, words=2).call("--inline", "--max-tokens", "5")
    assert found.code == 2
    assert "connector 'hf_text' asks none" in found.out
    with pytest.raises(UsageError, match="set num_workers to 1"):
        RunOptions(max_requests=5, num_workers=2)


def test_limits_hold_for_all_retries_and_configs_of_a_call(tmp_path: Path) -> None:
    with ChatServer() as server:
        alone = study_on(server, tmp_path / "alone")
        found = alone.call("--inline", "--max-requests", "10", "--max-retries", "2", "--retry-delay", "0")
        assert found.code == 1
        assert "retry 1" not in found.out
        assert len(server.asked) == 10
    with ChatServer() as server:
        studies = [study_on(server, tmp_path / name) for name in ("first", "second", "third")]
        words = [word for study in studies for word in ("--config", str(study.config))]
        most = ANSWERS + 8
        call = CliRunner().invoke(main, ["run", "--inline", "--max-requests", str(most), *words])
        assert call.exit_code == 1
        assert len(server.asked) == most
        assert [study.samples_on_disk() for study in studies][::2] == [2, 0]
        assert len(stored(studies[1])) == 8
    with ChatServer() as server:
        server.script = lambda ask: Act(status=404) if ask.number == 5 else Act()
        study = study_on(server, tmp_path / "stopped", kwargs={"max_concurrency": 1})
        found = study.call("--inline", "--max-requests", "9", "--max-retries", "1", "--retry-delay", "0")
        assert "retry 1 of 1" in found.out
        assert len(server.asked) == 9


@pytest.mark.slow
def test_a_worker_that_replaces_another_one_goes_on_counting(
    undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """All but the requests since the last heartbeat of the dead worker."""
    with ChatServer() as server:
        server.script = lambda _: Act(delay_s=0.2)
        study = study_on(server, tmp_path, kwargs={"max_concurrency": 1})
        driver = study.start("--max-requests", "20", "--num-workers", "1", "--flush-every", "0.1")
        driver.wait_for(lambda: len(server.answered) >= 12)
        (worker,) = workers_of(driver)
        worker.kill()
        found = driver.wait()
        assert found.code == 1, found.out
        assert "--max-requests 20: 20 request(s) were sent" in found.out
        missed = 1 + int((BEAT_S + 0.2) / 0.2)
        assert 20 <= len(server.asked) <= 20 + missed
        server.script = lambda _: Act()
        assert study.call("--inline", "--resume").code == 0
    assert results(study.output) == undisturbed


def workers_of(driver: Process) -> list[psutil.Process]:
    found = psutil.Process(driver.pid).children(recursive=True)
    return [each for each in found if "".join(each.cmdline()[:1]).startswith("ray::WorkerActor")]


def test_stored_answers_can_be_asked_for_again_and_bench_says_that_it_cannot(tmp_path: Path) -> None:
    with ChatServer() as server:
        study = study_on(server, tmp_path)
        assert study.call("--inline").code == 0
        found = study.call("--again", "5", verb="verify")
        assert found.code == 0, found.out
        assert len(server.asked) == ANSWERS + 5
        server.answer = lambda text: f"now {text}"
        assert "0 of 5" in study.call("--again", "5", verb="verify").out
        called = CliRunner().invoke(main, ["bench", "--config", str(study.config)])
        assert called.exit_code == 2
        assert "this one is behind a server" in called.output


def test_notes_on_answers_stay_with_their_study_when_the_model_is_kept(tmp_path: Path) -> None:
    def notes(study: Study) -> list[str]:
        spec = json.loads((study.output / "exact" / "spec.json").read_text())
        found: list[str] = spec["model"]["notes"]
        return found

    with ChatServer() as server:
        filtered, sound = (study_on(server, tmp_path / name) for name in ("filtered", "sound"))
        server.script = lambda ask: Act(finish_reason="content_filter" if ask.number < ANSWERS else "stop")
        calls = ("--config", str(filtered.config), "--config", str(sound.config), "--inline")
        found = CliRunner().invoke(main, ["run", *calls])
        assert found.exit_code == 0, found.output
    assert any("content filter" in note for note in notes(filtered))
    assert notes(sound) == []

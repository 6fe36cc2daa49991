"""Hub datasets, against a small hub on the loopback."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_kit import parquet_bytes
from hub_server import HubServer, nowhere
from huggingface_hub import constants

from mllm_shapx.config.models import DatasetConfig
from mllm_shapx.data.sources import Table, open_table
from mllm_shapx.errors import DatasetError

REPO = "owner/rows"
CARD = b"""---
configs:
- config_name: spoken
  data_files:
  - split: test
    path: spoken/test/*
---
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub of its own with an empty cache, as huggingface_hub would take it from the environment."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def _files(marker: str = "") -> dict[str, bytes]:
    return {
        "README.md": CARD,
        "spoken/test/0000.parquet": parquet_bytes({"prompt": [f"a{marker}", "b"]}),
        "spoken/test/0001.parquet": parquet_bytes({"prompt": ["c"]}),
        "other/test-00000-of-00001.parquet": parquet_bytes({"prompt": ["other"]}),
    }


def _config(**settings: Any) -> DatasetConfig:
    return DatasetConfig.model_validate({"repo_id": REPO, "subset": "spoken", **settings})


def _message(config: DatasetConfig) -> str:
    with pytest.raises(DatasetError) as caught:
        open_table(config, None)
    return str(caught.value)


def _rows(table: Table) -> list[str]:
    return [table.row(index, ["prompt"])["prompt"] for index in range(table.num_rows)]


def test_parquet_of_a_pinned_commit(hub: HubServer) -> None:
    """The files of the subset and split are read at the pinned commit, and the commit is told."""
    old = hub.add("dataset", REPO, _files())
    hub.add("dataset", REPO, _files("2"))
    table = open_table(_config(revision=old), None)
    assert _rows(table) == ["a", "b", "c"]
    assert table.commit == old
    assert table.column("prompt") == ["a", "b", "c"]
    assert not any("other" in request for request in hub.requests)


def test_a_branch_is_resolved_to_its_commit(hub: HubServer) -> None:
    """No revision means the main branch, a branch its head, slashes included; the commit is recorded."""
    main = hub.add("dataset", REPO, _files())
    converted = hub.add(
        "dataset",
        REPO,
        {"single_sentence/test/0000.parquet": parquet_bytes({"prompt": ["converted"]})},
        branch="refs/convert/parquet",
    )
    assert open_table(_config(), None).commit == main
    table = open_table(_config(revision="refs/convert/parquet", subset="single_sentence"), None)
    assert (table.commit, _rows(table)) == (converted, ["converted"])


def test_what_is_cached_is_not_downloaded_again(hub: HubServer) -> None:
    """A second open asks for the file list alone."""
    commit = hub.add("dataset", REPO, _files())
    open_table(_config(revision=commit), None)
    hub.requests.clear()
    assert _rows(open_table(_config(revision=commit), None)) == ["a", "b", "c"]
    assert not any(request.startswith("GET") and "/resolve/" in request for request in hub.requests)


def test_offline_the_cache_is_enough(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With HF_HUB_OFFLINE, and with a hub that is down, cached rows are read at the same commit."""
    commit = hub.add("dataset", REPO, _files())
    open_table(_config(), None)
    hub.failing["/api/datasets/owner/rows"] = 503
    down = open_table(_config(), None)
    assert (_rows(down), down.commit) == (["a", "b", "c"], commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    offline = open_table(_config(revision=commit), None)
    assert (_rows(offline), offline.commit) == (["a", "b", "c"], commit)
    assert hub.requests == []


def test_offline_without_a_cache_is_said(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names repository, cache and what to do."""
    hub.add("dataset", REPO, _files())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = _message(_config())
    assert REPO in message
    assert "HF_HUB_OFFLINE" in message
    assert constants.HF_HUB_CACHE in message


def test_a_hub_that_does_not_answer_is_said(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection is told with the endpoint."""
    endpoint = nowhere()
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    message = _message(_config())
    assert endpoint in message
    assert "cannot be reached" in message
    assert hub.requests == []


def test_a_cache_with_holes_is_not_taken_for_the_split(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download that broke off between shards fails, and offline afterwards too."""
    shards = {f"spoken/test-{n:05d}-of-00003.parquet": parquet_bytes({"prompt": [str(n)]}) for n in range(3)}
    commit = hub.add("dataset", REPO, shards)
    hub.failing["test-00001-of-00003.parquet"] = 404
    assert "test-00001-of-00003.parquet cannot be downloaded" in _message(_config(revision=commit))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "the shard spoken/test-00000-of-00003 is missing" in _message(_config(revision=commit))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"repo_id": "owner/absent"}, ["owner/absent", "no such dataset", "HF_TOKEN"]),
        ({"repo_id": "a/b/c"}, ["dataset.repo_id", "OWNER/NAME"]),
        ({"revision": "0" * 40}, ["no revision '0000", "dataset.revision"]),
        ({"subset": "spokn"}, ["did you mean 'spoken'", "other, spoken", "dataset.subset"]),
        ({"split": "train"}, ["no split 'train'", "its splits are test"]),
    ],
)
def test_what_the_hub_lacks_is_named(hub: HubServer, settings: dict[str, Any], said: list[str]) -> None:
    """Repository, revision, subset and split: each wrong one is named with what there is."""
    hub.add("dataset", REPO, _files())
    message = _message(_config(**settings))
    for words in said:
        assert words in message


@pytest.mark.parametrize("source", ["hf_parquet", "hf_datasets"])
@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_said(hub: HubServer, status: int, source: str) -> None:
    """A hub that does not take the token says so, cached rows or not."""
    hub.add("dataset", REPO, _files())
    hub.failing["/api/datasets/owner/rows"] = status
    message = _message(_config(source=source))
    assert f"refuses (HTTP {status})" in message
    assert "HF_TOKEN" in message


@pytest.mark.parametrize("source", ["hf_parquet", "hf_datasets"])
def test_a_gated_dataset_is_said(hub: HubServer, source: str) -> None:
    """Whose description is public and whose files are not is neither missing nor out of reach."""
    hub.add("dataset", REPO, _files())
    hub.gated.add(REPO)
    message = _message(_config(source=source))
    assert "is gated; ask for access on its page" in message
    assert "HF_TOKEN" in message


def test_a_hub_that_hangs_is_given_up_in_time(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One question, no longer than HF_HUB_ETAG_TIMEOUT; what is cached is read all the same."""
    commit = hub.add("dataset", REPO, _files())
    cached, absent = _config(revision=commit), _config(revision="0" * 40)
    open_table(cached, None)
    hub.hangs = True
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    began = time.monotonic()
    assert "cannot be reached (no answer within 1 s)" in _message(absent)
    assert _rows(open_table(cached, None)) == ["a", "b", "c"]
    assert time.monotonic() - began < 20


def test_a_damaged_download_is_said(hub: HubServer) -> None:
    """A hub file that is no parquet is named."""
    hub.add("dataset", REPO, {"spoken/test/0000.parquet": b"no parquet" * 20})
    assert "not a parquet file" in _message(_config())


_OPEN = """
import json, sys
from mllm_shapx.config.models import DatasetConfig
from mllm_shapx.data.sources import open_table
from mllm_shapx.errors import DatasetError
answers = []
for settings in json.loads(sys.argv[1]):
    try:
        table = open_table(DatasetConfig.model_validate(settings), None)
        names = list(table.columns)
        row = {name: repr(value) for name, value in table.row(1, names).items()}
        answers.append({"commit": table.commit, "rows": table.num_rows, "prompts": table.column("prompt"),
                        "row": row, "batches": [b.num_rows for b in table.batches(["prompt"])]})
    except DatasetError as error:
        answers.append({"error": str(error)})
loaded = {name: name in sys.modules for name in ("datasets", "torch")}
print(json.dumps({"answers": answers, **loaded}))
"""


def _in_a_process(hub_url: str, home: Path, settings: list[dict[str, Any]], **env: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _OPEN, json.dumps(settings)],
        capture_output=True,
        text=True,
        check=False,
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "HF_ENDPOINT": hub_url,
            "HF_HOME": str(home),
            "PYTHONPATH": os.pathsep.join(sys.path),
            **env,
        },
    )
    assert (done.returncode, done.stderr) == (0, "")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_parquet_through_the_environment_without_importing_datasets(tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE rule; neither `datasets` nor torch is imported."""
    with HubServer() as hub:
        commit = hub.add("dataset", REPO, _files())
        settings = [{"repo_id": REPO, "subset": "spoken"}]
        online = _in_a_process(hub.url, tmp_path, settings)
    offline = _in_a_process(hub.url, tmp_path, settings, HF_HUB_OFFLINE="1")
    for answer in (online, offline):
        (table,) = answer["answers"]
        assert "error" not in table, table
        assert (table["commit"], table["prompts"]) == (commit, ["a", "b", "c"])
        assert not answer["datasets"]
        assert not answer["torch"]


def test_datasets_reads_the_same_rows(tmp_path: Path) -> None:
    """hf_datasets gives rows, commit, raw recordings and errors in words; offline from its cache."""
    files = _files() | {
        "spoken/test/0000.parquet": parquet_bytes(
            {
                "prompt": ["a", "b"],
                "audio__male": [{"bytes": b"A", "path": "a"}, {"bytes": b"B", "path": "p"}],
            }
        ),
        "spoken/test/0001.parquet": parquet_bytes(
            {"prompt": ["c"], "audio__male": [{"bytes": b"C", "path": "c"}]}
        ),
    }
    common = {"source": "hf_datasets", "repo_id": REPO}
    with HubServer() as hub:
        commit = hub.add("dataset", REPO, files)
        settings = [
            {**common, "subset": "spoken", "revision": commit},
            {**common, "subset": "spokn"},
            {**common, "subset": "spoken", "split": "train"},
            {**common, "repo_id": "owner/absent", "subset": "spoken"},
        ]
        online = _in_a_process(hub.url, tmp_path, settings)["answers"]
    offline = _in_a_process(hub.url, tmp_path, settings[:1], HF_HUB_OFFLINE="1")["answers"]
    # The server is closed: the hub refuses the connection.
    unreachable = _in_a_process(hub.url, tmp_path, [settings[0], settings[3]])["answers"]
    assert f"the hub at {hub.url} cannot be reached" in unreachable[1]["error"]
    assert "correct dataset.repo_id" not in unreachable[1]["error"]
    for answer in (online[0], offline[0], unreachable[0]):
        assert answer["commit"] == commit
        assert answer["prompts"] == ["a", "b", "c"]
        assert answer["row"]["audio__male"] == "{'bytes': b'B', 'path': 'p'}"
    assert "spokn" in online[1]["error"]
    assert "dataset.subset" in online[1]["error"]
    assert "train" in online[2]["error"]
    assert "no such dataset" in online[3]["error"]

"""A study whose output is a bucket of an S3-compatible store: killed, resumed, checked and read."""

import json
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from small_study import Study, results, without_timings

import mllm_shapx
from mllm_shapx.cli import main
from mllm_shapx.records.run_reader import find_runs
from mllm_shapx.records.storage import FsspecStorage

s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto")

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}
OUTPUT = "s3://studies/output"


pytestmark = [
    pytest.mark.usefixtures("bucket"),
    # Of the server and the client, not of this package.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Return the address of a server on loopback."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from moto.server import ThreadedMotoServer

        served = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        served.start()
    try:
        host, port = served.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        served.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the empty bucket `studies`, and the environment that leads to it."""
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": server}.items():
        monkeypatch.setenv(name, value)
    httpx.post(f"{server}/moto-api/reset")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("studies")
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def names(storage: FsspecStorage, folder: str) -> list[str]:
    return [name for name in storage.list(folder) if name.endswith(".json")]


def test_a_study_in_a_bucket_is_killed_resumed_and_read(tmp_path: Path) -> None:
    """The samples that are in the bucket are kept, and all are equal to those of a local directory."""
    experiments = [{"explainer_type": "exact"}, {"explainer_type": "limited_mc", "fractions": [0.5]}]
    local = Study(tmp_path / "local", rows=6, words=4, settings={"experiments": experiments})
    assert local.call("--inline").code == 0
    study = Study(
        tmp_path / "remote", rows=6, words=4, settings={"experiments": experiments, "output_root": OUTPUT}
    )
    output = FsspecStorage(f"{OUTPUT}/study")

    process = study.start("--inline")
    process.wait_for(lambda: len(names(output, "exact/samples")) >= 2)
    process.kill()
    process.wait()
    before = {name: output.read_bytes(f"exact/samples/{name}") for name in names(output, "exact/samples")}
    assert 2 <= len(before) < 6, "it was done before the kill"

    resumed = study.call("--inline", "--resume")
    assert resumed.code == 0, resumed.out
    assert "took over the lock" in resumed.out
    assert {name: output.read_bytes(f"exact/samples/{name}") for name in before} == before
    assert not output.exists(".lock")

    for call in ("status", "verify", "failures"):
        found = CliRunner().invoke(main, [call, f"{OUTPUT}/study"])
        assert found.exit_code == 0, (call, found.output)
    page = tmp_path / "page.html"
    found = CliRunner().invoke(main, ["report", f"{OUTPUT}/study", "--output", str(page)])
    assert found.exit_code == 0, found.output
    assert "exact" in page.read_text()
    assert len(mllm_shapx.load(f"{OUTPUT}/study").values()) == len(mllm_shapx.load(local.output).values())

    storage, runs = find_runs(f"{OUTPUT}/study")
    paths = [
        path
        for run in runs
        for folder in (f"{run}/samples", f"{run}/summary")
        for path in (f"{folder}/{name}" for name in storage.list(folder))
    ]
    stored = {path: without_timings(json.loads(storage.read_bytes(path))) for path in paths}
    assert stored == results(local.output)


def test_one_of_many_drivers_gets_the_lock_of_a_bucket() -> None:
    """The store creates an object only where none is, also when all ask in the same moment."""
    storages = [FsspecStorage(OUTPUT) for _ in range(8)]
    for name in ("a", "b", "c"):
        start = threading.Barrier(len(storages))

        def create(number: int, name: str = name, start: threading.Barrier = start) -> bool:
            start.wait()
            return storages[number].create_exclusive(name, str(number).encode())

        with ThreadPoolExecutor(len(storages)) as pool:
            won = list(pool.map(create, range(len(storages))))
        assert won.count(True) == 1
        assert storages[0].read_bytes(name) == str(won.index(True)).encode()


def test_a_bucket_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    """Wrong names and wrong credentials show at the start, with the URI and the exit code of bad input."""
    study = Study(tmp_path, rows=1, words=2, settings={"output_root": "s3://no_such_BUCKET!/x"})
    found = study.call("--inline")
    assert found.code == 2
    assert "s3://no_such_BUCKET!/x" in found.out

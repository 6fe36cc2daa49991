"""Studies behind servers under Ray: where keys go, and which GPUs a worker's own server gets."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import chat_server
import pytest
from chat_server import Act, Ask, ChatServer
from ray_cluster import LoopbackCluster
from small_study import Process, Study

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SECRET = "quite-secret-1"  # noqa: S105 -- nobody's
EXACT = [{"explainer_type": "exact"}]


def test_a_key_is_in_no_result_no_log_of_ray_and_no_run_of_wandb(tmp_path: Path) -> None:
    """Under a cluster of the call's own, with every log on and a server that repeats the key."""
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as scratch, ChatServer() as server:
        in_ray: dict[str, bytes] = {}

        def script(ask: Ask) -> Act:
            if ask.number == 14:
                in_ray.update(files_below(Path(scratch)))  # they are removed at the end
            if ask.number < 4:
                words = f'{{"error": {{"message": "no {SECRET} here"}}}}'
                return Act(status=500 if ask.number else 400, raw=words.encode())
            return Act(delay_s=0.05)

        server.script = script
        kwargs = {"base_url": server.url, "model_id": "tiny", "api_key_env": "TINY_API_KEY"}
        settings = {
            "connector": "openai",
            "connector_kwargs": kwargs,
            "experiments": EXACT,
            "wandb": {"mode": "offline", "upload_samples": True},
        }
        study = Study(tmp_path, rows=2, words=4, settings=settings)
        env = {"TINY_API_KEY": SECRET, "LOG_LEVEL": "DEBUG", "RAY_TMPDIR": scratch}
        driver: Process = study.start("--num-workers", "1", env=env)
        found = driver.wait()
        assert found.code == 3, found.out
        assert {ask.headers["Authorization"] for ask in server.asked} == {f"Bearer {SECRET}"}
    told = files_below(tmp_path)
    assert any("wandb/offline-run-" in name for name in told)
    assert any(name.endswith("raylet.out") for name in in_ray)
    assert any("worker-" in name for name in in_ray)
    leaks = [name for name, data in (*told.items(), *in_ray.items()) if SECRET.encode() in data]
    assert not leaks
    assert any(b"no *** here" in data for data in (*told.values(), *in_ray.values()))


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def cluster() -> Iterator[LoopbackCluster]:
    with LoopbackCluster(cpus=4, gpus=4) as running:
        yield running


def test_each_worker_gets_the_gpus_that_its_server_needs(cluster: LoopbackCluster, tmp_path: Path) -> None:
    """Four GPUs at two each are two workers, and limits that one worker counts are refused."""
    program = Path(chat_server.__file__)
    shell = f'echo "$CUDA_VISIBLE_DEVICES" > {tmp_path}/seen-{{port}}; '
    shell += f"exec {sys.executable} {program} {{port}} 0.2"
    kwargs = {"model_id": "tiny", "server": {"command": ["sh", "-c", shell], "gpus": 2}}
    settings = {"connector": "openai", "connector_kwargs": kwargs, "experiments": EXACT}
    study = Study(tmp_path, rows=6, words=4, settings=settings, env=cluster.env)
    refused = study.run("--address", cluster.address, "--max-requests", "5")
    assert refused.code == 2, refused.out
    assert "are counted by one worker, and this call would start 2" in refused.out
    assert not list(tmp_path.glob("seen-*"))
    found = study.run("--address", cluster.address)
    assert found.code == 0, found.out
    assert study.samples_on_disk() == 6
    assert sorted(path.read_text() for path in tmp_path.glob("seen-*")) == ["0,1\n", "2,3\n"]

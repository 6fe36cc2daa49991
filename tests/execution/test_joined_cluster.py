"""A cluster that others started: its token, our secrets on it, a node without the data, and a lost node."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray_cluster import LoopbackCluster
from small_study import MODEL, Sabotage, Study

MARK = "a-secret-that-nobody-may-see"
TOKEN = "0123456789abcdef" * 4


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_cluster_with_a_token_takes_those_who_have_it_keeps_no_secret_and_gets_over_a_lost_node(
    tmp_path: Path,
) -> None:
    saboteur = Sabotage(tmp_path)
    saboteur.set(batch_s=1.5)
    secrets = {
        "WANDB_API_KEY": MARK,
        "HF_TOKEN": MARK,
        "HF_ENDPOINT": f"https://user:{MARK}@127.0.0.1",
        "HF_HUB_ETAG_TIMEOUT": "7",
    }
    study = Study(tmp_path, rows=24, words=6, env={**saboteur.env, **secrets})
    with LoopbackCluster(cpus=1, env=saboteur.env, token=TOKEN, dashboard=True) as cluster:
        second = cluster.add_node(cpus=1, wait=False)
        for env, words in (
            ({"RAY_AUTH_MODE": "disabled"}, "wants a token, and none is given: set RAY_AUTH_MODE=token"),
            ({**cluster.env, "RAY_AUTH_TOKEN": "0" * 64}, "takes another token than the one given"),
        ):
            ended = study.run(env={"RAY_ADDRESS": cluster.address, **env}, timeout=60)
            assert ended.code == 2
            assert f"the Ray cluster at '{cluster.address}' (from RAY_ADDRESS) {words}" in ended.out
        second.wait_started()
        ports = (cluster.address.rpartition(":")[2], str(cluster.dashboard_port))
        assert answers_to_another_user(*ports, "") == ["UNAUTHENTICATED", 401]
        assert answers_to_another_user(*ports, "0" * 64)[0] == "UNAUTHENTICATED"
        assert answers_to_another_user(*ports, TOKEN) == ["OK", 200]

        run = study.start("--num-workers", "2", "--address", cluster.address, env=cluster.env)
        run.wait_for(lambda: "2/2 workers busy" in run.out and study.samples_on_disk() >= 6)
        raylet = second.raylet()
        assert raylet is not None
        raylet.kill()
        killed = time.monotonic()
        run.wait_for(lambda: "its node was lost" in run.out)
        assert time.monotonic() - killed < 12, "Ray itself takes 15 s, in which the rows would wait"
        run.wait_for(lambda: study.samples_on_disk() == 72)
        all_there = time.monotonic()
        ended = run.wait(60)
        assert time.monotonic() - all_there < 9, "a new worker that finds no place is not waited for"
        assert ended.code == 0, ended.out
        files = [path for path in cluster.folder.rglob("*") if path.is_file() and not path.is_symlink()]
        assert not [path for path in files if MARK.encode() in path.read_bytes()]
        assert any(b"HF_HUB_ETAG_TIMEOUT" in path.read_bytes() for path in files), (
            "what is no secret is there"
        )


KNOCK = """
import encodings.idna, http.client, json, os, sys
import grpc, grpc._channel
head, dashboard, token = sys.argv[1:]
if os.geteuid() == 0:  # the interpreter may be for root alone, so that it is loaded by now
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
bearer = {"authorization": f"Bearer {token}"} if token else {}
with grpc.insecure_channel(f"127.0.0.1:{head}") as channel:
    method = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
    try:
        method(b"", timeout=20, metadata=tuple(bearer.items()))
        said = "OK"
    except grpc.RpcError as error:
        said = error.code().name
page = http.client.HTTPConnection("127.0.0.1", int(dashboard), timeout=20)
page.request("GET", "/api/jobs/", headers=bearer)
print(json.dumps([said, page.getresponse().status]))
"""
"""Calls the head and lists the jobs, as the user `nobody` where that can be done."""


def answers_to_another_user(head: str, dashboard: str, token: str) -> list[str | int]:
    """Return the head's gRPC status and the dashboard's HTTP status."""
    done = subprocess.run(
        [sys.executable, "-c", KNOCK, head, dashboard, token], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: list[str | int] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a folder is hidden from a node by a mount, which needs root")
def test_a_node_that_lacks_the_dataset_or_the_model_is_named(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    shutil.copytree(MODEL, hidden / "model")
    study = Study(tmp_path / "study", rows=2)
    shutil.copy(study.folder / "rows.parquet", hidden / "rows.parquet")
    lacking_rows = {"dataset": {"source": "local_parquet", "path": str(hidden / "rows.parquet")}}
    lacking_model = {"connector_kwargs": {"model_id": str(hidden / "model"), "dtype": "float32"}}
    with LoopbackCluster(cpus=1) as cluster:  # a worker that takes two CPUs is on the other node
        cluster.add_node(cpus=2, name="the-second-node", hidden=hidden)
        for settings in (lacking_rows, lacking_model):
            study.write_config(**settings)
            words = ("--num-workers", "1", "--overwrite", "--address", cluster.address)
            ended = study.run(*words, env=cluster.env)
            assert ended.code == 2, ended.out
            assert "on the node the-second-node (127.0.0.1): " in ended.out
            assert str(hidden) in ended.out
            assert "Every node needs the model and the dataset under the same path" in ended.out

"""A cluster that others started: its token, our secrets on it, and a node that it loses."""

import time
from pathlib import Path

import pytest
from ray_cluster import LoopbackCluster
from small_study import Sabotage, Study

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
    with LoopbackCluster(cpus=1, env=saboteur.env, token=TOKEN) as cluster:
        second = cluster.add_node(cpus=1, wait=False)
        for env, words in (
            ({"RAY_AUTH_MODE": "disabled"}, "wants a token, and none is given: set RAY_AUTH_MODE=token"),
            ({**cluster.env, "RAY_AUTH_TOKEN": "0" * 64}, "takes another token than the one given"),
        ):
            ended = study.run(env={"RAY_ADDRESS": cluster.address, **env}, timeout=60)
            assert ended.code == 2
            assert f"the Ray cluster at '{cluster.address}' (from RAY_ADDRESS) {words}" in ended.out
        second.wait_started()

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

"""A cluster that starts nodes on demand: it is asked for what a study needs, and that is taken back."""

from pathlib import Path

import pytest
from ray_cluster import LoopbackCluster
from small_study import Sabotage, Study, model_that_does_not_load

ONE_WORKER = {"CPU": 1.0, "GPU": 1.0}
ONE_RUN = {"experiments": [{"explainer_type": "exact"}]}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nodes_are_asked_for_and_the_request_is_taken_back_after_a_signal_and_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real autoscaler starts two nodes with one logical GPU each, on a cluster that begins without any."""
    saboteur = Sabotage(tmp_path)
    saboteur.set(slow=list(range(8)), slow_s=5.0)
    with LoopbackCluster(cpus=1, env=saboteur.env, more_nodes=2) as cluster:
        for name, value in cluster.env.items():
            monkeypatch.setenv(name, value)
        study = Study(tmp_path / "study", rows=8, settings=ONE_RUN, env={**saboteur.env, **cluster.env})
        here = ("--address", cluster.address, "--rows-in-flight", "1", "--grace", "1")
        study.write_config(device=None)
        refused = study.run(*here, "--num-gpus", "all")
        assert refused.code == 2
        assert "has no GPU yet and starts nodes on demand: say how many" in refused.out
        assert cluster.nodes_asked() is None

        study.write_config()
        run = study.start(*here, "--num-gpus", "2")
        run.wait_for(lambda: "2/2 workers busy" in run.out)
        assert cluster.nodes_asked() == [ONE_WORKER] * 2
        run.kill(15)
        assert run.wait().code == 143
        assert cluster.nodes_asked() == []

        broken = Study(tmp_path / "broken", rows=8, settings=ONE_RUN, env=study.env)
        broken.write_config(connector_kwargs={"model_id": str(model_that_does_not_load(tmp_path))})
        run = broken.start(*here, "--num-gpus", "2")
        run.wait_for(lambda: cluster.nodes_asked() == [ONE_WORKER] * 2)
        assert run.wait().code == 2
        assert cluster.nodes_asked() == []

"""The shipped way to submit a study as a Ray job."""

import subprocess
import sys
from pathlib import Path

import pytest
from ray_cluster import LoopbackCluster
from small_study import ROOT, Study, environment


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_study_is_submitted_by_the_shipped_script_and_submitted_again_when_it_is_done(
    tmp_path: Path,
) -> None:
    study = Study(tmp_path, rows=2, words=3, settings={"experiments": [{"explainer_type": "exact"}]})
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    with LoopbackCluster(cpus=2, dashboard=True, env={"PATH": path}) as cluster:
        env = environment(
            {
                **cluster.env,
                "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{cluster.dashboard_port}",
                "PATH": path,
            }
        )
        for said in ("2 of 2 samples", "everything is done: no model is loaded"):
            command = [str(ROOT / "cluster" / "submit.sh"), str(study.config), "--num-workers", "1"]
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            assert said in done.stdout + done.stderr
            assert "succeeded" in done.stdout + done.stderr
        assert study.samples_on_disk() == 2
        uploaded = [path for path in cluster.folder.rglob("working_dir_files/*/*") if path.is_dir()]
        names = {path.name for path in uploaded}
        assert "src" in names
        assert names.isdisjoint({".venv", "tests", "experiments_output", ".git"})

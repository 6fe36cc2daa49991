"""The files in cluster/: each as its schema wants it, and of one mind with the rest of the repository."""

import json
import re
import shlex
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

import mllm_shapx
from mllm_shapx.cli import main, run

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


@pytest.fixture
def job() -> Any:
    return read("rayjob.yaml")


def groups(job: Any) -> list[Any]:
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_the_cluster_file_fits_rays_schema() -> None:
    schema = json.loads((files("ray") / "autoscaler" / "ray-schema.json").read_text())
    content = read("aws.yaml")
    jsonschema.validate(content, schema)
    kinds = content["available_node_types"]
    assert content["head_node_type"] in kinds
    assert kinds["gpu"]["resources"]["GPU"] == 1
    assert kinds["gpu"]["max_workers"] <= content["max_workers"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**content, "max_worker": 4}, schema)


def test_every_pod_of_the_ray_job_fits_kubernetes_schema(job: Any) -> None:
    templates = [group["template"] for group in groups(job)] + [job["spec"]["submitterPodTemplate"]]
    for template in templates:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
        kubernetes_validate.validate(pod, "1.31", strict=True)


def test_the_ray_job_has_the_shape_that_kuberay_takes(job: Any) -> None:
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    known = {"entrypoint", "entrypointNumCpus", "runtimeEnvYAML", "shutdownAfterJobFinishes"}
    known |= {"ttlSecondsAfterFinished", "backoffLimit", "submitterPodTemplate", "rayClusterSpec"}
    assert spec.keys() <= known
    assert spec["rayClusterSpec"].keys() <= {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    for group in groups(job):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert re.fullmatch(r"[a-z][a-z0-9-]*", group["groupName"])
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "60"


def test_the_ray_jobs_command_is_one_that_run_takes_and_counts_what_the_cluster_has(job: Any) -> None:
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:2] == ["mllm-shapx", "run"]
    with run.make_context("run", words[2:]) as context:
        params = dict(context.params)
    workers = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    gpus = [
        group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        for group in workers
    ]
    assert params["nodes"] == 1 + sum(group["replicas"] for group in workers)
    assert params["num_workers"] == sum(
        group["replicas"] * each for group, each in zip(workers, gpus, strict=True)
    )


def test_versions_are_those_of_the_package_and_its_constraints(job: Any) -> None:
    (ray,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    package = {mllm_shapx.__version__}
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == ray
    for name in ("rayjob.yaml", "aws.yaml", "Dockerfile"):
        assert set(re.findall(r"mllm-shapx:(\d\S*)", (CLUSTER / name).read_text())) <= package


def test_the_dockerfile_passes_the_linter() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    command = [str(hadolint), "--failure-threshold", "style", str(CLUSTER / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_copies_what_there_is_and_installs_extras_that_there_are() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split()[:-1])
    (extras,) = re.findall(r'"\.\[(.+)\]"', text)
    optional = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    assert all(re.search(rf"^{extra} = ", optional, re.MULTILINE) for extra in extras.split(","))


def test_the_help_of_run_names_the_options_that_the_files_use() -> None:
    text = CliRunner().invoke(main, ["run", "--help"]).output
    assert all(option in text for option in ("--wait-for-nodes", "--num-workers", "--resume"))

"""A separate Slurm cluster in namespaces of this machine, ended by one process id."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

import pytest

ROOT = Path(__file__).resolve().parents[2]
_TOOL = str(ROOT / "tests" / "support" / "fakeslurm.sh")
_NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
_ENDED = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}


VENV = Path(sys.prefix)


def missing() -> str:
    """Return why Slurm cannot start here; empty if it can."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    lacking = [name for name in _NEEDED if shutil.which(name, path=path) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)}"
    return "" if os.geteuid() == 0 else "needs root"


needs_slurm = pytest.mark.skipif(bool(missing()), reason=f"a Slurm of the test's own: {missing()}")


class SlurmCluster:
    """Nodes n1, n2, … with fake GPUs, which all share `folder`."""

    def __init__(self, *, nodes: int = 2, cpus: int = 2, gpus: int = 2) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="shapx-slurm-", dir="/tmp"))
        self._state = self.folder / "slurm"
        self._state.mkdir()
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "WANDB_", "SLURM_", "CUDA_"))
        }
        path = [str(Path(sys.executable).parent), kept.get("PATH", ""), "/usr/sbin", "/sbin"]
        sources = [str(ROOT / "src"), *filter(None, [kept.get("PYTHONPATH")])]
        self._env = {
            **kept,
            "PATH": os.pathsep.join(path),
            "PYTHONPATH": os.pathsep.join(sources),
            "OMP_NUM_THREADS": "1",
            "FAKESLURM_OWNER": str(os.getpid()),
            "HF_HUB_OFFLINE": "1",
            # A checkout in /tmp would be invisible to the nodes.
            **({"FAKESLURM_KEEP": str(ROOT)} if ROOT.is_relative_to("/tmp") else {}),
        }
        shape = [str(nodes), str(cpus), str(gpus)]
        self._run([_TOOL, "start", str(self._state), str(self.folder), *shape], self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._run([_TOOL, "stop", str(self._state)], self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)

    def call(self, *command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """Run a command on the login node; return its output."""
        return self._run([_TOOL, "exec", str(self._state), *command], cwd or self.folder, env)

    def submit(self, *args: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """Submit a job with `sbatch`; return its id."""
        return self.call("sbatch", "--parsable", *args, cwd=cwd, env=env).strip()

    def state(self, job: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`."""
        words = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, log: Path, timeout: float = 240.0) -> dict[str, str]:
        """Wait until a job has finally ended."""
        deadline = time.monotonic() + timeout
        while (found := self.state(job))["JobState"] not in _ENDED:
            said = log.read_text(errors="replace") if log.exists() else ""
            assert time.monotonic() < deadline, f"{found}\n{said}"
            time.sleep(0.5)
        return found

    def _run(self, command: list[str], cwd: Path, env: dict[str, str] | None = None) -> str:
        paths = os.pathsep.join(filter(None, ((env or {}).get("PYTHONPATH"), self._env["PYTHONPATH"])))
        done = subprocess.run(
            ["bash", *command],
            cwd=cwd,
            env={**self._env, **(env or {}), "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=120,
            start_new_session=True,  # `start`'s daemons do not get this process's signals
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

"""A study's batch script for Slurm (one node, many nodes or a job array), and its submission."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from mllm_shapx.errors import ShapxError, UsageError

GRACE_S = 15
"""Seconds that running rows get. Slurm's KillWait is 30 s by default; the last writes need some of it."""
CPUS_PER_GPU = 4
"""CPUs per GPU if the call gives no number; also the CPUs of a node without GPUs."""
_TIME = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}")
_SUBMITTED = re.compile(r"Submitted batch job (\d+)")


_ELEMENT = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
"""One element of a job array. The last element's SLURM_JOB_ID is also the id of the whole array."""

_ABOUT = """
# Printed by `mllm-shapx slurm`. Print it anew with other options instead of editing it.
set -uo pipefail
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmJob:
    """The settings of a batch script.

    Raises:
        UsageError: If Slurm does not accept the time, or a value would not stay on its line.
    """

    configs: tuple[str, ...]
    """Paths, relative to the folder of the submission."""
    name: str
    time: str
    """Time limit in a Slurm format: minutes, H:MM:SS, D-HH:MM:SS and so on."""
    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_node: int | None = None
    """None for 4 per GPU."""
    drain_before_s: int = 120
    """Seconds before the time limit at which the study drains; Slurm may be up to 60 s early."""
    shards: int | None = None
    """Elements of the job array; None for a single job."""
    modules: tuple[str, ...] = ()
    venv: str | None = None
    setup: str | None = None
    """A shell file that the script sources, for the site's setup."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch, for example `--partition=gpu`."""
    run_options: tuple[str, ...] = ()
    """Further options of `mllm-shapx run`."""

    def __post_init__(self) -> None:
        if not _TIME.fullmatch(self.time):
            raise UsageError(
                f"--time {self.time!r} is no time limit; give minutes, H:MM:SS or D-HH:MM:SS, "
                "such as 12:00:00"
            )
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", self.name):
            raise UsageError(
                f"--job-name {self.name!r} has other characters than letters, digits, '.', '_' and '-'; it "
                "is part of the log's name"
            )
        for option in self.sbatch:
            if not re.fullmatch(r"--[a-z][a-z-]*(=[^\n\r]+)?", option):
                raise UsageError(f"--sbatch {option!r} is no option of sbatch; give --NAME=VALUE or --NAME")

    @property
    def log(self) -> str:
        """Return the name pattern of the log, which Slurm expands."""
        return "%x-%A_%a.log" if self.shards else "%x-%j.log"


def script(job: SlurmJob) -> str:
    """Return the batch script of a job. Deterministic."""
    nodes = "one_node" if job.nodes == 1 else "many_nodes"
    parts = [_directives(job), _ABOUT, _environment(job), _study(job), _part("signals"), _part(nodes)]
    return "\n".join(
        [*parts, _part("end").replace("JOB_TO_REQUEUE", _ELEMENT if job.shards else "$SLURM_JOB_ID")]
    )


def _part(name: str) -> str:
    """Return a part that is the same for all jobs."""
    return resources.files(__package__).joinpath("sbatch", f"{name}.sh").read_text(encoding="utf-8")


def submit(text: str) -> str:
    """Submit a batch script with `sbatch`; return the job's id.

    Raises:
        UsageError: When this machine has no `sbatch`.
        ShapxError: When Slurm refuses the job, with its reason.
    """
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise UsageError(
            "--submit: there is no sbatch on this machine; run this on a login node of the Slurm cluster, or "
            "leave --submit out to print the script"
        )
    done = subprocess.run([sbatch], input=text, capture_output=True, text=True, check=False)  # noqa: S603
    found = _SUBMITTED.search(done.stdout)
    if done.returncode or found is None:
        raise ShapxError(f"sbatch refused the job: {(done.stderr or done.stdout).strip()}")
    return found[1]


def _directives(job: SlurmJob) -> str:
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={job.cpus_per_node or CPUS_PER_GPU * max(1, job.gpus_per_node)}",
        *([f"--gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []),
        f"--time={job.time}",
        *([f"--array=0-{job.shards - 1}"] if job.shards else []),
        f"--signal=B:USR1@{job.drain_before_s}",
        "--requeue",
        "--open-mode=append",
        f"--output={job.log}",
        *job.sbatch,
    ]
    return "\n".join(["#!/bin/bash", *(f"#SBATCH {_quoted(option)}" for option in options)])


def _quoted(option: str) -> str:
    name, _, value = option.partition("=")
    return f'{name}="{value}"' if re.search(r"\s", value) else option


def _environment(job: SlurmJob) -> str:
    lines = ["# --- Environment: --module, --venv and --setup of `mllm-shapx slurm`"]
    lines += [f"module load {shlex.quote(module)}" for module in job.modules]
    if job.venv is not None:
        lines.append(f". {shlex.quote(f'{job.venv}/bin/activate')} || exit")
    if job.setup is not None:
        lines.append(f". {shlex.quote(job.setup)} || exit")
    return "\n".join([*lines, ""])


def _study(job: SlurmJob) -> str:
    words = ["mllm-shapx", "run"]
    for config in job.configs:
        words += ["--config", config]
    words += ["--resume", *(() if "--grace" in job.run_options else ("--grace", str(GRACE_S)))]
    line = shlex.join([*words, *job.run_options])
    if job.shards:
        line += f' --shard "$SLURM_ARRAY_TASK_ID/{job.shards}"'
    return (
        f"# --- The study: begun by the first start of the job, continued by the next ones\nstudy=({line})\n"
    )


def job_name(configs: Sequence[str]) -> str:
    """Return a job's name: that of its first config, in characters allowed in file names."""
    stem = configs[0].rpartition("/")[2].rpartition(".")[0] or "study"
    return re.sub(r"[^A-Za-z0-9._-]", "_", stem)

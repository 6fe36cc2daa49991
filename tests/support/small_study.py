"""Small real studies on the demo's model, run by the real command line in separate processes."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner
from demo_task import ENGLISH, draw_prompt

from mllm_shapx.cli import main

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "demo" / "model"

SABOTAGE = ROOT / "tests" / "support" / "sabotage"

VARIANTS: list[dict[str, Any]] = [
    {"explainer_type": "exact"},
    {"explainer_type": "limited_mc", "fractions": [0.5]},
    {"explainer_type": "standard_cc", "num_samples": [16]},
]
"""Explainers that share their answers; the last two depend on seeds."""

LONG_PROMPTS = (
    "please tell our tall sailor about the harbor and every ferry",
    "kindly remind my young painter that this museum shows old masks",
)
"""Eleven words each: 2,048 coalitions, which take some seconds."""

TIMINGS = ("runtime_sec", "runtime_sec_total", "runtime_sec_avg")


def write_rows(path: Path, count: int, *, words: int = 5, seed: int = 3) -> None:
    """Write `count` rows with prompts of `words` words."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = draw_prompt(rng, ENGLISH)
        rows.append({"prompt": " ".join(prompt.words[:words]), "language": prompt.language})
    pq.write_table(pa.Table.from_pylist(rows), path)


def model_that_does_not_load(folder: Path) -> Path:
    """Copy the demo's model with a layer's weights missing; only a worker's load detects it."""
    model = folder / "model-without-a-layer"
    shutil.copytree(MODEL, model)
    config = json.loads((model / "config.json").read_text())
    config |= {"num_hidden_layers": config["num_hidden_layers"] + 1, "layer_types": None}
    (model / "config.json").write_text(json.dumps(config))
    return model


@dataclass
class Study:
    """A config, its rows and its output in one folder."""

    folder: Path
    rows: int = 6
    words: int = 5
    settings: dict[str, Any] = field(default_factory=dict)
    """Keys of the config that differ from the defaults."""
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_rows(self.folder / "rows.parquet", self.rows, words=self.words)
        self.write_config()

    @property
    def config(self) -> Path:
        return self.folder / "config.json"

    @property
    def output(self) -> Path:
        return self.folder / "output" / "study"

    def write_config(self, **changes: Any) -> None:
        """Write the config with the default settings, those of the study, and `changes`."""
        usual = {
            "experiment_set_id": "study",
            "output_root": str(self.folder / "output"),
            "connector": "hf_text",
            "connector_kwargs": {"model_id": str(MODEL), "dtype": "float32"},
            "device": "cpu",
            "dataset": {"source": "local_parquet", "path": str(self.folder / "rows.parquet")},
            "selection": {"shuffle_seed": None},
            "generation": {"max_new_tokens": 6, "text_temperature": 0.0},
            "wandb": {"enabled": False},
            "experiments": VARIANTS,
        }
        self.config.write_text(json.dumps({**usual, **self.settings, **changes}, indent=2))

    def write_prompts(self, *prompts: str) -> None:
        """Replace the rows by these prompts."""
        rows = [{"prompt": prompt, "language": "en"} for prompt in prompts]
        pq.write_table(pa.Table.from_pylist(rows), self.folder / "rows.parquet")

    def start(self, *args: str, verb: str = "run", env: Mapping[str, str] | None = None) -> "Process":
        """Start `mllm-shapx run` on the config, in a new session."""
        return Process([verb, *self._target(verb), *args], {**self.env, **(env or {})}, self.folder)

    def run(
        self, *args: str, verb: str = "run", env: Mapping[str, str] | None = None, timeout: float = 240.0
    ) -> "Finished":
        """Run it to its end."""
        return self.start(*args, verb=verb, env=env).wait(timeout)

    def call(self, *args: str, verb: str = "run") -> "Finished":
        """Run it to its end in this process, where the slow imports are done; without Ray."""
        assert verb != "run" or "--inline" in args
        found = CliRunner().invoke(main, [verb, *self._target(verb), *args])
        assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
        return Finished(found.exit_code, found.output)

    def _target(self, verb: str) -> list[str]:
        return ["--config", str(self.config)] if verb == "run" else [str(self.output)]

    def samples_on_disk(self) -> int:
        return len(list(self.output.glob("*/samples/sample_*.json")))


@dataclass(frozen=True)
class Finished:
    """The end of a call."""

    code: int
    out: str

    def __post_init__(self) -> None:
        assert "Traceback (most recent call last)" not in self.out, self.out


class Process:
    """A running call of the command line; its output goes to a file, so that no full pipe stops it."""

    def __init__(
        self, args: Sequence[str], env: Mapping[str, str], folder: Path, *, prefix: Sequence[str] = ()
    ) -> None:
        self._log = folder / f"log-{time.monotonic_ns()}.txt"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "mllm_shapx", *args],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment(env),
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def out(self) -> str:
        return self._log.read_text(errors="replace")

    def kill(self, number: int = signal.SIGKILL) -> None:
        self._process.send_signal(number)

    def kill_group(self, number: int) -> None:
        """Send a signal to the whole group, like a terminal's Ctrl-C."""
        os.killpg(self.pid, number)

    def catches(self, number: signal.Signals) -> bool:
        """Return whether the process has a handler for a signal."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (number - 1) & 1)

    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait(self, timeout: float = 240.0) -> Finished:
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
            raise AssertionError(f"no end after {timeout:g} s:\n{self.out}") from None
        return Finished(code, self.out)

    def wait_for(self, what: Callable[[], bool], timeout: float = 180.0) -> None:
        """Wait until `what()` is true while the process runs."""
        deadline = time.monotonic() + timeout
        while not what():
            assert self.is_running(), f"it ended too early:\n{self.out}"
            assert time.monotonic() < deadline, f"not seen in {timeout:g} s:\n{self.out}"
            time.sleep(0.05)


class Sabotage:
    """Faults in the processes with its environment; see sabotage/sitecustomize.py."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "sabotage.json"
        self.set()

    @property
    def env(self) -> dict[str, str]:
        path = [str(SABOTAGE), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"PYTHONPATH": os.pathsep.join(path), "SABOTAGE_FILE": str(self._file)}

    def set(self, **wanted: Any) -> None:
        """Set the faults from now on, for example `die=[3]`; none by default."""
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(wanted))
        new.replace(self._file)


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a call: no outside cluster, no account, one thread."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "WANDB_"))}
    paths = os.pathsep.join(filter(None, (more.get("PYTHONPATH"), os.environ.get("PYTHONPATH"))))
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more, "PYTHONPATH": paths}


def without_timings(data: Any) -> Any:
    """Return JSON data without the fields that differ between equal runs."""
    if isinstance(data, dict):
        return {key: without_timings(value) for key, value in data.items() if key not in TIMINGS}
    if isinstance(data, list):
        return [without_timings(item) for item in data]
    return data


def results(output: Path) -> dict[str, Any]:
    """Return path -> every sample and summary, without timings."""
    files = [*output.glob("*/samples/*.json"), *output.glob("*/summary/*.json")]
    return {
        str(file.relative_to(output)): without_timings(json.loads(file.read_text()))
        for file in files
        if "set_aside" not in str(file)
    }


def everything_below(folder: Path) -> set[str]:
    """Return the relative path of every file and folder, except the logs of calls."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.name.startswith("log-")}


@contextlib.contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Check that nothing in `folder` appears or disappears."""
    before = everything_below(folder)
    yield
    assert everything_below(folder) == before

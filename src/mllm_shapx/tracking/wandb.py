"""Weights & Biases: one W&B run per run of the sweep, and never a reason for the work to stop."""

import hashlib
import json
import logging
import math
import os
import queue
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mllm_shapx.config.models import WandbConfig
from mllm_shapx.records.results import SampleResult

logger = logging.getLogger(__name__)

Mode = Literal["online", "offline", "disabled"]

COUNTER = "sample"
"""The metric that every other one is drawn over: samples of the run so far, so that it only grows."""

_MAX_WAITING = 100_000
"""Calls that may wait for W&B before tracking gives up: a hanging W&B must not fill the memory."""

_CLOSE_S_PER_RUN = 10.0

_SECRET_KEY = re.compile(
    r"(^|_)(api_?key|access_?key|secret|password|passwd|credentials?|authorization|"
    r"(hf|auth|access|api|bearer|session)_?token)($|_)|^token$",
    re.IGNORECASE,
)
_URI_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")


class WandbTracker:
    """Sends what happens to W&B from a thread of its own.

    No method waits for W&B or raises because of it; `close` alone waits, for a limited time. What goes
    wrong (wandb absent, not logged in, slow, raising) is said once through `warn`. With tracking switched
    off, wandb is not imported.

    A run keeps its W&B id over restarts, so that a resumed run goes on in the same place. Offline, each
    start leaves a folder `wandb/offline-run-*` of its own; `wandb sync` uploads them.

    Args:
        config: The config's `wandb` block. The environment's `WANDB_MODE` wins over its `mode`.
        experiment_set_id: Part of every id, and the group where the config names none.
        directory: Local folder that gets wandb's own files; wandb's default when None.
        warn: Takes the one warning. It is called from another thread.
        timeout_s: Seconds that W&B may take to accept a run, and to take the rest of it at its end.
        close_timeout_s: Seconds that `close` waits for what is still to be sent, and ten more per open run.
    """

    def __init__(
        self,
        config: WandbConfig,
        experiment_set_id: str,
        *,
        directory: Path | None = None,
        warn: Callable[[str], None] = logger.warning,
        timeout_s: float = 30.0,
        close_timeout_s: float = 60.0,
    ) -> None:
        self.mode = effective_mode(config)
        self._session = _Session(
            config,
            self.mode,
            experiment_set_id=experiment_set_id,
            directory=directory,
            warn=warn,
            timeout_s=timeout_s,
        )
        self._close_timeout_s = close_timeout_s
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(_MAX_WAITING)
        self._thread: threading.Thread | None = None
        self._closed = self.mode == "disabled"

    @property
    def enabled(self) -> bool:
        """Whether what is logged can still reach W&B."""
        return not self._closed and not self._session.is_off

    def start(self, run_name: str, spec: Mapping[str, Any], *, samples_done: int = 0, salt: str = "") -> None:
        """Open one run with `spec` as its config; secrets in it are left out.

        Args:
            run_name: The run's name in the sweep and in W&B.
            spec: JSON data, such as the content of `spec.json`.
            samples_done: Samples that an earlier start has logged; the counter goes on from there.
            salt: Part of the id. Give what a fresh start changes and a resumed one keeps, such as the
                checkpoint's `created_at`, so that a run that is done anew does not append to the old one.
        """
        config = without_secrets(spec)
        self._submit(lambda: self._session.start(run_name, config, samples_done, salt))

    def log_sample(self, result: SampleResult) -> None:
        """Log one sample of a started run."""
        metrics = sample_metrics(result)
        self._submit(lambda: self._session.log(result.run_name, metrics))

    def finish(self, run_name: str, summary: Mapping[str, Any], files: Sequence[Path] = ()) -> None:
        """Close one run with its summary.

        Args:
            run_name: A started run; an unknown one is ignored.
            summary: JSON data, such as the content of `aggregate_metrics.json`.
            files: Local files of the run's artifact; without any, `summary` itself becomes its
                `aggregate_metrics.json`.
        """
        content, paths = dict(summary), tuple(files)
        self._submit(lambda: self._session.finish(run_name, content, paths))

    def close(self) -> None:
        """Send what is left, mark unfinished runs as failed, and stop. Calling it twice is harmless."""
        if self._closed:
            return
        self._closed = True
        if self._thread is None:
            return
        self._put(self._session.stop)
        self._put(None)
        patience_s = self._close_timeout_s + _CLOSE_S_PER_RUN * self._session.open_runs
        self._thread.join(patience_s)
        if self._thread.is_alive():
            self._session.warn_once(
                f"it was still sending after {patience_s:g} s; `wandb sync` uploads what it wrote"
            )

    def _submit(self, call: Callable[[], None]) -> None:
        if not self.enabled:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="wandb-tracker", daemon=True)
            self._thread.start()
        self._put(call)

    def _put(self, call: Callable[[], None] | None) -> None:
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._session.switch_off(f"{_MAX_WAITING} calls are waiting for it")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


@dataclass
class _OpenRun:
    run: Any
    samples: int


class _Session:
    """The side that talks to wandb, one call after the other, in the tracker's thread."""

    def __init__(
        self,
        config: WandbConfig,
        mode: Mode,
        *,
        experiment_set_id: str,
        directory: Path | None,
        warn: Callable[[str], None],
        timeout_s: float,
    ) -> None:
        self.is_off = False
        self._takes_runs = True
        self._config = config
        self._mode = mode
        self._set_id = experiment_set_id
        self._directory = directory
        self._warn = warn
        self._timeout_s = timeout_s
        self._wandb: Any = None
        self._runs: dict[str, _OpenRun] = {}
        self._warned = False
        self._warn_lock = threading.Lock()

    @property
    def open_runs(self) -> int:
        """Return how many runs are open."""
        return len(self._runs)

    def start(self, run_name: str, config: dict[str, Any], samples_done: int, salt: str) -> None:
        if not self._takes_runs or run_name in self._runs:
            return
        try:
            run = self._init(run_name, config, salt)
            run.define_metric(COUNTER, hidden=True)
            run.define_metric("*", step_metric=COUNTER)
        except ImportError as error:
            self._refuse_runs(f"{error}; install the extra `wandb` or set wandb.enabled to false")
        except Exception as error:  # noqa: BLE001 -- whatever wandb raises is said and costs no sample
            self._refuse_runs(_describe(error))
        else:
            self._runs[run_name] = _OpenRun(run, samples_done)

    def log(self, run_name: str, metrics: dict[str, float | str]) -> None:
        opened = self._runs.get(run_name)
        if opened is None:
            return
        opened.samples += 1
        try:
            opened.run.log({COUNTER: opened.samples, **metrics})
        except Exception as error:  # noqa: BLE001 -- as above
            self._drop(run_name, error)

    def finish(self, run_name: str, summary: dict[str, Any], files: tuple[Path, ...]) -> None:
        opened = self._runs.get(run_name)
        if opened is None:
            return
        try:
            opened.run.summary.update(summary)
            opened.run.log_artifact(self._artifact(opened.run, summary, files))
        except Exception as error:  # noqa: BLE001 -- as above; what was logged before is still sent
            self.warn_once(f"run {run_name} has no artifact: {_describe(error)}")
        self._end(run_name, exit_code=0)

    def stop(self) -> None:
        """Close what `finish` was not called for, and wait for wandb's own process to write all to disk."""
        for run_name in list(self._runs):
            self._end(run_name, exit_code=1)
        if self._wandb is None:
            return
        try:
            # Left to the end of ours, it would not happen in a Ray actor, which ends without a farewell.
            self._wandb.teardown(exit_code=0)
        except Exception as error:  # noqa: BLE001 -- as above
            self.warn_once(f"it did not end properly: {_describe(error)}")

    def switch_off(self, reason: str) -> None:
        """Take no further calls."""
        self.is_off = True
        self.warn_once(reason)

    def warn_once(self, reason: str) -> None:
        with self._warn_lock:
            if self._warned:
                logger.debug("Weights & Biases: %s", reason)
                return
            self._warned = True
        self._warn(f"Weights & Biases: {reason}. The results on disk are not affected")

    def _end(self, run_name: str, exit_code: int) -> None:
        opened = self._runs.pop(run_name, None)
        if opened is None:
            return
        try:
            opened.run.finish(exit_code=exit_code)
        except TimeoutError:
            # The server is gone: waiting as long for every other run would hold up the end of the job.
            self._runs.clear()
            self.switch_off(
                f"run {run_name} could not be sent within {self._timeout_s:g} s; `wandb sync` sends it later"
            )
        except Exception as error:  # noqa: BLE001 -- as above
            self.warn_once(f"run {run_name} may be incomplete: {_describe(error)}")

    def _refuse_runs(self, reason: str) -> None:
        """Open no further runs: after one that took its whole timeout, thirty more would too."""
        self._takes_runs = False
        self.is_off = not self._runs
        self.warn_once(reason)

    def _drop(self, run_name: str, error: Exception) -> None:
        self._runs.pop(run_name, None)
        self.warn_once(f"run {run_name} is no longer tracked: {_describe(error)}")

    def _init(self, run_name: str, config: dict[str, Any], salt: str) -> Any:
        wandb = self._import()
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
        return wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            group=self._config.group or self._set_id,
            tags=self._config.tags,
            name=run_name,
            id=run_id(self._set_id, run_name, salt),
            dir=None if self._directory is None else str(self._directory),
            config=config,
            mode=self._mode,
            # Resuming is a word for the server; offline wandb would warn that it ignores it.
            resume="allow" if self._mode == "online" else None,
            reinit="create_new",
            settings=self._settings(wandb),
        )

    def _import(self) -> Any:
        if self._wandb is None:
            # Its own usage reports hold up the end of the process where the server does not answer.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            import wandb

            # Silent for the whole process: it neither writes into the progress display nor asks for a key.
            wandb.setup(settings=self._settings(wandb))
            logging.getLogger("wandb").propagate = False
            self._wandb = wandb
        return self._wandb

    def _settings(self, wandb: Any) -> Any:
        return wandb.Settings(
            silent=True,
            console="off",
            init_timeout=self._timeout_s,
            finish_timeout=self._timeout_s,
            finish_timeout_raises=True,
            # A remote's address may hold a password, and the source is no part of a study's record.
            disable_git=True,
            disable_code=True,
            # One process holds all runs: each would sample the same machine.
            x_disable_stats=True,
        )

    def _artifact(self, run: Any, summary: dict[str, Any], files: tuple[Path, ...]) -> Any:
        """Return the run's artifact; its files are copied to where nothing changes them."""
        artifact = self._wandb.Artifact(f"{run.id}-metrics", type="metrics")
        folder = Path(run.dir).parent / "artifact"
        folder.mkdir(parents=True, exist_ok=True)
        if not files:
            (folder / "aggregate_metrics.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
        for path in files:
            shutil.copyfile(path, folder / path.name)
        for copy in sorted(folder.iterdir()):
            # Immutable: wandb reads it in place instead of copying it into the home directory.
            artifact.add_file(str(copy), policy="immutable")
        return artifact


def effective_mode(config: WandbConfig) -> Mode:
    """Return the mode that holds: off when the config says so, else `WANDB_MODE`, else the config's."""
    if not config.enabled or config.mode == "disabled":
        return "disabled"
    match os.environ.get("WANDB_MODE", "").strip().lower():
        case "online":
            return "online"
        case "offline" | "dryrun":
            return "offline"
        case "disabled":
            return "disabled"
        case _:
            return config.mode


def run_id(experiment_set_id: str, run_name: str, salt: str = "") -> str:
    """Return a run's W&B id: readable, at most 64 characters, always the same for the same three words."""
    digest = hashlib.sha256(f"{experiment_set_id}\0{run_name}\0{salt}".encode()).hexdigest()[:10]
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", f"{experiment_set_id}-{run_name}")
    return f"{readable[:53]}-{digest}"


def sample_metrics(result: SampleResult) -> dict[str, float | str]:
    """Return what is logged for one sample; numbers that are not finite are left out."""
    values = [value for value in result.player_values() if value is not None]
    numbers: dict[str, float] = {
        "row_index": result.row_index,
        "num_players": result.num_players,
        "runtime_sec": result.runtime_sec,
        "n_calls": result.n_calls,
        "model_calls": result.model_calls,
        "frac_text": result.attr_summary.frac_text,
        "frac_audio": result.attr_summary.frac_audio,
        "residual": result.efficiency_residual,
    }
    if values:
        numbers["values_max"] = max(values)
        numbers["values_max_abs"] = max(abs(value) for value in values)
    finite = {key: value for key, value in numbers.items() if math.isfinite(value)}
    return {**finite, "language": result.language}


def without_secrets(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return `spec` without keys that name a secret, and without logins in its URIs."""
    return {key: _scrub(value) for key, value in spec.items() if not _SECRET_KEY.search(key)}


def _scrub(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_secrets(value)
    if isinstance(value, list | tuple):
        return [_scrub(item) for item in value]
    return _URI_LOGIN.sub("", value) if isinstance(value, str) else value


def _describe(error: Exception) -> str:
    text = str(error).strip()
    first = text.splitlines()[0].rstrip(" .") if text else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__

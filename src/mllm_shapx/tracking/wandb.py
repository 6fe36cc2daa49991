"""Weights & Biases: one W&B run per run of the sweep, and never a reason for the work to stop."""

import json
import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mllm_shapx.config.models import WandbConfig
from mllm_shapx.errors import ShapxError
from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.tracking.content import run_id, sample_metrics, without_secrets
from mllm_shapx.tracking.history import COUNTER, History, logged_before

logger = logging.getLogger(__name__)

Mode = Literal["online", "offline", "disabled"]

_FLUSH_S = 1.0
"""Seconds between two writes of W&B's log: what is younger is lost with the process, and logged again."""

_FLUSH_SETTING = "x_transaction_log_flush_interval"
"""Older releases of wandb do not have it."""
_SECOND_S = 0.1

_MAX_WAITING = 100_000
"""Calls that may wait for W&B before tracking gives up: a hanging W&B must not fill the memory."""

_CLOSE_S_PER_RUN = 10.0


class WandbTracker:
    """Sends what happens to W&B from a thread of its own.

    No method waits for W&B or raises because of it; `close` alone waits, for a limited time. What goes
    wrong (wandb absent, not logged in, slow, raising) is said once through `warn`. With tracking switched
    off, wandb is not imported.

    A run keeps its W&B id over restarts, so that a resumed run goes on in the same place. Offline, each
    start leaves a folder `wandb/offline-run-*` of its own; `wandb sync` uploads them.

    Every sample on disk is logged once, whatever was killed before: at the start and at the end of a run the
    samples that its history lacks are read from their files. A row that was explained again with other
    values is logged again.

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

    def start(
        self, run_name: str, spec: Mapping[str, Any], *, records: RunRecords | None = None, salt: str = ""
    ) -> None:
        """Open one run with `spec` as its config; secrets in it are left out.

        Args:
            run_name: The run's name in the sweep and in W&B.
            spec: JSON data, such as the content of `spec.json`.
            records: The run's files, whose samples the history is completed from.
            salt: Part of the id. Give what a fresh start changes and a resumed one keeps, such as the
                checkpoint's `created_at`, so that a run that is done anew does not append to the old one.
        """
        config = without_secrets(spec)
        self._submit(lambda: self._session.start(run_name, config, records, salt))

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
    history: History
    records: RunRecords | None


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

    def start(self, run_name: str, config: dict[str, Any], records: RunRecords | None, salt: str) -> None:
        if not self._takes_runs or run_name in self._runs:
            return
        try:
            run = self._init(run_name, config, salt)
            run.define_metric(COUNTER, hidden=True)
            run.define_metric("*", step_metric=COUNTER)
            self._runs[run_name] = _OpenRun(run, self._history(run), records)
        except ImportError as error:
            self._refuse_runs(f"{error}; install the extra `wandb` or set wandb.enabled to false")
        except Exception as error:  # noqa: BLE001 -- whatever wandb raises is said and costs no sample
            self._refuse_runs(_describe(error))
        else:
            self._catch_up(run_name)

    def log(self, run_name: str, metrics: dict[str, float | str]) -> None:
        opened = self._runs.get(run_name)
        if opened is None:
            return
        if opened.history.holds(metrics):
            return
        line = {COUNTER: opened.history.counter + 1, **metrics}
        opened.history.add(line)
        try:
            opened.run.log(line)
        except Exception as error:  # noqa: BLE001 -- as above
            self._drop(run_name, error)

    def finish(self, run_name: str, summary: dict[str, Any], files: tuple[Path, ...]) -> None:
        self._catch_up(run_name)
        opened = self._runs.get(run_name)
        if opened is None:
            return
        try:
            opened.run.summary.update(summary)
            opened.run.log_artifact(self._artifact(opened.run, summary, files))
        except Exception as error:  # noqa: BLE001 -- as above; what was logged before is still sent
            self.warn_once(f"run {run_name} has no artifact: {_describe(error)}")
        self._end(run_name, exit_code=0)

    def _history(self, run: Any) -> History:
        return logged_before(self._wandb, run, online=self._mode == "online", timeout_s=self._timeout_s)

    def _catch_up(self, run_name: str) -> None:
        """Log the samples on disk that the history lacks."""
        opened = self._runs.get(run_name)
        if opened is None or opened.records is None:
            return
        try:
            missing = [row for row in opened.records.sample_rows() if row not in opened.history.rows]
            for row in missing:
                self.log(run_name, sample_metrics(opened.records.read_sample(row)))
        except (OSError, ValueError, ShapxError) as error:
            self.warn_once(f"run {run_name} may lack samples: {_describe(error)}")

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
        identity = run_id(self._set_id, run_name, salt)
        self._await_own_second(identity)
        run = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            group=self._config.group or self._set_id,
            tags=self._config.tags,
            name=run_name,
            id=identity,
            dir=None if self._directory is None else str(self._directory),
            config=config,
            mode=self._mode,
            # Offline it is a word for `wandb sync`, which would else write each start over the one before.
            resume="allow",
            reinit="create_new",
            settings=self._settings(wandb),
        )
        for handler in logging.getLogger("wandb").handlers:
            # Its log cannot be written on a full disk, and each line of it would print a traceback.
            handler.handleError = _say_nothing  # type: ignore[method-assign,assignment]
        return run

    def _await_own_second(self, identity: str) -> None:
        """Wait while an earlier start has the folder that wandb would take: it is named by the second."""
        folder = (self._directory or Path(os.environ.get("WANDB_DIR") or ".")) / "wandb"
        while next(folder.glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-{identity}"), None) is not None:
            time.sleep(_SECOND_S)

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
            **({_FLUSH_SETTING: _FLUSH_S} if _FLUSH_SETTING in wandb.Settings.model_fields else {}),
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


def _say_nothing(_record: logging.LogRecord) -> None:
    """Take no notice of a line that a log handler could not write."""


def _describe(error: Exception) -> str:
    text = str(error).strip()
    first = text.splitlines()[0].rstrip(" .") if text else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__

"""Weights & Biases: one W&B run per run of the sweep."""

import contextlib
import io
import logging
import os
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from mllm_shapx.config.models import WandbConfig
from mllm_shapx.errors import ShapxError
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.tracking.content import set_prefix
from mllm_shapx.tracking.history import COUNTER, History, logged_before
from mllm_shapx.tracking.prompts import PromptRow, prompt_rows
from mllm_shapx.tracking.staging import sample_files, stage, summary_files
from mllm_shapx.tracking.tracker import Line, RunStart

Mode = Literal["online", "offline", "disabled"]

PROMPTS = "prompts"
"""Key of the table in the run's summary. A line of the history would count as a sample."""

_FLUSH_S = 1.0
"""Seconds between two writes of W&B's log. Newer lines are lost with the process, and logged again."""

_FLUSH_SETTING = "x_transaction_log_flush_interval"
"""Older releases of wandb do not have it."""
_SECOND_S = 0.1


def place(config: WandbConfig, experiment_set_id: str, output_uri: str) -> "Wandb | None":
    """Return W&B, which writes to the set's directory; where that is a bucket, to WANDB_DIR or to here."""
    mode = effective_mode(config)
    if mode == "disabled":
        return None
    is_shared = "://" in output_uri
    directory = Path((os.environ.get("WANDB_DIR") or ".") if is_shared else output_uri)
    return Wandb(config, mode, experiment_set_id, directory.expanduser().absolute(), is_shared=is_shared)


class Wandb:
    """The `Backend` of W&B.

    A run keeps its W&B id over restarts: a resumed run goes on in the same place. Offline, each start leaves
    a folder `wandb/offline-run-*` of its own; `wandb sync` uploads them.

    Args:
        config: The config's `wandb` block.
        mode: Whether there is a server.
        set_id: The experiment set's name: the group where the config names none.
        directory: Local folder that gets wandb's folder `wandb`.
        is_shared: Whether other sets may write there too.
        timeout_s: Seconds that W&B may take to accept a run, and to take the rest of it at its end.
    """

    name = "Weights & Biases"
    extra = "wandb"
    after_timeout = "`wandb sync` uploads what it wrote"

    def __init__(
        self,
        config: WandbConfig,
        mode: Mode,
        set_id: str,
        directory: Path,
        *,
        is_shared: bool = False,
        timeout_s: float = 30.0,
    ) -> None:
        self._config = config
        self._mode = mode
        self._set_id = set_id
        self._directory = directory
        self._folder = directory / "wandb"
        self._is_shared = is_shared
        self._timeout_s = timeout_s
        self._wandb: Any = None

    def open(self, start: RunStart) -> "_WandbRun":
        """See `Backend.open`."""
        run = self._init(start)
        run.define_metric(COUNTER, hidden=True, summary="none")
        # The summary is that of the whole run, not of the last sample.
        run.define_metric("*", step_metric=COUNTER, summary="none")
        history = logged_before(self._wandb, run, online=self._mode == "online", timeout_s=self._timeout_s)
        return _WandbRun(self._wandb, run, history, start.records, self._config)

    def close(self) -> None:
        """See `Backend.close`."""
        if self._wandb is not None:
            # wandb would do it at the end of the process, but a Ray actor is killed at its end.
            self._wandb.teardown(exit_code=0)

    def hint(self) -> str | None:
        """See `Backend.hint`."""
        starts = f"offline-run-*-{set_prefix(self._set_id)}*" if self._is_shared else "offline-run-*"
        if self._mode != "offline" or next(self._folder.glob(starts), None) is None:
            return None
        return f"to upload it to Weights & Biases: wandb sync {shlex.quote(str(self._folder))}/{starts}"

    def _init(self, start: RunStart) -> Any:
        wandb = self._import()
        # wandb silently takes a temporary folder where it cannot write to this one.
        self._folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=self._folder).close()
        self._await_own_second(start.identity)
        run = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            group=self._config.group or self._set_id,
            tags=self._config.tags,
            name=start.name,
            id=start.identity,
            dir=str(self._directory),
            config=dict(start.config),
            mode=self._mode,
            # Offline it is for `wandb sync`, which would otherwise replace each start by the next one.
            resume="allow",
            reinit="create_new",
            settings=self._settings(wandb),
        )
        for handler in logging.getLogger("wandb").handlers:
            # On a full disk each line of its log would print a traceback.
            handler.handleError = _say_nothing  # type: ignore[method-assign,assignment]
        return run

    def _await_own_second(self, identity: str) -> None:
        """Wait while an earlier start has the same folder: wandb names it after the second."""
        while next(self._folder.glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-{identity}"), None) is not None:
            time.sleep(_SECOND_S)

    def _import(self) -> Any:
        if self._wandb is None:
            # Its usage reports delay the end of the process where their server does not answer.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            import wandb

            # wandb is silent in the whole process: it must not write into the display or ask for a key.
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
            # The address of a Git remote may have a password. The source is not part of the results.
            disable_git=True,
            disable_code=True,
            # All runs are in one process: each would measure the same machine.
            x_disable_stats=True,
            **({_FLUSH_SETTING: _FLUSH_S} if _FLUSH_SETTING in wandb.Settings.model_fields else {}),
        )


class _WandbRun:
    """The `TrackedRun` of W&B."""

    recovers = False
    """An error of `log` does not say which samples wandb's own process has."""

    def __init__(
        self, wandb: Any, run: Any, history: History, records: RunRecords, config: WandbConfig
    ) -> None:
        self.history = history
        self._wandb = wandb
        self._run = run
        self._records = records
        self._config = config

    def reload(self) -> None:
        """Do nothing: see `recovers`."""

    def log(self, line: Line) -> None:
        self._run.log(dict(line))

    def flush(self) -> None:
        """Do nothing: wandb sends by itself."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(summary))
        self._add_artifact("metrics", summary_files(self._records))
        if self._config.upload_samples:
            self._add_artifact("samples", sample_files(self._records))
        if self._config.table_rows and (rows := list(prompt_rows(self._records, self._config.table_rows))):
            with _staged_in(self._folder):
                self._run.summary.update({PROMPTS: self._table(rows)})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

    @property
    def _folder(self) -> Path:
        """The folder of what is uploaded, beside wandb's own files of this start."""
        return Path(self._run.dir).parent / "artifact"

    def _add_artifact(self, kind: str, paths: list[str]) -> None:
        artifact = self._wandb.Artifact(f"{self._run.id}-{kind}", type=kind)
        for file in stage(self._records, paths, self._folder):
            # Immutable: wandb reads it in place instead of copying it into the home directory.
            artifact.add_file(str(file), name=file.name, policy="immutable")
        self._run.log_artifact(artifact)

    def _table(self, rows: list[PromptRow]) -> Any:
        columns = ["row", "language", "prompt", "answer"]
        most = max(len(row.recordings) for row in rows)
        columns += [f"recording {number}" for number in range(1, most + 1)]
        if any(row.spoken_answer for row in rows):
            columns.append("spoken answer")
        data = [[*self._cells(row, most), None][: len(columns)] for row in rows]
        return self._wandb.Table(columns=columns, data=data)

    def _cells(self, row: PromptRow, recordings: int) -> Iterator[Any]:
        yield from (row.row_index, row.language)
        yield self._wandb.Html(io.StringIO(row.prompt), inject=False)
        yield row.answer
        for number in range(recordings):
            yield self._sound(row.recordings[number] if number < len(row.recordings) else None)
        yield self._sound(row.spoken_answer)

    def _sound(self, path: str | None) -> Any:
        if path is None:
            return None
        try:
            (copy,) = stage(self._records, [path], self._folder)
        except (OSError, ShapxError):
            return None  # a recording that was removed leaves its cell empty
        return self._wandb.Audio(str(copy))


def effective_mode(config: WandbConfig) -> Mode:
    """Return the mode: disabled when the config says so, else that of `WANDB_MODE`, else the config's."""
    if not config.enabled or config.mode == "disabled":
        return "disabled"
    wanted: dict[str, Mode] = {
        "online": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"
    }  # fmt: skip
    return wanted.get(os.environ.get("WANDB_MODE", "").strip().lower(), config.mode)


@contextlib.contextmanager
def _staged_in(folder: Path) -> Iterator[None]:
    """Let wandb keep the files of a table in the run's folder instead of the home directory."""
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("WANDB_DATA_DIR", None)


def _say_nothing(_record: logging.LogRecord) -> None:
    """Ignore a line that a log handler could not write."""

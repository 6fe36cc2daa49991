"""MLflow: one MLflow run per run of the sweep, in a local SQLite file or on a server."""

import json
import logging
import math
import os
import re
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mllm_shapx.config.models import MlflowConfig
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.tracking.content import NUMBERS, run_id
from mllm_shapx.tracking.history import COUNTER, ROW, History
from mllm_shapx.tracking.prompts import page, prompt_rows
from mllm_shapx.tracking.staging import sample_files, stage, summary_files
from mllm_shapx.tracking.tracker import Line, RunStart

FOLDER = "mlflow"
"""Folder of the local store, in the experiment set's directory."""

IDENTITY = "mllm_shapx.run_id"
"""Tag by which a resumed run finds its MLflow run."""

_PARAMS = ("experiment_set_id", "run_name", "explainer_type", "generation_key", "seed")
"""Keys of the spec that become parameters, beside all of `result_settings`: no resume changes them, and a
parameter of MLflow keeps its first value. The whole spec is in `spec.json`."""

_BATCH_LINES = 50
"""Samples sent in one call; MLflow takes 1,000 metrics."""
_BATCH_PARAMS = 100
_LONGEST_NAME, _LONGEST_PARAM, _LONGEST_TAG = 250, 6000, 5000
_NOT_IN_A_NAME = re.compile(r"[^\w\-. /]")

_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Its log handlers would write into the progress display.
    "MLFLOW_CONFIGURE_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # MLflow refuses a file store, which is in maintenance mode, without this.
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}
"""Environment of MLflow, where the user has not set it."""


def located(config: MlflowConfig, directory: str) -> MlflowConfig:
    """Return the block with its store: the config's, else MLFLOW_TRACKING_URI's, else a SQLite file.

    Args:
        config: The config's block.
        directory: The experiment set's directory; where it is a URI, MLflow's own default store is used.
    """
    uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or None
    if uri is None and "://" not in directory:
        uri = f"sqlite:///{Path(directory).absolute() / FOLDER / 'mlflow.db'}"
    elif uri is not None and (found := re.fullmatch(r"sqlite:///(?!/)(.+)", uri)):
        uri = f"sqlite:///{Path(found[1]).absolute()}"
    elif uri is not None and "://" not in uri and not uri.startswith(("databricks", "file:", "uc:")):
        uri = Path(uri).expanduser().absolute().as_uri()
    return config.model_copy(update={"tracking_uri": uri})


def place(config: MlflowConfig, experiment_set_id: str, output_uri: str) -> "Mlflow":
    """Return the tracker with its store."""
    return Mlflow(located(config, output_uri), experiment_set_id)


class Mlflow:
    """The `Backend` of MLflow.

    Args:
        config: The config's `mlflow` block with its `tracking_uri` (`located`).
        set_id: The experiment set's name: that of the parent run.
        timeout_s: Seconds that a server may take to answer.
    """

    name = "MLflow"
    extra = "mlflow"
    after_timeout = "`mllm-shapx run --resume` sends what is missing"

    def __init__(self, config: MlflowConfig, set_id: str, timeout_s: float = 15.0) -> None:
        self._config = config
        self._set_id = set_id
        self._timeout_s = timeout_s
        self._client: Any = None
        self._experiment = ""
        self._parent: str | None = None
        self._monitors: list[Any] = []

    def open(self, start: RunStart) -> "_MlflowRun":
        """See `Backend.open`."""
        if self._client is None:
            self._connect()
        if self._config.nested_per_variant and self._parent is None:
            self._parent = self._begin(run_id(self._set_id, ""), self._set_id)
        number = self._begin(start.identity, start.name)
        run = _MlflowRun(self._client, number, start, self._config)
        run.reload()
        run.describe()
        return run

    def close(self) -> None:
        """See `Backend.close`."""
        for monitor in self._monitors:
            monitor.finish()
        if self._parent is not None:
            self._client.set_terminated(self._parent)

    def hint(self) -> str | None:
        """See `Backend.hint`."""
        file = self._database
        if file is None or not file.exists():
            return None
        return f"to see it in MLflow: mlflow ui --backend-store-uri {shlex.quote(f'sqlite:///{file}')}"

    def _connect(self) -> None:
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(math.ceil(self._timeout_s)))
        from mlflow.tracking import MlflowClient

        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        if self._database is not None:
            self._database.parent.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(tracking_uri=self._config.tracking_uri)
        self._experiment = self._experiment_id(client)
        self._client = client

    def _experiment_id(self, client: Any) -> str:
        name = self._config.experiment_name
        found = client.get_experiment_by_name(name)
        if found is None:
            # The files go beside a local database. A server and a folder know their own place.
            files = None if self._database is None else (self._database.parent / "artifacts").as_uri()
            try:
                return str(client.create_experiment(name, artifact_location=files))
            except Exception:
                found = client.get_experiment_by_name(name)  # another process was faster
                if found is None:
                    raise
        return str(found.experiment_id)

    @property
    def _database(self) -> Path | None:
        """The local SQLite file, None for any other store."""
        found = re.fullmatch(r"sqlite:///(.+)", self._config.tracking_uri or "")
        return None if found is None else Path(found[1])

    def _begin(self, identity: str, name: str) -> str:
        """Return the id of the run with an identity; it is made where there is none.

        Every run is a child of the parent run once there is one. Only a run without a parent is monitored.
        """
        text = f"tags.`{IDENTITY}` = '{identity}'"
        found = self._client.search_runs([self._experiment], filter_string=text, max_results=1)
        if found:
            number = str(found[0].info.run_id)
            self._client.update_run(number, status="RUNNING")
        else:
            run = self._client.create_run(self._experiment, run_name=name, tags=self._tags(identity))
            number = str(run.info.run_id)
        if self._config.system_metrics_enabled and self._parent is None:
            self._watch_system(number)
        return number

    def _tags(self, identity: str) -> dict[str, str]:
        asked = self._config.tags
        named = asked if isinstance(asked, dict) else dict.fromkeys(asked, "true")
        tags = {key: str(value)[:_LONGEST_TAG] for key, value in named.items()}
        parent = {} if self._parent is None else {"mlflow.parentRunId": self._parent}
        return {**tags, IDENTITY: identity, "experiment_set_id": self._set_id, **parent}

    def _watch_system(self, number: str) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(number, resume_logging=True, tracking_uri=self._config.tracking_uri)
        monitor.start()
        self._monitors.append(monitor)


class _MlflowRun:
    """The `TrackedRun` of MLflow: a sample's metrics are one step."""

    recovers = True

    def __init__(self, client: Any, number: str, start: RunStart, config: MlflowConfig) -> None:
        self.history = History()
        self._client = client
        self._number = number
        self._start = start
        self._config = config
        self._waiting: list[Line] = []

    def reload(self) -> None:
        """Read the samples that MLflow holds."""
        self._waiting.clear()
        lines: dict[int, dict[str, float]] = {}
        for key in self._client.get_run(self._number).data.metrics:
            if key in NUMBERS:
                for metric in self._client.get_metric_history(self._number, key):
                    lines.setdefault(metric.step, {COUNTER: metric.step})[key] = metric.value
        self.history = History()
        for step in sorted(lines):
            self.history.add(lines[step])
            # The number of an incomplete step, which has no row, is not used again.
            self.history.counter = max(self.history.counter, step)

    def describe(self) -> None:
        """Log the settings as parameters, and the whole spec as a file."""
        from mlflow.entities import Param

        spec = self._start.config
        known = self._client.get_run(self._number).data.params
        settings = {**{key: spec[key] for key in _PARAMS if key in spec}, **spec.get("result_settings", {})}
        wanted = dict(_flat(settings))
        params = [Param(key, value[:_LONGEST_PARAM]) for key, value in wanted.items() if key not in known]
        for first in range(0, len(params), _BATCH_PARAMS):
            self._client.log_batch(self._number, params=params[first : first + _BATCH_PARAMS])
        text = json.dumps(spec, indent=2, ensure_ascii=False, default=str)
        self._client.log_text(self._number, text + "\n", "spec.json")

    def log(self, line: Line) -> None:
        self._waiting.append(line)
        if len(self._waiting) >= _BATCH_LINES:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        from mlflow.entities import Metric

        at = round(time.time() * 1000)
        metrics = [
            Metric(key, value, at, int(line[COUNTER]))
            for line in self._waiting
            # The row comes last: it completes a step, also in a store that writes metrics one by one.
            for key, value in sorted(line.items(), key=lambda item: item[0] == ROW)
            if key != COUNTER and isinstance(value, int | float)
        ]
        self._client.log_batch(self._number, metrics=metrics)
        self._waiting.clear()

    def finish(self, summary: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        at, step = round(time.time() * 1000), self.history.counter
        metrics = [
            Metric(key, float(value), at, step) for key, value in _flat(_named(summary)) if _is_number(value)
        ]
        self._client.log_batch(self._number, metrics=metrics)
        with tempfile.TemporaryDirectory(prefix="mllm-shapx-mlflow-") as folder:
            self._add_files(Path(folder))

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._number, status="FAILED" if failed else "FINISHED")

    def _add_files(self, folder: Path) -> None:
        records = self._start.records
        names = summary_files(records)
        if self._config.upload_samples:
            names += sample_files(records)
        rows = list(prompt_rows(records, self._config.table_rows))
        names += [name for row in rows for name in (*row.recordings, row.spoken_answer) if name is not None]
        stage(records, [name for name in names if _is_there(records, name)], folder)
        if rows:
            (folder / "prompts.html").write_text(page(self._start.name, rows), encoding="utf-8")
        self._client.log_artifacts(self._number, str(folder))


def _is_there(records: RunRecords, name: str) -> bool:
    """Whether a file below a run's directory is there: recordings may have been removed."""
    return records.storage.exists(f"{records.run_name}/{name}")


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every leaf as a dotted name that MLflow takes, and its text; a list is one leaf."""
    for key, value in data.items():
        name = f"{prefix}{_NOT_IN_A_NAME.sub('_', str(key))}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}.")
        elif isinstance(value, str):
            yield name[:_LONGEST_NAME], value
        else:
            yield name[:_LONGEST_NAME], json.dumps(value, ensure_ascii=False, default=str)


def _named(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summary with the groups of `by_language` by their names instead of in a list."""
    groups = {
        key: {str(group.get("language")): group for group in value}
        for key, value in summary.items()
        if isinstance(value, list) and all(isinstance(group, Mapping) for group in value)
    }
    return {**summary, **groups}


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False

"""The messages between coordinator, workers and driver: plain data."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from mllm_shapx.config.models import DatasetConfig, EmbeddingConfig, RuntimeConfig
from mllm_shapx.config.servers import CONNECTOR
from mllm_shapx.execution.helping import HelpTask
from mllm_shapx.explaining.coalitions import RowCoalitions
from mllm_shapx.explaining.similarity import Vector
from mllm_shapx.models.base import Answer, ModelReport
from mllm_shapx.models.identity import Version
from mllm_shapx.models.server_budget import ServerLimits, Spent
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.planning.units import WorkUnit, plan_units
from mllm_shapx.records.environments import Environment
from mllm_shapx.records.likelihood import Likelihood, LikelihoodKey
from mllm_shapx.tracking.tracker import Placed


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers to coalitions of one conversation."""

    by_mask: dict[int, Answer] = field(default_factory=dict)
    """Coalition (bit i = player i) -> its answer."""
    snapshot_id: str = ""
    """mllm_shap's id of the conversation, empty if unknown. Answers to another conversation have another id,
    for example after a dataset file was edited."""
    num_players: int = 0
    """Players of the row, 0 if unknown."""
    vectors: dict[str, dict[bytes, Vector]] = field(default_factory=dict)
    """Kind of embedding -> `Answer.content_id` -> vector, for rescoring without the model."""

    likelihoods: dict[LikelihoodKey, Likelihood] = field(default_factory=dict)
    """(`forced_id`, coalition) -> likelihood of the forced continuation."""

    def give_to(self, row: RowCoalitions) -> None:
        """Give `row` these answers and likelihoods, if they belong to its coalitions."""
        if self.belong_to(row):
            row.know(self.by_mask)
            row.likelihoods.know(self.likelihoods)

    def belong_to(self, row: RowCoalitions) -> bool:
        """Return whether they have the conversation and the number of players of `row`."""
        return self.snapshot_id in {"", row.snapshot.snapshot_id} and self.num_players in {
            0,
            row.players.num_players,
        }


@dataclass(frozen=True)
class Study:
    """All that coordinator and workers need of one config."""

    experiment_set_id: str
    output_uri: str
    """The experiment set's directory."""
    runs: tuple[RunSpec, ...]
    rows: tuple[int, ...]
    """Selected rows in selection order."""
    players: Mapping[int, int] | None
    """Players per row; None if they are unknown until the row is loaded."""
    config_path: Path
    dataset: DatasetConfig
    dataset_commit: str | None
    model_path: Path | None
    """Local directory of the model, None for a hub id."""
    model_commit: str
    """Hub commit, or digest of the directory."""
    runtime: RuntimeConfig
    trackers: tuple[Placed, ...] = ()
    max_attempts: int = 3
    failures_allowed: int | None = None
    """Samples that may be quarantined in this call before it stops early; None for any number."""
    rows_in_flight: int | None = None
    """Rows that a worker explains at the same time; None for as many as fill its batches."""
    flush_s: float = 30.0
    """Seconds between two writes of a running row's answers."""
    retry_rows: Mapping[str, tuple[int, ...]] | None = None
    """For `retry`: run -> quarantined rows to try again, and no other rows."""
    dataset_content: str | None = None
    """Hash of a local dataset's content; None for a hub dataset, which has a commit."""
    model_version: Version | None = None
    """Required version of the model's files; None for any."""
    encoders: Mapping[EmbeddingConfig, Version] = field(default_factory=dict)
    """The external encoders of the runs."""

    server_limits: ServerLimits = field(default_factory=ServerLimits)
    """This call's limits for a model behind a server."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """The config's JSON data, bases merged in."""

    @property
    def worker_device(self) -> str | None:
        """Return the device of its workers; the CPU if the model is behind a server.

        None for workers that start their own server on GPUs: any GPU is fine.
        """
        if self.runs[0].connector != CONNECTOR:
            return self.runs[0].device
        return "cpu" if self.worker_gpus is None else None

    @property
    def worker_gpus(self) -> float | None:
        """Return the GPUs of a worker's own server, None if the config does not decide them."""
        server = self.runs[0].connector_kwargs.server
        return None if server is None or not server.gpus else server.gpus

    def encoder_commit(self, run: RunSpec) -> str | None:
        """Return the commit of a run's external encoder, None if it has none."""
        return None if run.embedding is None else self.encoders[run.embedding].commit

    def run(self, name: str) -> RunSpec:
        """Return a run by its name."""
        return next(run for run in self.runs if run.name == name)

    def units_left(
        self, completed: Mapping[str, Collection[int]], failed: Mapping[str, Collection[int]]
    ) -> list[WorkUnit]:
        """Return the units of rows that are neither done nor quarantined; for `retry`, of its rows only.

        Args:
            completed: Run -> rows with a sample.
            failed: Run -> quarantined rows.
        """
        retried = {run.name: set((self.retry_rows or {}).get(run.name, ())) for run in self.runs}
        settled = {name: {*completed[name], *(set(failed[name]) - rows)} for name, rows in retried.items()}
        units = plan_units(self.runs, self.rows, self.players, settled)
        if self.retry_rows is None:
            return units
        return [unit for unit in units if any(unit.row_index in retried[name] for name in unit.run_names)]


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker that has loaded its model."""

    worker: str
    node: str
    pid: int
    device: str
    dtype: str
    """Dtype of the weights in memory."""
    environment: Environment | None = None
    """Its environment; None if it generates no answers."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A unit handed to a worker."""

    unit: WorkUnit
    known: Answers
    """Stored answers of the unit."""


@dataclass(frozen=True, slots=True)
class LeaseReply:
    """The coordinator's reply to a worker that asks for work."""

    lease: Lease | None
    help: HelpTask | None = None
    """Coalitions of another worker's row to answer, if there is no unit."""
    drop: tuple[str, ...] = ()
    """Units that the worker should drop: another worker holds them, or they are done."""
    order: Literal["go", "drain", "stop"] = "go"
    """`drain`: finish the held units and take no more. `stop`: drop them; no work is left."""


@dataclass(frozen=True, slots=True)
class Beat:
    """A worker's heartbeat."""

    held: tuple[str, ...]
    answers: int
    """Answers generated since it started."""
    busy_seconds: float
    """Seconds that its device spent in the model."""
    unit_answers: Mapping[str, int] = field(default_factory=dict)
    """Held unit -> its number of answers."""
    generated: Mapping[str, int] = field(default_factory=dict)
    """Cost key -> answers generated since it started, also for other workers."""
    waiting_for: str = ""
    """Reason why the worker waits, for example a silent server; empty otherwise."""
    report: ModelReport | None = None
    """The report of its model; None if unchanged."""
    gpu_memory: tuple[int, int] | None = None
    """Bytes in use and in all of its GPU; None without one."""
    spent: Spent = field(default_factory=Spent)
    """What this call has asked of a server, also by the workers before this one."""


@dataclass(frozen=True, slots=True)
class UnitFailure:
    """Why a unit, or some of its runs, failed."""

    unit_id: str
    run_names: tuple[str, ...]
    reason: str
    message: str
    traceback: str | None
    final: bool
    """Whether a retry would not help."""

    @classmethod
    def of_lost_worker(cls, unit_id: str, run_names: tuple[str, ...], detail: str) -> Self:
        """Return the failure of a unit whose worker died."""
        message = f"the worker's process died while it explained this row: {detail}"
        return cls(unit_id, run_names, "worker_died", message, traceback=None, final=False)


@dataclass(frozen=True, slots=True)
class WorkerState:
    """One worker, for display."""

    name: str
    node: str
    device: str
    rows: tuple[int, ...]
    """Rows that it is explaining."""
    answers: int
    """Answers generated since it started."""
    gpu_memory: tuple[int, int] | None
    """Bytes in use and in all of its GPU; None without one."""
    waiting_for: str
    """Reason why it waits; empty while it works."""


@dataclass(frozen=True, slots=True)
class RunCalls:
    """Counts of one run's samples, earlier calls included."""

    coalitions: int = 0
    answers: int = 0
    """Answers generated for this run."""


@dataclass(frozen=True, slots=True)
class StudyTally:
    """Counts for display; no decision depends on them."""

    calls: Mapping[str, RunCalls] = field(default_factory=dict)
    store_hits: int = 0
    """Answers found in the store instead of generated."""
    workers: tuple[WorkerState, ...] = ()


@dataclass(frozen=True, slots=True)
class StudyState:
    """The state of a study, for the progress display and the driver."""

    done: Mapping[str, int]
    """Run -> rows with a sample."""
    failed: Mapping[str, int]
    """Run -> quarantined rows."""
    total: Mapping[str, int]
    """Run -> selected rows."""
    coalitions_done: float
    coalitions_total: float
    model_calls: int
    workers: tuple[str, ...]
    """Workers that have loaded the model."""
    busy_workers: int
    finished: bool
    unfinished_units: int
    draining: bool
    """Whether the coordinator hands out nothing more."""
    stalled: tuple[str, ...]
    """Workers that hold units and made no progress for the stall timeout."""
    device_seconds: float = 0.0
    """Device time of all workers in the model, in seconds."""
    device_seconds_left: float | None = None
    """Expected remaining device time in seconds; None before enough is measured."""
    notes: tuple[str, ...] = ()
    """Messages since the last state."""
    fatal: str | None = None
    """Why the coordinator cannot continue, for example a full disk."""
    spent: Spent = field(default_factory=Spent)
    """What this call has asked of a server, where requests or tokens are limited."""
    tally: StudyTally = field(default_factory=StudyTally)

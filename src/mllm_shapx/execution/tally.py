"""The coordinator's counts for display: calls of each run, answers from the store, workers."""

from collections.abc import Iterable, Mapping

from mllm_shapx.execution.ledger import Ledger
from mllm_shapx.execution.messages import Beat, RunCalls, StudyTally, WorkerInfo, WorkerState
from mllm_shapx.models.server_budget import Spent
from mllm_shapx.planning.units import WorkUnit
from mllm_shapx.records.results import SampleResult

Calls = Mapping[int, tuple[int, int]]
"""Row -> coalitions and generated answers of its sample."""


class Tally:
    """Counts for `StudyState.tally`.

    Args:
        spent: What this call has asked of a server for earlier configs.
    """

    def __init__(self, spent: Spent) -> None:
        self._calls: dict[str, RunCalls] = {}
        self._stored: dict[str, int] = {}
        self._beats: dict[str, tuple[WorkerInfo, Beat]] = {}
        self.spent = spent
        """What this call has asked of a server, where one worker counts it."""

    def begin(self, run_name: str, calls: Calls, rows: Iterable[int]) -> None:
        """Add the calls of earlier samples of `rows`; other rows do not count."""
        counted = [calls[row] for row in rows if row in calls]
        self._calls[run_name] = RunCalls(sum(each[0] for each in counted), sum(each[1] for each in counted))

    def written(self, sample: SampleResult) -> None:
        """Count a new sample."""
        before = self._calls.get(sample.run_name, RunCalls())
        self._calls[sample.run_name] = RunCalls(
            before.coalitions + sample.n_calls, before.answers + sample.model_calls
        )

    def handed_out(self, unit: WorkUnit, stored: int) -> None:
        """Count a leased unit with `stored` answers from the store."""
        self._stored.setdefault(unit.unit_id, stored)

    def hear(self, me: WorkerInfo, beat: Beat) -> None:
        """Record a worker's heartbeat."""
        self._beats[me.worker] = (me, beat)
        self.spent = max(self.spent, beat.spent, key=lambda spent: spent.requests)

    def now(self, workers: Iterable[str], ledger: Ledger) -> StudyTally:
        """Return the counts; `workers` are the living ones."""
        living = (self._beats[name] for name in sorted(workers) if name in self._beats)
        return StudyTally(
            calls=dict(self._calls),
            store_hits=sum(self._stored.values()),
            workers=tuple(_state(me, beat, ledger) for me, beat in living),
        )


def _state(me: WorkerInfo, beat: Beat, ledger: Ledger) -> WorkerState:
    return WorkerState(
        name=me.worker,
        node=me.node,
        device=me.device,
        rows=tuple(sorted(ledger.unit(unit_id).row_index for unit_id in ledger.held_by(me.worker))),
        answers=beat.answers,
        gpu_memory=beat.gpu_memory,
        waiting_for=beat.waiting_for,
    )

"""A study in one process without Ray: for debuggers, tests and small jobs."""

import asyncio
from collections.abc import Callable
from typing import Concatenate

from mllm_shapx.errors import ShapxError, first_of
from mllm_shapx.execution.aggregator import Aggregator
from mllm_shapx.execution.coordinator import Coordinator
from mllm_shapx.execution.lifecycle import Call
from mllm_shapx.execution.loading import DeviceLostError, LoadModel, ModelShelf
from mllm_shapx.execution.messages import Study, StudyState
from mllm_shapx.execution.preparation import OpenOutput
from mllm_shapx.execution.worker import Worker
from mllm_shapx.records.results import SampleResult

TICK_S = 0.25
"""Seconds between two checks of the study."""
STOP_S = 3.0
"""Seconds that the worker may take to stop. A longer model call is abandoned."""


class DirectDesk:
    """The connection to a coordinator in the same process."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    async def call[**P, R](
        self, method: Callable[Concatenate[Coordinator, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """See `Desk.call`."""
        return method(self._coordinator, *args, **kwargs)


class InProcessCrew:
    """A coordinator and an aggregator in this process. Subclasses explain the rows: see `Crew`."""

    def __init__(self, study: Study, output: OpenOutput, call: Call) -> None:
        self._study = study
        self._output = output
        self._call = call
        self._coordinator = Coordinator(study, output.inspections, self._log)
        self._maybe_aggregator: Aggregator | None = None
        self._runner = asyncio.Runner()

    def drain(self) -> None:
        """See `Crew.drain`."""
        self._coordinator.drain()

    def stop(self) -> None:
        """See `Crew.stop`. No row is running between two steps."""

    def finish(self) -> StudyState:
        """See `Crew.finish`."""
        return self.save()

    def save(self) -> StudyState:
        """See `Crew.save`."""
        self._coordinator.finish()
        return self._coordinator.state()

    def summarize(self) -> tuple[str, ...]:
        """See `Crew.summarize`."""
        return self._aggregator.finish()

    def close(self) -> None:
        """See `Crew.close`. It waits for a running model call; after a signal that takes too long."""
        if not self._call.is_stopped:
            self._runner.close()

    @property
    def _aggregator(self) -> Aggregator:
        # Created at first use: a study that continues with another crew creates another one.
        if self._maybe_aggregator is None:
            self._maybe_aggregator = Aggregator(self._study, self._output.specs, self._output.inspections)
        return self._maybe_aggregator

    def _log(self, sample: SampleResult) -> None:
        self._aggregator.log(sample)


class InlineCrew(InProcessCrew):
    """One worker in this process."""

    def __init__(
        self,
        study: Study,
        output: OpenOutput,
        call: Call,
        load: LoadModel,
        shelf: ModelShelf | None = None,
    ) -> None:
        super().__init__(study, output, call)
        self._maybe_aggregator = self._aggregator  # tracking starts before the first sample
        self._worker = Worker("inline", study, DirectDesk(self._coordinator), load, shelf=shelf)
        self._work: asyncio.Task[None] | None = None

    def step(self) -> StudyState:
        """See `Crew.step`."""
        if self._work is not None:
            self._wait(TICK_S)
            return self._coordinator.state()
        state = self._coordinator.state()
        if not state.finished:  # otherwise no model is loaded
            self._work = self._runner.get_loop().create_task(self._worker.run())
        return state

    def drain(self) -> None:
        """See `Crew.drain`."""
        super().drain()
        self._runner.run(self._worker.flush())

    def stop(self) -> None:
        """See `Crew.stop`."""
        self._runner.run(self._worker.stop())
        self._wait(STOP_S)

    def finish(self) -> StudyState:
        """See `Crew.finish`."""
        self._wait(STOP_S if self._call.is_stopped else None)
        return super().finish()

    def _wait(self, seconds: float | None) -> None:
        """Let the worker work for `seconds`, or to its end."""
        if self._work is None:
            return
        self._runner.run(asyncio.wait([self._work], timeout=seconds))
        if not self._work.done() or self._work.cancelled():
            return
        try:
            self._work.result()
        except ExceptionGroup as group:
            # Another process may still use the device.
            if group.subgroup(DeviceLostError) is None:
                raise
            raise ShapxError(
                f"the device does not work any more in this process: {first_of(group)}. What was written is "
                "valid; go on with --resume"
            ) from group

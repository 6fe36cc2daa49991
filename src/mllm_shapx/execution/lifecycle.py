"""A study from its lock to its outcome, with any crew: Ray, this process or the store."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from mllm_shapx.errors import StorageError, StudyError
from mllm_shapx.execution.messages import Study, StudyState
from mllm_shapx.execution.outcome import StudyOutcome, outcome_of
from mllm_shapx.execution.preparation import OpenOutput, open_output
from mllm_shapx.execution.progress import ProgressFeed
from mllm_shapx.execution.signals import StopRequest
from mllm_shapx.models.server_budget import Spent
from mllm_shapx.records.storage import open_storage
from mllm_shapx.reporting.progress import ProgressReporter


@dataclass(frozen=True, slots=True)
class Call:
    """The display of a call, and the signal that may end it."""

    reporter: ProgressReporter
    request: StopRequest

    @property
    def is_stopped(self) -> bool:
        """Whether a signal came, so that time is short."""
        return self.request.signal is not None


class Crew(Protocol):
    """Explains the rows of a study and writes its results."""

    def step(self) -> StudyState | None:
        """Work or wait briefly; return the state of the study, None while the coordinator restarts."""

    def drain(self) -> None:
        """Start no more rows, and write the answers of the running ones."""

    def stop(self) -> None:
        """Write the answers of the running rows and leave these rows unfinished."""

    def finish(self) -> StudyState:
        """Let the workers end, write the remaining results, and return the last state."""

    def save(self) -> StudyState | None:
        """Write the remaining results after a `StudyError` has ended the work; return the last state."""

    def summarize(self) -> tuple[str, ...]:
        """Write the summaries and end the tracking; return warnings."""

    def close(self) -> None:
        """Release processes and threads."""


@contextlib.contextmanager
def taken(study: Study, call: Call) -> Iterator[OpenOutput]:
    """Hold the lock of the output directory, after repairing the directory.

    Raises:
        OutputError: If another driver holds it, or its results have other settings.
    """
    output = open_output(study)
    call.request.begun = True
    try:
        for note in output.notes:
            call.reporter.message(note)
        with call.request.at_the_last(output.lock.release):
            yield output
    finally:
        output.lock.release()


def run_to_end(
    crew: Crew,
    study: Study,
    output: OpenOutput,
    call: Call,
    note_spent: Callable[[Spent], None] = lambda _: None,
) -> StudyOutcome:
    """Let `crew` explain the remaining rows; return the outcome.

    At the first signal the running rows get the grace period of the options to finish. `crew` is always
    closed. At the end `note_spent` gets what was asked of a server.

    Raises:
        ModelError: When the model cannot be loaded.
        StudyError: When the model differs from that of the study's start, or its server does not answer.
        StorageError: When results can no longer be written.
        OutputError: When another driver has taken the output directory.
    """
    started = time.monotonic()
    feed = ProgressFeed(call.reporter, open_storage(study.output_uri))
    try:
        with call.request.draining(study.options.grace_s):
            try:
                _watch(crew, output, feed, call)
                state = crew.finish()
            except StudyError:
                # The answers so far are valid: they come from the study's own model.
                if (saved := crew.save()) is not None:
                    note_spent(saved.spent)
                raise
            note_spent(state.spent)
            feed.show(state)
            feed.close()
            if state.fatal is not None:
                raise StorageError(state.fatal)
            warnings = crew.summarize()
    finally:
        crew.close()
    return outcome_of(
        study,
        state.done,
        state.failed,
        finished=state.finished,
        stopped_by=call.request.signal,
        model_calls=state.model_calls,
        seconds=time.monotonic() - started,
        warnings=warnings,
        on_disk=_samples_on_disk(study),
    )


def _watch(crew: Crew, output: OpenOutput, feed: ProgressFeed, call: Call) -> None:
    """Return when the study has finished, drained or failed, or the grace period is over."""
    deadline: float | None = None
    while True:
        output.lock.check()
        state = crew.step()
        if state is not None:
            feed.show(state)
            if state.finished or state.fatal is not None or (state.draining and not state.busy_workers):
                return
        if call.is_stopped and deadline is None:
            deadline = time.monotonic() + (call.request.grace_s or 0.0)
            call.reporter.message(call.request.announcement())
            crew.drain()
        if deadline is not None and time.monotonic() > deadline:
            crew.stop()
            return


def _samples_on_disk(study: Study) -> dict[str, int]:
    rows = frozenset(study.rows)
    return {name: len(rows.intersection(found.sample_rows())) for name, found in study.records().items()}

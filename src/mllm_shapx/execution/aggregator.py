"""The aggregator: writes the summary of each run and gives samples to the trackers."""

import copy
from collections.abc import Mapping
from typing import Any

from mllm_shapx.execution.messages import Study
from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.runs import RunInspection, RunRecords
from mllm_shapx.records.storage import Storage, open_storage
from mllm_shapx.records.summary import N_CONSTANT
from mllm_shapx.reporting.comparison import AGAINST_EXACT, against_exact
from mllm_shapx.tracking.background import BackgroundTracker


class Aggregator:
    """Logs new samples, and summarizes each run from its files.

    A summary depends on the files alone, so this process can be lost and restarted.
    """

    def __init__(
        self, study: Study, specs: Mapping[str, dict[str, Any]], inspections: Mapping[str, RunInspection]
    ) -> None:
        self._study = study
        self._storage = open_storage(study.output_uri)
        self._warnings: list[str] = []
        # Copies: the study keeps its backends unopened, because another crew may pickle them.
        self._trackers = [
            BackgroundTracker(copy.deepcopy(backend), study.experiment_set_id, warn=self._warnings.append)
            for backend in study.trackers
        ]
        for name, spec in specs.items():
            records = RunRecords(self._storage, name)
            for tracker in self._trackers:
                tracker.start(name, spec, records=records, salt=str(inspections[name].created_at))

    def log(self, sample: SampleResult) -> None:
        """Pass a sample's metrics to the trackers."""
        for tracker in self._trackers:
            tracker.log_sample(sample)

    def finish(self) -> tuple[str, ...]:
        """Write each run's `aggregate_metrics.json` and end the tracking; return warnings."""
        samples = constant = 0
        for run, summary in write_summaries(self._storage, self._study):
            samples += summary["n_samples"]
            constant += summary[N_CONSTANT]
            for tracker in self._trackers:
                tracker.finish(run, summary)
        for tracker in self._trackers:
            tracker.begin_close()  # no tracker waits for another one
        for tracker in self._trackers:
            tracker.close()
        if constant:
            self._warnings.append(
                f"in {constant:,} of {samples:,} sample(s) every coalition has the same answer, so that the "
                "values are equal and say nothing of the words; `mllm-shapx verify` counts such samples by "
                "run"
            )
        return tuple(self._warnings)


def write_summaries(storage: Storage, study: Study) -> list[tuple[str, dict[str, Any]]]:
    """Summarize each run from its files, write `summary/aggregate_metrics.json`; return names and content."""
    names = [run.name for run in study.runs]
    errors = against_exact(storage, names)
    written = []
    for name in names:
        records = RunRecords(storage, name)
        content = {**records.summarize(study.rows), AGAINST_EXACT: errors[name]}
        records.write_summary(content)
        written.append((name, content))
    return written

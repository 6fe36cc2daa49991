"""The Python API: run and plan a config, and read a finished study as tables."""

import contextlib
import io
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypedDict, Unpack

from mllm_shapx.config.loading import LoadedConfig, load_config
from mllm_shapx.errors import StorageError, UsageError
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.outcome import StudyOutcome
from mllm_shapx.execution.signals import StopNow, StopRequest
from mllm_shapx.planning.plan import Plan
from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.shards import Shard
from mllm_shapx.reporting.export import players_of, values_table
from mllm_shapx.reporting.reading import RunFiles, StudyFiles, open_study

if TYPE_CHECKING:
    import pandas as pd
    import shap

__all__ = ["Config", "Results", "RunKeywords", "load", "plan", "run"]

type Config = str | os.PathLike[str] | Mapping[str, Any]
"""A config file's path or content. Paths in a dict are relative to the working directory."""

_FROM_A_DICT = Path("the config given as a dict")
"""Replaces the config's path in messages."""


class RunKeywords(TypedDict, total=False):
    """The options of `mllm-shapx run`, under the same names; `RunOptions` describes them."""

    resume: bool
    overwrite: bool
    accept_changed_rows: bool
    max_samples: int | None
    shard: Shard | None
    num_gpus: float | Literal["all"] | None
    num_workers: int | None
    workers_per_gpu: int
    gpus_per_worker: float | None
    rows_in_flight: int | None
    address: str | None
    nodes: int
    max_attempts: int
    fail_fast: bool
    max_failures: str | None
    stall_s: float
    flush_s: float
    server_patience_s: float
    max_requests: int | None
    max_tokens: int | None
    grace_s: float


def run(
    config: Config, *, inline: bool = False, progress: bool = True, **options: Unpack[RunKeywords]
) -> StudyOutcome:
    """Explain the rows of a config by all its runs, as `mllm-shapx run` does.

    Works in a notebook. At an interrupt (Ctrl-C, the notebook's stop button), running rows get `grace_s`
    seconds to finish, and the outcome is returned; a second interrupt raises `KeyboardInterrupt`.

    Args:
        config: Path of a config file, or its content as a dict.
        inline: Do all work in this process, without Ray: for small studies and debuggers.
        progress: Write progress lines and warnings to `sys.stderr`.
        options: The command line's `--resume`, `--num-gpus`, and so on.

    Returns:
        The outcome. `exit_code` is 0 when all samples are done, 3 when some rows failed, 1 when the work
        stopped early, 130 after an interrupt. `output_uri` is the directory that `load` reads.

    Raises:
        UsageError: When the config or the call is wrong; nothing is written then.
        StorageError: When results could no longer be written.
    """
    from mllm_shapx.execution.run import run_config
    from mllm_shapx.reporting.progress import ProgressReporter

    loaded, asked, request = _loaded(config), RunOptions(**options), StopRequest()
    request.again = request.resume = "mllm_shapx.run(config, resume=True)"

    lines = _Lines(sys.stderr if progress else io.StringIO())

    def work() -> StudyOutcome:
        with ProgressReporter(lines, interactive=False) as reporter:
            return run_config(loaded, asked, reporter, inline=inline, request=request)

    return _in_a_thread(work, request, lines)


def plan(config: Config, *, skip_data: bool = False) -> Plan:
    """Return a config's plan: runs, rows, coalitions and answers. Loads no model.

    Args:
        config: Path of a config file, or its content as a dict.
        skip_data: Do not read the dataset; the plan then has runs but no figures.

    Raises:
        UsageError: When the config is wrong or the dataset cannot be used.
    """
    from mllm_shapx.execution.study_plan import study_plan

    return study_plan(_loaded(config), skip_data=skip_data).plan


def load(directory: str | os.PathLike[str]) -> "Results":
    """Return the results of an experiment set's directory or of one run's. Writes nothing.

    The study may be running: each read returns the files' current content.

    Raises:
        UsageError: When the directory holds no results.
    """
    return Results(open_study(os.fspath(directory)))


class Results:
    """The results of a study, read from its files on demand."""

    def __init__(self, study: StudyFiles) -> None:
        self._study = study

    def __repr__(self) -> str:
        return f"Results({self.directory!r}, runs={list(self.runs)})"

    @property
    def directory(self) -> str:
        """The experiment set's directory."""
        return self._study.storage.uri

    @property
    def runs(self) -> tuple[str, ...]:
        """Names of the runs, exact ones first."""
        return tuple(run.name for run in self._study.runs)

    def spec(self, run: str) -> Mapping[str, Any]:
        """Return the content of a run's `spec.json`, empty if it is missing or damaged."""
        return self._run(run).spec

    def summary(self, run: str) -> Mapping[str, float]:
        """Return the numbers of a run's `aggregate_metrics.json`, empty if not yet written."""
        return self._run(run).summary

    def samples(self, run: str | None = None) -> Iterator[SampleResult]:
        """Yield the samples of one run, by default of all runs, in row order.

        Raises:
            UsageError: When the run does not exist.
            StorageError: When a sample is damaged.
        """
        for files in self._study.runs if run is None else [self._run(run)]:
            for row in files.sample_rows:
                yield _sample(files, row)

    def values(self, run: str | None = None) -> "pd.DataFrame":
        """Return a table with one line per player of one run, by default of all runs.

        Columns: `run`; `row`, the row's index in the source dataset; `position` of the player in its row,
        from 0; `piece`, its text without surrounding blanks, empty for audio; `modality`, `text` or `audio`;
        `value`; `raw_value`, the value before the normalizer, NaN if the sample lacks it; `language`; `turn`
        of the player in the conversation; `n_calls`, `base_value` and `grand_value` of the sample;
        `standard_error` of `raw_value`, NaN if it is not known. `mllm-shapx export` writes the same table to
        a file.

        Raises:
            UsageError: When there is no such run.
            StorageError: When a sample is damaged.
        """
        return values_table(self.samples(run))

    def explanation(self, run: str, row: int | None = None) -> "shap.Explanation":
        """Return values as `shap.Explanation`, for the plots of `shap`.

        `values` are the sample's values, one per player; `data` the players' texts; `base_values` the value
        of the empty coalition. Only unscaled values (`IdentityNormalizer`) and the base value add up to the
        value of the whole prompt.

        Args:
            run: The run's name.
            row: One row's index, for `values` of shape (players,). By default all rows; `values` is then an
                array of arrays, one per row, as rows have different players.

        Raises:
            UsageError: When the run or the sample does not exist, or `shap` is not installed.
            StorageError: When a sample is damaged.
        """
        import numpy as np

        try:
            from shap import Explanation
        except ImportError as error:
            raise UsageError("shap is not installed; install it with: pip install shap") from error
        files = self._run(run)
        if row is not None:
            if row not in files.sample_rows:
                raise UsageError(f"{self._study.locate(run)} has no sample of row {row}")
            sample = _sample(files, row)
            values, texts = _values_and_texts(sample)
            return Explanation(values=values, base_values=sample.base_value, data=texts)
        samples = list(self.samples(run))
        pairs = [_values_and_texts(sample) for sample in samples]
        return Explanation(
            values=_ragged([values for values, _ in pairs]),
            base_values=np.array([sample.base_value for sample in samples]),
            data=_ragged([texts for _, texts in pairs]),
        )

    def _run(self, name: str) -> RunFiles:
        for files in self._study.runs:
            if files.name == name:
                return files
        raise UsageError(f"{self.directory} has no run {name}; it has {', '.join(self.runs)}")


def _loaded(config: Config) -> LoadedConfig:
    if not isinstance(config, Mapping):
        return load_config(Path(config))
    try:
        text = json.dumps(dict(config), default=os.fspath)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{_FROM_A_DICT}: it cannot be written as JSON: {error}") from error
    return load_config(_FROM_A_DICT, text)


class _Lines(io.StringIO):
    """Buffers another thread's text: only the thread of a notebook's cell may write to its stream."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._waiting: queue.SimpleQueue[str] = queue.SimpleQueue()

    def write(self, text: str) -> int:
        """Buffer the text for `pass_on`."""
        self._waiting.put(text)
        return len(text)

    def pass_on(self) -> None:
        """Write the buffered text to the stream. A closed stream does not stop the work."""
        while not self._waiting.empty():
            with contextlib.suppress(OSError, ValueError):
                self._stream.write(self._waiting.get())
                self._stream.flush()


def _in_a_thread[T](work: Callable[[], T], request: StopRequest, lines: _Lines) -> T:
    """Return the result of `work`, run in a thread without an event loop; a notebook's thread has one."""
    result: Future[T] = Future()

    def body() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # noqa: BLE001 -- the caller's thread raises it
            result.set_exception(error)

    # A daemon, so that a hanging model cannot keep the interpreter alive.
    threading.Thread(target=body, name="mllm-shapx", daemon=True).start()
    try:
        _wait_for(result, lines)
    except KeyboardInterrupt:
        request.signal = signal.SIGINT
        _wait_for(result, lines)
    try:
        return result.result()
    except StopNow as stop:
        raise KeyboardInterrupt from stop


def _wait_for(result: Future[Any], lines: _Lines) -> None:
    """Wait in short steps: a notebook's interrupt is not always a signal that ends a wait.

    Not with `Thread.join`: after an interrupt, it treats a running thread as finished (Python 3.12).
    """
    while not result.done():
        wait([result], timeout=0.2)
        lines.pass_on()
    lines.pass_on()


def _sample(files: RunFiles, row: int) -> SampleResult:
    place = files.records.storage.locate(files.records.layout.sample(row))
    try:
        return files.records.read_sample(row)
    except FileNotFoundError as error:
        raise StorageError(f"{place} was removed while it was read") from error
    except ValueError as error:
        raise StorageError(f"{place} is damaged: {error}; `run --resume` makes it again") from error


def _values_and_texts(sample: SampleResult) -> tuple[Any, Any]:
    import numpy as np

    players = players_of(sample)
    texts = [piece.text if piece.num_bytes is None else piece.label for piece, *_ in players]
    return np.array([value for _, value, _ in players]), np.array(texts, dtype=object)


def _ragged(arrays: list[Any]) -> Any:
    """Return an array of arrays; `numpy.array` would make a matrix of arrays of equal length."""
    import numpy as np

    found = np.empty(len(arrays), dtype=object)
    for index, array in enumerate(arrays):
        found[index] = array
    return found

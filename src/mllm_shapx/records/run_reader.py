"""Reads one run's directory: finished rows, damaged files, and contents. Changes nothing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from mllm_shapx.errors import StorageError
from mllm_shapx.records.checkpoint import Checkpoint
from mllm_shapx.records.failures import FailureRecord
from mllm_shapx.records.inspection import Fault, FaultKind, RunInspection, notes_of
from mllm_shapx.records.layout import GENERATIONS, RunLayout, row_of_failure, row_of_sample
from mllm_shapx.records.local_storage import unreadable
from mllm_shapx.records.results import SampleFile, SampleResult, parse_sample
from mllm_shapx.records.spec import RESULT_SETTINGS, is_of_older_runner, result_settings
from mllm_shapx.records.storage import Storage, decode_json, open_storage, read_json, unfinished
from mllm_shapx.records.summary import RunSummary

RunState = Literal["empty", "started", "abandoned"]
"""`started`: there is a checkpoint; `abandoned`: there are samples but no checkpoint."""

_UNLISTED = "{} sample(s) that the checkpoint does not name taken as done"
_VANISHED = "{} row(s) that the checkpoint names as completed have no sample, to be done again"
_UNEXPLAINED = "{} row(s) that the checkpoint names as failed have no failure file, to be done again"
_UNSELECTED = "{} sample(s) of rows that are not selected now are kept"


class RunReader:
    """The files of one run below an experiment set's directory, for reading.

    Methods that return the content of one file raise ValueError when it is damaged, with the reason.
    """

    def __init__(self, storage: Storage, run_name: str) -> None:
        self.storage = storage
        self.run_name = run_name
        self.layout = RunLayout(run_name)

    def state(self) -> RunState:
        """Return whether the run was started here, by its file names only."""
        if self.storage.exists(self.layout.checkpoint):
            return "started"
        return "abandoned" if self.sample_count() else "empty"

    def sample_count(self) -> int:
        """Return the number of sample files; opens none."""
        return len(self.sample_rows())

    def sample_rows(self) -> list[int]:
        """Return the rows with a sample file, ascending."""
        return sorted(self.sample_paths().values())

    def sample_paths(self) -> dict[str, int]:
        """Return path -> row of every sample file."""
        return _rows_in(self.storage, self.layout.samples, row_of_sample)

    def temp_files(self) -> list[str]:
        """Return the paths of temporary files of interrupted writes in the run's folders."""
        folders = [self.run_name, self.layout.samples, self.layout.failures, self.layout.summary_folder]
        if rows := self.storage.list(self.layout.audio):
            # A row's recordings are written before its sample.
            done = {self.layout.audio_folder(row) for row in self.sample_rows()}
            paths = (f"{self.layout.audio}/{name}" for name in rows if name.startswith("sample_"))
            folders += [path for path in paths if path not in done]
        return unfinished(self.storage, folders)

    def inspect(
        self,
        rows_in_order: Sequence[int],
        on_sample: Callable[[SampleFile], None] | None = None,
    ) -> RunInspection:
        """Read every file of the run; return the finished rows and the damaged or leftover files.

        A row with a readable sample that matches its file name is done, regardless of the checkpoint; all
        others are done again. Changes nothing: `RunRecords.heal` moves or removes the files in `faults`.

        Args:
            rows_in_order: The selected rows, in selection order.
            on_sample: Called once with every readable sample.

        Raises:
            StorageError: When the directory cannot be read.
        """
        faults = [Fault("leftover", path) for path in self.temp_files()]
        checkpoint = self._derived(self.layout.checkpoint, self.read_checkpoint, faults)
        made_from: dict[int, str] = {}
        calls: dict[int, tuple[int, int]] = {}
        damaged = set()
        for path, row, sample in self.sample_files():
            if isinstance(sample, Exception):
                if self._is_fault(path, "damaged sample", sample, faults):
                    damaged.add(row)
                continue
            made_from[row] = sample.made_from
            calls[row] = (sample.n_calls, sample.model_calls)
            if on_sample is not None:
                on_sample(sample)
        completed = frozenset(made_from)
        failures = self._readable_failures(completed, faults)
        self._derived(self.layout.summary, self.read_summary, faults)
        known = frozenset(checkpoint.completed_indices if checkpoint else ())
        failed_before = frozenset(checkpoint.failed_indices if checkpoint else ())
        differences = {
            _UNSELECTED: completed - set(rows_in_order),
            _UNLISTED: completed - known,
            _VANISHED: known - completed - damaged,
            _UNEXPLAINED: failed_before - failures.keys() - completed,
        }
        findings = [(kind, f"row {row}") for kind, rows in differences.items() for row in sorted(rows)]
        return RunInspection(
            completed=completed,
            failed=frozenset(row for row, failure in failures.items() if failure.quarantined),
            attempts={row: failure.attempts for row, failure in failures.items()},
            notes=notes_of(self.run_name, findings),
            created_at=None if checkpoint is None else checkpoint.created_at,
            made_from=made_from,
            calls=calls,
            faults=tuple(faults),
        )

    def summarize(self, rows: Sequence[int]) -> dict[str, Any]:
        """Return the aggregate metrics of the run's readable samples and quarantined rows."""
        summary = RunSummary()
        for _ in self.inspect(rows, summary.add).failed:
            summary.add_failure()
        return summary.to_json()

    def read_summary(self) -> dict[str, Any] | None:
        """Return the written aggregate metrics, None when there are none."""
        content = self._read_object(self.layout.summary)
        if content is not None and "n_samples" not in content:
            raise ValueError("it holds no n_samples")
        return content

    def read_spec(self) -> dict[str, Any] | None:
        """Return the resolved config, None when there is none."""
        return self._read_object(self.layout.spec)

    def read_usable_spec(self) -> dict[str, Any] | None:
        """Return the resolved config, None when there is none; without result settings, it is damaged."""
        spec = self.read_spec()
        if spec is not None and result_settings(spec) is None:
            raise ValueError(f"it holds no {RESULT_SETTINGS}")
        return spec

    def is_of_older_runner(self) -> bool:
        """Return whether the older runner wrote the run's spec; False without a readable spec."""
        try:
            return is_of_older_runner(self.read_spec() or {})
        except ValueError:
            return False

    def read_sample(self, row_index: int) -> SampleResult:
        """Return a sample; FileNotFoundError when there is none."""
        return self.decode_sample(row_index, self.storage.read_bytes(self.layout.sample(row_index)))

    def decode_sample(self, row_index: int, data: bytes) -> SampleResult:
        """Return the sample in a file's bytes; that of another row is damage."""
        sample = SampleResult.from_bytes(self.run_name, data)
        _check_row(sample.row_index, row_index)
        return sample

    def read_made_from(self) -> dict[int, str]:
        """Return row -> `SampleFile.made_from`, for readable samples."""
        samples = self.sample_files()
        return {row: sample.made_from for _, row, sample in samples if not isinstance(sample, Exception)}

    def read_failures(self) -> Iterator[FailureRecord]:
        """Yield the readable failures, by row; `inspect` and `verify` report the damaged ones."""
        for _, _, failure in self.failure_files():
            if not isinstance(failure, Exception):
                yield failure

    def sample_files(self) -> Iterator[tuple[str, int, SampleFile | ValueError | OSError]]:
        """Yield path, row and content of every sample file, by row; the error in place of a damaged one."""
        return self._files_of_rows(self.sample_paths(), parse_sample)

    def failure_files(self) -> Iterator[tuple[str, int, FailureRecord | ValueError | OSError]]:
        """Yield path, row and content of every failure file, by row; the error in place of a damaged one."""
        paths = _rows_in(self.storage, self.layout.failures, row_of_failure)
        return self._files_of_rows(paths, lambda data: FailureRecord.from_json(decode_json(data)))

    def _files_of_rows[T: (SampleFile, FailureRecord)](
        self, paths: Mapping[str, int], decode: Callable[[bytes], T]
    ) -> Iterator[tuple[str, int, T | ValueError | OSError]]:
        for path, content in self.storage.read_many(list(paths)):
            if isinstance(content, OSError):
                yield path, paths[path], content
                continue
            try:
                found = decode(content)
                _check_row(found.row_index, paths[path])
            except ValueError as error:
                yield path, paths[path], error
            else:
                yield path, paths[path], found

    def quarantined_rows(self) -> set[int]:
        """Return the quarantined rows with readable failures."""
        return {failure.row_index for failure in self.read_failures() if failure.quarantined}

    def read_checkpoint(self) -> Checkpoint | None:
        """Return the checkpoint, None when there is none."""
        try:
            return Checkpoint.from_bytes(self.storage.read_bytes(self.layout.checkpoint))
        except FileNotFoundError:
            return None

    def _read_object(self, path: str) -> dict[str, Any] | None:
        try:
            content = read_json(self.storage, path)
        except FileNotFoundError:
            return None
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")  # noqa: TRY004 -- one error type for all damage
        return content

    def _derived[T](self, path: str, read: Callable[[], T | None], faults: list[Fault]) -> T | None:
        """Return the content of a file that can be rebuilt; None, and a fault, if it is damaged."""
        try:
            return read()
        except ValueError as error:
            faults.append(Fault("damaged derived", path, str(error)))
            return None

    def _readable_failures(self, completed: frozenset[int], faults: list[Fault]) -> dict[int, FailureRecord]:
        failures = {}
        for path, row, failure in self.failure_files():
            if row in completed:
                faults.append(Fault("outdated failure", path))
            elif not isinstance(failure, Exception):
                failures[row] = failure
            else:
                self._is_fault(path, "damaged failure", failure, faults)
        return failures

    def _is_fault(self, path: str, kind: FaultKind, error: ValueError | OSError, faults: list[Fault]) -> bool:
        """Return whether a file is damaged, not missing; add a fault if damaged."""
        if isinstance(error, FileNotFoundError):
            return False
        if isinstance(error, OSError) and not isinstance(error, IsADirectoryError):
            raise unreadable(self.storage.locate(path), error) from error
        faults.append(Fault(kind, path, str(error.strerror if isinstance(error, OSError) else error)))
        return True


def find_runs(directory: str) -> tuple[Storage, tuple[str, ...]]:
    """Return an experiment set's storage and its runs, for the directory of the set or of one run.

    The runs are empty when the directory has none or does not exist.
    """
    root = directory.rstrip("/") or "/"
    storage = open_storage(root)
    if _is_run(storage.list()):
        parent, _, name = storage.uri.rpartition("/")
        return open_storage(parent or "/"), (name,)
    names = [name for name in storage.list() if name != GENERATIONS and not name.startswith(".")]
    return storage, tuple(name for name in names if _is_run(_names_below(storage, name)))


def _names_below(storage: Storage, name: str) -> list[str]:
    """Return the names in a folder; empty for a file."""
    try:
        return storage.list(name)
    except StorageError as error:
        if isinstance(error.__cause__, NotADirectoryError):
            return []
        raise


def _is_run(names: Sequence[str]) -> bool:
    return bool({"spec.json", "checkpoint.json", "samples"} & set(names))


def _check_row(found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"it holds row {found}")


def _rows_in(storage: Storage, folder: str, row_of: Callable[[str], int | None]) -> dict[str, int]:
    """Return path -> row for the files of rows in a folder."""
    rows = {f"{folder}/{name}": row_of(name) for name in storage.list(folder)}
    return {path: row for path, row in rows.items() if row is not None}

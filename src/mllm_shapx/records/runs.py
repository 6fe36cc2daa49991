"""One run's directory: what is done, healed where it is damaged, and how results are added."""

import contextlib
import datetime as dt
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mllm_shapx.errors import StorageError
from mllm_shapx.records.checkpoint import Checkpoint, CheckpointWriter
from mllm_shapx.records.failures import FailureRecord
from mllm_shapx.records.layout import GENERATIONS, RunLayout, row_of_failure, row_of_sample
from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.sample_file import parse_sample
from mllm_shapx.records.spec import RESULT_SETTINGS, is_of_older_runner, result_settings
from mllm_shapx.records.storage import (
    TEMP_PREFIX,
    Storage,
    decode_json,
    open_storage,
    read_json,
    unreadable,
    write_json,
)
from mllm_shapx.records.summary import SampleMetrics

Standing = Literal["empty", "started", "abandoned"]
"""`started`: there is a checkpoint; `abandoned`: there are samples without one."""

_LEFTOVER = "{} unfinished file(s) of a write that was cut short removed"
_DAMAGED_SAMPLE = "{} damaged sample(s) moved to damaged/, to be done again"
_DAMAGED_FAILURE = "{} damaged failure file(s) moved to damaged/, the rows to be done again"
_DAMAGED_DERIVED = "{} damaged file(s) moved to damaged/, to be made again from the samples"
_UNLISTED = "{} sample(s) that the checkpoint does not name taken as done"
_VANISHED = "{} row(s) that the checkpoint names as completed have no sample, to be done again"
_UNEXPLAINED = "{} row(s) that the checkpoint names as failed have no failure file, to be done again"
_OVERTAKEN = "{} failure file(s) removed of rows that have a sample by now"
_UNSELECTED = "{} sample(s) of rows that are not selected now are kept"

_SHOWN_IN_A_NOTE = 3


@dataclass(frozen=True, slots=True)
class RunInspection:
    """What a run's directory holds."""

    completed: frozenset[int]
    """Rows with a readable sample that fits, rows outside the selection included."""
    failed: frozenset[int]
    """Quarantined rows without a sample."""
    attempts: dict[int, int]
    """Attempts charged so far, of rows that are not completed."""
    notes: tuple[str, ...]
    """What was healed and what will be done again, in words."""
    created_at: float | None
    """`created_at` of the checkpoint, None when there is none that can be read."""
    made_from: Mapping[int, str] = field(default_factory=dict)
    """Row -> digest of what its sample was made from, see `SampleResult.made_from`."""
    calls: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """Row -> coalitions and generated answers of its sample."""

    def without(self, rows: Collection[int]) -> "RunInspection":
        """Return the same without the samples of `rows`."""
        return replace(
            self,
            completed=self.completed.difference(rows),
            made_from={row: digest for row, digest in self.made_from.items() if row not in rows},
            calls={row: calls for row, calls in self.calls.items() if row not in rows},
        )


class _Findings:
    """What one inspection has to say; findings of one kind make one note."""

    def __init__(self, run_name: str) -> None:
        self._run_name = run_name
        self._by_kind: dict[str, list[str]] = {}

    def add(self, kind: str, what: str) -> None:
        self._by_kind.setdefault(kind, []).append(what)

    def add_rows(self, kind: str, rows: Iterable[int]) -> None:
        for row in sorted(rows):
            self.add(kind, f"row {row}")

    def notes(self) -> tuple[str, ...]:
        return tuple(self._note(kind, found) for kind, found in self._by_kind.items())

    def _note(self, kind: str, found: list[str]) -> str:
        shown = ", ".join(found[:_SHOWN_IN_A_NOTE])
        rest = len(found) - _SHOWN_IN_A_NOTE
        more = f" and {rest} more" if rest > 0 else ""
        return f"{self._run_name}: {kind.format(len(found))}: {shown}{more}"


class RunRecords:
    """The files of one run below an experiment set's directory."""

    def __init__(self, storage: Storage, run_name: str) -> None:
        self.storage = storage
        self.run_name = run_name
        self.layout = RunLayout(run_name)

    def standing(self) -> Standing:
        """Return whether the run was begun here, from the names of its files alone."""
        if self.storage.exists(self.layout.checkpoint):
            return "started"
        names = self.storage.list(self.layout.samples)
        return "abandoned" if any(row_of_sample(name) is not None for name in names) else "empty"

    def sample_count(self) -> int:
        """Return how many samples there are by name; none is opened."""
        return sum(row_of_sample(name) is not None for name in self.storage.list(self.layout.samples))

    def inspect(
        self,
        rows_in_order: Sequence[int],
        on_sample: Callable[[SampleMetrics], None] | None = None,
    ) -> RunInspection:
        """Find what is done, and leave the directory free of anything damaged.

        A readable sample that fits its name is done, whatever the checkpoint says; everything else is done
        again. Damaged files are moved to `RUN/damaged/`, never deleted.

        Args:
            rows_in_order: The selected rows, in selection order.
            on_sample: Called with every readable sample, once for each.

        Raises:
            StorageError: When the directory cannot be read, or a damaged file cannot be moved.
        """
        findings = _Findings(self.run_name)
        calls: dict[int, tuple[int, int]] = {}

        def tell(metrics: SampleMetrics) -> None:
            calls[metrics.row_index] = (metrics.n_calls, metrics.model_calls)
            if on_sample is not None:
                on_sample(metrics)

        self._remove_temp_files(findings)
        checkpoint = self._healed_checkpoint(findings)
        made_from, damaged = self._readable_samples(findings, tell)
        completed = frozenset(made_from)
        failures = self._readable_failures(completed, findings)
        self._healed_summary(findings)
        quarantined = frozenset(row for row, failure in failures.items() if failure.quarantined)
        findings.add_rows(_UNSELECTED, completed - set(rows_in_order))
        known = frozenset(checkpoint.completed_indices if checkpoint else ())
        findings.add_rows(_UNLISTED, completed - known)
        findings.add_rows(_VANISHED, known - completed - damaged)
        failed_before = frozenset(checkpoint.failed_indices if checkpoint else ())
        findings.add_rows(_UNEXPLAINED, failed_before - failures.keys() - completed)
        return RunInspection(
            completed=completed,
            failed=quarantined,
            attempts={row: failure.attempts for row, failure in failures.items()},
            notes=findings.notes(),
            created_at=None if checkpoint is None else checkpoint.created_at,
            made_from=made_from,
            calls=calls,
        )

    def checkpoint_writer(
        self, rows_in_order: Sequence[int], inspection: RunInspection | None = None
    ) -> CheckpointWriter:
        """Return the keeper of the run's checkpoint, beginning with what an inspection found."""
        if inspection is None:
            return CheckpointWriter(self.storage, self.layout.checkpoint, rows_in_order)
        return CheckpointWriter(
            self.storage,
            self.layout.checkpoint,
            rows_in_order,
            completed=inspection.completed,
            failed=inspection.failed,
            created_at=inspection.created_at,
        )

    def write_spec(self, spec: dict[str, Any]) -> None:
        """Write the resolved config; `records.spec` names the keys that other commands read."""
        write_json(self.storage, self.layout.spec, spec)

    def read_spec(self) -> dict[str, Any] | None:
        """Return the resolved config, None when there is none.

        Raises:
            ValueError: When the file is damaged.
        """
        try:
            spec = read_json(self.storage, self.layout.spec)
        except FileNotFoundError:
            return None
        if not isinstance(spec, dict):
            raise ValueError("it is not a JSON object")  # noqa: TRY004 -- one error type for damaged content
        return spec

    def is_of_older_runner(self) -> bool:
        """Return whether the older runner wrote the run's spec; False where none can be read."""
        try:
            return is_of_older_runner(self.read_spec() or {})
        except ValueError:
            return False

    def heal_spec(self) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
        """Return the resolved config and notes; a damaged file is moved aside and counts as missing."""
        try:
            spec = self.read_spec()
            if spec is not None and result_settings(spec) is None:
                raise ValueError(f"it holds no {RESULT_SETTINGS}")  # noqa: TRY301
        except ValueError as error:
            kept = self.move_aside(self.layout.spec)
            note = (
                f"{self.run_name}: spec.json was damaged: {error}; it is now {kept}. "
                "The settings that the samples were made with could not be compared"
            )
            return None, (note,)
        return spec, ()

    def write_sample(self, sample: SampleResult) -> None:
        """Write a sample, its audio first; only then note the row in the checkpoint."""
        for path, content in sample.audio_files.items():
            self.storage.write_bytes(f"{self.run_name}/{path}", content)
        write_json(self.storage, self.layout.sample(sample.row_index), sample.to_json())

    def read_sample(self, row_index: int) -> SampleResult:
        """Return a sample.

        Raises:
            FileNotFoundError: When there is none.
            ValueError: When the file is damaged or holds another row.
        """
        return self.decode_sample(row_index, self.storage.read_bytes(self.layout.sample(row_index)))

    def decode_sample(self, row_index: int, data: bytes) -> SampleResult:
        """Return the sample that a file's bytes hold.

        Raises:
            ValueError: When they are damaged or hold another row.
        """
        sample = SampleResult.from_json(self.run_name, decode_json(data))
        if sample.row_index != row_index:
            raise ValueError(f"it holds row {sample.row_index}")
        return sample

    def read_made_from(self) -> dict[int, str]:
        """Return row -> what its sample was made from, for the samples that can be read; changes nothing."""
        paths = {self.layout.sample(row): row for row in self.sample_rows()}
        found = {}
        for path, content in self.storage.read_many(list(paths)):
            with contextlib.suppress(ValueError, OSError):
                found[paths[path]] = _metrics(content, paths[path]).made_from
        return found

    def sample_rows(self) -> list[int]:
        """Return the rows that have a sample by name, ascending."""
        rows = (row_of_sample(name) for name in self.storage.list(self.layout.samples))
        return sorted(row for row in rows if row is not None)

    def write_failure(self, failure: FailureRecord) -> None:
        """Write what is known of a row's failed attempts."""
        write_json(self.storage, self.layout.failure(failure.row_index), failure.to_json())

    def read_failures(self) -> Iterator[FailureRecord]:
        """Yield the failures that can be read, by row."""
        for _, row, content in self._failure_files():
            try:
                yield _failure(content, row)
            except (ValueError, OSError):
                # `inspect` and `verify` are the ones to speak of a damaged file.
                continue

    def quarantined_rows(self) -> set[int]:
        """Return the rows that were given up, as far as their failures can be read."""
        return {failure.row_index for failure in self.read_failures() if failure.quarantined}

    def clear_failure(self, row_index: int) -> None:
        """Remove a row's failure, if there is one."""
        self.storage.remove(self.layout.failure(row_index))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write the aggregate metrics."""
        write_json(self.storage, self.layout.summary, summary)

    def read_checkpoint(self) -> Checkpoint | None:
        """Return the checkpoint, None when there is none.

        Raises:
            ValueError: When the file is damaged.
        """
        try:
            return Checkpoint.from_bytes(self.storage.read_bytes(self.layout.checkpoint))
        except FileNotFoundError:
            return None

    def set_aside(self) -> str:
        """Move all of the run's old results to a dated folder; return its name, relative to the run."""
        taken = set(self.storage.list(self.run_name))
        name = self._free_name(taken)
        # The samples go after what speaks of them: cut short, this is done again by the next run.
        for part in ("failures", "summary", "audio", "samples", "checkpoint.json", "spec.json"):
            if part in taken:
                self.storage.move(f"{self.run_name}/{part}", f"{self.run_name}/{name}/{part}")
        return name

    def set_rows_aside(self, rows: Iterable[int]) -> str:
        """Move the samples and recordings of some rows to a dated folder; return its name."""
        name = self._free_name(set(self.storage.list(self.run_name)))
        for row in sorted(rows):
            sample, audio = self.layout.sample(row), self.layout.audio_folder(row)
            # The sample last: cut short, this is done again by the next run.
            for path in (audio, sample):
                if self.storage.exists(path):
                    self.storage.move(
                        path, f"{self.run_name}/{name}/{path.removeprefix(f'{self.run_name}/')}"
                    )
        return name

    def _free_name(self, taken: Collection[str]) -> str:
        stamp = dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%SZ")
        names = itertools.chain(
            [f"set_aside_{stamp}"], (f"set_aside_{stamp}_{number}" for number in itertools.count(2))
        )
        return next(name for name in names if name not in taken)

    def move_aside(self, path: str) -> str:
        """Move a damaged file to `RUN/damaged/NAME.N`; return that path, relative to the experiment set."""
        name = path.rpartition("/")[2]
        candidates = (f"{self.layout.damaged}/{name}.{number}" for number in itertools.count(1))
        target = next(candidate for candidate in candidates if not self.storage.exists(candidate))
        self.storage.move(path, target)
        return target

    def _remove_temp_files(self, findings: _Findings) -> None:
        folders = (self.run_name, self.layout.samples, self.layout.failures, self.layout.summary_folder)
        for folder in folders:
            for name in self.storage.list(folder):
                if name.startswith(TEMP_PREFIX):
                    self.storage.remove(f"{folder}/{name}")
                    findings.add(_LEFTOVER, name)

    def _healed_checkpoint(self, findings: _Findings) -> Checkpoint | None:
        try:
            return self.read_checkpoint()
        except ValueError as error:
            self._set_damaged_aside(self.layout.checkpoint, error, _DAMAGED_DERIVED, findings)
            return None

    def _readable_samples(
        self, findings: _Findings, on_sample: Callable[[SampleMetrics], None]
    ) -> tuple[dict[int, str], frozenset[int]]:
        """Return the rows that are done, with what they were made from, and those with a damaged sample."""
        names = {name: row_of_sample(name) for name in self.storage.list(self.layout.samples)}
        rows = {f"{self.layout.samples}/{name}": row for name, row in names.items() if row is not None}
        made_from: dict[int, str] = {}
        damaged = set()
        for path, content in self.storage.read_many(list(rows)):
            try:
                metrics = _metrics(content, rows[path])
            except FileNotFoundError:
                continue
            except (ValueError, IsADirectoryError) as error:
                self._set_damaged_aside(path, error, _DAMAGED_SAMPLE, findings)
                damaged.add(rows[path])
                continue
            except OSError as error:
                raise unreadable(self.storage.locate(path), error) from error
            made_from[metrics.row_index] = metrics.made_from
            on_sample(metrics)
        return made_from, frozenset(damaged)

    def _readable_failures(self, completed: frozenset[int], findings: _Findings) -> dict[int, FailureRecord]:
        failures = {}
        for path, row, content in self._failure_files():
            name = path.rpartition("/")[2]
            if row in completed:
                self.storage.remove(path)
                findings.add(_OVERTAKEN, name)
                continue
            try:
                failures[row] = _failure(content, row)
            except FileNotFoundError:
                continue
            except (ValueError, IsADirectoryError) as error:
                self._set_damaged_aside(path, error, _DAMAGED_FAILURE, findings)
            except OSError as error:
                raise unreadable(self.storage.locate(path), error) from error
        return failures

    def _failure_files(self) -> Iterator[tuple[str, int, bytes | OSError]]:
        rows = {name: row_of_failure(name) for name in self.storage.list(self.layout.failures)}
        paths = {f"{self.layout.failures}/{name}": row for name, row in rows.items() if row is not None}
        for path, content in self.storage.read_many(list(paths)):
            yield path, paths[path], content

    def _healed_summary(self, findings: _Findings) -> None:
        try:
            content = read_json(self.storage, self.layout.summary)
            if not isinstance(content, dict):
                raise ValueError("it is not a JSON object")  # noqa: TRY004, TRY301
            if "n_samples" not in content:
                raise ValueError("it holds no n_samples")  # noqa: TRY301
        except FileNotFoundError:
            return
        except ValueError as error:
            self._set_damaged_aside(self.layout.summary, error, _DAMAGED_DERIVED, findings)

    def _set_damaged_aside(self, path: str, error: Exception, kind: str, findings: _Findings) -> None:
        kept = self.move_aside(path)
        reason = str(error.strerror if isinstance(error, OSError) else error)
        findings.add(kind, f"{kept.rpartition('/')[2]} ({reason})")


def find_runs(directory: str) -> tuple[Storage, tuple[str, ...]]:
    """Return an experiment set's storage and its runs, for the directory of the set or of one run.

    No run is returned when the directory holds none, or is not there.
    """
    root = directory.rstrip("/") or "/"
    storage = open_storage(root)
    if _is_run(storage.list()):
        parent, _, name = storage.uri.rpartition("/")
        return open_storage(parent or "/"), (name,)
    names = [name for name in storage.list() if name != GENERATIONS and not name.startswith(".")]
    return storage, tuple(name for name in names if _is_run(_names_below(storage, name)))


def _names_below(storage: Storage, name: str) -> list[str]:
    """Return the names in a folder; none for a file."""
    try:
        return storage.list(name)
    except StorageError as error:
        if isinstance(error.__cause__, NotADirectoryError):
            return []
        raise


def _is_run(names: Sequence[str]) -> bool:
    return bool({"spec.json", "checkpoint.json", "samples"} & set(names))


def _metrics(content: bytes | OSError, row: int) -> SampleMetrics:
    sample = parse_sample(_content(content))
    if sample["row_index"] != row:
        raise ValueError(f"it holds row {sample['row_index']}")
    return SampleMetrics.of_file(sample)


def _failure(content: bytes | OSError, row: int) -> FailureRecord:
    failure = FailureRecord.from_json(decode_json(_content(content)))
    if failure.row_index != row:
        raise ValueError(f"it holds row {failure.row_index}")
    return failure


def _content(content: bytes | OSError) -> bytes:
    if isinstance(content, OSError):
        raise content
    return content

"""All errors of the product, from the general to the specific."""

from collections.abc import Sequence
from dataclasses import dataclass


class ShapxError(Exception):
    """Base of all errors with a message for the user.

    ``exit_code`` is the command line's exit code for the error.
    """

    exit_code = 1


class UsageError(ShapxError):
    """The config or the call is wrong, and the user can fix it."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault in a config file."""

    path: str
    """Place in the file, as dotted keys with list positions: ``experiments[2].fractions[0]``."""

    message: str
    """Description of the fault."""

    fix: str = ""
    """What to write instead; empty if the message says it."""

    def __str__(self) -> str:
        head = f"{self.path}: {self.message}" if self.path else self.message
        return f"{head} ({self.fix})" if self.fix else head


class ConfigError(UsageError):
    """A config file is unusable. Lists all problems at once."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{source}: {len(self.problems)} problem(s) in the config\n{lines}")


class DatasetError(UsageError):
    """The dataset cannot be read, lacks a column, or leaves no row to explain."""


class ModelError(UsageError):
    """The model cannot be loaded: no such directory or repository, or not a model."""


class ServerAwayError(ModelError):
    """The model's server is unreachable, so its model is unknown."""


class StudyError(ShapxError):
    """It concerns all remaining rows: the study stops, no row is charged, and --resume continues."""


class ModelChangedError(StudyError):
    """A model differs from that of the study's start: their answers must not be mixed."""


class ServerError(StudyError):
    """The model's server does not answer, or accepts no more requests."""


class BudgetError(StudyError):
    """The call's limit of requests or tokens is reached."""


class OutputError(UsageError):
    """The output directory does not allow the call."""


class ResourceError(UsageError):
    """The machine or the cluster lacks the requested resources."""


class StorageError(ShapxError):
    """Writing results failed: a full disk, a read-only directory. Written results stay valid."""


class MisplacedError(StorageError):
    """Another file is in the place of a results folder; the user can move it."""

    exit_code = 2


class RowError(ShapxError):
    """One row cannot be explained, and a retry would not help.

    ``reason`` is a short stable word for listing and filtering, for example ``no_players``.
    """

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)

    def __reduce__(self) -> tuple[type["RowError"], tuple[str, str]]:
        return (type(self), (self.reason, str(self)))


def first_of(error: BaseException) -> BaseException:
    """Return the first error of a group, nested groups included; another error unchanged."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

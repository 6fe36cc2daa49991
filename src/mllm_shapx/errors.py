"""Every error that the product raises on purpose, from the general to the particular."""

from collections.abc import Sequence
from dataclasses import dataclass


class ShapxError(Exception):
    """Base of all errors whose message is meant for the user.

    ``exit_code`` is what the command line ends with when the error reaches it.
    """

    exit_code = 1


class UsageError(ShapxError):
    """The config or the call is wrong, and the user can mend it."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in a config file."""

    path: str
    """Where in the file, as dotted keys with list positions: ``experiments[2].fractions[0]``."""

    message: str
    """What is wrong with it, in words."""

    fix: str = ""
    """What to write instead; empty when the message says it already."""

    def __str__(self) -> str:
        head = f"{self.path}: {self.message}" if self.path else self.message
        return f"{head} ({self.fix})" if self.fix else head


class ConfigError(UsageError):
    """A config file cannot be used. All problems are listed at once."""

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
    """The model's server cannot be reached, so that nobody can say which model it has."""


class StudyError(ShapxError):
    """It concerns every row that is left: the study stops, no row is to blame, and --resume goes on."""


class ModelChangedError(StudyError):
    """A model is not the one that the study began with: its answers must not be mixed."""


class ServerError(StudyError):
    """The server behind which the model is does not answer, or takes no more requests."""


class BudgetError(StudyError):
    """The call's limit of requests or tokens is reached."""


class OutputError(UsageError):
    """The output directory cannot be used as asked."""


class ResourceError(UsageError):
    """The machine or the cluster does not have what the call asks for."""


class StorageError(ShapxError):
    """Writing results failed: a full disk, a directory gone read-only. What was written stays valid."""


class MisplacedError(StorageError):
    """Something else stands where the results need a folder; the user can move it away."""

    exit_code = 2


class RowError(ShapxError):
    """One row cannot be explained and trying again would not help.

    ``reason`` is a short stable word for listing and filtering, such as ``no_players``.
    """

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)

    def __reduce__(self) -> tuple[type["RowError"], tuple[str, str]]:
        return (type(self), (self.reason, str(self)))


def first_of(error: BaseException) -> BaseException:
    """Return the first error of a group, of groups too; the error itself where it is none."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

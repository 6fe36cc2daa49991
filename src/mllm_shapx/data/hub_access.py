"""Asks the hub for a repository's contents: one request, a time limit, no output of libraries."""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["model", "dataset"]

Problem = Literal["unreachable", "missing", "gated", "revision", "name", "refused"]

_LIBRARIES = ("huggingface_hub", "datasets", "transformers", "httpx2", "httpx", "fsspec")
_LATER = frozenset({408, 429})
"""HTTP client errors that may be temporary."""


class HubError(Exception):
    """The hub did not return the requested data.

    Args:
        problem: Kind of the reason.
        detail: The reason, in one line.
    """

    def __init__(self, problem: Problem, detail: str) -> None:
        super().__init__(detail)
        self.problem = problem
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Named:
    """A repository as named in a config, for messages."""

    kind: Kind
    repo_id: str
    revision: str | None
    id_key: str
    """The config's key that holds the id, such as `dataset.repo_id`."""
    revision_key: str
    instead: str
    """The user's alternative to a repository."""

    def explain(self, error: HubError) -> str:
        """Return a message with the repository, the problem and the fix."""
        return f"{self.repo_id}: {self.reason(error)}"

    def reason(self, error: HubError) -> str:
        """Return a message with the problem and the fix."""
        match error.problem:
            case "unreachable":
                return self._unreachable(error.detail)
            case "missing":
                reason = f"the hub has no such {self.kind}, or it is private"
                fix = f"correct {self.id_key}, or set HF_TOKEN to a token that may read it"
            case "gated":
                reason = f"the {self.kind} is gated"
                fix = "ask for access on its page, then set HF_TOKEN to a token that has it"
            case "revision":
                reason, fix = f"it has no revision {self.revision!r}", f"correct {self.revision_key}"
            case "name":
                reason, fix = f"{self.id_key} is no repository id ({error.detail})", "write OWNER/NAME"
            case "refused":
                reason, fix = f"the hub refuses ({error.detail})", "check HF_TOKEN and HF_ENDPOINT"
        return f"{reason}; {fix}"

    def _unreachable(self, detail: str) -> str:
        from huggingface_hub import constants

        asked, fix = f"the hub at {constants.ENDPOINT} cannot be reached ({detail})", "check the connection"
        if constants.HF_HUB_OFFLINE and not _stays_offline.is_set():
            asked, fix = "HF_HUB_OFFLINE is set", "unset it"
        return (
            f"{asked}, and the hub cache ({constants.HF_HUB_CACHE}) does not have "
            f"it; {fix}, set HF_HOME to a cache that has it, or name {self.instead}"
        )


_stays_offline = threading.Event()


def stay_offline() -> None:
    """Make this process, and workers that it starts, read only the hub cache from now on.

    Otherwise loading a cached model would first request each file from the hub, with all retries.
    """
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"
        _stays_offline.set()


def ask(kind: Kind, repo_id: str, revision: str | None) -> Any:
    """Return the hub's description of a repository: commit, files, whether it is gated.

    Tries once, for at most `HF_HUB_ETAG_TIMEOUT` seconds (default 10), name look-up included.

    Raises:
        HubError: When the hub is unreachable or refuses.
    """
    answer = in_time(lambda: _ask(kind, repo_id, revision))
    if answer is None:
        raise HubError("unreachable", f"no answer within {_limit_s():g} s")
    if isinstance(answer, HubError):
        raise answer
    return answer


def in_time[T](work: Callable[[], T]) -> T | None:
    """Return the result of `work`; None after `HF_HUB_ETAG_TIMEOUT` seconds."""
    found: list[T] = []
    # The thread may outlive the limit: client timeouts do not cover name look-ups and retries.
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    with quiet():
        thread.start()
        thread.join(_limit_s())
    return found[0] if found else None


def _ask(kind: Kind, repo_id: str, revision: str | None) -> Any:
    """Return the description, or a `HubError` with the reason."""
    from huggingface_hub import HfApi

    try:
        found = HfApi().repo_info(repo_id, repo_type=kind, revision=revision, timeout=_limit_s() + 1.0)
        if found.gated:
            # The description of a gated repository is public, its files are not.
            HfApi().auth_check(repo_id, repo_type=kind)
    except Exception as error:  # noqa: BLE001 -- HTTP clients differ
        return problem_of(error)
    return found


def _limit_s() -> float:
    from huggingface_hub import constants

    return float(constants.HF_HUB_ETAG_TIMEOUT)


def problem_of(error: BaseException) -> HubError:
    """Return the `HubError` for a hub client's error; the first known error of its chain decides."""
    from huggingface_hub import errors

    problems: dict[type[Exception], Problem] = {
        errors.GatedRepoError: "gated",  # before the next, which is its base
        errors.RepositoryNotFoundError: "missing",
        errors.RevisionNotFoundError: "revision",
        errors.HFValidationError: "name",
    }
    for each in _chain(error):
        for kind, problem in problems.items():
            if isinstance(each, kind):
                return HubError(problem, one_line(each))
        status = getattr(getattr(each, "response", None), "status_code", 0)
        if status:
            is_refusal = 400 <= status < 500 and status not in _LATER  # noqa: PLR2004
            return HubError("refused" if is_refusal else "unreachable", f"HTTP {status}")
    return HubError("unreachable", f"{type(error).__name__}: {one_line(error)}")


def is_connection_problem(error: BaseException) -> bool:
    """Return whether an error means that the network or the hub failed, not that the request is wrong."""
    names = ("ConnectError", "ConnectTimeout", "ReadTimeout", "ReadError", "RemoteProtocolError")
    return any(
        isinstance(each, ConnectionError | TimeoutError) or type(each).__name__ in names
        for each in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


@contextlib.contextmanager
def quiet(*, downloads: bool = False) -> Iterator[None]:
    """Silence the hub's clients; our own messages report what matters.

    With `LOG_LEVEL=DEBUG` they print.

    Args:
        downloads: Whether a terminal may show download progress.
    """
    if os.environ.get("LOG_LEVEL", "").upper() == "DEBUG":
        yield
        return
    levels = {each: each.level for each in map(logging.getLogger, _LIBRARIES)}
    for each in levels:
        each.setLevel(logging.CRITICAL)
    try:
        with contextlib.nullcontext() if downloads and sys.stderr.isatty() else _without_bars():
            yield
    finally:
        for each, level in levels.items():
            each.setLevel(level)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Switch the progress bars of `huggingface_hub` off, unless the environment sets them."""
    from huggingface_hub import constants, utils

    is_ours = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not utils.are_progress_bars_disabled()
    if is_ours:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if is_ours:
            utils.enable_progress_bars()


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Make `huggingface_hub` and `datasets` read only their caches."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def one_line(error: BaseException) -> str:
    """Return an error's text in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or "no reason given"

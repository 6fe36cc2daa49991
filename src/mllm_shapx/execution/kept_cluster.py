"""A Ray cluster that stays joined while the configs of one call are worked on."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from mllm_shapx.execution.cluster import connected, logged_output
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.signals import StopRequest


class KeptCluster:
    """Joins or starts a cluster at its first use, and leaves it when the `with` block ends."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._folder: Path | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    @contextlib.contextmanager
    def joined(self, options: RunOptions, request: StopRequest) -> Iterator[Path]:
        """Give a study the cluster; one that raises leaves it, since the cluster may be the cause.

        Yields:
            A folder on this machine that only this user may enter.

        Raises:
            ResourceError: As `connected`.
        """
        with contextlib.ExitStack() as failing:
            failing.callback(self._leave)
            if self._folder is None:
                self._folder = self._stack.enter_context(connected(options, request))
            with logged_output():
                yield self._folder
            failing.pop_all()

    def _leave(self) -> None:
        self._folder = None
        self._stack.close()

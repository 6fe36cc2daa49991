"""The Ray cluster, its idle workers, the model and the count of requests, kept for all configs of a call."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from mllm_shapx.execution.cluster import connected, logged_output
from mllm_shapx.execution.loading import LoadModel, ModelShelf
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.signals import StopRequest
from mllm_shapx.models.server_budget import Spent

CLOSE_S = 30.0
"""Seconds that idle workers may take to release their models; a server of their own may end slowly."""


class IdleWorkers:
    """Actors with the model of a finished study, for the next study with the same key."""

    def __init__(self) -> None:
        self._key: object = None
        self._actors: list[Any] = []

    def take(self, key: object) -> Any | None:
        """Return an actor that was put here with an equal key; None if there is none.

        Actors with another key end: they hold resources that the new ones need.
        """
        if key != self._key:
            self.end()
        return self._actors.pop() if self._actors else None

    def put(self, key: object, actor: Any) -> None:
        """Keep an actor that has done its work."""
        if key != self._key:
            self.end()
        self._key = key
        self._actors.append(actor)

    def end(self) -> None:
        """End the actors, their models first: a server may still hold a GPU that the next one needs."""
        actors, self._actors = self._actors, []
        if not actors:
            return
        import ray

        try:
            closed = [actor.close.remote() for actor in actors]
            ray.wait(closed, num_returns=len(closed), timeout=CLOSE_S)
        finally:
            for actor in actors:
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.kill(actor, no_restart=True)


class Kept:
    """Joins or starts a cluster at its first use, and leaves it at the end of the `with` block.

    With `workers`, it keeps workers and models too, for the next config.
    """

    def __init__(self, *, workers: bool) -> None:
        self._stack = contextlib.ExitStack()
        self._folder: Path | None = None
        self._shelf: ModelShelf | None = None
        self._workers = workers
        self.idle_workers = IdleWorkers() if workers else None
        self.spent = Spent()
        """What the configs so far have asked of servers."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._leave()
        finally:
            if self._shelf is not None:
                self._shelf.close()

    def note_spent(self, spent: Spent) -> None:
        """Take what was asked of servers up to the end of a config's work."""
        self.spent = spent

    def shelf(self, load: LoadModel) -> ModelShelf | None:
        """Return the shelf for the model in this process; None if none is kept. `load` is always the same."""
        if self._workers and self._shelf is None:
            self._shelf = ModelShelf(load)
        return self._shelf

    @contextlib.contextmanager
    def joined(self, options: RunOptions, request: StopRequest) -> Iterator[Path]:
        """Give a study the cluster, see `connected`; leave it after an error, as it may be the cause."""
        with contextlib.ExitStack() as failing:
            failing.callback(self._leave)
            if self._folder is None:
                self._folder = self._stack.enter_context(connected(options, request))
            with logged_output():
                yield self._folder
            failing.pop_all()

    def _leave(self) -> None:
        self._folder = None
        try:
            if self.idle_workers is not None:
                self.idle_workers.end()
        finally:
            self._stack.close()

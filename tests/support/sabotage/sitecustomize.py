"""Breaks things on purpose in processes that have this folder on PYTHONPATH; the product knows nothing of it.

SABOTAGE_FILE names a JSON object that is read anew for every row: `die`, `raise` and `slow` list rows whose
worker kills itself, raises, or takes `slow_s` seconds longer, each time that the row is read; `hang` lists
rows that stop their worker's process the first time, noted in the folder `once`; `batch_s` are the seconds
that every batch of the model takes longer. SMALL_DISK_BYTES is the size
of the disk behind `smalldisk://` URIs, and SMALL_DISK_ROOT the folder that fills it.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROWS = "mllm_shapx.data.conversations"
STORAGE = "mllm_shapx.records.storage"
ENGINE = "mllm_shapx.models.engine"


def sabotaged(load_row: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `load_row` that breaks at some rows."""

    def broken(table: Any, row_index: int, *rest: Any) -> Any:
        wanted = _wanted()
        for kind, act in _ACTS.items():
            if row_index in wanted.get(kind, ()) and (kind != "hang" or _is_due(wanted["once"], row_index)):
                act(wanted)
        return load_row(table, row_index, *rest)

    return broken


def slowed(answer: Callable[..., Any]) -> Callable[..., Any]:
    """Return an `answer` whose batches take longer."""

    def slow(*args: Any) -> Any:
        time.sleep(_wanted().get("batch_s", 0))
        return answer(*args)

    return slow


def _wanted() -> Any:
    return json.loads(Path(os.environ["SABOTAGE_FILE"]).read_text())


def _is_due(folder: str, row_index: int) -> bool:
    """Return whether it is the row's first time."""
    try:
        (Path(folder) / f"hung-{row_index}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _die(_wanted: Any) -> None:
    print("the poison takes effect", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def _raise(_wanted: Any) -> None:
    raise ArithmeticError("the row is poisoned")


def _hang(_wanted: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _slow(wanted: Any) -> None:
    time.sleep(wanted["slow_s"])


_ACTS: dict[str, Callable[[Any], None]] = {"slow": _slow, "hang": _hang, "die": _die, "raise": _raise}


def add_small_disk() -> None:
    """Make `smalldisk:///folder` a directory on a disk of SMALL_DISK_BYTES bytes."""
    import errno

    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    class SmallDisk(LocalFileSystem):  # type: ignore[misc]
        protocol = ("smalldisk",)

        def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
            root = Path(os.environ["SMALL_DISK_ROOT"])
            used = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
            if used + len(value) > int(os.environ["SMALL_DISK_BYTES"]):
                raise OSError(errno.ENOSPC, "No space left on device")
            super().pipe_file(path, value, **options)

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(LocalFileSystem._strip_protocol(path.removeprefix("smalldisk://")))

    fsspec.register_implementation("smalldisk", SmallDisk, clobber=True)


class _Saboteur(importlib.abc.MetaPathFinder):
    """Changes modules as they are imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in {ROWS, STORAGE, ENGINE}:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                if fullname == ROWS and "SABOTAGE_FILE" in os.environ:
                    module.load_row = sabotaged(module.load_row)  # type: ignore[attr-defined]
                if fullname == ENGINE and "SABOTAGE_FILE" in os.environ:
                    module.Engine._answer = slowed(module.Engine._answer)
                if fullname == STORAGE and "SMALL_DISK_BYTES" in os.environ:
                    add_small_disk()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Saboteur())

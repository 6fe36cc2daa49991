"""The samples that a run's history has; for W&B, from its local logs and its server."""

import json
import logging
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

COUNTER = "sample"
"""The x axis of all other metrics: the number of the run's samples so far, which only grows."""

ROW = "row_index"

_COSTS = frozenset({COUNTER, "runtime_sec", "n_calls", "model_calls"})
"""Metrics that may differ between two attempts with the same values."""
_BLOCK = 32768
_FILE_HEADER = 7
_CHUNK_HEADER = 7
_WHOLE, _LAST = 1, 4


@dataclass
class History:
    """The samples that a history has."""

    rows: dict[int, int] = field(default_factory=dict)
    """Row -> fingerprint of its latest metrics."""
    counter: int = 0
    """The highest value of the counter."""

    def holds(self, metrics: Mapping[str, Any]) -> bool:
        """Return whether the history has this sample with these values."""
        return self.rows.get(int(metrics[ROW])) == fingerprint(metrics)

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Note one line of the history; lines without a row are no samples."""
        if isinstance(row := metrics.get(ROW), int | float) and math.isfinite(row):
            self.rows[int(row)] = fingerprint(metrics)
            self.counter = max(self.counter, int(metrics.get(COUNTER) or 0))


def fingerprint(metrics: Mapping[str, Any]) -> int:
    """Return a number that is the same for each attempt at a row with the same values.

    Texts do not count, since not every tracker keeps them, nor do W&B's own keys, which begin with an
    underscore.
    """
    kept = {
        key: float(f"{value:.9g}")
        for key, value in metrics.items()
        if isinstance(value, int | float) and key not in _COSTS and not key.startswith("_")
    }
    return zlib.crc32(json.dumps(kept, sort_keys=True).encode())


def logged_before(wandb: Any, run: Any, *, online: bool, timeout_s: float) -> History:
    """Return what earlier starts of a run have logged to W&B.

    With a server, its answer counts, and the logs of offline starts, which wait for `wandb sync`. The log of
    an online start does not say which lines arrived. Where the server cannot be asked, every log counts.
    """
    history = History()
    if online and run.resumed:
        try:
            for line in _server_lines(wandb, run, timeout_s):
                history.add(line)
        except Exception as error:  # noqa: BLE001 -- whatever wandb raises
            logger.debug("the history of %s cannot be asked for: %s", run.id, error)
            online = False
    folder = Path(run.dir).parents[1]
    for kind in ("offline-run",) if online else ("offline-run", "run"):
        # Each start has a folder of its own.
        for path in sorted(folder.glob(f"{kind}-*-{run.id}/run-{run.id}.wandb")):
            for line in _history_lines(path):
                history.add(line)
    return history


def _server_lines(wandb: Any, run: Any, timeout_s: float) -> Iterator[dict[str, Any]]:
    api = wandb.Api(timeout=math.ceil(timeout_s))
    found = api.run(f"{run.entity}/{run.project}/{run.id}")
    for line in found.scan_history(use_cache=False):
        yield {key: value for key, value in line.items() if value is not None}


def _history_lines(path: Path) -> Iterator[dict[str, Any]]:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from wandb.proto.wandb_internal_pb2 import Record

    for payload in _payloads(path):
        record = Record()
        try:
            record.ParseFromString(payload)
            if record.HasField("history"):
                yield {
                    item.key or item.nested_key[0]: json.loads(item.value_json)
                    for item in record.history.item
                }
        except (DecodeError, ValueError):
            continue


def _payloads(path: Path) -> Iterator[bytes]:
    """Yield the whole records of a `.wandb` file: LevelDB's log format after a header of 7 bytes.

    A record that is cut short is left out: its writer was killed.
    """
    parts = b""
    with path.open("rb") as file:
        block = file.read(_BLOCK)
        position = _FILE_HEADER
        while block:
            while position + _CHUNK_HEADER <= len(block):
                length = int.from_bytes(block[position + 4 : position + 6], "little")
                kind, begin = block[position + 6], position + _CHUNK_HEADER
                position = begin + length
                if position > len(block):
                    return
                parts = block[begin:position] if kind in {_WHOLE, 2} else parts + block[begin:position]
                if kind in {_WHOLE, _LAST}:
                    yield parts
            block, position = file.read(_BLOCK), 0

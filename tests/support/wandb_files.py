"""Reads wandb's `.wandb` files with an independent reader."""

import json
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_payloads(data: bytes) -> Iterator[bytes]:
    """Yield the records of a W&B file: LevelDB's log format after a header of 7 bytes."""
    position, parts = 7, b""
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if position + 7 + length > len(data):
            return  # its writer was killed
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in {1, 4}:  # a whole record, or the last part of one
            yield parts
            parts = b""


def read_records(folder: Path) -> list[Any]:
    """Return the protobuf records of an offline run's file."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("run-*.wandb")
    records = []
    for payload in read_payloads(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        records.append(record)
    return records


def history_of(records: list[Any]) -> list[dict[str, Any]]:
    """Return the rows of the history."""
    rows = []
    for record in records:
        if record.HasField("history"):
            items = record.history.item
            rows.append({(item.key or item.nested_key[0]): json.loads(item.value_json) for item in items})
    return rows


def whole_history(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Return run name -> its history over all calls, as `wandb sync` would upload it."""
    found: dict[str, list[dict[str, Any]]] = {}
    for folder in sorted(directory.glob("wandb/offline-run-*")):
        records = read_records(folder)
        names = [record.run.display_name for record in records if record.HasField("run")]
        if names:
            found.setdefault(names[0], []).extend(history_of(records))
    return found


def check_history(output: Path, edited: set[int]) -> int:
    """Check that W&B has every sample once, and an edited row's last values last; return their number."""
    histories = whole_history(output)
    logged = 0
    for folder in sorted(path.parent for path in output.glob("*/spec.json")):
        lines = histories[folder.name]
        samples = {int(path.name.split("_")[1]): path for path in folder.glob("samples/sample_*.json")}
        counts = Counter(int(line["row_index"]) for line in lines)
        assert counts.keys() == samples.keys(), f"{folder.name}: {samples.keys() ^ counts.keys()}"
        twice = {row: count for row, count in counts.items() if count > 1 and row not in edited}
        assert not twice, f"{folder.name}: logged more than once: {twice}"
        for row in edited:
            last = [line for line in lines if line["row_index"] == row][-1]
            sample = json.loads(samples[row].read_text())
            gap = abs(sample["values_sum"] - (sample["grand_value"] - sample["base_value"]))
            assert last["residual"] == gap
        logged += len(samples)
    return logged

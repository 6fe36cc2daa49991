"""A writer killed at any moment leaves a directory that the next one completes, nothing lost or twice."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

from records_kit import files_below, make_finished_run, make_sample

from mllm_shapx.records.checkpoint import Checkpoint
from mllm_shapx.records.local_storage import TEMP_PREFIX
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.storage import LocalStorage
from mllm_shapx.records.store import CoalitionStore, StoreHeader
from mllm_shapx.records.summary import RunSummary

ROWS = list(range(40))
HEADER = StoreHeader({"model_id": "m"}, "s", 3)

WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from records_kit import make_sample
from mllm_shapx.records.answer import Answer
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.storage import LocalStorage
from mllm_shapx.records.store import CoalitionStore, StoreHeader

rows = list(range(40))
storage = LocalStorage(sys.argv[1])
records = RunRecords(storage, "exact")
store = CoalitionStore(storage)
header = StoreHeader({"model_id": "m"}, "s", 3)
inspection = records.inspect(rows)
records.heal(inspection)
writer = records.checkpoint_writer(rows, inspection)
writer.write()
print("ready", flush=True)
for number, row in enumerate(row for row in rows if row not in inspection.completed):
    store.append(row, "aa", header, {mask: Answer(str(mask)) for mask in range(4)})
    store.merge(row, "aa", header, {mask: Answer(str(mask)) for mask in range(8)})
    records.write_sample(make_sample(row))
    writer.complete(row)
    writer.maybe_write(float(number))
writer.write()
print("done", flush=True)
"""


def _run_until(root: Path, seconds: float | None) -> bool:
    """Run the writer, killed after `seconds` of work; return whether it came to its end."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(root), str(Path(__file__).parents[1] / "support")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    if seconds is not None:
        time.sleep(seconds)
        process.kill()
    ended = process.stdout.read() == "done\n"
    process.wait()
    process.stdout.close()
    return ended


def test_a_writer_killed_again_and_again_ends_with_every_sample_once(tmp_path: Path) -> None:
    root = tmp_path / "killed"
    generator = random.Random(3)
    records = RunRecords(LocalStorage(root), "exact")
    done: frozenset[int] = frozenset()
    for _ in range(2):
        if _run_until(root, generator.uniform(0.02, 0.3)):
            break
        for name, data in files_below(root).items():
            if name.endswith("checkpoint.json"):
                Checkpoint.from_bytes(data)
            elif "samples/sample_" in name:
                row = int(name[-17:-12])
                assert records.read_sample(row) == make_sample(row)
        found = frozenset(records.sample_rows())
        assert done <= found, "a sample that was written is gone"
        done = found
    assert _run_until(root, None)

    summary = RunSummary()
    inspection = records.inspect(ROWS, summary.add)
    records.heal(inspection)
    assert inspection.notes == ()
    assert inspection.completed == frozenset(ROWS)
    make_finished_run(tmp_path / "undisturbed", ROWS)
    theirs = files_below(tmp_path / "undisturbed" / "exact" / "samples")
    assert files_below(root / "exact" / "samples") == theirs
    store = CoalitionStore(LocalStorage(root))
    store.remove_leftovers()
    for row in ROWS:
        assert set(store.read(row, "aa", HEADER).answers) in (set(range(8)), set(range(4)))
    assert not any(TEMP_PREFIX in name for name in files_below(root))
    assert list(store.problems()) == []

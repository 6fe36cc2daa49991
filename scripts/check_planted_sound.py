"""Counts the rows of the audio demo whose largest value is on the planted sound.

    python scripts/check_planted_sound.py experiments_output/demo_audio/exact

Exits with 1 if these are less than nine rows in ten.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

WANTED = 0.9


def window_of_largest(sample: dict[str, Any]) -> int:
    """Return the position of the audio window with the largest value."""
    values = [
        value
        for turn in sample["conversation"]
        for entry in turn
        if entry["content_type"] == 1 and entry["shap_values"] is not None
        for value in entry["shap_values"]
    ]
    return max(range(len(values)), key=values.__getitem__)


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, default=Path("experiments_output/demo_audio/exact"))
    parser.add_argument("--rows", type=Path, default=Path("demo_audio/rows.parquet"))
    parser.add_argument("--config", type=Path, default=Path("configs/demo_audio.json"))
    options = parser.parse_args()
    window_ms = json.loads(options.config.read_text())["audio_segmentation"]["window_ms"]
    rows = pq.read_table(options.rows, columns=["planted_start_ms", "planted_end_ms"]).to_pylist()
    hits = total = 0
    for path in sorted((options.run / "samples").glob("*.json")):
        sample = json.loads(path.read_text())
        row = rows[sample["row_index"]]
        start = window_of_largest(sample) * window_ms
        hits += start < row["planted_end_ms"] and start + window_ms > row["planted_start_ms"]
        total += 1
    if total == 0:
        sys.exit(f"{options.run} holds no samples; run make demo-audio")
    print(f"the largest value lies on the planted sound in {hits} of {total} rows")
    sys.exit(0 if hits >= WANTED * total else 1)


if __name__ == "__main__":
    main()

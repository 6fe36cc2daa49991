"""Measures a study's time from the command to the first sample, and from the last sample to the end.

    python benchmarks/bench_start.py                                # Ray beside --inline
    python benchmarks/bench_start.py --beside OTHER_CHECKOUT        # and both of another checkout

The study has one row of three words and the demo's model, so the first sample is on disk about 0.2 s after
the first coalition. Contestants take turns; medians are shown.
"""

import json
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
LOOK_S = 0.01
"""Seconds between two checks for the sample."""


@dataclass
class Contestant:
    """A way to run the study, and its seconds."""

    name: str
    checkout: Path
    words: tuple[str, ...]
    to_start: list[float] = field(default_factory=list)
    to_end: list[float] = field(default_factory=list)

    def measure(self, folder: Path) -> None:
        """Run the study once in an empty folder."""
        config = _write_study(folder)
        sample = folder / "out" / "start" / "exact" / "samples" / "sample_00000_result.json"
        command = [
            str(self.checkout / ".venv" / "bin" / "mllm-shapx"),
            "run",
            "--config",
            str(config),
            *self.words,
        ]
        started = time.monotonic()
        process = subprocess.Popen(
            command, cwd=self.checkout, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        while not sample.exists():
            if process.poll() is not None:
                raise SystemExit((process.stderr.read() if process.stderr else b"").decode())
            time.sleep(LOOK_S)
        first = time.monotonic()
        process.communicate()
        self.to_start.append(first - started)
        self.to_end.append(time.monotonic() - first)


def _write_study(folder: Path) -> Path:
    pq.write_table(pa.table({"prompt": ["please tell me"]}), folder / "rows.parquet")
    path = folder / "config.json"
    content = {
        "experiment_set_id": "start",
        "output_root": str(folder / "out"),
        "connector": "hf_text",
        "connector_kwargs": {"model_id": str(ROOT / "demo" / "model"), "dtype": "float32"},
        "device": "cpu",
        "dataset": {"source": "local_parquet", "path": str(folder / "rows.parquet")},
        "generation": {"max_new_tokens": 4, "text_temperature": 0.0},
        "wandb": {"enabled": False},
        "experiments": [{"explainer_type": "exact"}],
    }
    path.write_text(json.dumps(content))
    return path


@click.command()
@click.option("--rounds", type=int, default=5, show_default=True)
@click.option("--beside", type=click.Path(exists=True, path_type=Path), help="Another checkout with a .venv.")
def main(rounds: int, beside: Path | None) -> None:
    """Measure and print one line for each contestant."""
    checkouts = {"": ROOT} | ({} if beside is None else {" of the other checkout": beside.resolve()})
    contestants = [
        Contestant(way + whose, checkout, words)
        for whose, checkout in checkouts.items()
        for way, words in (("Ray", ("--num-workers", "1")), ("--inline", ("--inline",)))
    ]
    for _ in range(rounds):
        for each in contestants:
            with tempfile.TemporaryDirectory(prefix="shapx-start-") as folder:
                each.measure(Path(folder))
    ours = statistics.median(contestants[0].to_start)
    for each in contestants:
        start, end = statistics.median(each.to_start), statistics.median(each.to_end)
        print(
            f"{each.name}: first sample after {start:.1f} s ({start / ours:.2f} times ours with Ray), "
            f"prompt {end:.1f} s after it"
        )


if __name__ == "__main__":
    main()

"""Long chaos test of a study: kills, signals, and faults of its disk, clock and dataset.

    python scripts/chaos.py --kills 60 --seed 7

A study of 240 units runs undisturbed, then on its own Ray cluster of two nodes on loopback. There, the
following happens equally often at random moments: SIGKILL to a worker, the coordinator, the aggregator, the
second node's raylet and the driver; SIGINT, SIGTERM and SIGHUP to a working or just started driver; a full
disk, and one with failing fsync; a second driver with a clock two hours ahead, then one with a clock set
back; an edit of a dataset row that is then undone. Disk and clock are LD_PRELOAD shims, which need a C
compiler. A driver that has ended is restarted with --resume. At the end every sample must exist, none written
twice, `verify` must be clean, samples and summaries must equal those of the undisturbed run except for
timings, and the W&B history must have every sample once. The seed is printed; it decides what happens at
which progress.
"""

import argparse
import secrets
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Read the options, run, print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=60, help="how many times something is done to it")
    parser.add_argument("--seed", type=int, default=None, help="drawn and printed when it is not given")
    parser.add_argument("--kinds", nargs="+", default=None, help="of what is done; all by default")
    parser.add_argument("--rows", type=int, default=240, help="units of the study")
    parser.add_argument("--words", type=int, default=8, help="players of a row, at most")
    parser.add_argument("--batch-seconds", type=float, default=2.0, help="that each batch takes longer")
    options = parser.parse_args()
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "scripts")]
    from chaos_kit import KINDS, run_chaos

    # Under nohup the drivers would inherit the ignored SIGHUP.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {text}", flush=True)

    with tempfile.TemporaryDirectory(prefix="mllm-shapx-chaos-") as folder:
        figures = run_chaos(
            Path(folder),
            seed=seed,
            blows=options.kills,
            kinds=options.kinds or KINDS,
            rows=options.rows,
            words=options.words,
            batch_s=options.batch_seconds,
            say=say,
        )
    print(figures.text())


if __name__ == "__main__":
    main()

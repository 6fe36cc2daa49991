"""Long chaos test: SIGKILL to workers, coordinator, aggregator, a second node's raylet and the driver.

    python scripts/chaos.py --kills 30 --seed 7

A study of 240 units runs undisturbed, then on a Ray cluster of two nodes of its own on loopback in which
something is killed again and again; a killed driver is started again with --resume. Afterwards every sample
must be there once, none written twice, `verify` clean, and samples and summaries equal to the undisturbed
run's, timings aside. The seed is printed; it decides who is killed and at which progress.
"""

import argparse
import secrets
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Read the options, run, print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=None, help="drawn and printed when it is not given")
    parser.add_argument("--rows", type=int, default=240, help="units of the study")
    parser.add_argument("--words", type=int, default=8, help="players of a row, at most")
    parser.add_argument("--batch-seconds", type=float, default=2.0, help="that each batch takes longer")
    options = parser.parse_args()
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "scripts")]
    from chaos_kit import run_chaos

    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {text}", flush=True)

    with tempfile.TemporaryDirectory(prefix="mllm-shapx-chaos-") as folder:
        figures = run_chaos(
            Path(folder),
            seed=seed,
            kills=options.kills,
            rows=options.rows,
            words=options.words,
            batch_s=options.batch_seconds,
            say=say,
        )
    print(figures.text())


if __name__ == "__main__":
    main()

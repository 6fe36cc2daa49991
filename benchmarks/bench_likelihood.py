"""Measures teacher forcing against generation of as many tokens, on random Llamas.

Both arms process the coalitions of the same prompt with one engine in one process, in turns: one generates 16
tokens per coalition, the other reads the likelihood of a given answer of 16 tokens. Figures are medians over
the rounds; the ratio is of a round's two arms. Figures are of wall time and of CPU time, because other work
on the machine distorts wall time.

    python benchmarks/bench_likelihood.py --parameters 5m --rounds 3
"""

import argparse
import asyncio
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from made_up import SHAPES, Speed, build, coalitions, measure
from mllm_shap import ConversationSnapshot

from mllm_shapx.config.model_settings import ModelSettings
from mllm_shapx.config.models import ConnectorKwargs
from mllm_shapx.models.base import Decoding, Forcing
from mllm_shapx.models.engine import Engine
from mllm_shapx.models.hf_text import load


class Bench:
    """The two arms over one model."""

    def __init__(self, directory: Path, snapshots: Sequence[ConversationSnapshot], tokens: int) -> None:
        self.snapshots = snapshots
        self.decoding = Decoding(max_new_tokens=tokens)
        self.loop = asyncio.new_event_loop()
        self.engine = self.loop.run_until_complete(self._start(directory))
        (answer,) = self.loop.run_until_complete(self.engine.answer(snapshots[-1:], self.decoding, [0]))
        self.given = answer.token_ids

    async def _start(self, directory: Path) -> Engine:
        kwargs = ConnectorKwargs(dtype="float32")
        settings = ModelSettings("hf_text", str(directory), kwargs=kwargs, device="cpu")
        return Engine(load(settings, directory, None))

    def generate(self) -> Speed:
        """Answer every coalition."""
        call = self.engine.answer(self.snapshots, self.decoding, [0] * len(self.snapshots))
        return measure(len(self.snapshots), lambda: self.loop.run_until_complete(call))

    def force(self, top_k: int) -> Speed:
        """Read the likelihood of the whole prompt's answer after every coalition's prompt."""
        forcing = Forcing(self.snapshots, [self.given] * len(self.snapshots), self.decoding, top_k)
        call = self.engine.likelihoods(forcing)
        return measure(len(self.snapshots), lambda: self.loop.run_until_complete(call))


def main() -> None:
    """Parse the arguments, measure, and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parameters", choices=sorted(SHAPES), default="5m")
    parser.add_argument("--players", type=int, default=10, help="words of the prompt (default: 10)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of an answer (default: 16)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        build(options.parameters, Path(name))
        bench = Bench(Path(name), coalitions(options.players), options.tokens)
        bench.generate()  # the engine finds its batch size
        bench.force(0)
        rounds = [
            {"generate": bench.generate(), "tf_logprob": bench.force(0), "tf_jsd": bench.force(20)}
            for _ in range(options.rounds)
        ]
    figures: dict[str, float | int | str] = {"parameters": options.parameters, "players": options.players}
    for arm in ("generate", "tf_logprob", "tf_jsd"):
        wall = statistics.median(each[arm].wall for each in rounds)
        ratio, of_cpu = (
            statistics.median(getattr(each[arm], clock) / getattr(each["generate"], clock) for each in rounds)
            for clock in ("wall", "cpu")
        )
        print(f"{arm:>12}: {wall:9.1f} coalitions/s, {ratio:5.2f} times generate ({of_cpu:.2f} by CPU time)")
        figures |= {
            arm: round(wall, 1),
            f"{arm}_ratio": round(ratio, 2),
            f"{arm}_cpu_ratio": round(of_cpu, 2),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

"""The plan of a study's disturbances, and its figures."""

import contextlib
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Blow:
    """One entry of the plan."""

    kind: str
    samples: int
    """Number of samples on disk when it is due."""
    delay_s: float
    """Seconds between that moment and the blow."""


def plan_blows(
    rng: random.Random, kinds: Sequence[str], count: int, samples: int, longest_delay_s: float
) -> list[Blow]:
    """Draw the plan: all kinds equally often, spread over the study, some shortly after another."""
    drawn = [kinds[number % len(kinds)] for number in range(count)]
    rng.shuffle(drawn)
    moments = sorted(rng.randrange(int(samples * 0.9)) for _ in range(count))
    return [
        Blow(kind, moment, rng.choice([rng.uniform(0, 0.5), rng.uniform(0, longest_delay_s)]))
        for kind, moment in zip(drawn, moments, strict=True)
    ]


@dataclass
class Figures:
    """The results of a run under chaos."""

    seed: int
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(Kind, outcome) -> how often."""
    driver_starts: int = 0
    coordinator_restarts: int = 0
    seconds: float = 0.0
    undisturbed_s: float = 0.0
    samples: int = 0
    units: int = 0
    logged: int = 0

    def count(self, kind: str) -> int:
        """Return the number of blows of a kind."""
        return sum(count for (each, _), count in self.outcomes.items() if each == kind)

    def text(self) -> str:
        """Return the figures as a table and sentences."""
        rows = [f"  {kind:12} {count:3}  {what}\n" for (kind, what), count in sorted(self.outcomes.items())]
        return (
            f"seed {self.seed}: {self.outcomes.total()} blows over {self.units} units and {self.samples} "
            f"samples; driver started {self.driver_starts} times, coordinator restarted "
            f"{self.coordinator_restarts} times; {self.seconds:.0f} s, undisturbed (inline) "
            f"{self.undisturbed_s:.0f} s\n"
            f"  {'kind':12} {'n':>3}  outcome\n{''.join(rows)}"
            "every sample is there once, none was written twice, verify is clean, samples and summaries "
            f"equal the undisturbed run's; the W&B histories hold {self.logged} samples, each once"
        )


@contextlib.contextmanager
def timed(figures: Figures, name: str) -> Iterator[None]:
    """Write the duration of the `with` block into a field, in seconds."""
    started = time.monotonic()
    yield
    setattr(figures, name, time.monotonic() - started)

"""Kills what a study consists of at random moments, and holds what comes out against an undisturbed run."""

import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from ray_cluster import LoopbackCluster
from small_study import Process, Sabotage, Study, results

KINDS = {"worker": 9, "coordinator": 5, "driver": 4, "raylet": 3, "aggregator": 1}
"""What is killed, and how often each is drawn."""
ACTORS = {
    "worker": "ray::WorkerActor",
    "coordinator": "ray::CoordinatorActor",
    "aggregator": "ray::AggregatorActor",
}
ORPHANS_S = 60.0
"""Seconds after the driver's death within which its actors must be gone."""
OPTIONS = ("--num-workers", "3", "--flush-every", "0.3", "--max-attempts", "6")
"""Random kills can hit one row alone again and again, which is not its fault: hence the attempts."""


@dataclass(frozen=True)
class Kill:
    """One kill of the plan."""

    kind: str
    samples: int
    """Samples on disk at which it is due."""
    delay_s: float
    """What passes between that moment and the kill."""


def plan_kills(rng: random.Random, count: int, samples: int, longest_delay_s: float) -> list[Kill]:
    """Draw when and whom to kill: spread over the study, some shortly after another."""
    kinds = [*KINDS, *rng.choices(list(KINDS), weights=list(KINDS.values()), k=count)][:count]
    rng.shuffle(kinds)
    moments = sorted(rng.randrange(int(samples * 0.9)) for _ in range(count))
    return [
        Kill(kind, moment, rng.choice([rng.uniform(0, 0.5), rng.uniform(0, longest_delay_s)]))
        for kind, moment in zip(kinds, moments, strict=True)
    ]


@dataclass
class Figures:
    """What a run under chaos came to."""

    seed: int
    kills: Counter[str] = field(default_factory=Counter)
    driver_starts: int = 0
    coordinator_restarts: int = 0
    seconds: float = 0.0
    undisturbed_s: float = 0.0
    samples: int = 0
    units: int = 0

    def text(self) -> str:
        """Return the figures in words."""
        by_kind = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kills.items()))
        return (
            f"seed {self.seed}: {sum(self.kills.values())} kills ({by_kind}) over {self.units} units and "
            f"{self.samples} samples; driver started {self.driver_starts} times, coordinator restarted "
            f"{self.coordinator_restarts} times; {self.seconds:.0f} s, undisturbed (inline) "
            f"{self.undisturbed_s:.0f} s; every sample there once, none written twice, verify clean, samples "
            "and summaries equal to the undisturbed run's"
        )


class Chaos:
    """A study on a cluster of two nodes, in which everything but the head's own processes is killed."""

    def __init__(self, study: Study, cluster: LoopbackCluster, say: Callable[[str], None]) -> None:
        self._study = study
        self._cluster = cluster
        self._say = say
        self._second = cluster.add_node(cpus=1)
        self._driver = self._start()
        self._starts = 1
        self._coordinator_restarts = 0
        self._written: dict[Path, tuple[int, int]] = {}
        self._rewritten: set[Path] = set()

    def carry_out(self, kills: Sequence[Kill], rng: random.Random, figures: Figures) -> None:
        """Kill by plan, then let the study end."""
        for number, kill in enumerate(kills, 1):
            self._wait(lambda kill=kill: self._study.samples_on_disk() >= kill.samples)  # type: ignore[misc]
            self._pause(kill.delay_s)
            done = self._study.samples_on_disk()
            kind = self._kill(kill.kind, rng)
            self._say(f"kill {number} of {len(kills)}: {kind}, at {done} samples")
            figures.kills[kind] += 1
        self._wait(lambda: not self._driver.is_running(), may_end=True)
        self._collect()
        figures.driver_starts = self._starts
        figures.coordinator_restarts = self._coordinator_restarts
        end = self._driver.wait()
        assert end.code == 0, end.out
        assert not self._rewritten, f"written twice: {sorted(map(str, self._rewritten))}"

    def _start(self, *args: str) -> Process:
        return self._study.start("--address", self._cluster.address, *OPTIONS, *args, env=self._cluster.env)

    def _kill(self, kind: str, rng: random.Random) -> str:
        """Kill one process of a kind and return the kind."""
        if kind == "aggregator" and not any(self._cluster.processes(ACTORS[kind])):
            kind = "worker"  # it was killed before, and a driver starts only one
        if kind == "driver":
            self._collect()
            self._driver.kill()
            self._driver.wait()
            self._no_orphans()
            self._driver = self._start("--resume")
            self._starts += 1
        elif kind == "raylet":
            self._wait(lambda: self._second.raylet() is not None and self._second.has_started())
            self._lose_node()
        else:
            _kill_one(self._wait_for_processes(ACTORS[kind]), rng)
        return kind

    def _lose_node(self) -> None:
        """Kill the second node and let another one start meanwhile."""
        raylet = self._second.raylet()
        assert raylet is not None
        raylet.kill()
        self._second = self._cluster.add_node(cpus=1, wait=False)

    def _wait_for_processes(self, name: str) -> list[psutil.Process]:
        self._wait(lambda: any(self._cluster.processes(name)))
        return list(self._cluster.processes(name))

    def _no_orphans(self) -> None:
        """Hold that nothing of a killed driver lives on."""
        deadline = time.monotonic() + ORPHANS_S
        while any(process for name in ACTORS.values() for process in self._cluster.processes(name)):
            assert time.monotonic() < deadline, "actors outlive their driver"
            time.sleep(0.2)

    def _wait(self, what: Callable[[], bool], *, may_end: bool = False, timeout: float = 600.0) -> None:
        deadline = time.monotonic() + timeout
        while not what():
            self._watch_files()
            assert may_end or self._driver.is_running(), f"it ended too early:\n{self._driver.out}"
            assert time.monotonic() < deadline, f"no progress in {timeout:g} s:\n{self._driver.out}"
            time.sleep(0.1)

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._driver.is_running():
            self._watch_files()
            time.sleep(0.05)

    def _watch_files(self) -> None:
        """Note each sample's file, and whether it is another one than it was."""
        for path in self._study.output.glob("*/samples/sample_*.json"):
            stat = path.stat()
            now = (stat.st_ino, stat.st_mtime_ns)
            if self._written.setdefault(path, now) != now:
                self._rewritten.add(path)

    def _collect(self) -> None:
        self._coordinator_restarts += self._driver.out.count("the coordinator is back")


def _kill_one(processes: Sequence[psutil.Process], rng: random.Random) -> None:
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
        rng.choice(sorted(processes, key=lambda process: process.pid)).kill()


@contextlib.contextmanager
def timed(figures: Figures, name: str) -> Iterator[None]:
    """Write the seconds that something takes into a field."""
    started = time.monotonic()
    yield
    setattr(figures, name, time.monotonic() - started)


def run_chaos(
    folder: Path,
    *,
    seed: int,
    kills: int,
    rows: int,
    words: int,
    longest_delay_s: float = 8.0,
    batch_s: float = 0.0,
    say: Callable[[str], None] = print,
) -> Figures:
    """Run a study undisturbed and under chaos; both must come to the same.

    Under chaos every batch of the model takes `batch_s` seconds longer, so that the kills find it at work.

    Raises:
        AssertionError: When something was lost, done twice, or came out differently.
    """
    figures = Figures(seed, units=rows)
    undisturbed = Study(folder / "undisturbed", rows=rows, words=words)
    disturbed = Study(folder / "disturbed", rows=rows, words=words)
    with timed(figures, "undisturbed_s"):
        assert undisturbed.call("--inline").code == 0
    expected = results(undisturbed.output)
    figures.samples = undisturbed.samples_on_disk()
    rng = random.Random(seed)
    plan = plan_kills(rng, kills, figures.samples, longest_delay_s)
    say(f"seed {seed}: {json.dumps([[kill.kind, kill.samples, round(kill.delay_s, 2)] for kill in plan])}")
    saboteur = Sabotage(folder)
    saboteur.set(batch_s=batch_s)
    with LoopbackCluster(cpus=2, env=saboteur.env) as cluster, timed(figures, "seconds"):
        Chaos(disturbed, cluster, say).carry_out(plan, rng, figures)
    check = disturbed.run(verb="verify")
    assert check.code == 0, check.out
    found = results(disturbed.output)
    assert found.keys() == expected.keys()
    differing = [path for path in expected if found[path] != expected[path]]
    assert not differing, f"{len(differing)} file(s) differ, such as {differing[0]}"
    return figures

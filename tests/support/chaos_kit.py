"""Disturbs a study at random moments, and compares its results with an undisturbed run."""

import contextlib
import json
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from chaos_plan import Blow, Figures, plan_blows, timed
from faults import BadDisk, Failure, has_compiler, wrong_clock
from ray_cluster import LoopbackCluster
from small_study import Process, Sabotage, Study, results
from wandb_files import check_history

ACTORS = {
    "worker": "ray::WorkerActor",
    "coordinator": "ray::CoordinatorActor",
    "aggregator": "ray::AggregatorActor",
}
SIGNALS = {"sigint": signal.SIGINT, "sigterm": signal.SIGTERM, "sighup": signal.SIGHUP}
DISK: dict[str, Failure] = {"disk_full": "w", "fsync": "f"}
KILLS = (*ACTORS, "raylet", "driver")
"""SIGKILL to a process."""
KINDS = (*KILLS, *SIGNALS, *DISK, "clock", "edited")
"""Kinds of disturbances."""
ORPHANS_S = 60.0
"""Seconds after the driver's death until its actors must have ended."""
END_S = 300.0
"""Seconds until a driver must end after a signal or a disk fault."""
OPTIONS = ("--num-workers", "3", "--flush-every", "0.3", "--max-attempts", "6", "--grace", "5")
"""Many attempts, because random kills can hit one innocent row repeatedly."""
INLINE = ("--inline", "--resume", "--flush-every", "0.3", "--grace", "5")
WANDB = {"enabled": True, "mode": "offline"}


class Chaos:
    """A study on a cluster of two nodes, with disturbances of everything except the head's own processes."""

    def __init__(
        self, study: Study, cluster: LoopbackCluster, disk: BadDisk | None, say: Callable[[str], None]
    ) -> None:
        self._study = study
        self._cluster = cluster
        self._disk = disk
        self._say = say
        self._second = cluster.add_node(cpus=1)
        self._driver = self._start()
        self._starts = 1
        self._coordinator_restarts = 0
        self._written: dict[Path, tuple[int, int]] = {}
        self._rewritten: set[Path] = set()
        self.edited: set[int] = set()
        """Rows that were edited and restored, and explained again each time."""

    def carry_out(self, blows: Sequence[Blow], rng: random.Random, figures: Figures) -> None:
        """Carry out the plan, then let the study end."""
        for number, blow in enumerate(blows, 1):
            self._wait(lambda blow=blow: self._study.samples_on_disk() >= blow.samples)  # type: ignore[misc]
            self._pause(blow.delay_s)
            done = self._study.samples_on_disk()
            outcome = self._strike(blow.kind, rng)
            self._say(f"{number} of {len(blows)}: {blow.kind}, at {done} samples: {outcome}")
            figures.outcomes[blow.kind, outcome] += 1
        self._wait(lambda: not self._driver.is_running(), may_end=True)
        self._collect()
        figures.driver_starts = self._starts
        figures.coordinator_restarts = self._coordinator_restarts
        end = self._driver.wait()
        assert end.code == 0, end.out
        assert not self._rewritten, f"written twice: {sorted(map(str, self._rewritten))}"

    def _strike(self, kind: str, rng: random.Random) -> str:
        """Carry out one disturbance; return its outcome."""
        if kind in ACTORS:
            _kill_one(self._wait_for_processes(ACTORS[kind]), rng)
            return "went on"
        if kind in SIGNALS:
            return self._signal(SIGNALS[kind], rng)
        if kind in DISK:
            return self._break_disk(kind)
        return {"raylet": self._lose_node, "driver": self._kill_driver, "clock": self._set_clock}.get(
            kind, lambda: self._edit(rng)
        )()

    def _start(self, *args: str) -> Process:
        env = {**self._cluster.env, **(self._disk.env if self._disk is not None else {})}
        return self._study.start("--address", self._cluster.address, *OPTIONS, *args, env=env)

    def _restart(self) -> None:
        self._no_orphans()
        self._driver = self._start("--resume")
        self._starts += 1

    # --- the driver

    def _stop(self) -> None:
        self._collect()
        self._driver.kill()
        self._driver.wait()
        self._no_orphans()

    def _kill_driver(self) -> str:
        self._stop()
        self._restart()
        return "resumed"

    def _signal(self, number: signal.Signals, rng: random.Random) -> str:
        """Signal a working or just started driver; check its exit code and last message."""
        moment = "at work"
        if rng.random() < 0.5:
            self._kill_driver()
            # On a busy machine Python may take seconds to start; during these no handler exists.
            self._wait(lambda: self._driver.catches(signal.SIGTERM))
            self._pause(rng.uniform(0.0, 10.0))
            moment = "while it starts"
        self._driver.kill(number)
        end = self._end(128 + number)
        assert "--resume" in end, end
        self._restart()
        return f"exit {128 + number} {moment}, resumed"

    def _break_disk(self, kind: str) -> str:
        """Let the disk fail until the driver ends."""
        assert self._disk is not None
        what = DISK[kind]
        self._disk.fail(what)
        try:
            out = self._end(1)
        finally:
            self._disk.mend()
        assert BadDisk.ERRORS[what] in out, out
        self._restart()
        return "exit 1 with the reason, resumed"

    def _set_clock(self) -> str:
        """Try to take the directory with a clock ahead of time; then continue with a clock set back."""
        ahead, behind = (wrong_clock(self._study.folder, hours * 3600) for hours in (2, -2))
        self._wait((self._study.output / ".lock").exists)
        second = self._study.run(*INLINE, env=ahead)
        assert self._driver.is_running()
        assert second.code == 2, second.out
        self._stop()
        done = self._study.samples_on_disk()
        early = self._study.start(*INLINE, env=behind)
        early.wait_for(lambda: self._study.samples_on_disk() > done)
        early.kill(signal.SIGTERM)
        end = early.wait()
        assert end.code == 128 + signal.SIGTERM, end.out
        self._watch_files()
        self._restart()
        return "second driver refused, resumed 2 h earlier"

    # --- the dataset

    def _edit(self, rng: random.Random) -> str:
        """Edit an explained row and restore it: each time first refused, then only this row done again."""
        self._wait(lambda: bool(self._complete_rows()))
        self._stop()
        row = rng.choice(sorted(self._complete_rows()))
        file = self._study.folder / "rows.parquet"
        original = file.read_bytes()
        reverse_prompt(file, row)
        refused = self._study.run(*INLINE)
        assert refused.code == 2, refused.out
        assert re.search(r"\b1\b.*\brow", refused.out), refused.out
        self._accept(row)
        file.write_bytes(original)
        self._accept(row)
        self.edited.add(row)
        self._restart()
        return "refused, that row done again"

    def _accept(self, row: int) -> None:
        """Continue with the changed row until it is done again; no other sample may be written again."""
        self._watch_files()
        before = dict(self._written)
        mine = set(self._study.output.glob(f"*/samples/sample_{row:05d}_result.json"))
        again = self._study.start(*INLINE, "--accept-changed-rows")
        again.wait_for(lambda: all(path.exists() and _stamp(path) != before[path] for path in mine))
        again.kill(signal.SIGTERM)
        end = again.wait()
        assert end.code in {0, 128 + signal.SIGTERM}, end.out
        for path in mine:
            del self._written[path]
        self._watch_files()

    def _complete_rows(self) -> set[int]:
        """Return the rows explained by every run."""
        found = Counter(
            int(path.name.split("_")[1]) for path in self._study.output.glob("*/samples/sample_*.json")
        )
        runs = len(list(self._study.output.glob("*/spec.json")))
        return {row for row, count in found.items() if count == runs}

    # --- helpers

    def _lose_node(self) -> str:
        """Kill the second node and start another one."""
        self._wait(self._has_second_node)
        raylet = self._second.raylet()
        assert raylet is not None
        raylet.kill()
        self._second = self._cluster.add_node(cpus=1, wait=False)
        return "went on"

    def _has_second_node(self) -> bool:
        """Return whether the second node runs; restart it after a failed start on a busy machine."""
        if self._second.has_ended():
            self._second = self._cluster.add_node(cpus=1, wait=False)
        return self._second.raylet() is not None and self._second.has_started()

    def _end(self, code: int) -> str:
        """Wait for the driver's end with `code`; return its output."""
        deadline = time.monotonic() + END_S
        while self._driver.is_running():
            self._watch_files()
            assert time.monotonic() < deadline, f"no end in {END_S:g} s:\n{self._driver.out}"
            time.sleep(0.1)
        self._collect()
        end = self._driver.wait()
        assert end.code == code, f"exit {end.code} instead of {code}:\n{end.out}"
        return end.out

    def _wait_for_processes(self, name: str) -> list[psutil.Process]:
        self._wait(lambda: any(self._cluster.processes(name)))
        return list(self._cluster.processes(name))

    def _no_orphans(self) -> None:
        """Check that no process of an ended driver is alive."""
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
        """Record each sample's file, and whether it was replaced."""
        for path in self._study.output.glob("*/samples/sample_*.json"):
            now = _stamp(path)
            if self._written.setdefault(path, now) != now:
                self._rewritten.add(path)

    def _collect(self) -> None:
        self._coordinator_restarts += self._driver.out.count("the coordinator is back")


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns


def _kill_one(processes: Sequence[psutil.Process], rng: random.Random) -> None:
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
        rng.choice(sorted(processes, key=lambda process: process.pid)).kill()


def reverse_prompt(file: Path, row: int) -> None:
    """Reverse the words of one row's prompt."""
    rows = pq.read_table(file).to_pylist()
    rows[row]["prompt"] = " ".join(reversed(rows[row]["prompt"].split()))
    pq.write_table(pa.Table.from_pylist(rows), file)


def possible_kinds() -> tuple[dict[str, str], list[str]]:
    """Return (kind -> reason, for kinds that are impossible here; possible kinds)."""
    missing: dict[str, str] = {}
    if not has_compiler():
        missing |= dict.fromkeys((*DISK, "clock"), "there is no C compiler")
    return missing, [kind for kind in KINDS if kind not in missing]


def run_chaos(
    folder: Path,
    *,
    seed: int,
    blows: int,
    rows: int,
    words: int,
    kinds: Sequence[str] = KINDS,
    longest_delay_s: float = 8.0,
    batch_s: float = 0.0,
    say: Callable[[str], None] = print,
) -> Figures:
    """Run a study undisturbed and under chaos; both must have equal results.

    Under chaos every batch of the model takes `batch_s` seconds longer, so that the blows hit it at work.
    Kinds that are impossible on this machine are named and left out.

    Raises:
        AssertionError: When a result is lost, made twice, or different.
    """
    figures = Figures(seed, units=rows)
    missing, possible = possible_kinds()
    kinds = [kind for kind in kinds if kind in possible]
    for kind, reason in missing.items():
        say(f"not tried: {kind}: {reason}")
    undisturbed = Study(folder / "undisturbed", rows=rows, words=words)
    disturbed = Study(folder / "disturbed", rows=rows, words=words, settings={"wandb": WANDB})
    with timed(figures, "undisturbed_s"):
        assert undisturbed.call("--inline").code == 0
    expected = results(undisturbed.output)
    figures.samples = undisturbed.samples_on_disk()
    rng = random.Random(seed)
    plan = plan_blows(rng, kinds, blows, figures.samples, longest_delay_s)
    say(f"seed {seed}: {json.dumps([[blow.kind, blow.samples, round(blow.delay_s, 2)] for blow in plan])}")
    saboteur = Sabotage(folder)
    saboteur.set(batch_s=batch_s)
    disk = BadDisk(folder, disturbed.output) if set(DISK) & set(kinds) else None
    env = {**saboteur.env, **(disk.env if disk is not None else {})}
    disturbed.env = saboteur.env
    with LoopbackCluster(cpus=2, env=env) as cluster, timed(figures, "seconds"):
        chaos = Chaos(disturbed, cluster, disk, say)
        chaos.carry_out(plan, rng, figures)
    check = disturbed.run(verb="verify")
    assert check.code == 0, check.out
    found = results(disturbed.output)
    assert found.keys() == expected.keys()
    differing = [path for path in expected if found[path] != expected[path]]
    assert not differing, f"{len(differing)} file(s) differ, such as {differing[0]}"
    figures.logged = check_history(disturbed.output, chaos.edited)
    return figures

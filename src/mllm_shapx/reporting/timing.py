"""The rate of the work and the time left, from what was done and when."""

import math
import time
from collections.abc import Callable

SHORT_GAP_S = 2.0
"""Seconds between two updates with new work that are usual in every study."""


class Rate:
    """Work per second by exponential smoothing: recent seconds weigh most.

    Args:
        half_life_s: Age at which a second weighs half. It may be a function of the seconds since the first
            observation.
    """

    def __init__(self, half_life_s: float | Callable[[float], float]) -> None:
        self._half_life = half_life_s if callable(half_life_s) else lambda _: half_life_s
        self._first: float | None = None
        self._last = (0.0, 0.0)
        self._work = 0.0
        self._seconds = 0.0

    def observe(self, at: float, done: float) -> None:
        """Record that `done` units of work were finished at second `at`. Both only grow.

        Work that is done at the first observation is not part of the rate.
        """
        if self._first is None:
            self._first, self._last = at, (at, done)
            return
        seconds, work = at - self._last[0], max(0.0, done - self._last[1])
        if seconds <= 0.0:
            return
        half_lives = seconds / self._half_life(at - self._first)
        keep = 0.5**half_lives
        # The work of a step is spread evenly over its seconds, and the older ones already weigh less.
        fresh = (1.0 - keep) / (math.log(2.0) * half_lives)
        self._work = self._work * keep + work * fresh
        self._seconds = self._seconds * keep + seconds * fresh
        self._last = (at, max(done, self._last[1]))

    @property
    def per_second(self) -> float | None:
        """Return the rate, None before two observations."""
        return self._work / self._seconds if self._seconds > 0.0 else None


class TimeLeft:
    """Seconds until all expected work is done.

    Work is counted in *expected* model calls: a finished unit counts as much as was expected of it. The
    measured rate corrects an expectation that is wrong by a factor. The rate is a `lasting_rate`: it forgets
    a slow start, and one large unit does not make the estimate jump.

    Work arrives in lumps. The rate is measured from lump to lump. The time since the last lump only counts
    once it is longer than usual.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rate = lasting_rate()
        self._start: tuple[float, float] | None = None
        """Time and work of the first update."""
        self._done = 0.0
        self._lost = 0.0
        self._heard = 0.0
        """Time of the last lump."""
        self._longest_gap = 0.0
        self._left: float | None = None

    def update(self, done: float, total: float) -> None:
        """Record the expected calls that are done (parts of running units included) and the total.

        Call it at least every few seconds, also without new work: a standstill lowers the rate. The first
        call sets the start; make it when the workers are ready.
        """
        now = self._clock()
        self._left = max(0.0, total - done)
        # Work can be lost, with a worker or when the coordinator is started again.
        self._lost = max(self._lost, self._done - done)
        done += self._lost
        if self._start is None:
            self._start, self._done, self._heard = (now, done), done, now
        elif done > self._done:
            if self._has_lump:
                self._longest_gap = max(self._longest_gap, now - self._heard)
            self._done, self._heard = done, now
            self._rate.observe(now, done)
        elif self._has_lump and now - self._heard > self._usual_gap:
            self._rate.observe(now, done)

    @property
    def seconds(self) -> float | None:
        """Return the seconds left, None while nothing was measured."""
        if not self._left or self._start is None:
            return self._left
        now = self._clock()
        is_usual = now - self._heard <= self._usual_gap
        rate = self._rate.per_second
        if not rate:  # there is one lump at most, which is measured from the start
            elapsed = (self._heard if is_usual else now) - self._start[0]
            rate = (self._done - self._start[1]) / elapsed if elapsed else 0.0
        if not rate:
            return None
        return max(0.0, self._left / rate - (now - self._heard if is_usual else 0.0))

    @property
    def _has_lump(self) -> bool:
        return self._start is not None and self._done > self._start[1]

    @property
    def _usual_gap(self) -> float:
        return max(SHORT_GAP_S, 2.0 * self._longest_gap)


def lasting_rate() -> Rate:
    """Return a rate whose memory grows with the run: its half-life is half of the run, at least 20 s."""
    return Rate(lambda elapsed: max(20.0, elapsed / 2.0))


def format_duration(seconds: float) -> str:
    """Return a duration in at most two units: `45s`, `1m 12s`, `2h 05m`, `3d 04h`."""
    whole = max(0, round(seconds))
    minutes, secs = divmod(whole, 60)
    hours, mins = divmod(minutes, 60)
    days, hrs = divmod(hours, 24)
    if days:
        return f"{days}d {hrs:02d}h"
    if hours:
        return f"{hours}h {mins:02d}m"
    if minutes:
        return f"{minutes}m {secs:02d}s"
    return f"{secs}s"


def format_rate(per_second: float) -> str:
    """Return a rate with two or three digits: `212/s`, `3.4/s`, `24/min`."""
    if per_second >= 10.0:  # noqa: PLR2004 -- from there on a decimal says nothing
        return f"{per_second:,.0f}/s"
    if per_second >= 1.0:
        return f"{per_second:.1f}/s"
    per_minute = per_second * 60.0
    return f"{per_minute:.0f}/min" if per_minute >= 10.0 else f"{per_minute:.1f}/min"  # noqa: PLR2004


def count_workers(count: int | None) -> str:
    """Return a number of workers in words."""
    return "one worker" if count == 1 else f"{count} workers"

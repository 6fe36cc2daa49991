"""How fast the work goes and how long the rest takes, from what was done and when."""

import math
import time
from collections.abc import Callable

SHORT_GAP_S = 2.0
"""Seconds without news that are usual in every study."""


class Rate:
    """Work per second, the recent past weighing most (exponential smoothing over unequal steps).

    Args:
        half_life_s: Age at which a second of the past weighs half; a callable gets the seconds since the
            first observation.
    """

    def __init__(self, half_life_s: float | Callable[[float], float]) -> None:
        self._half_life = half_life_s if callable(half_life_s) else lambda _: half_life_s
        self._first: float | None = None
        self._last = (0.0, 0.0)
        self._work = 0.0
        self._seconds = 0.0

    def observe(self, at: float, done: float) -> None:
        """Take in that `done` units of work stood finished at second `at`; neither may shrink.

        The first observation is where counting starts: what was done before it is no part of the rate.
        """
        if self._first is None:
            self._first, self._last = at, (at, done)
            return
        seconds, work = at - self._last[0], max(0.0, done - self._last[1])
        if seconds <= 0.0:
            return
        keep = 0.5 ** (seconds / self._half_life(at - self._first))
        # A long step is itself the past: its own work decays over it, evenly spread.
        fresh = (1.0 - keep) / (math.log(2.0) * seconds / self._half_life(at - self._first))
        self._work = self._work * keep + work * fresh
        self._seconds = self._seconds * keep + seconds * fresh
        self._last = (at, max(done, self._last[1]))

    @property
    def per_second(self) -> float | None:
        """Return the rate, None before two observations."""
        return self._work / self._seconds if self._seconds > 0.0 else None


class TimeLeft:
    """Seconds until all expected work is done.

    Work is counted in *expected* model calls: a finished unit counts for what was expected of it, not for
    what it took, so that an expectation that is off by a factor is corrected by the measured rate. The
    memory grows with the run (half-life half of its length, at least 20 s): a start-up hiccup is
    forgotten, and one heavy unit does not make the estimate jump.

    Work is heard of in lumps. The rate is taken from lump to lump, so that neither the wait for the first
    one nor the time since the last one counts as slowness, as long as the latter is no longer than usual.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._from_start = lasting_rate()
        self._from_first_lump = lasting_rate()
        self._start_done: float | None = None
        self._done = 0.0
        self._lost = 0.0
        self._heard = 0.0
        self._longest_gap = 0.0
        self._left: float | None = None

    def update(self, done: float, total: float) -> None:
        """Take in the expected calls that are done (parts of running units included) and those in all.

        Call it at least every few seconds, also when nothing was done: standing still is a rate too. The
        first call sets the start; make it when the workers are ready.
        """
        now = self._clock()
        self._left = max(0.0, total - done)
        # What was done can be lost: with a worker, or with what a coordinator knew that was restarted.
        self._lost = max(self._lost, self._done - done)
        done += self._lost
        if self._start_done is None:
            self._start_done = self._done = done
            self._heard = now
            self._from_start.observe(now, done)
        elif done > self._done:
            if self._done > self._start_done:
                self._longest_gap = max(self._longest_gap, now - self._heard)
            self._done, self._heard = done, now
            self._observe(now)
        elif now - self._heard > self._usual_gap:
            self._observe(now)

    @property
    def seconds(self) -> float | None:
        """Return the seconds left, None while nothing was measured."""
        if not self._left:
            return self._left
        rate = self._from_first_lump.per_second or self._from_start.per_second
        if not rate:
            return None
        waited = self._clock() - self._heard
        return max(0.0, self._left / rate - (waited if waited <= self._usual_gap else 0.0))

    def _observe(self, now: float) -> None:
        self._from_start.observe(now, self._done)
        if self._start_done is not None and self._done > self._start_done:
            self._from_first_lump.observe(now, self._done)

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

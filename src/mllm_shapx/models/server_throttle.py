"""Adapts the number of requests in flight: up while throughput grows, halved on overload."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator

START = 4
DOUBLE = 2.0
STEP = 1.5
"""Factor of a step that is no doubling."""
WORTH = 0.25
"""A limit that is f times another one is better if throughput is more than f^WORTH times as high."""
TRIAL_ROUNDS = 3
"""Rounds for which a step is measured; one for a doubling, whose gain is large."""
HOLD_ROUNDS = 8
"""Rounds at a limit that was found best, after which the next step is tried."""


class Throttle:
    """Limits the requests in flight; waiting ones are served in order.

    A round is as many answers as there may be requests in flight. The limit doubles while that is worth it.
    When a step is not, the limit goes back, and after some rounds another step is tried: up, or once down
    after each step up, since a noisy measurement may have made that look worth it. A step up that is worth it
    is followed by doubling, but a limit at which the server was overloaded is approached by halving the
    distance, and tried again only after a hold. For one event loop.

    Args:
        most: Requests in flight at most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = min(START, most)
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._not_before = 0.0
        self._cut_at = 0.0
        self._best: tuple[int, float] | None = None
        """The best limit so far and its throughput; None while the limit in use is measured anew."""
        self._factor = DOUBLE
        """The next step up."""
        self._doubts = False
        """Whether the last step that was worth it went up, and no step down was tried since."""
        self._overload: int | None = None
        """The limit at the last overload, until it is tried again."""
        self._rounds = 1
        """Rounds of the measurement under way."""
        self._since: tuple[float, int] | None = None
        """When that began, and the answers since."""
        self._busy_since = 0.0
        self._busy = 0.0
        self.in_flight = 0

    @property
    def limit(self) -> int:
        """Return the requests that may be in flight now."""
        return self._limit

    @property
    def busy_seconds(self) -> float:
        """Return the time in which some request was in flight."""
        return self._busy + (time.monotonic() - self._busy_since if self.in_flight else 0.0)

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[float]:
        """Wait until a request may be sent; yield that time."""
        await self._enter()
        try:
            yield time.monotonic()
        finally:
            self._leave()

    def succeeded(self) -> None:
        """Record an answer."""
        now = time.monotonic()
        if not self._waiting or self.in_flight > self._limit:
            self._since = None  # fewer or more requests are in flight than the limit says
            return
        if self._since is None:
            self._since = (now, 0)
            return
        begun, count = self._since[0], self._since[1] + 1
        self._since = (begun, count)
        if count >= self._rounds * self._limit and now > begun:
            self._measured(count / (now - begun))

    def too_many(self, sent_at: float) -> None:
        """Halve the limit; requests sent before the last cut do not halve it again."""
        if sent_at > self._cut_at:
            self._cut_at = time.monotonic()
            self._overload = self._limit
            half = max(1, self._limit // 2)
            self._begin_again(half, STEP, TRIAL_ROUNDS if half + 1 < self._overload else HOLD_ROUNDS)

    def away(self) -> None:
        """Send one request at a time until the server answers again."""
        self._cut_at = time.monotonic()
        self._begin_again(1, DOUBLE, 1)

    def pause(self, seconds: float) -> None:
        """Send nothing for `seconds`."""
        until = time.monotonic() + seconds
        if until > self._not_before:
            self._not_before = until
            self._since = None  # the pause says nothing about the throughput
            asyncio.get_running_loop().call_later(seconds, self._wake)

    # --- finding the limit

    def _measured(self, rate: float) -> None:
        """Take the throughput of the limit in use, in answers per second; choose the next limit."""
        limit = self._limit
        if self._best is None:
            self._best = (limit, rate)
            self._step(down=self._doubts and self._factor < DOUBLE)
            return
        best, best_rate = self._best
        is_worth_it = rate > best_rate * (limit / best) ** WORTH
        if is_worth_it:
            self._best = (limit, rate)
            if limit > best:
                self._factor, self._doubts = DOUBLE, True
            self._step(down=limit < best)
            return
        if limit < best:
            self._doubts = False
        self._begin_again(best, STEP, HOLD_ROUNDS, doubts=self._doubts)

    def _step(self, *, down: bool) -> None:
        """Try another limit; measure the same one again where there is none."""
        limit = self._limit
        other = int(limit / STEP) if down else self._higher
        if other in {0, limit}:
            self._begin_again(limit, STEP, HOLD_ROUNDS, doubts=self._doubts and not down)
        else:
            self._set(other, 1 if other >= DOUBLE * limit else TRIAL_ROUNDS)

    @property
    def _higher(self) -> int:
        """Return the next limit upwards; the one in use where that is to be held."""
        limit, overload = self._limit, self._overload
        higher = min(self._most, max(limit + 1, int(limit * self._factor)))
        if overload is None or higher < overload:
            return higher
        if limit + 1 < overload:
            return (limit + overload) // 2
        if self._factor == DOUBLE:
            return limit
        self._overload = None
        return min(self._most, limit + 1)

    def _begin_again(self, limit: int, factor: float, rounds: int, *, doubts: bool = False) -> None:
        """Measure a limit anew, for so many rounds, before the next step."""
        self._best, self._factor, self._doubts = None, factor, doubts
        self._set(limit, rounds)

    def _set(self, limit: int, rounds: int) -> None:
        self._limit, self._rounds, self._since = limit, rounds, None
        self._wake()

    # --- slots

    async def _enter(self) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._wake()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()
            raise

    def _leave(self) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self._busy += time.monotonic() - self._busy_since
        self._wake()

    def _wake(self) -> None:
        if self._waiting and time.monotonic() < self._not_before:
            asyncio.get_running_loop().call_later(self._not_before - time.monotonic(), self._wake)
            return
        while self._waiting and self.in_flight < self._limit:
            turn = self._waiting.popleft()
            if turn.done():  # cancelled
                continue
            if not self.in_flight:
                self._busy_since = time.monotonic()
            self.in_flight += 1
            turn.set_result(None)

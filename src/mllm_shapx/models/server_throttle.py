"""Adapts the number of requests in flight: up while throughput grows, halved on overload."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator

START = 4
GAIN = 1.05
"""Factor by which throughput must grow for the limit to rise."""
HOLD = 8
"""Rounds without a gain after which one more request is tried."""


class Throttle:
    """Limits the requests in flight; waiting ones are served in order.

    A round is as many answers as there may be requests in flight. While throughput grows from round to round
    the number doubles, and after the first setback it grows by one. For one event loop.

    Args:
        most: Requests in flight at most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = float(min(START, most))
        self._doubling = True
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._not_before = 0.0
        self._cut_at = 0.0
        self._round: tuple[float, int] | None = None
        self._best = 0.0
        self._held = 0
        self._busy_since = 0.0
        self._busy = 0.0
        self.in_flight = 0

    @property
    def limit(self) -> int:
        """Return the requests that may be in flight now."""
        return max(1, int(self._limit))

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
            self.in_flight -= 1
            if not self.in_flight:
                self._busy += time.monotonic() - self._busy_since
            self._wake()

    def succeeded(self) -> None:
        """Record an answer."""
        now = time.monotonic()
        if not self._waiting:
            self._round = None  # not all slots are used: the throughput says nothing
            return
        if self._round is None:
            self._round = (now, 0)
            return
        begun, count = self._round[0], self._round[1] + 1
        self._round = (begun, count)
        if count >= self.limit and now > begun:
            self._round = (now, 0)
            self._adapt(count / (now - begun))

    def too_many(self, sent_at: float) -> None:
        """Halve the limit; requests sent before the last cut do not halve it again."""
        if sent_at > self._cut_at:
            self._cut_at = time.monotonic()
            self._limit = max(1.0, self._limit / 2)
            self._start_over(doubling=False)

    def away(self) -> None:
        """Send one request at a time until the server answers again."""
        self._cut_at = time.monotonic()
        self._limit = 1.0
        self._start_over(doubling=True)

    def pause(self, seconds: float) -> None:
        """Send nothing for `seconds`."""
        until = time.monotonic() + seconds
        if until > self._not_before:
            self._not_before = until
            asyncio.get_running_loop().call_later(seconds, self._wake)

    def _start_over(self, *, doubling: bool) -> None:
        self._doubling = doubling
        self._round, self._best, self._held = None, 0.0, 0

    def _adapt(self, rate: float) -> None:
        if rate > GAIN * self._best:
            self._best, self._held = rate, 0
            self._limit = self._limit * 2 if self._doubling else self._limit + 1
        else:
            self._doubling = False
            self._held += 1
            if self._held >= HOLD:
                # The server's speed may have changed: measure again.
                self._best, self._held = rate, 0
                self._limit += 1
        self._limit = min(self._limit, float(self._most))
        self._wake()

    async def _enter(self) -> None:
        if self._waiting or not self._is_open():
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            self._wake()
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._leave_unused()
                raise
        else:
            self._take()

    def _take(self) -> None:
        if not self.in_flight:
            self._busy_since = time.monotonic()
        self.in_flight += 1

    def _leave_unused(self) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self._busy += time.monotonic() - self._busy_since
        self._wake()

    def _is_open(self) -> bool:
        return self.in_flight < self.limit and time.monotonic() >= self._not_before

    def _wake(self) -> None:
        if self._waiting and time.monotonic() < self._not_before:
            asyncio.get_running_loop().call_later(self._not_before - time.monotonic(), self._wake)
            return
        while self._waiting and self._is_open():
            turn = self._waiting.popleft()
            if not turn.done():
                self._take()
                turn.set_result(None)

"""The number of requests in flight against simulated servers, on a clock of their own."""

import asyncio
import random
import selectors
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mllm_shapx.models import server_throttle
from mllm_shapx.models.server_throttle import START, Throttle

Curve = Callable[[int], float]
"""Requests in flight -> answers per second."""

MOST = 256
SEEDS = range(8)


class _Clock(asyncio.SelectorEventLoop):
    """A loop whose sleeps take no time."""

    def __init__(self) -> None:
        self.now = 1.0
        self._real = selectors.DefaultSelector()
        super().__init__(SimpleNamespace(  # type: ignore[arg-type]
            select=self._select,
            register=self._real.register,
            unregister=self._real.unregister,
            modify=self._real.modify,
            get_map=self._real.get_map,
            get_key=self._real.get_key,
            close=self._real.close,
        ))  # fmt: skip

    def time(self) -> float:
        return self.now

    def _select(self, timeout: float | None) -> list[Any]:
        assert timeout is not None, "nothing will ever happen"
        self.now += timeout
        return self._real.select(0)


class Server:
    """Answers `curve(n)` requests a second with n in flight, times a noise of 10 % that changes each second.

    Args:
        curve: The throughput.
        throttle: What limits the requests.
        seed: Of the noise.
        refuses_above: Requests in flight beyond which it answers 429.
    """

    def __init__(self, curve: Curve, throttle: Throttle, seed: int, refuses_above: float = 1e9) -> None:
        self.curve = curve
        self.throttle = throttle
        self.refuses_above = refuses_above
        self.limits: list[int] = []
        """The limit at each answer."""
        self.refused = 0
        self._rng = random.Random(seed)
        self.noise: dict[int, float] = {}
        """Second -> factor."""

    async def ask(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            async with self.throttle.slot() as sent_at:
                if self.throttle.in_flight > self.refuses_above:
                    self.refused += 1
                    self.throttle.too_many(sent_at)
                    self.throttle.pause(0.25)
                    continue
                left = 1.0  # of the work of one request
                while left > 0.0:
                    noise = self.noise.setdefault(int(loop.time()), self._rng.gauss(1.0, 0.1))
                    n = self.throttle.in_flight
                    speed = max(0.1, noise) * self.curve(n) / n
                    step = min(0.25, left / speed)
                    await asyncio.sleep(step)
                    left -= step * speed + 1e-9
                self.throttle.succeeded()
                self.limits.append(self.throttle.limit)
                return


def serve(monkeypatch: pytest.MonkeyPatch, play: Callable[[], Awaitable[Server]]) -> Server:
    """Return the server after a play on a clock of its own."""
    loop = _Clock()
    monkeypatch.setattr(server_throttle, "time", SimpleNamespace(monotonic=loop.time))
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(play())  # type: ignore[arg-type]


def limits_of(
    monkeypatch: pytest.MonkeyPatch,
    curve: Curve,
    answers: int,
    seed: int,
    *,
    noise: dict[int, float] | None = None,
    **server: float,
) -> Server:
    async def play() -> Server:
        asked = Server(curve, Throttle(MOST), seed, **server)
        asked.noise |= noise or {}
        await asyncio.gather(*(asked.ask() for _ in range(answers)))
        return asked

    return serve(monkeypatch, play)


def linear_to(most: int) -> Curve:
    return lambda n: float(min(n, most))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_server_that_takes_64_gets_them_in_spite_of_noise(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = limits_of(monkeypatch, linear_to(64), 3000, seed).limits
    assert max(limits[:1000]) >= 48
    settled = sorted(limits[1500:-MOST])
    assert settled[len(settled) // 2] >= 48


@pytest.mark.parametrize("second", [2, 3, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_slow_moment_does_not_end_the_growth(
    seed: int, second: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = dict.fromkeys(range(second, second + 3), 0.3)
    assert max(limits_of(monkeypatch, linear_to(64), 1200, seed, noise=slow).limits) >= 48


@pytest.mark.parametrize("seed", SEEDS)
def test_a_server_that_takes_8_is_not_flooded(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = limits_of(monkeypatch, linear_to(8), 3000, seed).limits
    settled = sorted(limits[500:-MOST])
    assert settled[len(settled) // 20] >= 5
    assert settled[len(settled) // 2] <= 12
    assert settled[-1] <= 36


@pytest.mark.parametrize("seed", SEEDS)
def test_a_halved_limit_recovers(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> Server:
        server = Server(linear_to(64), Throttle(MOST), seed)
        work = [asyncio.ensure_future(server.ask()) for _ in range(4000)]
        await asyncio.wait(work[:1500])
        before = server.throttle.limit
        server.throttle.too_many(asyncio.get_running_loop().time())
        assert server.throttle.limit == before // 2
        server.limits.clear()
        await asyncio.gather(*work)
        return server

    limits = serve(monkeypatch, play).limits
    assert max(limits[1:1000]) >= 48


@pytest.mark.parametrize("seed", SEEDS)
def test_a_server_that_refuses_more_than_8_is_kept_busy_and_seldom_asked_too_often(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = limits_of(monkeypatch, linear_to(64), 2000, seed, refuses_above=8)
    limits = server.limits[200:-MOST]
    assert server.refused < 100
    assert sum(limits) / len(limits) > 6.0


def test_one_request_at_a_time_finds_out_whether_the_server_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> Server:
        server = Server(linear_to(64), Throttle(MOST), 0)
        server.throttle.away()
        assert server.throttle.limit == 1
        await asyncio.gather(*(server.ask() for _ in range(1000)))
        return server

    assert max(serve(monkeypatch, play).limits) >= 48


@pytest.mark.parametrize("most", [1, 2, 5])
def test_the_bound_is_kept(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> Server:
        server = Server(linear_to(64), Throttle(most), 0)
        assert server.throttle.limit == min(START, most)
        await asyncio.gather(*(server.ask() for _ in range(500)))
        return server

    limits = serve(monkeypatch, play).limits
    assert max(limits) == most

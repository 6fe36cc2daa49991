"""Rate and time left against synthetic workloads with a clock of their own."""

import random

import pytest

from mllm_shapx.reporting.timing import Rate, TimeLeft, format_duration, format_rate


def simulate(
    expected: list[float], *, factor: float, slow_start: float, seed: int
) -> list[tuple[float, float]]:
    """Work off units at 0.02 s a call; return (estimate, truth) between 10% and 90% of the work.

    `factor` is how far the expected calls are off; calls of the first 3% of the work take `slow_start`
    times as long; every unit's speed varies by up to 20%.
    """
    draw = random.Random(seed)
    total = sum(expected)
    now, done = 0.0, 0.0
    left = TimeLeft(clock=lambda: now)
    left.update(0.0, total)
    history: list[tuple[float, float | None, float]] = []
    for cost in expected:
        slow = slow_start if done < 0.03 * total else 1.0
        now += cost * factor * 0.02 * slow * draw.uniform(0.8, 1.2)
        done += cost
        left.update(done, total)
        history.append((done, left.seconds, now))
    return [
        (estimate, now - at)
        for finished, estimate, at in history
        if 0.1 * total <= finished < 0.9 * total and estimate is not None
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("factor", [0.4, 1.0, 1.7])
@pytest.mark.parametrize("order", ["growing", "shrinking"])
def test_estimate_is_within_a_fifth_after_a_tenth(order: str, factor: float, seed: int) -> None:
    """Whether units grow or shrink over three orders of magnitude, expectations off or not, 20% is kept."""
    costs = [4.0 * 1.035**step for step in range(200)]
    pairs = simulate(costs if order == "growing" else costs[::-1], factor=factor, slow_start=1.0, seed=seed)
    assert pairs
    for estimate, truth in pairs:
        assert estimate == pytest.approx(truth, rel=0.2)


def test_slow_start_is_forgotten() -> None:
    """A start that is twice as slow is out of the estimate by a tenth of the work."""
    pairs = simulate([20.0] * 1000, factor=1.0, slow_start=2.0, seed=1)
    for estimate, truth in pairs:
        assert estimate == pytest.approx(truth, rel=0.2)


def test_work_of_earlier_starts_is_no_speed() -> None:
    """A resumed study that begins at 90% does not count these 90% as done by this start."""
    now = 0.0
    left = TimeLeft(clock=lambda: now)
    left.update(900.0, 1000.0)
    now = 10.0
    left.update(910.0, 1000.0)
    assert left.seconds == pytest.approx(90.0)


def test_standing_still_lengthens_the_estimate() -> None:
    """While nothing is finished the time left grows instead of staying at the old promise."""
    now = 0.0
    left = TimeLeft(clock=lambda: now)
    left.update(0.0, 100.0)
    now = 10.0
    left.update(50.0, 100.0)
    first = left.seconds
    now = 100.0
    left.update(50.0, 100.0)
    assert first == pytest.approx(10.0)
    assert left.seconds is not None
    assert left.seconds > 30.0


def test_unknown_until_measured_and_zero_at_the_end() -> None:
    """No estimate before anything was measured, none that divides by zero, and 0 when all is done."""
    now = 0.0
    left = TimeLeft(clock=lambda: now)
    assert left.seconds is None
    left.update(0.0, 10.0)
    assert left.seconds is None
    now = 5.0
    left.update(0.0, 10.0)
    assert left.seconds is None
    left.update(10.0, 10.0)
    assert left.seconds == 0.0


@pytest.mark.parametrize("gap", [0.7, 5.0, 60.0])
def test_waiting_for_news_is_no_slowness(gap: float) -> None:
    """Work that is heard of in lumps, the first one late, is timed as the steady work that it is."""
    now = 0.0
    left = TimeLeft(clock=lambda: now)
    lumps = 40
    for tick in range(int(30 * gap / 0.5)):
        now = tick * 0.5
        heard = max(0, int((now - 2 * gap) / gap))
        left.update(100.0 * heard, 100.0 * lumps)
        if heard >= 4:
            assert left.seconds is not None
            truth = (lumps + 3) * gap - now
            assert left.seconds == pytest.approx(truth, rel=0.15, abs=1.5 * gap)


def test_rate_does_not_hang_on_how_often_it_is_asked() -> None:
    """Steady work gives the same rate from a hundred short steps and from a few long ones."""
    for steps in (3, 100):
        rate = Rate(10.0)
        for step in range(steps + 1):
            rate.observe(step * 60.0 / steps, step * 600.0 / steps)
        assert rate.per_second == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.6, "1m 00s"),
        (72, "1m 12s"),
        (3599, "59m 59s"),
        (7500, "2h 05m"),
        (273_600, "3d 04h"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    """Durations take two units at most."""
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [(2120.4, "2,120/s"), (12.0, "12/s"), (3.44, "3.4/s"), (0.4, "24/min"), (0.02, "1.2/min")],
)
def test_rates_read_well(rate: float, text: str) -> None:
    """Slow work is given per minute."""
    assert format_rate(rate) == text


def test_lost_work_is_no_standstill() -> None:
    """When a worker dies, or a restarted coordinator counts from nought, the rate stays what it was."""
    now = 0.0
    left = TimeLeft(clock=lambda: now)
    for second in range(100):
        now = float(second)
        left.update(10.0 * second, 2000.0)
    for second in range(100, 110):
        now = float(second)
        left.update(10.0 * (second - 100), 1000.0)
    assert left.seconds == pytest.approx(91.0, rel=0.1)

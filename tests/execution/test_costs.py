"""What an answer costs, from what devices report."""

import random

import pytest

from mllm_shapx.execution.forecast import AnswerCost


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dear", [0.2, 1.0, 5.0])
def test_settings_are_told_apart_within_a_fifth(dear: float, seed: int) -> None:
    """Batches jitter by 20%; the second settings generate longer or shorter answers."""
    draw = random.Random(seed)
    cost, now = AnswerCost(), 0.0
    for _ in range(40):
        for key, times in (("a", 1.0), ("b", dear)):
            now += 64 * 0.01 * times
            cost.observe(now, 64 * 0.01 * times * draw.uniform(0.8, 1.2), {key: 64})
    assert cost.seconds("a") == pytest.approx(0.01, rel=0.2)
    assert cost.seconds("b") == pytest.approx(0.01 * dear, rel=0.2)


def test_settings_that_one_heartbeat_reports_share_its_time_by_what_they_cost() -> None:
    cost = AnswerCost()
    for at in range(3):
        cost.observe(float(at), 1.0, {"a": 100})
        cost.observe(float(at), 4.0, {"b": 100})
    for at in range(3, 60):
        cost.observe(float(at), 5.0, {"a": 100, "b": 100})
    assert cost.seconds("a") == pytest.approx(0.01, rel=0.1)
    assert cost.seconds("b") == pytest.approx(0.04, rel=0.1)


def test_nothing_is_predicted_from_next_to_nothing() -> None:
    cost = AnswerCost()
    assert cost.seconds("a") is None
    cost.observe(1.0, 0.0, {})
    for at in range(3):
        assert cost.seconds("a") is None
        cost.observe(float(at), 1.0, {"a": 10})
    assert cost.seconds("a") == pytest.approx(0.1)
    assert cost.seconds("unseen") == pytest.approx(0.1)


def test_what_warming_up_took_is_forgotten() -> None:
    cost = AnswerCost()
    for step in range(10):
        cost.observe(step * 10.0, 10.0, {"a": 10})
    for step in range(200):
        cost.observe(100.0 + step * 10.0, 1.0, {"a": 10})
    assert cost.seconds("a") == pytest.approx(0.1, rel=0.1)

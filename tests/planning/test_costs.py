"""What an answer costs, learnt from what devices report."""

import random

import pytest

from mllm_shapx.planning.costs import EARLY_S, AnswerCost, Generated


def left_after(share: float, *, slope: float, dear: float, seed: int) -> tuple[float, float]:
    """Work off rows of 80 to 6 players, longest first; return (predicted, true) seconds of what is left.

    A row's longest prompts come first. Answers cost 0.01 + slope * players; those of the second key
    `dear` times as much. Machines jitter by 20%.
    """
    draw = random.Random(seed)
    cost = AnswerCost()
    rows = [(key, players) for players in range(80, 5, -1) for key in ("a", "b")]
    batches = [
        (key, players, present)
        for key, players in rows
        for present in sorted((draw.randint(0, players) for _ in range(30)), reverse=True)
    ]
    now, true_left, predicted = 0.0, 0.0, 0.0
    for done, (key, players, present) in enumerate(batches):
        seconds = 64 * (0.01 + slope * present) * (dear if key == "b" else 1.0)
        if done < share * len(batches):
            now += seconds
            cost.observe(now, seconds * draw.uniform(0.8, 1.2), {key: Generated(64, 64 * present)})
        else:
            true_left += seconds
            predicted += 64 * (cost.seconds(key, players / 2) or 0.0)
    return predicted, true_left


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dear", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("slope", [0.0, 0.001, 0.01])
def test_what_is_left_is_foretold_after_a_tenth(slope: float, dear: float, seed: int) -> None:
    """Whether long prompts or other settings cost more or not, the prediction is within a fifth."""
    predicted, truth = left_after(0.1, slope=slope, dear=dear, seed=seed)
    assert predicted == pytest.approx(truth, rel=0.2)


def test_nothing_is_foretold_from_next_to_nothing() -> None:
    cost = AnswerCost()
    assert cost.seconds("a", 4.0) is None
    cost.observe(1.0, 0.0, {})
    for at in range(3):
        assert cost.seconds("a", 4.0) is None
        cost.observe(float(at), 1.0, {"a": Generated(10, 40)})
    assert cost.seconds("a", 4.0) == pytest.approx(0.1)
    assert cost.seconds("unseen", 4.0) == pytest.approx(0.1, rel=0.2)


def test_a_prediction_is_never_free() -> None:
    cost = AnswerCost()
    for present in range(30, 40):
        cost.observe(float(present), 0.1 * (present - 29), {"a": Generated(10, 10 * present)})
    assert (cost.seconds("a", 0.0) or 0.0) > 0.0


def test_what_warming_up_took_is_forgotten() -> None:
    cost = AnswerCost()
    for step in range(10):
        cost.observe(step * 10.0, 10.0, {"a": Generated(10, 40)})
    for step in range(200):
        cost.observe(100.0 + step * 10.0, 1.0, {"a": Generated(10, 40)})
    assert cost.seconds("a", 4.0) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("dear", [1.0, 2.5, 6.0])
def test_a_slow_start_is_not_taken_for_what_a_setting_costs(dear: float) -> None:
    """Both settings are met while all is twice as slow, and later one alone: the other is not overrated."""
    draw = random.Random(1)
    cost = AnswerCost()
    for step in range(100):
        now = 0.5 * step
        slower = 2.0 if now < EARLY_S else 1.0
        keys = {"a": 1.0, "b": dear} if now < EARLY_S / 2 else {"a": 1.0}
        for key, times in keys.items():
            seconds = 64 * 0.01 * times * slower * draw.uniform(0.8, 1.2)
            cost.observe(now, seconds, {key: Generated(64, 64 * 4)})
    assert cost.seconds("a", 4.0) == pytest.approx(0.01, rel=0.2)
    assert cost.seconds("b", 4.0) == pytest.approx(0.01 * dear, rel=0.25)


def test_few_measurements_never_make_players_cost_more_than_in_proportion() -> None:
    """Batches that get faster while prompts get shorter say little: half the players cost half at least."""
    cost = AnswerCost()
    for step, present in enumerate((9, 8, 7, 6)):
        cost.observe(0.5 * step, 64 * 0.01 * 2.0**-step, {"a": Generated(64, 64 * present)})
    usual, half = cost.seconds("a", 7.5), cost.seconds("a", 3.75)
    assert usual is not None
    assert half is not None
    assert usual / 2 <= half * 1.001
    assert half <= usual

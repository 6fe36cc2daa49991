"""The time left follows from what answers cost so far, and so does the queue's order."""

import random

import pytest

from mllm_shapx.config.models import ExperimentSet
from mllm_shapx.execution.forecast import REORDER_S, Forecast
from mllm_shapx.execution.ledger import Ledger
from mllm_shapx.execution.messages import Beat
from mllm_shapx.planning.sweep import expand
from mllm_shapx.planning.units import WorkUnit, plan_units


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def unit(row: int, key: str, cost: float) -> WorkUnit:
    return WorkUnit(f"{row}-{key}", row, row, key, key, ("run",), cost)


class Device:
    """A worker that does units one after the other, a batch of 50 at a time, and says so."""

    def __init__(self, forecast: Forecast, clock: Clock, seed: int) -> None:
        self.forecast, self.clock = forecast, clock
        self.draw = random.Random(seed)
        self.busy = 0.0
        self.generated: dict[str, int] = {}

    def do(self, unit: WorkUnit, *, twins: float = 0.0, stored: int = 0) -> None:
        """Generate a unit's answers, but for those that are stored and the share that are twins."""
        self.forecast.handed_out(unit, stored)
        answers = round((unit.cost - stored) * (1.0 - twins))
        for start in range(0, answers, 50):
            batch = min(50, answers - start)
            seconds = batch * self.each(unit.generation_key) * self.draw.uniform(0.9, 1.1)
            self.busy += seconds
            self.clock.now += seconds
            self.generated[unit.generation_key] = self.generated.get(unit.generation_key, 0) + batch
            self.forecast.observe("worker", Beat((), 0, self.busy, generated=dict(self.generated)))
        self.forecast.settled(unit)

    @staticmethod
    def each(key: str) -> float:
        return 0.004 * (4.0 if key == "dear" else 1.0)


@pytest.mark.parametrize("twins", [0.0, 0.4])
@pytest.mark.parametrize("seed", range(3))
def test_the_time_left_is_right_to_a_fifth_after_a_tenth(seed: int, twins: float) -> None:
    """Settings that cost four times as much count as such; coalitions with the same prompt cost nothing."""
    units = [unit(row, key, 400.0) for row in range(100) for key in ("key", "dear")]
    clock = Clock()
    forecast = Forecast(units, clock)
    assert forecast.seconds_left([]) is None
    device = Device(forecast, clock, seed)
    done, rest = [*units[:19], units[100]], [*units[19:100], *units[101:]]
    for each in done:
        device.do(each, twins=twins)
    truth = sum(400.0 * (1.0 - twins) * device.each(each.generation_key) for each in rest)
    assert forecast.seconds_left([]) == pytest.approx(truth, rel=0.2)
    assert forecast.device_seconds == pytest.approx(clock.now)


def test_stored_answers_are_no_speed_and_what_is_at_hand_is_no_more_to_do() -> None:
    units = [unit(row, "key", 500.0) for row in range(10)]
    clock = Clock()
    forecast = Forecast(units, clock)
    device = Device(forecast, clock, 0)
    for each in units[:4]:
        device.do(each, stored=250)
    each_s = device.each("key")
    assert forecast.seconds_left([]) == pytest.approx(6 * 500 * each_s, rel=0.25)
    before = forecast.seconds_left([]) or 0.0
    forecast.handed_out(units[4], 250)
    assert forecast.seconds_left([(units[4], 250.0)]) == pytest.approx(before * 5.5 / 6, rel=0.05)


def test_the_queue_is_ordered_by_what_answers_were_measured_to_cost() -> None:
    """Units of fewer answers that take longer overtake; what has the same cost keeps its order."""
    units = [
        *(unit(row, "cheap", 300.0) for row in range(6)),
        *(unit(row, "dear", 200.0) for row in range(6)),
    ]
    clock = Clock()
    forecast, ledger = Forecast(units, clock), Ledger(units)
    assert not forecast.is_order_due()
    device = Device(forecast, clock, 0)
    for each in (units[0], units[6]):
        device.do(each)
        ledger.settle(each.unit_id, ("run",))
    clock.now += REORDER_S
    assert forecast.is_order_due()
    assert not forecast.is_order_due()
    ledger.reorder(forecast.cost)
    handed_out = [ledger.lease(f"worker-{place}") for place in range(10)]
    assert handed_out == [*units[7:], *units[1:6]]


def test_one_generation_key_needs_no_new_order() -> None:
    clock = Clock()
    forecast = Forecast([unit(0, "key", 4.0), unit(1, "key", 2.0)], clock)
    clock.now += 10 * REORDER_S
    assert not forecast.is_order_due()


def test_plan_says_what_the_progress_line_said() -> None:
    units = [unit(row, "cheap", 2.0 ** (6 + row % 3)) for row in range(12)]
    clock = Clock()
    forecast = Forecast(units, clock)
    assert not forecast.pace([])
    device = Device(forecast, clock, seed=1)
    for each in units[:4]:
        device.do(each, twins=0.2)
    left = sum(each.cost * forecast.pace([])["cheap"] for each in units[4:])
    assert left == pytest.approx(forecast.seconds_left([]))


@pytest.mark.parametrize("warm_up_s", [0.0, 6.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_planned_study_knows_its_time_left_after_a_tenth(seed: int, warm_up_s: float) -> None:
    """Exact and sampling runs, some with three times the tokens, in the planned order."""
    draw = random.Random(seed)
    sampling = {
        "explainer_type": "standard_cc",
        "linear": [2.0],
        "generation_override": {"max_new_tokens": 24},
    }
    settings = {
        "experiment_set_id": "study",
        "generation": {"max_new_tokens": 8, "text_temperature": 0.0},
        "experiments": [{"explainer_type": "exact"}, {"fractions": [0.2, 0.5]}, sampling],
    }
    runs = expand(ExperimentSet.model_validate(settings)).runs
    players = {row: draw.randint(4, 11) for row in range(96)}
    units = plan_units(runs, list(players), players, {})
    tokens = {run.cost_key: run.generation.max_new_tokens for run in runs}
    clock = Clock()
    forecast = Forecast(units, clock)
    generated: dict[str, int] = {}
    done, said = 0.0, None
    for each in units:
        if said is None and done >= 0.1 * sum(unit.cost for unit in units):
            said = clock.now, forecast.seconds_left([])
        forecast.handed_out(each, 0)
        for start in range(0, round(each.cost), 64):
            batch = min(64, round(each.cost) - start)
            slower = 2.0 if clock.now < warm_up_s else 1.0
            clock.now += tokens[each.cost_key] * (0.004 + 0.0003 * batch) * slower * draw.uniform(0.85, 1.15)
            generated[each.cost_key] = generated.get(each.cost_key, 0) + batch
            forecast.observe("worker", Beat((), 0, clock.now, generated=dict(generated)))
        forecast.settled(each)
        done += each.cost
    assert said is not None
    assert said[1] == pytest.approx(clock.now - said[0], rel=0.2)

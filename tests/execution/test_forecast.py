"""The time left is told from what answers were measured to cost, and the queue's order follows it."""

import random

import pytest

from mllm_shapx.execution.forecast import REORDER_S, Forecast
from mllm_shapx.execution.ledger import Ledger
from mllm_shapx.execution.messages import Beat
from mllm_shapx.planning.costs import Generated
from mllm_shapx.planning.units import WorkUnit


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def unit(row: int, key: str, cost: float) -> WorkUnit:
    return WorkUnit(f"{row}-{key}", row, row, key, key, ("run",), cost)


class Device:
    """A worker that does units one after the other, a batch of 50 at a time, and says so."""

    def __init__(self, forecast: Forecast, clock: Clock, players: dict[int, int], seed: int) -> None:
        self.forecast, self.clock, self.players = forecast, clock, players
        self.draw = random.Random(seed)
        self.busy = 0.0
        self.generated: dict[str, Generated] = {}

    def do(self, unit: WorkUnit, *, twins: float = 0.0, stored: int = 0) -> None:
        """Generate a unit's answers, but for those that are stored and the share that are twins."""
        self.forecast.handed_out(unit, stored)
        answers = round((unit.cost - stored) * (1.0 - twins))
        for start in range(0, answers, 50):
            batch = min(50, answers - start)
            present = self.draw.randint(0, self.players[unit.row_index])
            seconds = batch * self.each(unit.generation_key, present) * self.draw.uniform(0.9, 1.1)
            self.busy += seconds
            self.clock.now += seconds
            before = self.generated.get(unit.generation_key, Generated())
            self.generated[unit.generation_key] = Generated(
                before.answers + batch, before.present + batch * present
            )
            self.forecast.observe("worker", Beat((), 0, self.busy, generated=dict(self.generated)))
        self.forecast.settled(unit)

    @staticmethod
    def each(key: str, present: float) -> float:
        return (0.002 + 0.001 * present) * (4.0 if key == "dear" else 1.0)


@pytest.mark.parametrize("twins", [0.0, 0.4])
@pytest.mark.parametrize("seed", range(3))
def test_long_rows_do_not_stand_for_short_ones(seed: int, twins: float) -> None:
    """After a tenth, all of long prompts, the rest is foretold to a fifth; twins cost nothing."""
    players = {row: 100 - row for row in range(95)}
    units = [unit(row, "key", 400.0) for row in players]
    clock = Clock()
    forecast = Forecast(units, players, clock)
    assert forecast.seconds_left([]) is None
    device = Device(forecast, clock, players, seed)
    for each in units[:10]:
        device.do(each, twins=twins)
    truth = sum(
        400.0 * (1.0 - twins) * device.each("key", players[each.row_index] / 2) for each in units[10:]
    )
    assert forecast.seconds_left([]) == pytest.approx(truth, rel=0.2)
    assert forecast.device_seconds == pytest.approx(clock.now)


def test_stored_answers_are_no_speed_and_what_is_at_hand_is_no_more_to_do() -> None:
    players = dict.fromkeys(range(10), 4)
    units = [unit(row, "key", 500.0) for row in players]
    clock = Clock()
    forecast = Forecast(units, players, clock)
    device = Device(forecast, clock, players, 0)
    for each in units[:4]:
        device.do(each, stored=250)
    each_s = device.each("key", 2)
    assert forecast.seconds_left([]) == pytest.approx(6 * 500 * each_s, rel=0.25)
    before = forecast.seconds_left([]) or 0.0
    forecast.handed_out(units[4], 250)
    assert forecast.seconds_left([(units[4], 250.0)]) == pytest.approx(before * 5.5 / 6, rel=0.05)


def test_the_queue_is_ordered_by_what_answers_were_measured_to_cost() -> None:
    """Units of fewer answers that take longer overtake; what has the same cost keeps its order."""
    players = dict.fromkeys(range(6), 4)
    units = [
        *(unit(row, "cheap", 300.0) for row in range(6)),
        *(unit(row, "dear", 200.0) for row in range(6)),
    ]
    clock = Clock()
    forecast, ledger = Forecast(units, players, clock), Ledger(units)
    assert not forecast.is_order_due()
    device = Device(forecast, clock, players, 0)
    for each in (units[0], units[6]):
        device.do(each)
        ledger.complete(each.unit_id)
    clock.now += REORDER_S
    assert forecast.is_order_due()
    assert not forecast.is_order_due()
    ledger.reorder(forecast.cost)
    handed_out = [ledger.lease(f"worker-{place}") for place in range(10)]
    assert handed_out == [*units[7:], *units[1:6]]


def test_one_generation_key_needs_no_new_order() -> None:
    clock = Clock()
    forecast = Forecast([unit(0, "key", 4.0), unit(1, "key", 2.0)], None, clock)
    clock.now += 10 * REORDER_S
    assert not forecast.is_order_due()


def test_the_pace_left_behind_foretells_what_the_progress_foretold() -> None:
    players = {row: 6 + row % 3 for row in range(12)}
    units = [unit(row, "cheap", 2.0 ** players[row]) for row in players]
    clock = Clock()
    forecast = Forecast(units, players, clock)
    assert not forecast.pace([])
    device = Device(forecast, clock, players, seed=1)
    for each in units[:4]:
        device.do(each, twins=0.2)
    pace = forecast.pace([])["cheap"]
    left = sum(each.cost * pace[players[each.row_index]] for each in units[4:])
    assert left == pytest.approx(forecast.seconds_left([]))

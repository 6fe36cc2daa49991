"""The queue's state machine, without Ray."""

import random

import pytest

from mllm_shapx.execution.ledger import Ledger, UnitState
from mllm_shapx.planning.units import WorkUnit


def units(count: int) -> list[WorkUnit]:
    return [WorkUnit(f"{row:05d}-key", row, row, "key", "key", ("exact",), 1.0) for row in range(count)]


def leased(ledger: Ledger, worker: str) -> str:
    unit = ledger.lease(worker)
    assert unit is not None
    return unit.unit_id


def test_units_are_handed_out_in_order_and_each_once() -> None:
    ledger = Ledger(units(3))
    assert [leased(ledger, "a"), leased(ledger, "b"), leased(ledger, "a")] == [
        "00000-key",
        "00001-key",
        "00002-key",
    ]
    assert ledger.lease("b") is None
    assert not ledger.is_finished


def test_a_completion_that_arrives_twice_counts_once() -> None:
    ledger = Ledger(units(1))
    unit = leased(ledger, "a")
    assert ledger.settle(unit, ("exact",))
    assert not ledger.settle(unit, ("exact",))
    assert ledger.is_finished
    assert ledger.count(UnitState.ENDED) == 1


def test_a_unit_alone_in_a_dead_worker_is_charged_and_quarantined_at_the_third_attempt() -> None:
    ledger = Ledger(units(1), max_attempts=3)
    verdicts = []
    for attempt in range(3):
        leased(ledger, f"w{attempt}")
        (blame,) = ledger.worker_lost(f"w{attempt}")
        verdicts.append((blame.charged, blame.attempts, blame.quarantined))
    assert verdicts == [(True, 1, False), (True, 2, False), (True, 3, True)]
    assert ledger.is_finished


def test_units_that_shared_a_dead_worker_are_not_charged_and_run_alone_next() -> None:
    ledger = Ledger(units(4))
    first, second = leased(ledger, "a"), leased(ledger, "a")
    assert [blame.charged for blame in ledger.worker_lost("a")] == [False, False]
    assert leased(ledger, "b") == first
    assert ledger.lease("b") is None, "a suspect shares its worker with nobody"
    ledger.settle(first, ("exact",))
    assert leased(ledger, "b") == second


def test_a_busy_worker_drains_for_a_suspect_while_others_go_on() -> None:
    ledger = Ledger(units(6))
    leased(ledger, "a")
    leased(ledger, "a")
    busy = leased(ledger, "b")
    leased(ledger, "c")
    ledger.worker_lost("a")
    assert ledger.lease("b") is None, "b makes room for the suspect"
    assert leased(ledger, "c") == "00004-key", "c need not wait"
    ledger.settle(busy, ("exact",))
    assert leased(ledger, "b") == "00000-key"


def test_a_preempted_worker_charges_nobody() -> None:
    ledger = Ledger(units(1), max_attempts=1)
    unit = leased(ledger, "a")
    (blame,) = ledger.worker_lost("a", innocent=True)
    assert (blame.charged, blame.quarantined) == (False, False)
    assert leased(ledger, "b") == unit
    assert ledger.attempts(unit) == 0


def test_an_error_is_charged_to_its_unit_and_a_final_one_quarantines_at_once() -> None:
    ledger = Ledger(units(2), max_attempts=2)
    first, second = leased(ledger, "a"), leased(ledger, "b")
    assert not ledger.error("a", first).quarantined
    ledger.settle(second, ("exact",))
    assert ledger.count(UnitState.ENDED) == 1
    leased(ledger, "a")
    assert ledger.error("a", first).quarantined


def test_an_error_from_a_worker_that_lost_the_lease_changes_nothing() -> None:
    ledger = Ledger(units(1))
    unit = leased(ledger, "a")
    ledger.worker_lost("a", innocent=True)
    leased(ledger, "b")
    assert not ledger.error("a", unit).charged
    assert ledger.holds("b", unit)


def test_reconciling_takes_back_a_lease_whose_hand_out_was_lost() -> None:
    ledger = Ledger(units(1))
    unit = leased(ledger, "a")
    assert ledger.reconcile("a", ()) == []
    assert leased(ledger, "b") == unit


def test_a_restarted_ledger_learns_from_the_workers_what_they_hold() -> None:
    ledger = Ledger(units(2))
    assert ledger.reconcile("a", ("00001-key",)) == []
    assert ledger.holds("a", "00001-key")
    assert leased(ledger, "b") == "00000-key"
    assert ledger.reconcile("c", ("00001-key",)) == ["00001-key"], "somebody else has it"
    ledger.settle("00001-key", ("exact",))
    assert ledger.reconcile("a", ("00001-key",)) == ["00001-key"], "it is done already"


def test_attempts_of_earlier_tries_count() -> None:
    ledger = Ledger(units(1), max_attempts=3, attempts={"00000-key": 2})
    unit = leased(ledger, "a")
    assert ledger.worker_lost("a")[0].quarantined
    assert ledger.attempts(unit) == 3


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_every_unit_ends_once(seed: int) -> None:  # noqa: C901 -- one story
    """Random leases, completions, crashes, preemptions and errors leave no unit lost or doubled."""
    rng = random.Random(seed)
    ledger = Ledger(units(30), max_attempts=3)
    workers = [f"w{index}" for index in range(4)]
    held: dict[str, set[str]] = {worker: set() for worker in workers}
    finished: dict[str, str] = {}
    for _ in range(20_000):
        if ledger.is_finished:
            break
        worker = rng.choice(workers)
        action = rng.random()
        if action < 0.5 and len(held[worker]) < 2:
            unit = ledger.lease(worker)
            if unit is not None:
                assert all(unit.unit_id not in others for others in held.values())
                held[worker].add(unit.unit_id)
        elif held[worker]:
            unit_id = rng.choice(sorted(held[worker]))
            if action < 0.85:
                assert ledger.settle(unit_id, ("exact",))
                assert unit_id not in finished
                finished[unit_id] = "done"
                held[worker].discard(unit_id)
            elif action < 0.92:
                for blame in ledger.worker_lost(worker, innocent=rng.random() < 0.3):
                    if blame.quarantined:
                        finished[blame.unit.unit_id] = "quarantined"
                held[worker].clear()
            else:
                blame = ledger.error(worker, unit_id)
                if blame.quarantined:
                    finished[unit_id] = "quarantined"
                held[worker].discard(unit_id)
    assert ledger.is_finished
    assert len(finished) == 30
    assert ledger.count(UnitState.ENDED) == 30

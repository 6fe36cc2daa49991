"""How many rows are explained side by side."""

import math

from mllm_shapx.models.flight import MOST_ROWS, Flight


def rows_taken(flight: Flight, answers: float) -> int:
    """Begin rows of so many answers while there is room."""
    count = 0
    while flight.has_room:
        flight.begin(f"row{count}", answers)
        count += 1
    return count


def test_rows_are_taken_until_two_batches_are_at_hand() -> None:
    """Short rows are taken side by side, long ones two at a time, and tiny ones not without end."""
    assert rows_taken(Flight(None, lambda: 256), 64.0) == 8
    assert rows_taken(Flight(None, lambda: 256), 4096.0) == 2
    assert rows_taken(Flight(None, lambda: 4096), 0.0) == MOST_ROWS


def test_a_fixed_number_is_kept_to() -> None:
    """Whatever the rows need."""
    assert rows_taken(Flight(3, lambda: 256), 1.0) == 3
    assert rows_taken(Flight(1, lambda: 256), 1e9) == 1


def test_answers_and_ends_make_room() -> None:
    """A row counts for what it still needs, and for nothing once it has ended."""
    flight = Flight(None, lambda: 8)
    assert rows_taken(flight, 8.0) == 2
    flight.answered("row0")
    assert flight.has_room
    flight.begin("another", 8.0)
    assert not flight.has_room
    flight.end("row1")
    assert flight.has_room
    assert flight.most == 3


def test_more_answers_than_expected_do_no_harm() -> None:
    """An expectation may be too low, or infinite for a row that will be refused."""
    flight = Flight(None, lambda: 1)
    flight.begin("short", 1.0)
    for _ in range(5):
        flight.answered("short")
    flight.begin("hopeless", math.inf)
    flight.answered("hopeless")
    flight.answered("nobody's")
    assert not flight.has_room
    flight.end("hopeless")
    flight.end("short")
    assert flight.has_room

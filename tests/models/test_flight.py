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


def test_a_server_gets_as_many_rows_as_requests() -> None:
    """Rows that need few answers are not bounded by what fits a device."""
    assert rows_taken(Flight(None, lambda: 256, lambda: 256), 0.0) == 256
    assert rows_taken(Flight(None, lambda: 256, lambda: 256), 4.0) == 128
    assert rows_taken(Flight(None, lambda: 1, lambda: 1), 4.0) == 2


def test_a_fixed_number_is_kept_to() -> None:
    """Whatever the rows need."""
    assert rows_taken(Flight(3, lambda: 256), 1.0) == 3
    assert rows_taken(Flight(1, lambda: 256), 1e9) == 1


def test_a_row_counts_for_all_of_it_until_it_ends() -> None:
    """Also when more turns out to be needed than was expected, or an endless row is refused."""
    flight = Flight(None, lambda: 8)
    flight.begin("row0", 2.0)
    flight.begin("row1", 8.0)
    assert flight.has_room_for_more
    flight.begin("row0", math.inf)
    assert not flight.has_room
    flight.end("row0")
    assert flight.has_room
    assert flight.most == 2


def test_beyond_the_first_rows_there_is_room_only_while_batches_are_not_full() -> None:
    """The first ones are taken in any case, and are nobody else's to take."""
    flight = Flight(None, lambda: 8)
    flight.begin("row0", 1.0)
    assert flight.has_room
    assert not flight.has_room_for_more
    flight.begin("row1", 1.0)
    assert flight.has_room_for_more
    fixed = Flight(3, lambda: 8)
    assert rows_taken(fixed, 1.0) == 3
    assert not fixed.has_room_for_more

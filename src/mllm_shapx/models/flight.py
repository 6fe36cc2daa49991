"""Rows in flight: so many side by side that batches are full and the device never waits."""

from collections.abc import Callable

FEWEST_ROWS = 2
"""One row's scoring, or its first answers that others wait for, must not leave the device idle."""
MOST_ROWS = 32
BATCHES_AT_HAND = 2
"""A batch on the device, and one that is ready when it ends."""


class Flight:
    """The rows that are being explained on one device, and whether there is room for another.

    A row counts for all its answers until it ends: its scoring, and what was expected of it too low, would
    otherwise let rows pile up.

    Args:
        fixed: Rows side by side, whatever they need; None for as many as fill `BATCHES_AT_HAND` batches.
        batch_size: Gives the prompts of a batch at present.
    """

    def __init__(self, fixed: int | None, batch_size: Callable[[], int]) -> None:
        self.fixed = fixed
        self.most = 0
        """Rows that were there at a time, at most, since it was last set to 0."""
        self._batch_size = batch_size
        self._answers: dict[str, float] = {}

    @property
    def has_room(self) -> bool:
        """Whether another row should begin."""
        rows = len(self._answers)
        if self.fixed is not None:
            return rows < self.fixed
        if rows < FEWEST_ROWS:
            return True
        return rows < MOST_ROWS and sum(self._answers.values()) < BATCHES_AT_HAND * self._batch_size()

    @property
    def has_room_for_more(self) -> bool:
        """Whether there is room beyond the rows that are always side by side."""
        return self.fixed is None and len(self._answers) >= FEWEST_ROWS and self.has_room

    def begin(self, row: str, answers: float) -> None:
        """Take note of a row that is expected to need so many answers; a later note replaces the first."""
        self._answers[row] = answers
        self.most = max(self.most, len(self._answers))

    def end(self, row: str) -> None:
        """Forget a row."""
        self._answers.pop(row, None)

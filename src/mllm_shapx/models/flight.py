"""Decides how many rows a worker explains at once, so that batches are full and the device is busy."""

from collections.abc import Callable

FEWEST_ROWS = 2
"""While one row is scored, another one keeps the device busy."""
MOST_ROWS = 32
"""Most rows at once on a device. A server may get as many rows as requests (`PromptEngine.most_rows`)."""
BATCHES_AT_HAND = 2
"""One batch on the device, and one ready to follow."""


class Flight:
    """The rows that are being explained with one engine, and whether there is room for another.

    A row counts with all its expected answers until it ends. Otherwise rows would pile up while they are
    scored, or when too few answers were expected.

    Args:
        fixed: Rows side by side, whatever they need; None for as many as fill `BATCHES_AT_HAND` batches.
        batch_size: Gives the prompts of a batch at present, or the requests that may be in flight.
        most_rows: Gives the rows at once at most, unless `fixed`.
    """

    def __init__(
        self,
        fixed: int | None,
        batch_size: Callable[[], int],
        most_rows: Callable[[], int] = lambda: MOST_ROWS,
    ) -> None:
        self.fixed = fixed
        self.most = 0
        """Most rows at once since this was last set to 0."""
        self._batch_size = batch_size
        self._most_rows = most_rows
        self._answers: dict[str, float] = {}

    @property
    def has_room(self) -> bool:
        """Whether another row should begin."""
        rows = len(self._answers)
        if self.fixed is not None:
            return rows < self.fixed
        if rows < FEWEST_ROWS:
            return True
        at_hand = sum(self._answers.values())
        return rows < self._most_rows() and at_hand < BATCHES_AT_HAND * self._batch_size()

    @property
    def has_room_for_more(self) -> bool:
        """Whether there is room beyond the rows that are always side by side."""
        return self.fixed is None and len(self._answers) >= FEWEST_ROWS and self.has_room

    def begin(self, row: str, answers: float) -> None:
        """Add a row with its expected number of answers, or change that number."""
        self._answers[row] = answers
        self.most = max(self.most, len(self._answers))

    def end(self, row: str) -> None:
        """Forget a row."""
        self._answers.pop(row, None)

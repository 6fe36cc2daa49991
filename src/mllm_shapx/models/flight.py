"""Rows in flight: so many side by side that batches are full and the device never waits."""

from collections.abc import Callable

FEWEST_ROWS = 2
"""One row's scoring, or its first answers that others wait for, must not leave the device idle."""
MOST_ROWS = 32
BATCHES_AT_HAND = 2
"""A batch on the device, and one that is ready when it ends."""


class Flight:
    """The rows that are being explained on one device, and whether there is room for another.

    Args:
        fixed: Rows side by side, whatever they need; None for as many as fill `BATCHES_AT_HAND` batches.
        batch_size: Gives the prompts of a batch at present.
    """

    def __init__(self, fixed: int | None, batch_size: Callable[[], int]) -> None:
        self.fixed = fixed
        self.most = 0
        """Rows that were there at a time, at most, since it was last set to 0."""
        self._batch_size = batch_size
        self._left: dict[str, float] = {}
        self._sum = 0.0

    @property
    def has_room(self) -> bool:
        """Whether another row should begin."""
        rows = len(self._left)
        if self.fixed is not None:
            return rows < self.fixed
        if rows < FEWEST_ROWS:
            return True
        return rows < MOST_ROWS and self._sum < BATCHES_AT_HAND * self._batch_size()

    def begin(self, row: str, answers: float) -> None:
        """Take note of a row that is expected to need so many answers."""
        self._left[row] = max(0.0, answers)
        self.most = max(self.most, len(self._left))
        self._count()

    def answered(self, row: str) -> None:
        """Take note of one answer."""
        if self._left.get(row, 0.0) >= 1.0:
            self._left[row] -= 1.0
            self._sum -= 1.0

    def end(self, row: str) -> None:
        """Forget a row."""
        self._left.pop(row, None)
        self._count()

    def _count(self) -> None:
        # Anew each time: infinity, which a hopeless row may be expected to need, cannot be taken away again.
        self._sum = sum(self._left.values())

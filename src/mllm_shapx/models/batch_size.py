"""Chooses the batch size: a fixed number, or the knee of the measured throughput."""

from dataclasses import dataclass, field

FIRST_SIZE = 32
"""First size of `auto`: below the knee of every measured device, and small enough for nearly all devices."""
LARGEST_SIZE = 4096
WORTHWHILE = 1.07
"""The size doubles while throughput grows by at least this factor."""
CLEAR = 1.25
"""One measurement proves a gain of this factor; smaller gains need `MEASUREMENTS` measurements."""
MEASUREMENTS = 2


@dataclass(slots=True)
class _Curve:
    """Throughput measured for one way of decoding."""

    size: int
    settled: bool = False
    rates: dict[int, list[float]] = field(default_factory=dict)


class BatchSizer:
    """Chooses how many prompts to batch, from measured throughput and out-of-memory errors.

    Args:
        fixed: The configured batch size. None searches for the knee: the size doubles while throughput grows,
            then falls back to the best size.

    `auto` never exceeds `largest`. A size that did not fit is stored as positions (prompt plus new tokens,
    padded), because memory depends on positions: shorter prompts may still fill larger batches.
    """

    def __init__(self, fixed: int | None = None, largest: int = LARGEST_SIZE) -> None:
        self._fixed = fixed
        self._largest = largest
        self._curves: dict[object, _Curve] = {}
        self._most_positions: int | None = None
        self.size = fixed or FIRST_SIZE
        """The last size returned."""

    def size_for(self, key: object) -> int:
        """Return the size of the next batch of prompts decoded as `key`, without regard to memory."""
        self.size = self._fixed or self._curve(key).size
        return self.size

    def fits(self, prompts: int, longest: int) -> bool:
        """Return whether a batch of `prompts` of `longest` positions is smaller than any that did not fit."""
        return prompts == 1 or self._most_positions is None or prompts * longest <= self._most_positions

    def too_large(self, prompts: int, longest: int) -> None:
        """Record that a batch of `prompts` of `longest` positions did not fit."""
        positions = max(1, prompts // 2) * longest
        self._most_positions = min(positions, self._most_positions or positions)

    def observe(self, key: object, prompts: int, work: float, seconds: float) -> None:
        """Record that a batch of `prompts` took `seconds` for `work` computed positions."""
        curve = self._curve(key)
        if self._fixed or curve.settled or prompts < curve.size or seconds <= 0:
            return
        rates = curve.rates.setdefault(curve.size, [])
        rates.append(work / seconds)
        before = max(curve.rates.get(curve.size // 2, [0.0]))
        gain = max(rates) / before if before else float("inf")
        if gain >= CLEAR or (gain >= WORTHWHILE and len(rates) >= MEASUREMENTS):
            self._grow(curve)
        elif len(rates) >= MEASUREMENTS:
            curve.size //= 2
            curve.settled = True

    def _grow(self, curve: _Curve) -> None:
        if 2 * curve.size > self._largest:
            curve.settled = True
        else:
            curve.size *= 2

    def _curve(self, key: object) -> _Curve:
        if key not in self._curves:
            # The knee depends on model and device more than on the answers' length: start just below.
            known = max((curve.size for curve in self._curves.values()), default=FIRST_SIZE)
            self._curves[key] = _Curve(max(FIRST_SIZE, known // 2))
        return self._curves[key]

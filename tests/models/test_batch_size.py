"""The batch size: the knee of the curve, below what memory held."""

from collections.abc import Callable

import pytest

from mllm_shapx.models.batch_size import LARGEST_SIZE, BatchSizer


def settle(seconds: Callable[[int], float], batches: int = 60) -> int:
    """Feed full batches that take `seconds(size)`; return the size given out in the end."""
    sizer = BatchSizer()
    for _ in range(batches):
        size = sizer.size_for("greedy")
        sizer.observe("greedy", size, float(size), seconds(size))
    return sizer.size_for("greedy")


@pytest.mark.parametrize(
    ("seconds", "low", "high"),
    [
        (lambda size: 1.0 + 0.01 * size, 512, 2048),
        (lambda size: 0.05 + 0.01 * size, 32, 64),
        (lambda size: 0.01 * size, 16, 32),
        (lambda size: 0.01 * size + 1e-5 * size**2, 16, 32),
        (lambda size: 1.0 + max(0.0, size - 256) / 256, 256, 1024),
    ],
)
def test_auto_stops_where_larger_batches_pay_no_more(
    seconds: Callable[[int], float], low: int, high: int
) -> None:
    """A fixed cost per batch is spread over many prompts; where cost goes with size, batches stay small."""
    assert low <= settle(seconds) <= high


def test_auto_never_grows_without_end() -> None:
    """Even a device that does everything in no time gets batches of a bounded size."""
    assert settle(lambda _: 1.0) == LARGEST_SIZE


def test_auto_keeps_to_the_largest_size_that_the_model_names() -> None:
    """A model on processors bounds what noise on a shared machine might make of the curve."""
    sizer = BatchSizer(largest=256)
    for _ in range(30):
        sizer.observe("greedy", sizer.size_for("greedy"), float(sizer.size), 1.0)
    assert sizer.size_for("greedy") == 256


def test_a_fixed_size_stays() -> None:
    """What the config says holds, whatever is measured."""
    sizer = BatchSizer(8)
    for _ in range(10):
        sizer.observe("greedy", 8, 8.0, 0.001)
    assert sizer.size_for("greedy") == 8


def test_partial_batches_say_nothing_about_the_curve() -> None:
    """The tail of a row does not pull the size down or up."""
    sizer = BatchSizer()
    for _ in range(20):
        sizer.observe("greedy", 3, 3.0, 1e-6)
    assert sizer.size_for("greedy") == BatchSizer().size_for("greedy")


def test_a_batch_that_did_not_fit_is_halved_in_positions() -> None:
    """Short prompts may still fill a large batch where long ones may not."""
    sizer = BatchSizer(64)
    sizer.too_large(64, 100)
    assert sizer.fits(32, 100)
    assert not sizer.fits(33, 100)
    assert sizer.fits(64, 50)
    sizer.too_large(32, 100)
    assert not sizer.fits(32, 100)
    assert sizer.fits(1, 10**9), "one prompt is always tried"


def test_another_way_of_decoding_begins_just_below_the_knee_that_is_known() -> None:
    """It need not grow from the smallest size again, and finds a knee of its own above or at it."""
    sizer = BatchSizer()
    for _ in range(60):
        size = sizer.size_for("short")
        sizer.observe("short", size, float(size), 1.0 + max(0.0, size - 256) / 256)
    known = sizer.size_for("short")
    assert known >= 256
    assert sizer.size_for("long") == known // 2
    for _ in range(60):
        size = sizer.size_for("long")
        sizer.observe("long", size, float(size), 1.0 + 0.5 * size)
    assert sizer.size_for("long") == known // 2

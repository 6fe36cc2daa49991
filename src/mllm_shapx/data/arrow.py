"""Converts between Arrow, Python and numpy without pandas.

`pyarrow.scalar`, `pyarrow.array` and `to_numpy` import pandas if installed, which adds half a second to
`plan`.
"""

import struct

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


def scalar(value: bool | float | str) -> pa.Scalar:
    """Return `value` as bool, int64, float64 or string.

    Raises:
        OverflowError: For an integer outside int64.
    """
    if isinstance(value, bool):
        return _one(pa.bool_(), bytes([value]))
    if isinstance(value, str):
        data = value.encode()
        return _one(pa.string(), struct.pack("<ii", 0, len(data)), data)
    if isinstance(value, float):
        return _one(pa.float64(), struct.pack("<d", value))
    try:
        return _one(pa.int64(), struct.pack("<q", value))
    except struct.error as error:
        raise OverflowError(value) from error


def to_mask(array: pa.Array) -> NDArray[np.bool_]:
    """Return a bool array without nulls as numpy, same length."""
    return np.from_dlpack(pc.cast(array, pa.uint8())).astype(np.bool_)


def to_integers(array: pa.Array) -> NDArray[np.int64]:
    """Return an int64 array without nulls as numpy, same length."""
    return np.from_dlpack(array).astype(np.int64, copy=False)


def _one(kind: pa.DataType, *buffers: bytes) -> pa.Scalar:
    return pa.Array.from_buffers(kind, 1, [None, *map(pa.py_buffer, buffers)])[0]

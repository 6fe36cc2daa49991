"""Reducers: one vector from the (tokens, hidden) states of an answer."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

States = NDArray[np.float64]

REDUCERS: dict[str, Callable[[States], States]] = {
    "MeanReducer": lambda states: states.mean(axis=0),
    "MaxReducer": lambda states: states.max(axis=0),
    "MinReducer": lambda states: states.min(axis=0),
    "SumReducer": lambda states: states.sum(axis=0),
    "FirstReducer": lambda states: states[0],
    "ZeroReducer": lambda states: states.reshape(-1),
}
"""Config name -> function from (tokens, hidden) to (hidden,); `ZeroReducer` flattens."""


def pool(states: States, reducer: str) -> States:
    """Return one vector for the states of an answer, shaped (tokens, hidden); empty for no tokens.

    Raises:
        KeyError: When `reducer` is none of `REDUCERS`.
    """
    reduce = REDUCERS[reducer]
    return reduce(states) if len(states) else np.zeros(0)

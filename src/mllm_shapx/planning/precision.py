"""Warns about dtypes in which an answer depends on its batch."""

from collections.abc import Sequence

from mllm_shapx.config.vocabulary import EXPLAINERS
from mllm_shapx.planning.runs import RunSpec

ROUNDED = ("bfloat16", "float16")
"""Dtypes whose rounding lets batching change an answer."""


def rounding_warnings(runs: Sequence[RunSpec]) -> list[str]:
    """Return a warning when a config asks for exact values in such a dtype.

    `auto` is such a dtype on a GPU; if the config names no device, `loaded_warnings` reports it.
    """
    dtype, device = runs[0].connector_kwargs.dtype, runs[0].device or ""
    if dtype == "auto" and device.startswith(("cuda", "mps")):
        return _warnings(runs, f'"auto", which is bfloat16 or float16 on {device}')
    return _warnings(runs, f'"{dtype}"') if dtype in ROUNDED else []


def loaded_warnings(runs: Sequence[RunSpec], dtype: str) -> list[str]:
    """Return the same warning if the loaded dtype of `auto` is such a dtype; never repeat the first."""
    if dtype not in ROUNDED or runs[0].connector_kwargs.dtype != "auto" or rounding_warnings(runs):
        return []
    return _warnings(runs, f'"auto", which is {dtype} here')


def _warnings(runs: Sequence[RunSpec], dtype: str) -> list[str]:
    flat = (run for run in runs if run.hierarchical is None)
    exact = next((run.name for run in flat if EXPLAINERS[run.explainer_type].estimator == "exact"), None)
    if exact is None:
        return []
    text = (
        f"connector_kwargs.dtype is {dtype}: an answer may change with the batch that it is generated in, so "
        f"the values of {exact} are exact for the answers that were given, which may not be those that the "
        "model gives to each prompt alone. float32 avoids it; `mllm-shapx verify --again N DIRECTORY` "
        "measures how many answers agree"
    )
    return [text]

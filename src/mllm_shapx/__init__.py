"""Runs whole Shapley-value studies of language and speech models with mllm_shap.

`run`, `plan` and `load` are the command line in Python; see `mllm_shapx.api`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mllm_shapx.api import Results, load, plan, run
    from mllm_shapx.errors import ConfigError, ShapxError, UsageError
    from mllm_shapx.execution.outcome import StudyOutcome
    from mllm_shapx.planning.plan import Plan

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "Plan",
    "Results",
    "ShapxError",
    "StudyOutcome",
    "UsageError",
    "__version__",
    "load",
    "plan",
    "run",
]

_HOMES = {
    "ConfigError": "mllm_shapx.errors",
    "Plan": "mllm_shapx.planning.plan",
    "Results": "mllm_shapx.api",
    "ShapxError": "mllm_shapx.errors",
    "StudyOutcome": "mllm_shapx.execution.outcome",
    "UsageError": "mllm_shapx.errors",
    "load": "mllm_shapx.api",
    "plan": "mllm_shapx.api",
    "run": "mllm_shapx.api",
}
"""Name -> its module. Imported at first use, so that the command line starts faster."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

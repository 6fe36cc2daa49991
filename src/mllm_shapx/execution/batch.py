"""Several configs in one call: retries of failed ones, and the exit code of all."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from mllm_shapx.config.loading import LoadedConfig
from mllm_shapx.errors import BudgetError, ConfigError, OutputError, ShapxError
from mllm_shapx.execution.options import Again, RunOptions
from mllm_shapx.execution.outcome import INTERRUPTED_FROM, StudyOutcome
from mllm_shapx.execution.signals import StopRequest

_SEVERITY = {0: 0, 3: 1, 1: 2}
"""Exit code -> rank: a stopped study is worse than quarantined samples, which are worse than none."""
_REFUSED = 3
"""Rank of all other codes: a refused config, a signal."""


@dataclass(frozen=True, slots=True)
class ConfigResult:
    """The result of one config."""

    found: StudyOutcome | ShapxError
    tries: int
    seconds: float
    """Duration of all attempts, with the waits between them."""

    @property
    def exit_code(self) -> int:
        """Return the exit code of this config alone."""
        return self.found.exit_code

    @property
    def is_interrupted(self) -> bool:
        """Whether a signal ended the work."""
        return self.exit_code > INTERRUPTED_FROM


def run_with_retries(
    work: Callable[[RunOptions], StudyOutcome],
    config: LoadedConfig,
    *,
    options: RunOptions,
    again: Again,
    request: StopRequest,
    tell: Callable[[str], None],
) -> ConfigResult:
    """Do the work of a config; retry when it fails.

    A wrong config, a wrong directory, a limit of requests or tokens, or a signal ends it at once. Attempts
    after the first one resume. `tell` is called with a line for each retry.
    """
    started, tries = time.monotonic(), 0
    while True:
        tries += 1
        found: StudyOutcome | ShapxError
        try:
            found = work(options)
        except ShapxError as error:
            found = error
        is_final = isinstance(found, ConfigError | OutputError | BudgetError) or found.exit_code not in {1, 2}
        if is_final or request.signal is not None or tries > again.max_retries:
            return ConfigResult(found, tries, time.monotonic() - started)
        why = str(found) if isinstance(found, ShapxError) else "it stopped early"
        tell(f"{config.path}: {why}; retry {tries} of {again.max_retries} in {again.retry_delay_s:g} s")
        time.sleep(again.retry_delay_s)
        if request.begun:
            options = replace(options, resume=True, overwrite=False)


def worst(exit_codes: Iterable[int]) -> int:
    """Return the worst exit code: refused or interrupted, then stopped, then quarantined."""
    return max(exit_codes, key=lambda code: _SEVERITY.get(code, _REFUSED), default=0)

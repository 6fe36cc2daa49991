"""Several configs in one call: trying again what failed, and the exit code of all."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from mllm_shapx.config.loading import LoadedConfig
from mllm_shapx.errors import ConfigError, OutputError, ShapxError
from mllm_shapx.execution.options import Again, RunOptions
from mllm_shapx.execution.outcome import INTERRUPTED_FROM, StudyOutcome
from mllm_shapx.execution.signals import StopRequest

_SEVERITY = {0: 0, 3: 1, 1: 2}
"""Exit code -> rank: quarantined samples are worse than none, a study that stopped is worse than those."""
_REFUSED = 3
"""Rank of everything else: a refused config, a signal."""


@dataclass(frozen=True, slots=True)
class ConfigResult:
    """What became of one config."""

    found: StudyOutcome | ShapxError
    tries: int
    seconds: float
    """All tries together, with the waits between them."""

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
    """Do the work of a config; try again when it fails.

    A wrong config or directory and a signal end it at once.

    Args:
        work: Does the work once, such as `run.run_config`.
        config: The config, for messages.
        options: Options of the first try; later ones resume what has begun.
        again: How often it is tried again, and when.
        request: Says when a signal came.
        tell: Takes a line for each retry.
    """
    started, tries = time.monotonic(), 0
    while True:
        tries += 1
        found: StudyOutcome | ShapxError
        try:
            found = work(options)
        except ShapxError as error:
            found = error
        is_final = isinstance(found, ConfigError | OutputError) or found.exit_code not in {1, 2}
        if is_final or request.signal is not None or tries > again.max_retries:
            return ConfigResult(found, tries, time.monotonic() - started)
        why = str(found) if isinstance(found, ShapxError) else "it stopped early"
        tell(
            f"{config.path}: {why}; retry {tries} of {again.max_retries} in {again.retry_delay_s:g} s",
        )
        time.sleep(again.retry_delay_s)
        if request.begun:
            options = replace(options, resume=True, overwrite=False)


def worst(exit_codes: Iterable[int]) -> int:
    """Return the exit code that stands for all: refused or interrupted, then stopped, then quarantined."""
    return max(exit_codes, key=lambda code: _SEVERITY.get(code, _REFUSED), default=0)

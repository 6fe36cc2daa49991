"""The top command `mllm-shapx`: signals, errors, exit codes, logging."""

import contextlib
import logging
import os
import shlex
import sys
import traceback
from typing import Any, NoReturn

import click

from mllm_shapx.config.paths import exists, expanded, real
from mllm_shapx.errors import ShapxError, UsageError
from mllm_shapx.execution.signals import StopNow, StopRequest, stop_requests
from mllm_shapx.plaintext import ShownFormatter
from mllm_shapx.terminal import UNEXPECTED, make_streams_safe, report_unexpected, say

RESUMABLE = {"run", "demo", "retry", "rescore"}
"""Commands that finish the running rows after a signal and can be resumed."""


class _Commands(click.Group):
    """Ends with the exit code of an error; shows a traceback only at LOG_LEVEL=DEBUG."""

    def main(self, *args: Any, **extra: Any) -> Any:
        make_streams_safe()
        try:
            return super().main(*args, **extra)
        except (SystemExit, KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001 -- last handler; Rust panics are no Exception
            report_unexpected(error)
            sys.exit(UNEXPECTED)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.obj = StopRequest()
        if args and args[0] in RESUMABLE:
            resume = args[0] == "run" and not {"--resume", "--overwrite"} & set(args)
            ctx.obj.again = shlex.join(["mllm-shapx", *args, *(["--resume"] if resume else [])])
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        request = ctx.obj
        try:
            with stop_requests(request):
                return super().invoke(ctx)
        except ShapxError as error:
            if logging.getLogger().isEnabledFor(logging.DEBUG):
                traceback.print_exc()
            say(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except StopNow as stop:
            leave(int(stop.code or 0))
        except SystemExit:
            # During its calls, Ray turns a handler's exception into exit code 1.
            if request.signal is not None:
                leave(request.exit_code)
            raise


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="mllm-shapx", prog_name="mllm-shapx")
def main() -> None:
    """Run whole Shapley-value studies of language and speech models: one config, many GPUs, nothing lost."""
    _set_log_level(os.environ.get("LOG_LEVEL", "WARNING"))
    _put_source_first(os.environ.get("MLLM_SHAP_SRC", ""))


def leave(code: int) -> NoReturn:
    """End the process after a signal. A normal end would wait for threads with a running model."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
            stream.flush()
    os._exit(code)


def _set_log_level(name: str) -> None:
    level = logging.getLevelNamesMapping().get(name.upper())
    if level is None:
        raise UsageError(f'LOG_LEVEL is "{name}"; use DEBUG, INFO, WARNING or ERROR')
    handler = logging.StreamHandler()
    handler.setFormatter(ShownFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    logging.getLogger().setLevel(level)


def _put_source_first(folder: str) -> None:
    """Import mllm_shap from a checkout; workers do the same by their environment."""
    if not folder:
        return
    try:
        path = expanded(folder)
    except ValueError as error:
        raise UsageError(f"MLLM_SHAP_SRC: {error}") from error
    if not exists(path) or not path.is_dir():
        raise UsageError(f"MLLM_SHAP_SRC names no directory: {folder}")
    sys.path.insert(0, str(real(path)))

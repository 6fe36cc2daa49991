"""Vega-Lite specifications drawn as SVG and PDF by vl-convert, without a browser or a network."""

from typing import Any

from mllm_shapx.errors import UsageError

INSTALL = "pip install 'mllm-shapx[plots]'"

_VERSION = "6.1"
"""Of Vega-Lite; vl-convert brings several."""


def can_draw() -> bool:
    """Return whether vl-convert is installed."""
    try:
        import vl_convert  # noqa: F401
    except ImportError:
        return False
    return True


def svg(spec: dict[str, Any]) -> str:
    """Return a plot as SVG.

    Raises:
        UsageError: When vl-convert is not installed.
    """
    drawn: str = _library().vegalite_to_svg(spec, vl_version=_VERSION)
    return drawn


def pdf(spec: dict[str, Any]) -> bytes:
    """Return a plot as PDF.

    Raises:
        UsageError: When vl-convert is not installed.
    """
    drawn: bytes = _library().vegalite_to_pdf(spec, vl_version=_VERSION)
    return drawn


def _library() -> Any:
    try:
        import vl_convert
    except ImportError as error:
        raise UsageError(f"plots need the package vl-convert-python; install it with: {INSTALL}") from error
    return vl_convert

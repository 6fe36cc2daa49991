"""The one place that decides what a path or a name written by the user means, and whether it can be one."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from mllm_shapx.plaintext import printable

LONGEST_NAME = 255
LONGEST_PATH = 4095
"""Bytes of one name and of a whole path that Linux and macOS file systems take."""

_CONTROL = re.compile("[\x00-\x1f\x7f]")
_LONGEST_SHOWN = 80
_LOGIN = re.compile(r"[^/?#@\s]*@")
_WEB = frozenset({"http", "https", "git", "ftp"})
_SECRET = re.compile(r"(?i)token|secret|password|passwd|signature|api_?key|credential")


def is_uri(written: str) -> bool:
    """Return whether `written` is a URI other than a `file://` one, and so no path of this machine."""
    return "://" in written and not written.startswith("file://")


def expanded(written: str) -> Path:
    """Return the path that `written` means, `~` and `~user` expanded and `file://` taken away.

    Raises:
        ValueError: When it cannot be a path; the message says why, to follow the name of a key or option.
    """
    fault = name_fault(written)
    if fault is not None:
        raise ValueError(fault)
    text = written.removeprefix("file://")
    if text.startswith("~"):
        text = _home(text)
    if len(os.fsencode(text)) > LONGEST_PATH or any(
        len(os.fsencode(part)) > LONGEST_NAME for part in text.split("/")
    ):
        msg = (
            f"{_short(written)} is too long for a path: a name takes at most {LONGEST_NAME} bytes, "
            f"a path {LONGEST_PATH}"
        )
        raise ValueError(msg)
    return Path(text)


def location(written: str) -> str:
    """Return a directory or URI of the user's: paths as `expanded` makes them, URIs as written.

    Raises:
        ValueError: As `expanded`, and for a URI that holds a login.
    """
    if not is_uri(written):
        return str(expanded(written))
    fault = name_fault(written)
    if fault is not None:
        raise ValueError(fault)
    return written


def name_fault(written: str) -> str | None:
    """Return what keeps `written` from being any name, path or URI; None when nothing does."""
    if not written.strip():
        return "is empty; write a name, or leave it out"
    if (found := _CONTROL.search(written)) is not None:
        return f"{_short(written)} holds the control character {found[0]!r}; remove it"
    try:
        os.fsencode(written)
    except UnicodeEncodeError:
        return f"{_short(written)} holds half of a surrogate pair, which is no character; remove it"
    return _login_fault(written)


def exists(path: Path) -> bool:
    """Return whether something is there; False too for links in a circle and for what can be no path."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def matches(pattern: Path) -> Iterator[Path]:
    """Yield what a glob finds, hidden files only where the pattern names them; links to folders end `**`.

    Nothing is yielded for a pattern that pathlib does not take.
    """
    relative = str(pattern).removeprefix(pattern.anchor)
    hidden = any(part.startswith(".") for part in Path(relative).parts)
    root = Path(pattern.anchor)
    try:
        for path in root.glob(relative):
            if hidden or not any(part.startswith(".") for part in path.parts if part not in {".", ".."}):
                yield path
    except (OSError, ValueError):
        return


def real(path: Path) -> Path:
    """Return the absolute path without links; links in a circle stay as they are."""
    return Path(os.path.realpath(path))


def _home(text: str) -> str:
    found = os.path.expanduser(text)  # noqa: PTH111 -- Path.expanduser raises RuntimeError without saying who
    if found.startswith("~"):
        user = text.partition("/")[0]
        msg = f"{_short(text)} begins with {_short(user)}, and there is no such user; write the path in full"
        raise ValueError(msg)
    return found


def _login_fault(written: str) -> str | None:
    """Refuse a URL with a login: the config is copied into the results, where others read it."""
    if "://" not in written:
        return None
    scheme, _, rest = written.partition("://")
    login = _LOGIN.match(rest)
    has_login = login is not None and (":" in login[0] or scheme.lower() in _WEB)
    try:
        keys = [key for key, _ in parse_qsl(urlsplit(written).query)]
    except ValueError:
        keys = []
    if has_login or any(_SECRET.search(key) for key in keys):
        return (
            "is a URL with a login or a token in it, and configs are copied into the results; give it "
            "through the environment (HF_TOKEN, AWS_SECRET_ACCESS_KEY, …) or fsspec's config files "
            "(~/.config/fsspec/*.json)"
        )
    return None


def _short(written: str) -> str:
    text = printable(written)
    return f'"{text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…"}"'

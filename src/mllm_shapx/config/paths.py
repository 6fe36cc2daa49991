"""The meaning and validity of the user's paths and names. No other module decides them."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from mllm_shapx.plaintext import printable

LONGEST_NAME = 255
LONGEST_PATH = 4095
"""Maximum bytes of one name and of a whole path on Linux and macOS file systems."""

_CONTROL = re.compile("[\x00-\x1f\x7f]")
_LONGEST_SHOWN = 80
_LOGIN = re.compile(r"[^/?#@\s]*@")
_WEB = frozenset({"http", "https", "git", "ftp"})
_SECRET = re.compile(r"(?i)token|secret|password|passwd|signature|api_?key|credential")


def is_uri(written: str) -> bool:
    """Return whether `written` is a URI other than `file://`, so not a local path."""
    return "://" in written and not written.startswith("file://")


def expanded(written: str) -> Path:
    """Return the path of `written`, with `~` and `~user` expanded and `file://` removed.

    Raises:
        ValueError: When it cannot be a path; the message is the reason, to follow a key's or option's name.
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
        raise ValueError(
            f"{_short(written)} is too long for a path: a name takes at most {LONGEST_NAME} bytes, "
            f"a path {LONGEST_PATH}"
        )
    return Path(text)


def location(written: str) -> str:
    """Return the user's directory or URI: paths as by `expanded`, URIs as written.

    Raises:
        ValueError: As `expanded`, and for a URI with a login.
    """
    if not is_uri(written):
        return str(expanded(written))
    fault = name_fault(written)
    if fault is not None:
        raise ValueError(fault)
    return written


def name_fault(written: str) -> str | None:
    """Return why `written` can be no name, path or URI; None if it can."""
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
    """Return whether the path exists; False also for circular links and invalid paths."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def matches(pattern: Path) -> Iterator[Path]:
    """Yield the matches of a glob; nothing for a pattern that pathlib refuses.

    Hidden files match only if the pattern names them. `**` does not follow links to folders.
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
    """Return the absolute path without links; circular links stay unchanged."""
    return Path(os.path.realpath(path))


def _home(text: str) -> str:
    found = os.path.expanduser(text)  # noqa: PTH111 -- the RuntimeError of Path.expanduser names no user
    if found.startswith("~"):
        user = text.partition("/")[0]
        raise ValueError(
            f"{_short(text)} begins with {_short(user)}, and there is no such user; write the path in full"
        )
    return found


def _login_fault(written: str) -> str | None:
    """Refuse a URL with a login: others can read the config's copy in the results."""
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

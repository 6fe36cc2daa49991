"""Makes text from files, data and models safe to show: no terminal escapes, no logins."""

import logging
import re

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and newline, marks that reorder text, and halves of surrogate pairs."""

_LOGIN = re.compile(r"(?<=://)[^/?#@\s'\"]+@")
_SECRET_QUERY = re.compile(
    r"(?i)([?&][\w.-]*(?:token|secret|password|passwd|pwd|signature|sig|api[_-]?key|credential)[\w.-]*=)"
    r"[^&#\s'\"]+"
)
_HIDDEN = "***"


def printable(text: str) -> str:
    """Return `text` with unsafe characters replaced by Python's escapes."""
    return _UNSAFE.sub(lambda match: _written_out(match[0]), text)


def printable_json(text: str) -> str:
    """Return JSON text with unsafe characters replaced by JSON's escapes."""
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def redacted(text: str) -> str:
    """Return `text` without the logins and tokens of its URLs."""
    return _SECRET_QUERY.sub(rf"\g<1>{_HIDDEN}", _LOGIN.sub(f"{_HIDDEN}@", text))


def shown(text: str) -> str:
    """Return `text`, safe for a terminal or a log."""
    return printable(redacted(text))


class ShownFormatter(logging.Formatter):
    """A log formatter with safe lines."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's text, made safe by `shown`."""
        return shown(super().format(record))


def _written_out(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}"  # noqa: PLR2004 -- Python's own notation

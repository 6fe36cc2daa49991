"""A config's chat templates: read from their files and checked without rendering."""

from pathlib import Path
from typing import Any

_MARKS = ("{{", "{%", "{#")
_LARGEST = 1 << 20
"""Maximum size of a template file in bytes; a larger file is something else."""


def is_template_text(written: str) -> bool:
    """Return whether `chat_template` is the template itself: a template has a jinja mark, a path has none."""
    return any(mark in written for mark in _MARKS)


def read_template(written: str, path: Path) -> str:
    """Return the template's text.

    Args:
        written: `chat_template` of the config, a template or a path.
        path: Location of the file, if it is a path.

    Raises:
        ValueError: When the file does not exist, is not text, or jinja cannot parse it; says which.
    """
    text = written if is_template_text(written) else _read(path)
    if not is_template_text(text):
        raise ValueError(f"{path} holds no chat template: there is no {{{{ or {{% in it")
    _parsed(text)
    return text


def template_variables(template: str) -> frozenset[str]:
    """Return the variables that a template reads and does not set; empty if jinja cannot parse it."""
    from jinja2 import meta

    try:
        return frozenset(meta.find_undeclared_variables(_parsed(template)))
    except ValueError:
        return frozenset()


def _read(path: Path) -> str:
    try:
        if not path.is_file():
            raise ValueError(f"there is no file {path}, and it is no template text: that holds {{{{ or {{%")
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"{path} is no chat template: it is larger than {_LARGEST >> 20} MiB")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def _parsed(text: str) -> Any:
    from jinja2 import TemplateError, TemplateSyntaxError

    environment = _environment()
    try:
        environment.from_string(text)
        return environment.parse(text)
    except TemplateSyntaxError as error:
        raise ValueError(f"jinja cannot read the template: {error.message} (line {error.lineno})") from None
    except (TemplateError, RecursionError, SyntaxError) as error:
        raise ValueError(f"jinja cannot read the template: {error}") from None


def _environment() -> Any:
    """Return an environment with the extensions of transformers' environment for chat templates."""
    from jinja2 import ext, nodes
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """The tag that marks the assistant's part; renders its content unchanged."""

        tags = {"generation"}  # noqa: RUF012 -- jinja's declaration

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )

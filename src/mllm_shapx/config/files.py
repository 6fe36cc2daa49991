"""The config files of a call: their paths, and checks across them."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_shapx.config.paths import exists, matches, real
from mllm_shapx.errors import UsageError

if TYPE_CHECKING:
    from mllm_shapx.config.loading import LoadedConfig


def config_files(named: Sequence[str], config_list: Path | None) -> tuple[Path, ...]:
    """Return a call's config files, globs expanded in name order, each file once.

    Args:
        named: Paths and globs.
        config_list: File with one path or glob per line; blank lines and lines that begin with # are skipped.

    Raises:
        UsageError: When a glob matches nothing or no file is named at all.
    """
    names: list[tuple[str, Path | None]] = [(name, None) for name in named]
    if config_list is not None:
        lines = map(str.strip, _list_text(config_list).splitlines())
        names += [(line, config_list) for line in lines if line and not line.startswith("#")]
    files: dict[Path, Path] = {}
    for name, origin in names:
        for file in _expanded(name, origin):
            files.setdefault(real(file), file)
    if not files:
        where = f"{config_list} names no config" if config_list is not None else "no config is named"
        raise UsageError(f"{where}; give --config FILE, or --config-list FILE with one path a line")
    return tuple(files.values())


def load_configs(files: Sequence[Path]) -> "list[LoadedConfig]":
    """Load all configs.

    Raises:
        ConfigError: When one of them is wrong.
        UsageError: With all messages when several are wrong, or when two write to the same directory.
    """
    from mllm_shapx.config.loading import load_config

    loaded, errors = [], []
    for file in files:
        try:
            loaded.append(load_config(file))
        except UsageError as error:
            errors.append(error)
    raise_all(errors)
    owners: dict[tuple[str, str], Path] = {}
    for config in loaded:
        settings = config.experiment_set
        first = owners.setdefault((settings.output_root, settings.experiment_set_id), config.path)
        if first != config.path:
            raise UsageError(
                f"{first} and {config.path} both write to "
                f"{settings.output_root}/{settings.experiment_set_id}; give one another experiment_set_id"
            )
    return loaded


def raise_all(errors: Sequence[UsageError]) -> None:
    """Raise the errors of several configs as one; do nothing without errors."""
    if errors:
        raise errors[0] if len(errors) == 1 else UsageError("\n".join(map(str, errors)))


def _expanded(name: str, config_list: Path | None) -> list[Path]:
    from mllm_shapx.config.loading import resolve_path

    try:
        path = resolve_path(name, config_list)
    except ValueError as error:
        raise UsageError(f"--config: {error}") from error
    if not glob.has_magic(str(path)) or exists(path):
        return [path]
    found = sorted(matches(path))
    if not found:
        raise UsageError(f"no config file matches {name}")
    return found


def _list_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(
            f"--config-list {path}: cannot be read: {error.strerror}; name another file"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--config-list {path}: is not UTF-8 text (byte {error.start}); it takes one path a line"
        ) from error

"""What tests share: their order, and directories with small random models, made once per process."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest


@pytest.hookimpl(trylast=True)  # after pytest-randomly
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that two processes end at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from an architecture's name to its model directory."""
    from model_kit import build_model  # which imports torch

    @cache
    def directory(architecture: str) -> Path:
        return build_model(architecture, tmp_path_factory.mktemp(architecture))

    return directory

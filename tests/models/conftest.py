"""Fixtures of the model tests: directories with small random models, made once per session."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from model_kit import build_model


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from an architecture's name to its model directory."""

    @cache
    def directory(architecture: str) -> Path:
        return build_model(architecture, tmp_path_factory.mktemp(architecture))

    return directory

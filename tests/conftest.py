"""What all tests share: their order."""

import pytest


@pytest.hookimpl(trylast=True)  # after pytest-randomly
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that two processes end at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)

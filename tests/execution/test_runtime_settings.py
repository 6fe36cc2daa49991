"""Settings of `runtime` do what they say."""

import gc
from pathlib import Path
from typing import Any

from small_study import Study


def collections_of(study: Study) -> int:
    """Return how many full garbage collections a run makes by itself, Python's own switched off."""
    count = 0

    def take(phase: str, info: dict[str, int]) -> None:
        nonlocal count
        count += phase == "start" and info["generation"] == 2

    gc.disable()
    gc.callbacks.append(take)
    try:
        assert study.call("--inline").code == 0
    finally:
        gc.callbacks.remove(take)
        gc.enable()
    return count


def test_garbage_is_collected_after_so_many_rows(tmp_path: Path) -> None:
    def collections(name: str, runtime: dict[str, Any]) -> int:
        settings = {"experiments": [{"explainer_type": "exact"}], "runtime": runtime}
        return collections_of(Study(tmp_path / name, rows=4, words=2, settings=settings))

    collections("first", {})  # imports collect too
    usual = collections("never", {"gc_interval": 0})
    assert collections("every second", {"gc_interval": 2}) == usual + 2
    assert collections("each", {"gc_interval": 2, "gc_after_each_sample": True}) == usual + 4

"""Tests of the loopback hub that other tests use, with the real clients."""

from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

FILES = {"config.json": b"{}", "weights/a.bin": b"A" * 1000, "README.md": b"# x"}


def test_a_model_repository_is_downloaded_whole(tmp_path: Path) -> None:
    """snapshot_download of a model returns every file at the commit of a branch."""
    with HubServer() as hub:
        commit = hub.add("model", "o/m", FILES)
        folder = Path(snapshot_download("o/m", endpoint=hub.url, cache_dir=tmp_path))
    assert folder.name == commit
    assert {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    } == FILES


def test_models_and_datasets_of_one_name_are_apart(tmp_path: Path) -> None:
    """A dataset is not served as a model, and commits of old content remain."""
    with HubServer() as hub:
        old = hub.add("dataset", "o/d", FILES)
        new = hub.add("dataset", "o/d", {"config.json": b"[]"})
        api = HfApi(endpoint=hub.url)
        assert api.dataset_info("o/d").sha == new
        assert sorted(api.list_repo_files("o/d", repo_type="dataset", revision=old)) == sorted(FILES)
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("o/d")
        with pytest.raises(RevisionNotFoundError):
            api.dataset_info("o/d", revision="nowhere")
        with pytest.raises(RemoteEntryNotFoundError):
            hf_hub_download("o/d", "weights/a.bin", repo_type="dataset", endpoint=hub.url, cache_dir=tmp_path)


def test_the_file_system_view_lists_folders() -> None:
    """fsspec's view of the hub, which `datasets` uses for patterns, has folders and sizes."""
    with HubServer() as hub:
        hub.add("dataset", "o/d", FILES)
        system = HfFileSystem(endpoint=hub.url, skip_instance_cache=True)
        assert system.ls("datasets/o/d/weights", detail=False) == ["datasets/o/d/weights/a.bin"]
        assert system.info("datasets/o/d/weights/a.bin")["size"] == 1000
        assert system.glob("datasets/o/d/*.json") == ["datasets/o/d/config.json"]
        assert system.read_text("datasets/o/d/README.md") == "# x"

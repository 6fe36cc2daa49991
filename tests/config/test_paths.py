"""Paths and names that a user gives: one meaning everywhere, and a reason where there is none."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mllm_shapx.cli import main
from mllm_shapx.config.loading import load_config
from mllm_shapx.config.paths import expanded, matches
from mllm_shapx.errors import ConfigError

BAD = {
    "empty": ("", "is empty"),
    "blank": ("  ", "is empty"),
    "unknown user": ("~nobody-has-this-name/x", "no such user"),
    "NUL": ("a\0b", "control character"),
    "newline": ("a\nb", "control character"),
    "long name": ("x" * 300, "too long"),
    "long path": ("/".join(["x" * 100] * 60), "too long"),
}
"""What cannot be a path, and a word of the reason."""

LOGINS = [
    "https://user:hunter2@example.org/x",
    "https://hunter2@example.org/x",
    "s3://key:hunter2@bucket/x",
    "https://example.org/x?token=hunter2",
]


def config(folder: Path, **changes: Any) -> Path:
    path = folder / "study.json"
    usual = {
        "experiment_set_id": "study",
        "connector": "hf_text",
        "dataset": {"source": "local_csv", "path": "rows.csv"},
        "experiments": [{"explainer_type": "exact"}],
    }
    path.write_text(json.dumps({**usual, **changes}))
    return path


def placed(key: str, value: str) -> dict[str, Any]:
    """Return a config's changes that put `value` at a dotted key."""
    block, _, name = key.partition(".")
    if not name:
        return {key: value}
    source = {"source": "local_csv"} if block == "dataset" else {}
    return {block: {**source, name: value}}


def called(*args: str) -> Result:
    found = CliRunner().invoke(main, list(args))
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    assert "unexpected" not in found.output, found.output
    return found


@pytest.mark.parametrize(
    "key",
    ["output_root", "connector_kwargs.model_id", "dataset.path", "embedding.model_id", "base"],
)
@pytest.mark.parametrize("kind", BAD)
def test_a_key_that_cannot_be_a_path_is_refused_with_the_reason(tmp_path: Path, key: str, kind: str) -> None:
    value, reason = BAD[kind]
    with pytest.raises(ConfigError) as caught:
        load_config(config(tmp_path, **placed(key, value)))
    assert any(problem.path == key and reason in str(problem) for problem in caught.value.problems), caught


@pytest.mark.parametrize("kind", [kind for kind in BAD if kind != "NUL"])
@pytest.mark.parametrize("command", ["status", "failures", "verify", "report", "retry", "store info"])
def test_a_directory_argument_that_cannot_be_a_path_is_refused(command: str, kind: str) -> None:
    value, reason = BAD[kind]
    found = called(*command.split(), value)
    assert found.exit_code == 2
    assert reason in found.output


@pytest.mark.parametrize("kind", ["unknown user", "long name", "long path"])
@pytest.mark.parametrize("option", ["--config", "--config-list"])
def test_a_config_that_cannot_be_a_path_is_refused(option: str, kind: str) -> None:
    value, reason = BAD[kind]
    found = called("validate", option, value)
    assert found.exit_code == 2
    assert reason in found.output


def test_the_home_is_meant_by_a_tilde_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    (home / "data" / "rows.csv").write_text("prompt\none two\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    named = config(home, output_root="~/results", dataset={"source": "local_csv", "path": "~/data/rows.csv"})
    assert load_config(named).experiment_set.output_root == str(home / "results")
    (home / "list").write_text("~/study.json\n")
    for options in (["--config", "~/study.json"], ["--config", "~/*.json"], ["--config-list", "~/list"]):
        found = called("validate", "--check-dataset", *options)
        assert found.exit_code == 0, found.output
        assert "1 row(s)" in found.output
    (home / "results" / "study" / "exact" / "samples").mkdir(parents=True)
    assert str(home / "results" / "study") in called("status", "~/results/study").output
    assert called("report", "~/results/study").output.strip() == str(home / "results/study/report.html")
    assert called("report", "~/results/study", "--output", "~/page.html").exit_code == 0
    assert (home / "page.html").is_file()
    child = tmp_path / "child.json"
    child.write_text(json.dumps({"base": "~/study.json"}))
    assert load_config(child).experiment_set.experiment_set_id == "study"
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("login", LOGINS)
@pytest.mark.parametrize(
    "key",
    ["output_root", "connector_kwargs.model_id", "dataset.repo_id", "dataset.path", "embedding.model_id"],
)
def test_a_login_in_a_url_is_refused_and_not_shown(tmp_path: Path, key: str, login: str) -> None:
    path = config(tmp_path, **placed(key, login))
    found = called("validate", "--config", str(path))
    assert found.exit_code == 2
    assert key in found.output
    assert "fsspec" in found.output
    assert "hunter2" not in found.output


def test_a_login_that_the_command_line_names_is_not_shown() -> None:
    found = called("status", "memory://user:hunter2@host/results")
    assert found.exit_code == 2
    assert "hunter2" not in found.output


def test_uris_without_a_login_stay_as_they_are(tmp_path: Path) -> None:
    for uri in ("s3://bucket/a b", "memory://study", "sftp://user@host/folder", "gs://bucket/~x"):
        assert load_config(config(tmp_path, output_root=uri)).experiment_set.output_root == uri
    path = f"file://{tmp_path}/x"
    assert load_config(config(tmp_path, output_root=path)).experiment_set.output_root == f"{tmp_path}/x"


def test_odd_characters_are_names_like_any_other(tmp_path: Path) -> None:
    folder = tmp_path / "Übung 'x' \U0001f600 100% [a]"
    folder.mkdir()
    path = config(folder, output_root=str(folder / "out"))
    assert called("validate", "--config", str(path)).exit_code == 0
    assert expanded(str(folder)) == folder


def test_links_in_a_circle_are_told(tmp_path: Path) -> None:
    (tmp_path / "loop.json").symlink_to("loop.json")
    found = called("validate", "--config", str(tmp_path / "loop.json"))
    assert found.exit_code == 2
    assert "loop.json" in found.output
    path = config(tmp_path, base="loop.json")
    found = called("validate", "--config", str(path))
    assert found.exit_code == 2
    assert "base" in found.output
    (tmp_path / "rows.csv").symlink_to("rows.csv")
    found = called("validate", "--check-dataset", "--config", str(config(tmp_path)))
    assert found.exit_code == 2
    assert "rows.csv" in found.output


def test_a_glob_over_folders_that_link_to_each_other_ends(tmp_path: Path) -> None:
    """Two links to the folder above would make 2^40 paths for a glob that follows them."""
    (tmp_path / "rows.csv").write_text("prompt\na b\n")
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(".")
    assert list(matches(tmp_path / "**" / "*.csv")) == [tmp_path / "rows.csv"]
    path = config(tmp_path, dataset={"source": "local_csv", "path": str(tmp_path / "**" / "*.csv")})
    assert "1 row(s)" in called("validate", "--check-dataset", "--config", str(path)).output


def test_a_list_of_configs_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(b"\xff\xfe\0\x80")
    found = called("validate", "--config-list", str(tmp_path / "list"))
    assert found.exit_code == 2
    assert "not UTF-8" in found.output
    found = called("validate", "--config-list", str(tmp_path))
    assert found.exit_code == 2
    assert "--config-list" in found.output

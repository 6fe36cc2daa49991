"""What the README and the documentation show is true."""

import json
import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

import mllm_shapx
from mllm_shapx.cli import main
from mllm_shapx.config.loading import load_config
from mllm_shapx.config.models import ConnectorKwargs, ExperimentSet
from mllm_shapx.planning.sweep import expand
from mllm_shapx.records.results import FIELDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_config_shown_can_be_used_as_it_stands(tmp_path: Path) -> None:
    """A reader who copies the config gets a study, with the run names that the text tells."""
    (block,) = re.findall(r"```json\n(.*?)```", text_of(ROOT / "README.md"), flags=re.DOTALL)
    path = tmp_path / "study.json"
    path.write_text(block)
    config = load_config(path)
    assert config.warnings == ()
    assert config.experiment_set.experiment_set_id == json.loads(block)["experiment_set_id"]
    names = {run.name for run in expand(config.experiment_set).runs}
    assert {"exact", "limited_mc_frac0_1", "limited_mc_frac0_3"} <= names


@pages
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link names a file that is there, and a heading that the page has."""
    for target in re.findall(r"\]\(\s*([^)\s]+)\s*\)", text_of(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = page if not name else page.parent / name
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


@pages
def test_files_modules_and_targets_named_are_there(page: Path) -> None:
    text = text_of(page)
    places = r"(?:configs|scripts|demo|demo_smollm2|tests|examples|docs|\.ci)"
    for name in re.findall(rf"`({places}/[\w./]+)`", text):
        assert (ROOT / name).exists(), name
    rooms = "|".join(path.name for path in (ROOT / "src" / "mllm_shapx").iterdir() if path.is_dir())
    for name in re.findall(rf"`((?:{rooms})/[a-z_]+\.py)`", text):
        assert (ROOT / "src" / "mllm_shapx" / name).exists(), name
    targets = re.findall(r"^([a-z0-9-]+):", text_of(ROOT / "Makefile"), flags=re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", text, flags=re.MULTILINE)) <= set(targets)


def test_the_table_of_commands_is_complete() -> None:
    section = text_of(ROOT / "README.md").split("## The command line")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE)
    told = {name.split()[0] for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert told == set(main.commands)


def test_every_option_of_run_is_told() -> None:
    told = text_of(ROOT / "docs" / "running.md")
    options = re.findall(r"--[a-z][a-z-]+", CliRunner().invoke(main, ["run", "--help"]).output)
    assert {option for option in options if option not in told} == {"--help"}


def keys_of(schema: dict[str, Any]) -> Iterator[str]:
    for definition in (schema, *schema["$defs"].values()):
        yield from definition.get("properties", {})


def test_the_page_of_formats_has_every_key_and_field() -> None:
    """A key of the config or a field of a sample that the page does not name is one nobody finds."""
    page = text_of(ROOT / "docs" / "formats.md")
    named = set(re.findall(r"\w+", page))
    keys = set(keys_of(ExperimentSet.model_json_schema()))
    assert set(ConnectorKwargs.model_fields) <= keys
    assert not (keys | set(FIELDS)) - named


def names_of(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        yield from (name for name in schema.get("enum", ()) if isinstance(name, str))
        schema = list(schema.values())
    if isinstance(schema, list):
        for each in schema:
            yield from names_of(each)


def test_the_page_of_formats_has_every_name_that_a_config_chooses_from() -> None:
    """A connector, explainer, similarity, source or other name that the page does not have is not found."""
    page = text_of(ROOT / "docs" / "formats.md")
    names = set(names_of(ExperimentSet.model_json_schema()))
    assert {"openai", "TfIdfCosineSimilarity", "local_csv"} <= names
    assert not {name for name in names if f"`{name}`" not in page}


def test_there_is_one_version() -> None:
    """The package says its version; the project's metadata and the changelog follow."""
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mllm_shapx.__version__"}
    assert version("mllm-shapx") == mllm_shapx.__version__
    assert f"\n## {mllm_shapx.__version__}" in text_of(ROOT / "CHANGELOG.md")


def test_files_of_the_front_door_can_be_read() -> None:
    for name in (".pre-commit-config.yaml", "CITATION.cff", ".github/workflows/ci.yml"):
        assert yaml.safe_load(text_of(ROOT / name)), name
    hooks = yaml.safe_load(text_of(ROOT / ".pre-commit-config.yaml"))["repos"][0]["hooks"]
    commands = {hook["entry"].removeprefix(".venv/bin/") for hook in hooks}
    check = text_of(ROOT / "Makefile").split("\ncheck:")[1].split("\n\n")[0]
    assert all(command in check.replace("$(BIN)/", "") for command in commands)
    assert (ROOT / "docs" / "images" / "report.png").stat().st_size < 300_000
    assert "Apache License" in text_of(ROOT / "LICENSE")

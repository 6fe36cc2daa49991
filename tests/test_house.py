"""The house stays as it was designed: imports run downwards, and each heavy library has its room."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "mllm_shapx"

FLOORS = [
    {"__main__"},
    {"cli", "api"},
    {"terminal"},
    {"execution"},
    {"benchmark"},
    {"explaining"},
    {"models", "data", "tracking", "reporting"},
    {"planning"},
    {"records"},
    {"config"},
    {"errors", "plaintext"},
]
"""From the top. A room imports from its own and from lower floors, never from a neighbour's above."""

HEAVY = {
    "ray": {"execution"},
    "wandb": {"tracking"},
    "mlflow": {"tracking"},
    "liquid_audio": {"models"},
    "shapiq": {"explaining"},
}
"""Library -> the rooms that may import it."""


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module, node.lineno


def files() -> list[Path]:
    return [path for path in sorted(SOURCE.rglob("*.py")) if room_of(path) != "__init__"]


def floor(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def test_every_room_has_its_floor() -> None:
    assert {room_of(path) for path in files()} == set().union(*FLOORS)


def test_imports_run_downwards() -> None:
    upwards = []
    for path in files():
        room = room_of(path)
        for name, line in imported(path):
            parts = name.split(".")
            if parts[0] == "mllm_shapx" and len(parts) > 1 and floor(parts[1]) < floor(room):
                upwards.append(f"{path.relative_to(SOURCE)}:{line} imports {name}")
    assert not upwards, "\n".join(upwards)


def test_models_know_settings_and_no_runs() -> None:
    strangers = [
        f"{path.relative_to(SOURCE)}:{line}"
        for path in files()
        for name, line in imported(path)
        if room_of(path) == "models" and name.startswith("mllm_shapx.planning")
    ]
    assert not strangers


@pytest.mark.parametrize("library", sorted(HEAVY))
def test_heavy_libraries_stay_in_their_rooms(library: str) -> None:
    strangers = [
        f"{path.relative_to(SOURCE)}:{line}"
        for path in files()
        for name, line in imported(path)
        if name.split(".")[0] == library and room_of(path) not in HEAVY[library]
    ]
    assert not strangers


def test_no_module_imports_in_a_circle() -> None:
    graph = {
        ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): {
            name for name, _ in imported(path) if name.startswith("mllm_shapx.")
        }
        for path in files()
    }
    done: set[str] = set()

    def visit(module: str, chain: tuple[str, ...]) -> None:
        assert module not in chain, " -> ".join([*chain, module])
        if module in done:
            return
        for other in sorted(graph.get(module, ())):
            visit(other, (*chain, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_every_module_says_in_its_first_line_what_it_is_for() -> None:
    silent = [path.name for path in files() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


def test_no_module_has_more_than_four_hundred_lines() -> None:
    names = {path.relative_to(SOURCE).as_posix(): path for path in files()}
    over = {name for name, path in names.items() if len(path.read_text().splitlines()) > 400}
    assert not over


def test_no_two_public_classes_have_the_same_name() -> None:
    classes = Counter(
        node.name
        for path in files()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in classes.items() if count > 1] == []


def test_the_version_is_written_in_one_place() -> None:
    root = SOURCE.parents[1]
    number = re.search(r'__version__ = "(.+)"', (SOURCE / "__init__.py").read_text())
    assert number is not None
    listed = ("pyproject.toml", "CITATION.cff", "Makefile", "cluster", "docs", "scripts", "slurm", "src")
    paths = [path for name in listed for path in (root / name, *sorted((root / name).rglob("*")))]
    written = [
        path.relative_to(root).as_posix()
        for path in paths
        if path.is_file()
        and ".egg-info" not in str(path)
        and path.suffix in {".py", ".toml", ".cff", ".yaml", ".md", ".sh", ""}
        if re.search(rf"(?<![\d.]){re.escape(number[1])}(?![\d.])", path.read_text(errors="replace"))
    ]
    assert written == ["src/mllm_shapx/__init__.py"]

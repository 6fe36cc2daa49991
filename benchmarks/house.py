"""Prints the size of the source: lines per room, modules, and lengths of functions.

`python benchmarks/house.py` measures the working tree, `python benchmarks/house.py COMMIT` a commit.
"""

import ast
import statistics
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
PACKAGE = "src/mllm_shapx"


def sources(commit: str | None) -> Iterator[tuple[str, str]]:
    """Yield each module's path in the package, and its text."""
    if commit is None:
        for path in sorted((ROOT / PACKAGE).rglob("*.py")):
            yield path.relative_to(ROOT / PACKAGE).as_posix(), path.read_text(encoding="utf-8")
        return
    for name in _git("ls-tree", "-r", "--name-only", commit, PACKAGE).split():
        if name.endswith(".py"):
            yield name.removeprefix(f"{PACKAGE}/"), _git("show", f"{commit}:{name}")


def function_lengths(text: str) -> list[int]:
    """Return the lines of each function, decorators and docstring included."""
    functions = (
        node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return [(node.end_lineno or node.lineno) - node.lineno + 1 for node in functions]


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@click.command()
@click.argument("commit", required=False)
def main(commit: str | None) -> None:
    """Print the figures of COMMIT, of the working tree by default."""
    rooms, modules, lengths = Counter[str](), dict[str, int](), list[int]()
    for name, text in sources(commit):
        lines = len(text.splitlines())
        rooms[name.split("/")[0].removesuffix(".py")] += lines
        modules[name] = lines
        lengths += function_lengths(text)
    for room, lines in rooms.most_common():
        click.echo(f"{lines:7,}  {room}")
    over = [f"{name} ({lines})" for name, lines in sorted(modules.items()) if lines > 400]
    click.echo(f"{sum(rooms.values()):7,}  lines in {len(modules)} modules")
    click.echo(f"over 400 lines: {', '.join(over) or 'none'}")
    percentile = statistics.quantiles(lengths, n=20)[-1]
    click.echo(
        f"{len(lengths):,} functions: median {statistics.median(lengths):g} lines, 95th percentile "
        f"{percentile:g}, longest {max(lengths)}"
    )


if __name__ == "__main__":
    main()

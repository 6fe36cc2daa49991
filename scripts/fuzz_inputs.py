"""Edits valid configs, datasets, models and results at random, and checks that every command ends well.

    python scripts/fuzz_inputs.py --edits 10000 --seed 1

A command ends well if it ends in time, shows no traceback, reports no unexpected error, prints no terminal
escape, and exits with 0, 2 or 3; `verify` may also exit with 1, if it finds something. Each edit depends only
on the seed and its number: `--only N` repeats one of them and prints it.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fuzz_edits import edit_bytes, edit_csv, edit_json, edit_parquet, edit_place

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "demo" / "model"
LIMIT_S = 60.0
"""Maximum seconds of a command; high, for loaded machines."""

MOST_BYTES = 3 << 30
"""Maximum memory of a process in bytes."""

_ESCAPES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]")
_PROMPTS = [
    "please tell our tall sailor",
    "kindly remind my young painter",
    "old ferry near harbor",
    "",
    "masks of this museum",
]


@dataclass(frozen=True)
class Finding:
    """One edit whose command did not end well."""

    number: int
    what: str
    """Description of the edit."""
    command: str
    fault: str
    output: str

    def __str__(self) -> str:
        return f"edit {self.number}: {self.what}\n  {self.command}\n  {self.fault}\n{self.output[-3000:]}"


@dataclass(frozen=True)
class Outcome:
    """The end of one edit's command."""

    kind: str
    code: int
    finding: Finding | None


class Fuzz:
    """The valid inputs, and edits of copies of them.

    Args:
        base: Folder of the valid inputs of `make_base`.
        scratch: A folder for each edit's files.
        seed: Decides every edit, with its number.
        runs: Share of the edits that run a study instead of only reading it.
    """

    def __init__(self, base: Path, scratch: Path, seed: int, runs: float) -> None:
        self._base, self._scratch, self._seed, self._runs = base, scratch, seed, runs

    def edit(self, number: int, *, show: bool = False) -> Outcome:
        """Make one edit, run one command on it, and judge its end."""
        draw = random.Random(f"{self._seed}-{number}")
        shutil.rmtree(self._scratch, ignore_errors=True)
        shutil.copytree(self._base, self._scratch, symlinks=True)
        is_run = draw.random() < self._runs
        kind = draw.choice(["config", "csv", "parquet", "results", "results", *(["model"] if is_run else [])])
        what, command = getattr(self, f"_{kind}")(draw, is_run)
        if show:
            print(f"{kind}: {what}\nmllm-shapx {' '.join(command)}\nin {self._scratch}")
        code, output, error = _called(command)
        if show:
            print(output)
        fault = _fault(command, code, output, error)
        finding = (
            None if fault is None else Finding(number, f"{kind}: {what}", " ".join(command), fault, output)
        )
        return Outcome(f"{kind} {command[0]}", code, finding)

    def _config(self, draw: random.Random, is_run: bool) -> tuple[str, list[str]]:
        path = self._scratch / draw.choice(["csv.json", "parquet.json", "child.json", "common.json"])
        edit = draw.choice([edit_json, edit_json, edit_json, edit_json, edit_bytes, _edit_place_of_config])
        what = f"{path.name}: {edit(path, draw)}"
        target = path if path.name != "common.json" else self._scratch / "child.json"
        if is_run:
            _keep_at_home(target)
        return what, self._study_command(target, draw, is_run)

    def _csv(self, draw: random.Random, is_run: bool) -> tuple[str, list[str]]:
        edit = draw.choice([edit_csv, edit_csv, edit_csv, edit_bytes, edit_place])
        what = edit(self._scratch / "rows.csv", draw)
        return what, self._study_command(self._scratch / "csv.json", draw, is_run)

    def _parquet(self, draw: random.Random, is_run: bool) -> tuple[str, list[str]]:
        edit = draw.choice([edit_parquet, edit_parquet, edit_parquet, edit_bytes, edit_place])
        what = edit(self._scratch / "rows.parquet", draw)
        return what, self._study_command(self._scratch / "parquet.json", draw, is_run)

    def _model(self, draw: random.Random, is_run: bool) -> tuple[str, list[str]]:
        path = draw.choice(sorted((self._scratch / "model").iterdir()))
        edits: list[Callable[[Path, random.Random], str]] = [edit_bytes, edit_place]
        if path.suffix == ".json":
            edits += [edit_json] * 3
        what = f"{path.name}: {draw.choice(edits)(path, draw)}"
        return what, self._study_command(self._scratch / "parquet.json", draw, is_run)

    def _results(self, draw: random.Random, is_run: bool) -> tuple[str, list[str]]:
        output = self._scratch / "output" / "study"
        path = draw.choice([path for path in sorted(output.rglob("*")) if path.is_file()])
        edits: list[Callable[[Path, random.Random], str]] = [edit_bytes, edit_place]
        if path.suffix == ".json" or path.name == ".lock":
            edits += [edit_json] * 5
        what = f"{path.relative_to(output)}: {draw.choice(edits)(path, draw)}"
        if draw.random() < 0.1:
            folder = draw.choice([path for path in sorted(output.rglob("*")) if path.is_dir()])
            what += f"; {folder.relative_to(output)}/: {edit_place(folder, draw)}"
        if is_run:
            return what, self._study_command(self._scratch / "parquet.json", draw, is_run)
        target = str(draw.choice([output, output, output, output / "exact"]))
        command = draw.choice(
            [
                ["status", target],
                ["status", "--json", target],
                ["verify", target],
                ["verify", "--json", target],
                ["report", target],
                ["failures", target],
                ["failures", "--json", target],
                ["store", "info", target],
                ["plan", "--config", str(self._scratch / "parquet.json")],
            ]
        )
        return what, command

    def _study_command(self, config: Path, draw: random.Random, is_run: bool) -> list[str]:
        named = ["--config", str(config)]
        if is_run:
            how = draw.choice(["--resume", "--resume", "--overwrite"])
            return ["run", *named, how, "--inline", "--max-samples", "2"]
        looks = [["validate"], ["validate", "--check-dataset"], ["plan"], ["plan", "--json"]]
        return [*draw.choice(looks), *named]


def make_base(folder: Path) -> None:
    """Write valid inputs and run a small study on them."""
    shutil.copytree(MODEL, folder / "model")
    columns = {
        "prompt": _PROMPTS,
        "language": ["en"] * len(_PROMPTS),
        "score": [0.5 * place for place in range(len(_PROMPTS))],
    }
    pq.write_table(pa.table(columns), folder / "rows.parquet", row_group_size=2)
    lines = ["prompt,language,score", *(f"{text},en,{place}" for place, text in enumerate(_PROMPTS))]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    common = {
        "experiment_set_id": "study",
        "output_root": "output",
        "connector": "hf_text",
        "connector_kwargs": {"model_id": "model", "dtype": "float32", "batch_size": 8},
        "device": "cpu",
        "dataset": {"source": "local_parquet", "path": "rows.parquet", "column_mapping": {"text": "prompt"}},
        "selection": {
            "shuffle_seed": None,
            "filters": [
                {"column": "score", "op": "<", "value": 9},
                {"column": "language", "op": "in", "value": ["en", "de"]},
            ],
        },
        "generation": {"max_new_tokens": 3, "text_temperature": 0.0},
        "chat": {"system_prompt": "Answer."},
        "shap": {"similarity": "TfIdfCosineSimilarity", "normalizer": "AbsSumNormalizer"},
        "wandb": {"enabled": False, "tags": ["a"]},
        "experiments": [
            {"explainer_type": "exact"},
            {"explainer_type": "limited_mc", "num_samples": [8]},
            {
                "explainer_type": "hierarchical",
                "name": "h",
                "hierarchical": {"ks": [3], "shap_fractions": [0.5]},
            },
        ],
    }
    text = json.dumps(common, indent=1)
    (folder / "parquet.json").write_text(text)
    (folder / "csv.json").write_text(text.replace("parquet", "csv"))
    (folder / "common.json").write_text(text)
    (folder / "child.json").write_text(json.dumps({"base": "common.json", "chat": {"system_prompt": ""}}))
    with _inside(folder):
        code, output, error = _called(["run", "--config", "parquet.json", "--inline"])
    if code != 3 or error is not None:  # the empty prompt is quarantined
        raise SystemExit(f"the study on valid inputs ended with {code}:\n{output}{error or ''}")


def _edit_place_of_config(path: Path, draw: random.Random) -> str:
    done = edit_place(path, draw)
    # A config may be a pipe, for example the shell's <(...). It would wait for a writer; here is none.
    if path.is_fifo():
        path.unlink()
        done = "gone"
    return done


def _keep_at_home(config: Path) -> None:
    """Keep a run away from accounts and the network, with any edit."""
    if not config.is_file():
        return
    try:
        data = json.loads(config.read_text())
        data["wandb"] = {"enabled": False}
        config.write_text(json.dumps(data))
    except (ValueError, TypeError, OSError, RecursionError):
        return


class _inside:  # noqa: N801 -- reads as a statement
    """Context with a folder as the working directory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        self._before = Path.cwd()
        os.chdir(self._folder)

    def __exit__(self, *_: object) -> None:
        os.chdir(self._before)


def _called(command: Sequence[str]) -> tuple[int, str, str | None]:
    """Return exit code, output, and the traceback of an uncaught error."""
    from click.testing import CliRunner

    from mllm_shapx.cli import main

    found = CliRunner().invoke(main, list(command))
    error = None
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        error = "".join(traceback.format_exception(found.exception))
    return found.exit_code, found.output, error


def _fault(command: Sequence[str], code: int, output: str, error: str | None) -> str | None:
    """Return the fault in a command's end, None without a fault."""
    if error is not None:
        return error
    if "error: unexpected" in output:
        report = re.search(r"traceback is in (\S+)", output)
        return "unexpected error\n" + (Path(report[1]).read_text() if report else "")
    if re.search(r"^Traceback \(most recent call last\)", output, re.MULTILINE):
        return "a traceback is shown"
    if code not in {0, 2, 3} and not (command[0] == "verify" and code == 1 and "problem" in output):
        return f"exit {code}"
    if (escape := _ESCAPES.search(output)) is not None:
        return f"the output holds {escape[0]!r}"
    return None


def in_process(base: Path, scratch: Path, seed: int, numbers: Sequence[int], runs: float) -> list[Outcome]:
    """Make edits in this process; SIGALRM ends slow commands."""
    fuzz = Fuzz(base, scratch, seed, runs)
    scratch.mkdir(exist_ok=True)
    return [_timed(fuzz, scratch, number) for number in numbers]


def _timed(fuzz: Fuzz, scratch: Path, number: int) -> Outcome:
    def too_late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        scratch.mkdir(exist_ok=True)
        with _inside(scratch.parent):
            return fuzz.edit(number)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _serve(pipe: Connection, base: Path, scratch: Path, seed: int, runs: float) -> None:
    """Make the edits received from a pipe, until None."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    os.environ.update(_environment())
    fuzz = Fuzz(base, scratch, seed, runs)
    while (number := pipe.recv()) is not None:
        scratch.mkdir(exist_ok=True)
        with _inside(scratch.parent):
            pipe.send(fuzz.edit(number))


def _environment() -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "LOG_LEVEL": "ERROR"}


def outcomes(base: Path, work: Path, seed: int, numbers: Sequence[int], runs: float) -> Iterator[Outcome]:
    """Make edits in a separate process; restart it if it dies or does not answer in time."""
    context = multiprocessing.get_context("spawn")
    process: Any = None
    for number in numbers:
        if process is None:
            pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, base, work / "edited", seed, runs))
            process.start()
            theirs.close()
        pipe.send(number)
        fault = None
        try:
            if pipe.poll(2 * LIMIT_S):
                yield pipe.recv()
                continue
            fault = f"no end after {2 * LIMIT_S:g} s"
        except EOFError:
            process.join()
            fault = f"the process died with {process.exitcode}"
        process.kill()
        process.join()
        process = None
        yield Outcome("lost", -1, Finding(number, "see --only", "", fault, ""))
    if process is not None:
        pipe.send(None)
        process.join()


def main() -> None:
    """Make the edits and print the faults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--edits", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=int, default=0, help="number of the first edit")
    parser.add_argument("--runs", type=float, default=0.08, help="share of edits that run a study")
    parser.add_argument("--only", type=int, help="do this one edit, here, and show it")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    asked = parser.parse_args()
    os.environ.update(_environment())
    work = asked.folder or Path(tempfile.mkdtemp(prefix="fuzz-"))
    base = work / "base"
    if not base.exists():
        base.mkdir(parents=True)
        make_base(base)
    if asked.only is not None:
        (work / "edited").mkdir(exist_ok=True)
        with _inside(work):
            outcome = Fuzz(base, work / "edited", asked.seed, asked.runs).edit(asked.only, show=True)
        sys.exit(0 if outcome.finding is None else str(outcome.finding))
    started = time.monotonic()
    counts: Counter[str] = Counter()
    found = 0
    numbers = range(asked.start, asked.start + asked.edits)
    for done, outcome in enumerate(outcomes(base, work, asked.seed, numbers, asked.runs), start=1):
        counts[f"{outcome.kind}: exit {outcome.code}"] += 1
        if outcome.finding is not None:
            found += 1
            print(outcome.finding, flush=True)
        if done % 500 == 0:
            print(f"{done} edits, {found} findings, {time.monotonic() - started:.0f} s", flush=True)
    for name, count in sorted(counts.items()):
        print(f"{count:6} {name}")
    took = f"{time.monotonic() - started:.0f} s"
    print(f"{asked.edits} edits, seed {asked.seed}: {found} did not end well ({took})")
    if asked.folder is None:
        shutil.rmtree(work)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()

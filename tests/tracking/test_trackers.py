"""A study's trackers: a third one is one module, and the command that uploads offline runs is right."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from small_study import Study
from tracking_kit import make_sample, records_of
from wandb_files import whole_history

import mllm_shapx.tracking
from mllm_shapx.config.models import ExperimentSet, TrackingBlock, WandbConfig
from mllm_shapx.tracking.background import BackgroundTracker
from mllm_shapx.tracking.tracker import placed_trackers
from mllm_shapx.tracking.wandb import place

JSON_LINES = """
import json
from pathlib import Path

from mllm_shapx.tracking.history import COUNTER, History


class JsonLines:
    name, extra, after_timeout = "JSON lines", "json_lines", "nothing is lost"

    def __init__(self, folder):
        self.folder = folder

    def open(self, start):
        self.folder.mkdir(exist_ok=True)
        return JsonLinesRun(self.folder / f"{start.identity}.jsonl")

    def close(self):
        (self.folder / "closed").touch()

    def hint(self):
        return f"to read it: jq . {self.folder}/*.jsonl"


class JsonLinesRun:
    recovers = False

    def __init__(self, path):
        self.path, self.history = path, History()
        for line in path.read_text().splitlines() if path.exists() else ():
            if COUNTER in json.loads(line):
                self.history.add(json.loads(line))

    def write(self, **content):
        with self.path.open("a") as stream:
            stream.write(json.dumps(content) + "\\n")

    def reload(self): ...
    def log(self, line): self.write(**line)
    def flush(self): ...
    def finish(self, summary): self.write(summary=dict(summary))
    def close(self, *, failed): self.write(failed=failed)


def place(block, experiment_set_id, output_uri):
    return JsonLines(Path(output_uri) / "json_lines")
"""


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third tracker: the module above, and its line in the config's shape."""
    module = ModuleType("mllm_shapx.tracking.json_lines")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(mllm_shapx.tracking, "json_lines", module, raising=False)
    exec(JSON_LINES, vars(module))  # noqa: S102 -- the text above
    known = vars(ExperimentSet)["trackers"]
    more = {"json_lines": TrackingBlock()}
    both = property(lambda each: {**known.fget(each), **more})
    monkeypatch.setattr(ExperimentSet, "trackers", both)


@pytest.mark.usefixtures("third")
def test_a_third_tracker_is_one_module_and_one_line(tmp_path: Path) -> None:
    """It gets each sample of two starts once, the summaries and the end, and its hint is printed."""
    study = Study(tmp_path, rows=3, words=3)
    assert study.call("--inline", "--max-samples", "2").code == 0
    end = study.call("--inline", "--resume")
    assert end.code == 0, end.out
    folder = study.output / "json_lines"
    assert f"to read it: jq . {folder}/*.jsonl" in end.out
    runs = sorted(path.parent.name for path in study.output.glob("*/spec.json"))
    files = sorted(folder.glob("*.jsonl"))
    assert len(files) == len(runs) > 1
    for file in files:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert sorted(line["row_index"] for line in lines if "sample" in line) == [0, 1, 2]
        assert [line["summary"]["n_samples"] for line in lines if "summary" in line] == [2, 3]
        assert [line["failed"] for line in lines if "failed" in line] == [False, False]
    assert (folder / "closed").exists()


def test_blocks_and_modules_have_the_same_names() -> None:
    """Every block of a tracker that the config's shape has names a module with `place`."""
    config = {"experiment_set_id": "study", "experiments": [{"explainer_type": "exact"}], "mlflow": {}}
    experiment_set = ExperimentSet.model_validate(config)
    assert list(experiment_set.trackers) == ["wandb", "mlflow"]
    names = {type(each).__name__ for each in placed_trackers(experiment_set, "/data/study")}
    assert names == {"Wandb", "Mlflow"}
    assert (
        placed_trackers(
            experiment_set.model_copy(update={"mlflow": None, "wandb": WandbConfig(enabled=False)}), "/x"
        )
        == ()
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "bucket", "bucket with WANDB_DIR"])
def test_the_command_that_is_printed_names_the_offline_runs(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shell finds with it this set's runs and no others, wherever the study and WANDB_DIR are."""
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "my dir"))
    if kind == "bucket":
        monkeypatch.delenv("WANDB_DIR")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    offline = WandbConfig(mode="offline")
    found = {}
    for name in ("study", "study2"):
        uri = str(tmp_path / name) if kind == "local" else f"memory://bucket/{name}"
        placed = place(offline, name, uri)
        assert placed is not None
        assert placed.hint() is None
        warnings: list[str] = []
        tracker = BackgroundTracker(placed, name, warn=warnings.append)
        tracker.start("exact", {}, records=records_of(tmp_path, name))
        tracker.log_sample(make_sample("exact", 1))
        tracker.finish("exact", {})
        tracker.close()
        assert warnings == []
        found[name] = placed.hint()
    for name, hint in found.items():
        assert hint is not None
        _, _, command = hint.partition("wandb sync ")
        listed = subprocess.run(
            ["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True, cwd="/"
        )
        (folder,) = map(Path, listed.stdout.splitlines())
        assert (folder / ".." / "..").resolve() == {
            "local": tmp_path / name,
            "bucket": here,
            "bucket with WANDB_DIR": tmp_path / "my dir",
        }[kind]
        assert f"-{name}-exact-" in folder.name
        (history,) = whole_history(folder.parents[1]).values() if kind == "local" else [[1]]
        assert history

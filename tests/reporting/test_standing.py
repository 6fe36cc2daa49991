"""`plan` says what is done already, and how long the rest takes by what was measured."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from small_study import Study

from mllm_shapx.cli import main
from mllm_shapx.config.loading import load_config
from mllm_shapx.planning.sweep import expand
from mllm_shapx.records.pace import Pace, read_pace, write_pace
from mllm_shapx.records.storage import open_storage

ROWS = 4
WORDS = 5


def plan(study: Study, *options: str) -> str:
    found = CliRunner().invoke(main, ["plan", "--config", str(study.config), *options])
    assert found.exit_code == 0, found.output
    return found.output


def standing(study: Study) -> Any:
    return json.loads(plan(study, "--json"))["standing"]


@pytest.fixture
def half_done(tmp_path: Path) -> Study:
    """Two of four rows explained by three runs; answers to rows of five players took 0.5 s each."""
    study = Study(tmp_path, rows=ROWS, words=WORDS)
    assert standing(study) is None, "nothing is done"
    assert study.call("--inline", "--max-samples", "2").code == 0
    (run, *_) = expand(load_config(study.config).experiment_set).runs
    write_pace(open_storage(str(study.output)), Pace(2, {run.generation_key: 0.5}))
    return study


def test_the_rest_is_told_from_what_was_measured(half_done: Study) -> None:
    assert standing(half_done) == {
        "samples_done": 6,
        "samples_failed": 0,
        "samples": 12,
        "seconds_left": pytest.approx(2 * 2**WORDS * 0.5 / 2),
        "workers": 2,
    }
    assert "6 of 12 samples are done; the rest takes about 16s on 2 workers, as before." in plan(half_done)


def test_what_was_not_measured_is_not_told(half_done: Study) -> None:
    write_pace(open_storage(str(half_done.output)), Pace(2, {"another": 0.5}))
    assert plan(half_done).rstrip().endswith("6 of 12 samples are done.")
    (half_done.output / "pace.json").write_text('{"workers": 2, "seconds_per')
    assert read_pace(open_storage(str(half_done.output))) is None
    assert standing(half_done)["seconds_left"] is None


def test_a_finished_study_has_nothing_left(half_done: Study) -> None:
    assert half_done.call("--inline", "--resume").code == 0
    assert "12 of 12 samples are done: nothing is left." in plan(half_done)
    assert standing(half_done)["seconds_left"] == 0

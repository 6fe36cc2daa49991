"""When a study stops early: --fail-fast, --max-failures, a device that broke; and how it goes on later."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_study import Study

from mllm_shapx.config.loading import load_config
from mllm_shapx.data.conversations import load_row
from mllm_shapx.errors import RowError
from mllm_shapx.execution import loading
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.preparation import open_output, prepare
from mllm_shapx.explaining.unit import RowExplainer
from mllm_shapx.models.engine import Engine
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.records.results import SampleResult

ROWS = 6
ONE_RUN = {"experiments": [{"explainer_type": "limited_mc", "num_samples": [8]}]}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path, rows=ROWS, settings=ONE_RUN)


@pytest.fixture
def break_rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, Exception]], None]:
    """Return what makes rows raise when they are read, until the next call."""

    def set_errors(errors: dict[int, Exception]) -> None:
        def broken(table: Any, row_index: int, *rest: Any) -> Any:
            if row_index in errors:
                raise errors[row_index]
            return load_row(table, row_index, *rest)

        monkeypatch.setattr(loading, "load_row", broken)

    return set_errors


def test_fail_fast_stops_at_the_first_quarantined_sample_and_a_resumed_study_goes_on(
    study: Study, break_rows: Callable[[dict[int, Exception]], None]
) -> None:
    break_rows({row: RowError("no_players", f"row {row} has no players") for row in (0, 1, 2, 3)})
    end = study.call("--inline", "--fail-fast", "--rows-in-flight", "1")
    assert end.code == 1
    assert study.samples_on_disk() == 0
    assert "1 sample(s) were quarantined and 0 are allowed; stopping early" in end.out
    break_rows({})
    end = study.call("--inline", "--fail-fast", "--resume")
    assert end.code == 3, "what failed before does not stop it, and is not tried again"
    failures = study.call(verb="failures").out
    assert "no_players" in failures
    assert study.call("--inline", "--only", "no_players", verb="retry").code == 0
    assert study.samples_on_disk() == ROWS


@pytest.mark.parametrize(("limit", "code"), [("1", 1), ("2", 3), ("20%", 1), ("50%", 3)])
def test_as_many_samples_may_fail_as_the_call_allows(
    study: Study, break_rows: Callable[[dict[int, Exception]], None], limit: str, code: int
) -> None:
    break_rows({row: RowError("bad_audio", "it cannot be decoded") for row in (0, 1)})
    end = study.call("--inline", "--max-failures", limit, "--rows-in-flight", "1")
    assert end.code == code
    assert (study.samples_on_disk() == ROWS - 2) == (code == 3)


def test_a_row_that_cannot_be_explained_is_not_tried_again_and_one_that_raised_is(
    study: Study, break_rows: Callable[[dict[int, Exception]], None]
) -> None:
    break_rows({0: RowError("no_players", "nothing to explain"), 1: ArithmeticError("no way")})
    assert study.call("--inline").code == 3
    attempts = {
        failure["row_index"]: failure["attempts"]
        for path in study.output.glob("*/failures/*.json")
        for failure in [json.loads(path.read_text())]
    }
    assert attempts == {0: 1, 1: 3}


def test_a_run_that_raises_leaves_the_other_runs_of_its_row_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(tmp_path, rows=2)

    async def broken(explainer: RowExplainer, run: RunSpec, *rest: Any) -> SampleResult:
        if run.name == "limited_mc_frac0_5":
            raise ArithmeticError("no way")
        return await explain(explainer, run, *rest)

    explain = RowExplainer.explain
    monkeypatch.setattr(RowExplainer, "explain", broken)
    assert study.call("--inline").code == 3
    samples = {path.parts[-3] for path in study.output.glob("*/samples/*.json")}
    assert samples == {"exact", "standard_cc_ns16"}
    assert {path.parts[-3] for path in study.output.glob("*/failures/*.json")} == {"limited_mc_frac0_5"}


def test_a_device_that_broke_ends_the_process_instead_of_giving_up_every_row(
    study: Study, break_rows: Callable[[dict[int, Exception]], None]
) -> None:
    """After CUDA's device-side assert every later call fails too: that is no fault of the rows."""
    break_rows(dict.fromkeys(range(ROWS), torch.AcceleratorError("device-side assert triggered")))
    end = study.call("--inline", "--rows-in-flight", "1")
    assert end.code == 1
    assert "the device does not work any more in this process: device-side assert triggered" in end.out
    assert "--resume" in end.out
    assert len(list(study.output.glob("*/failures/*.json"))) == 1
    break_rows({})
    assert study.call("--inline", "--resume").code == 0
    assert study.samples_on_disk() == ROWS


def test_an_engine_that_broke_ends_the_run_and_blames_no_row(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error outside of the model's answer is no fault of the rows: they are explained by --resume."""

    def broken(*_: Any) -> None:
        raise OSError("no such luck")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_answer", broken)
        end = study.call("--inline")
    assert end.code == 1
    assert "engine stopped working: OSError('no such luck')" in end.out
    assert not list(study.output.glob("*/failures/*.json"))
    assert study.call("--inline", "--resume").code == 0
    assert study.samples_on_disk() == ROWS


def test_retry_begins_with_workers_for_its_own_rows_only(
    study: Study, break_rows: Callable[[dict[int, Exception]], None]
) -> None:
    """Not for rows that the study has yet to explain: retry leaves them alone."""
    break_rows({0: RowError("no_players", "row 0 has no players")})
    assert study.call("--inline", "--fail-fast", "--rows-in-flight", "1").code == 1
    loaded = load_config(study.config)
    (run,) = prepare(loaded, RunOptions(resume=True))[0].runs
    begun = []
    for rows in (None, {run.name: (0,)}):
        options = RunOptions(resume=True, retry_rows=rows)
        prepared, _ = prepare(loaded, options)
        output = open_output(prepared)
        begun.append(len(prepared.units_left(output.inspections)))
        output.lock.release()
    assert begun == [ROWS - 1 - study.samples_on_disk(), 1]
    assert begun[0] > 1

"""The Python API: it does what the command line does, in notebooks too, and gives results as tables."""

import _thread
import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pandas as pd
import pytest
import shap
from results_on_disk import make_sample, planted_word, text_entry, write_study
from small_study import LONG_PROMPTS, Study

import mllm_shapx
from mllm_shapx.api import RunKeywords
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.records.results import AUDIO, USER, AudioPiece, ConversationEntry
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.storage import open_storage

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of five rows and three runs, which the tests only read."""
    return write_study(tmp_path_factory.mktemp("api") / "study", range(5))


def as_dict(study: Study) -> dict[str, Any]:
    return dict(json.loads(study.config.read_text()))


def test_a_notebook_runs_plans_and_loads(tmp_path: Path) -> None:
    """While an event loop is running, as in a notebook, a dict is planned, run and read."""
    small = Study(tmp_path, rows=2, words=4)
    config = {**as_dict(small), "output_root": tmp_path / "from a dict"}

    async def cell() -> tuple[mllm_shapx.Plan, mllm_shapx.StudyOutcome]:
        return mllm_shapx.plan(config), mllm_shapx.run(config, inline=True, progress=False, max_samples=1)

    plan, outcome = asyncio.run(cell())
    assert plan.totals()["samples"] == 6
    assert (outcome.exit_code, outcome.done["exact"], outcome.total["exact"]) == (0, 1, 1)
    results = mllm_shapx.load(outcome.output_uri)
    assert set(results.runs) == set(outcome.done)
    (sample,) = results.samples("exact")
    table = results.values("exact")
    assert list(table["value"]) == sample.player_values()
    assert list(table["piece"]) == sample.prompt_texts[0].split()

    with pytest.raises(mllm_shapx.UsageError, match="already holds finished samples"):
        mllm_shapx.run(config, inline=True, progress=False)
    again = mllm_shapx.run(config, inline=True, progress=False, resume=True)
    assert (again.exit_code, again.done["exact"]) == (0, 2)


def test_an_interrupt_ends_a_study_in_good_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A notebook's stop button gives the outcome of an interrupted study, and says how to go on."""
    small = Study(tmp_path, settings={"experiments": [{"explainer_type": "exact"}]})
    small.write_prompts(*LONG_PROMPTS)

    def interrupt() -> None:
        while not (small.output / "exact" / "checkpoint.json").exists():
            time.sleep(0.02)
        _thread.interrupt_main()

    threading.Thread(target=interrupt, daemon=True).start()
    outcome = mllm_shapx.run(small.config, inline=True, grace_s=0.0)
    assert outcome.exit_code == 130
    assert "to go on: mllm_shapx.run(config, resume=True)" in capsys.readouterr().err
    assert sum(outcome.done.values()) < 2
    assert not (small.output / ".lock").exists()


def test_a_wrong_config_is_one_error_that_names_the_key() -> None:
    config = {"experiment_set_id": "x", "experiments": [{"explainer_type": "exakt"}]}
    with pytest.raises(mllm_shapx.ConfigError, match="exact") as caught:
        mllm_shapx.plan(config)
    assert "the config given as a dict" in str(caught.value)
    assert [problem.path for problem in caught.value.problems] == ["experiments[0].explainer_type"]
    with pytest.raises(mllm_shapx.UsageError, match="cannot be written as JSON"):
        mllm_shapx.plan({"experiment_set_id": object()})
    with pytest.raises(mllm_shapx.UsageError, match="not JSON"):
        mllm_shapx.plan({"generation": {"text_temperature": float("nan")}})


def test_options_that_contradict_each_other_are_refused() -> None:
    config = ROOT / "configs" / "demo.json"
    with pytest.raises(mllm_shapx.UsageError, match="resume and overwrite exclude each other"):
        mllm_shapx.run(config, resume=True, overwrite=True)
    with pytest.raises(mllm_shapx.UsageError, match="goes with resume"):
        mllm_shapx.run(config, accept_changed_rows=True)
    with pytest.raises(mllm_shapx.UsageError, match="num_gpus='some' is neither a number nor 'all'"):
        mllm_shapx.run(config, num_gpus="some")  # type: ignore[arg-type]
    with pytest.raises(mllm_shapx.UsageError, match="max_failures='x' is neither a number nor a percentage"):
        mllm_shapx.run(config, max_failures="x")


def test_run_takes_every_option_of_the_command() -> None:
    options = get_type_hints(RunOptions)
    del options["retry_rows"]  # `retry` gives it
    assert get_type_hints(RunKeywords) == options


def test_values_are_one_line_for_each_player(study: Path) -> None:
    results = mllm_shapx.load(study)
    table = results.values()
    assert list(table.columns)[:7] == ["run", "row", "position", "piece", "modality", "value", "raw_value"]
    assert len(table) == sum(sample.num_players for sample in results.samples())
    assert not table.duplicated(["run", "row", "position"]).any()
    for run in results.runs:
        for sample in results.samples(run):
            of_row = table[(table["run"] == run) & (table["row"] == sample.row_index)]
            assert list(of_row["value"]) == sample.player_values()
            assert list(of_row["position"]) == list(range(sample.num_players))
    assert set(table["modality"]) == {"text"}
    assert table["raw_value"].isna().all()
    first = table[(table["run"] == "exact") & (table["row"] == 3)].sort_values("value").iloc[-1]
    assert first["piece"] == planted_word(3)


def test_sound_and_raw_values_have_their_columns(tmp_path: Path) -> None:
    words = text_entry(USER, ["Hear ", "this"], [0.5, None])
    sound = ConversationEntry(AUDIO, (USER, USER), (AudioPiece(640), AudioPiece(640)), (0.25, -0.75))
    sample = replace(
        make_sample("exact", 0),
        conversation=((words, sound),),
        num_players=3,
        extra={"raw_values": [1.0, 0.5, -1.5]},
    )
    records = RunRecords(open_storage(str(tmp_path)), "exact")
    records.write_sample(sample)
    table = mllm_shapx.load(tmp_path).values()
    assert list(table["modality"]) == ["text", "audio", "audio"]
    assert list(table["piece"]) == ["Hear", "", ""]
    assert list(table["value"]) == [0.5, 0.25, -0.75]
    assert list(table["raw_value"]) == [1.0, 0.5, -1.5]


def test_an_explanation_is_what_shap_plots(study: Path) -> None:
    results = mllm_shapx.load(study)
    one = results.explanation("exact", row=3)
    sample = next(sample for sample in results.samples("exact") if sample.row_index == 3)
    np.testing.assert_array_equal(one.values, sample.player_values())
    assert isinstance(one, shap.Explanation)
    assert one.base_values == sample.base_value
    assert "".join(one.data).split() == sample.prompt_texts[0].split()
    everything = results.explanation("exact")
    assert everything.shape[0] == 5
    np.testing.assert_array_equal(everything[3].values, one.values)


def test_what_is_not_there_is_one_message(study: Path, tmp_path: Path) -> None:
    results = mllm_shapx.load(str(study))
    with pytest.raises(mllm_shapx.UsageError, match="has no run exakt; it has exact"):
        results.values("exakt")
    with pytest.raises(mllm_shapx.UsageError, match="no sample of row 77"):
        results.explanation("exact", row=77)
    with pytest.raises(mllm_shapx.UsageError, match="holds no results"):
        mllm_shapx.load(tmp_path)


def test_a_damaged_sample_is_named(tmp_path: Path) -> None:
    directory = write_study(tmp_path / "study", range(2))
    damaged = directory / "exact" / "samples" / "sample_00001_result.json"
    damaged.write_text("{")
    with pytest.raises(mllm_shapx.ShapxError, match=r"sample_00001_result\.json is damaged: it is not JSON"):
        mllm_shapx.load(directory).values("exact")


def test_importing_the_package_loads_no_library() -> None:
    """The command line starts at once: the API's modules are imported when they are used."""
    code = "import sys, mllm_shapx; assert mllm_shapx.__version__; print(*sorted(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in found.stdout.split()}
    assert not loaded & {"torch", "ray", "pandas", "numpy", "transformers", "pydantic", "click"}


def test_everything_exported_is_there() -> None:
    assert all(getattr(mllm_shapx, name) is not None for name in mllm_shapx.__all__)
    assert set(mllm_shapx.__all__) <= set(dir(mllm_shapx))
    with pytest.raises(AttributeError, match="no attribute 'explain'"):
        mllm_shapx.explain  # noqa: B018


def cells_of(notebook: Path) -> Iterator[str]:
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "outputs are not kept in the repository"
            yield "".join(cell["source"])


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example finds the planted words. Its cells run inside an event loop, as Jupyter runs them."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path / "examples")
    names: dict[str, Any] = {}

    async def kernel() -> None:
        for cell in cells_of(ROOT / "examples" / "explain_prompts.ipynb"):
            exec(compile(cell, "cell", "exec"), names)  # noqa: S102 -- our own notebook

    asyncio.run(kernel())
    rows = pd.read_parquet(ROOT / "demo" / "rows.parquet")
    planted = names["planted"]
    assert list(planted["piece"]) == list(rows.loc[planted["row"], "planted_word"])
    assert len(planted) == 4
    assert names["correlation"].loc["exact"].min() > 0.9

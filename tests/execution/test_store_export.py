"""`store export`: the games behind a study's values, for shapiq and for tables."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from older_directories import write_older_directory
from shapiq import ExactComputer
from small_study import ROOT, Study

from mllm_shapx.cli import main
from mllm_shapx.execution import store_export

EXACT = {"explainer_type": "exact"}
COSINE = {**EXACT, "name": "cosine", "shap_override": {"similarity": "CosineSimilarity"}}
FORCED = {**EXACT, "name": "forced", "shap_override": {"value_function": "tf_logprob"}}
COLUMNS = ["row", "generation_key", "num_players", "coalition", "answer"]
PROMPTS = ("please help my teacher explain the harbor", "tell the sailor about it")


def finished(folder: Path, *experiments: dict[str, Any]) -> Study:
    study = Study(folder, settings={"experiments": list(experiments)})
    study.write_prompts(*PROMPTS)
    end = study.call("--inline")
    assert end.code == 0, end.out
    return study


def call(study: Study, output: Path, *flags: str, directory: Path | None = None) -> Result:
    form = output.suffix.removeprefix(".")
    where = str(directory or study.output)
    return CliRunner().invoke(
        main, ["store", "export", where, "--format", form, "--output", str(output), *flags]
    )


def exported(study: Study, output: Path, **keys: Any) -> pd.DataFrame:
    found = call(study, output, **keys)
    assert found.exit_code == 0, found.output
    return pd.read_parquet(output)


def sample(study: Study, run: str, row: int) -> dict[str, Any]:
    path = study.output / run / "samples" / f"sample_{row:05d}_result.json"
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study with games of three kinds that share their answers."""
    return finished(tmp_path_factory.mktemp("store"), EXACT, COSINE, FORCED)


def documented() -> dict[str, Any]:
    """Return the names of the example in docs/reports.md, its class for one."""
    page = (ROOT / "docs" / "reports.md").read_text()
    (code,) = (part for part in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "shapiq" in part)
    names: dict[str, Any] = {}
    exec(code.partition("\ngame = ")[0], names)  # noqa: S102 -- our own page
    return names


@pytest.mark.parametrize(
    ("run", "column"),
    [("exact", "TfIdfCosineSimilarity"), ("cosine", "CosineSimilarity"), ("forced", "tf_logprob")],
)
def test_the_file_is_a_game_whose_shapley_values_are_those_of_the_sample(
    study: Study, tmp_path: Path, run: str, column: str
) -> None:
    table = exported(study, tmp_path / "out.parquet")
    assert list(table.columns) == [*COLUMNS, "TfIdfCosineSimilarity", "CosineSimilarity", "tf_logprob"]
    prompt = documented()["Prompt"]
    for row, players in enumerate(len(text.split()) for text in PROMPTS):
        game = prompt(str(tmp_path / "out.parquet"), row=row, value=column)
        assert game.n_players == players
        found = ExactComputer(game, n_players=players)("SV")
        values = [found[(player,)] for player in range(players)]
        assert values == pytest.approx(sample(study, run, row)["raw_values"], abs=1e-9)
    assert np.ptp(values) > 0


def test_lines_are_the_stored_coalitions_in_order_and_csv_says_the_same(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = exported(study, tmp_path / "out.parquet")
    assert [len(lines) for _, lines in table.groupby("row")] == [1 << 7, 1 << 5]
    assert [int(mask, 16) for mask in table["coalition"]] == [*range(1 << 7), *range(1 << 5)]
    whole = table[(table["row"] == 0) & (table["coalition"] == "0x7f")].iloc[0]
    assert whole["answer"] == sample(study, "exact", 0)["response"]
    assert whole["TfIdfCosineSimilarity"] == pytest.approx(1.0)
    spec = json.loads((study.output / "exact" / "spec.json").read_text())
    assert set(table["generation_key"]) == {spec["generation_key"]}
    monkeypatch.setattr(store_export, "_AT_ONCE", 10)
    assert call(study, tmp_path / "out.csv").exit_code == 0
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out.csv", keep_default_na=False), table)
    pd.testing.assert_frame_equal(exported(study, tmp_path / "small.parquet"), table)


def test_of_one_run_its_own_value_function_is_exported(study: Study, tmp_path: Path) -> None:
    table = exported(study, tmp_path / "out.parquet", directory=study.output / "forced")
    assert list(table.columns) == [*COLUMNS, "tf_logprob"]
    assert table["tf_logprob"].notna().all()


def test_what_is_not_stored_is_empty(tmp_path: Path) -> None:
    """Vectors of few coalitions, likelihoods of as few, and answers of two generation keys."""
    few = {"explainer_type": "limited_mc", "num_samples": 12}
    longer = {**EXACT, "generation_override": {"max_new_tokens": 3}}
    maximum = {"similarity": "CosineSimilarity", "reducer": "MaxReducer"}
    study = finished(
        tmp_path / "study",
        EXACT,
        {**COSINE, **few},
        {**FORCED, **few},
        {**longer, "name": "longer"},
        {**longer, "name": "max", "shap_override": maximum},
    )
    table = exported(study, tmp_path / "out.parquet")
    first, second = "CosineSimilarity (cosine_limited_mc_ns12)", "CosineSimilarity (max)"
    assert list(table.columns) == [*COLUMNS, "TfIdfCosineSimilarity", first, "tf_logprob", second]
    keys = [
        json.loads((study.output / name / "spec.json").read_text())["generation_key"]
        for name in ("exact", "longer")
    ]
    for row, coalitions in ((0, 1 << 7), (1, 1 << 5)):
        of_row = table[table["row"] == row]
        one, other = (of_row[of_row["generation_key"] == key].notna().sum() for key in keys)
        assert one["answer"] == one["TfIdfCosineSimilarity"] == coalitions
        assert other["answer"] == other["TfIdfCosineSimilarity"] == other[second] == coalitions
        assert one["tf_logprob"] == 12
        # Coalitions with the same answer share its vector.
        assert 12 <= one[first] <= coalitions
        assert one[second] == other[first] == other["tf_logprob"] == 0


def test_likelihoods_need_no_answers(tmp_path: Path) -> None:
    table = exported(finished(tmp_path / "study", FORCED), tmp_path / "out.parquet")
    assert table["tf_logprob"].notna().all()
    assert table["answer"].notna().sum() == len(PROMPTS), "those to the whole prompts"


def test_rows_that_have_changed_are_left_out_and_nothing_is_moved(tmp_path: Path) -> None:
    study = finished(tmp_path / "study", EXACT)
    study.write_prompts(PROMPTS[0], "another prompt of five words")
    (damaged,) = (study.output / "generations").glob("00000-*.parquet")
    content = damaged.read_bytes()
    found = call(study, tmp_path / "out.parquet")
    assert found.exit_code == 0, found.output
    assert "1 row(s) are left out" in found.output
    assert set(pd.read_parquet(tmp_path / "out.parquet")["row"]) == {0}
    damaged.write_bytes(content[:-20] + b"x" * 20)
    found = call(study, tmp_path / "out.parquet", "--overwrite")
    assert "1 file(s) cannot be read" in found.output
    assert damaged.exists()
    assert len(pd.read_parquet(tmp_path / "out.parquet")) == 0


def test_what_cannot_be_exported_is_refused_in_words(study: Study, tmp_path: Path) -> None:
    def refused(*args: Any, **keys: Any) -> str:
        found = call(study, *args, **keys)
        assert found.exit_code == 2, found.output
        return " ".join(found.output.split())

    assert "is in the study's directory" in refused(study.output / "out.csv")
    (tmp_path / "there.csv").write_text("mine")
    assert "is there already; replace it with --overwrite" in refused(tmp_path / "there.csv")
    assert (tmp_path / "there.csv").read_text() == "mine"
    assert "nowhere holds no results" in refused(tmp_path / "out.csv", directory=tmp_path / "nowhere")
    older = write_older_directory(tmp_path / "older", {"connector": "hf_text"})
    assert "written by the older runner" in refused(tmp_path / "out.csv", directory=older)
    away = CliRunner().invoke(main, ["store", "export", "memory://bucket/study", "--format", "csv"])
    assert (away.exit_code, "is not on this machine" in away.output) == (2, True)
    told = CliRunner().invoke(main, ["store", "info", str(older)])
    assert (told.exit_code, "no answers are stored" in told.output) == (0, True)
    copy = tmp_path / "copy"
    shutil.copytree(study.output, copy)
    shutil.move(copy / "forced", copy / "unknown")
    assert "names none of its runs" in refused(tmp_path / "out.csv", directory=copy / "unknown")
    shutil.rmtree(copy / "generations")
    assert "holds no answers of its runs" in refused(tmp_path / "out.csv", directory=copy)
    assert not (tmp_path / "out.csv").exists()

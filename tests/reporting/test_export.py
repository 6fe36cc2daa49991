"""`export`: one line for each player, the same in CSV, Parquet and the Python API."""

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from older_directories import OLDER_VALUES, OLDER_WORDS, write_older_directory
from results_on_disk import make_sample, text_entry, write_study

import mllm_shapx
from mllm_shapx.errors import StorageError, UsageError
from mllm_shapx.records.results import AUDIO, USER, AudioPiece, ConversationEntry
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.storage import open_storage
from mllm_shapx.reporting.export import export
from mllm_shapx.reporting.output import TableForm

HOSTILE = 'say "no", \u2028\r\n; \ud800 =1+1'


def read(path: Path) -> pd.DataFrame:
    return (
        pd.read_parquet(path)
        if path.suffix == ".parquet"
        else pd.read_csv(path, keep_default_na=False, na_values=[""])
    )


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_file_holds_what_the_api_returns(tmp_path: Path, form: TableForm) -> None:
    study = write_study(tmp_path / "study", range(5))
    records = RunRecords(open_storage(str(study)), "exact")
    sound = ConversationEntry(AUDIO, (USER, USER), (AudioPiece(640), AudioPiece(640)), (0.1 + 0.2, -1e-300))
    turns = ((text_entry(USER, [HOSTILE, "?"], [1 / 3, None]),), (sound,))
    records.write_sample(
        replace(
            make_sample("exact", 2),
            conversation=turns,
            raw_values=(1.0, 2.0, -3.0),
            standard_errors=(0.25, math.nan, 0.0),
        )
    )
    found = export(str(study), form, tmp_path / f"out.{form}")
    assert (found.samples, found.lines, found.left_out) == (15, 14 * 8 + 3, 0)
    table = read(found.path)
    expected = mllm_shapx.load(study).values()
    assert list(table.columns) == list(expected.columns)
    assert len(table) == found.lines
    for column in ("run", "row", "position", "modality", "language", "turn", "n_calls"):
        assert list(table[column]) == list(expected[column]), column
    for column in ("value", "raw_value", "base_value", "grand_value", "standard_error"):
        pd.testing.assert_series_equal(table[column], expected[column], check_exact=True)
    mine = table[(table["run"] == "exact") & (table["row"] == 2)]
    assert list(mine["value"]) == [1 / 3, 0.1 + 0.2, -1e-300]
    assert list(mine["raw_value"]) == [1.0, 2.0, -3.0]
    assert [None if math.isnan(error) else error for error in mine["standard_error"]] == [0.25, None, 0.0]
    assert table.loc[table["row"] != 2, "standard_error"].isna().all()
    assert list(mine["modality"]) == ["text", "audio", "audio"]
    assert mine["piece"].iloc[0] == HOSTILE.replace("\ud800", "?")
    assert math.isnan(table["raw_value"].iloc[0])


def test_damaged_samples_are_counted_and_left_out(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", range(4), runs={"exact": 0.0, "mc": 0.1})
    (study / "mc" / "samples" / "sample_00001_result.json").write_text("{")
    found = export(str(study), "parquet", tmp_path / "out.parquet")
    assert (found.samples, found.left_out) == (7, 1)
    assert "1 sample(s) cannot be read and are left out" in found.to_text()
    assert set(read(found.path).query("run == 'mc'")["row"]) == {0, 2, 3}


def test_older_directories_and_single_runs_are_exported(tmp_path: Path) -> None:
    study = write_older_directory(tmp_path / "study", {"connector": "hf_text"})
    table = read(export(str(study / "neyman_frac0_5"), "csv", tmp_path / "one.csv").path)
    assert set(table["run"]) == {"neyman_frac0_5"}
    assert list(table["value"]) == [value for row in OLDER_VALUES["neyman_frac0_5"] for value in row]
    assert list(table["piece"]) == [word.strip() for word in OLDER_WORDS] * 2
    assert table["base_value"].isna().all()


def test_a_study_without_samples_gives_a_table_with_its_columns(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", [], planned=[0])
    for form in ("csv", "parquet"):
        table = read(export(str(study), form, tmp_path / f"empty.{form}").path)
        assert (len(table), table.columns[0]) == (0, "run")
    assert str(pq.read_schema(tmp_path / "empty.parquet").field("value").type) == "double"


def test_no_file_is_replaced_or_written_into_the_study_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = write_study(tmp_path / "study", range(2))
    monkeypatch.chdir(tmp_path)
    assert export(str(study), "csv").path == Path("study.csv")
    before = Path("study.csv").read_bytes()
    Path("study.csv").write_text("mine")
    with pytest.raises(UsageError, match="--overwrite"):
        export(str(study), "csv")
    assert Path("study.csv").read_text() == "mine"
    export(str(study), "csv", overwrite=True)
    assert Path("study.csv").read_bytes() == before
    with pytest.raises(UsageError, match="left as it is"):
        export(str(study / "exact"), "csv", study / "values.csv")
    with pytest.raises(StorageError, match="cannot be written"):
        export(str(study), "csv", tmp_path / "nowhere" / "values.csv")
    with pytest.raises(UsageError, match="holds no results"):
        export(str(tmp_path / "nothing"), "csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["study", "study.csv"]

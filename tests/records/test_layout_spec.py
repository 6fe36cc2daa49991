"""Names on disk are those of the contract, and a spec tells what changed and which rows it plans."""

import pytest

from mllm_shapx.records.layout import (
    GenerationLayout,
    RunLayout,
    row_and_key,
    row_of_failure,
    row_of_sample,
    sample_name,
)
from mllm_shapx.records.spec import differences, planned_rows, selected_rows


def test_every_path_is_the_one_that_notebooks_read() -> None:
    run = RunLayout("limited_mc_ns50")
    assert run.spec == "limited_mc_ns50/spec.json"
    assert run.checkpoint == "limited_mc_ns50/checkpoint.json"
    assert run.sample(355) == "limited_mc_ns50/samples/sample_00355_result.json"
    assert run.failure(355) == "limited_mc_ns50/failures/sample_00355.json"
    assert run.audio_folder(355) == "limited_mc_ns50/audio/sample_00355"
    assert run.summary == "limited_mc_ns50/summary/aggregate_metrics.json"
    assert GenerationLayout(7, "ab12").answers == "generations/00007-ab12.parquet"


@pytest.mark.parametrize("row", [0, 7, 99_999, 100_000, 1_234_567])
def test_names_and_rows_translate_both_ways(row: int) -> None:
    assert row_of_sample(sample_name(row)) == row
    assert row_of_failure(RunLayout("x").failure(row).rpartition("/")[2]) == row
    for path in (GenerationLayout(row, "k").answers, GenerationLayout(row, "k").embeddings):
        assert row_and_key(path.rpartition("/")[2]) == (row, "k")
    assert row_and_key(GenerationLayout(row, "k").parts.rpartition("/")[2]) == (row, "k")


@pytest.mark.parametrize(
    "name",
    [
        "sample_7_result.json",
        "sample_000007_result.json",
        "sample_00007_result.json.1",
        ".tmp-ab",
        "notes.txt",
    ],
)
def test_other_names_are_nobodys_sample(name: str) -> None:
    assert row_of_sample(name) is None
    assert row_and_key(name) is None


def test_equal_settings_have_no_differences_whatever_their_order_and_number_type() -> None:
    old = {"b": {"x": 1, "y": [1, 2.0]}, "a": None, "extra": None}
    assert differences(old, {"a": None, "b": {"y": [1.0, 2], "x": 1.0}}) == []


def test_differences_are_named_by_their_dotted_keys() -> None:
    old = {"shap": {"similarity": "Cosine", "mode": "STATIC"}, "flag": 1, "list": [1], "gone": {"a": 1}}
    new = {"shap": {"similarity": "TfIdf", "mode": "STATIC"}, "flag": True, "list": [1, 2], "came": {"b": 2}}
    assert differences(old, new) == ["came.b", "flag", "gone.a", "list", "shap.similarity"]


@pytest.mark.parametrize("rows", [[], [5], [3, 2, 1], [0, 1, 2, 7, 9, 10], list(range(100_000))])
def test_the_planned_rows_are_recorded_short_and_read_back(rows: list[int]) -> None:
    record = selected_rows(rows)
    assert record["count"] == len(rows)
    assert len(record["ranges"]) < 20
    assert planned_rows({"selected_rows": record}) == frozenset(rows)


def test_a_spec_without_planned_rows_says_nothing_and_a_damaged_one_says_so() -> None:
    assert planned_rows({}) is None
    for record in (3, {"count": 2}, {"count": 2, "ranges": "1-x"}, {"count": 3, "ranges": "1-2"}):
        with pytest.raises(ValueError, match="selected_rows"):
            planned_rows({"selected_rows": record})

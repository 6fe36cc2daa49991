"""A sample survives its file, a wrong file is refused by name, and a summary does not hang on order."""

import copy
import json
import math
import random
from typing import Any

import pytest
from records_kit import make_sample

from mllm_shapx.records.failures import FailureRecord
from mllm_shapx.records.measures import Areas, Faithfulness
from mllm_shapx.records.results import AUDIO, USER, AudioPiece, ConversationEntry, SampleResult, parse_sample
from mllm_shapx.records.storage import encode_json
from mllm_shapx.records.summary import RunSummary


def _spoken() -> SampleResult:
    turn = (ConversationEntry(AUDIO, (USER, USER), (AudioPiece(3200), AudioPiece(1600)), (0.5, None)),)
    return make_sample(
        3,
        conversation=(turn,),
        audio_artifacts={"input": "x.wav"},
        num_levels=2,
        extra={"later": [1, {"a": None}]},
    )


@pytest.mark.parametrize("sample", [make_sample(0), make_sample(12), _spoken()])
def test_a_sample_is_the_same_after_its_file(sample: SampleResult) -> None:
    data = encode_json(sample.to_json())
    assert SampleResult.from_bytes(sample.run_name, data) == sample


def test_numbers_that_json_lacks_become_null_and_are_unknown_when_read() -> None:
    sample = make_sample(1, base_value=math.nan, grand_value=math.inf)
    data = encode_json(sample.to_json())
    assert json.loads(data)["base_value"] is None
    again = SampleResult.from_bytes("exact", data)
    assert math.isnan(again.base_value)
    assert math.isnan(again.imbalance)
    assert math.isnan(parse_sample(data).imbalance)


def test_the_words_of_speech_survive_their_file() -> None:
    spoken = ConversationEntry(
        AUDIO,
        (USER,) * 3,
        (AudioPiece(640, "tell"), AudioPiece(320), AudioPiece(8, "me")),
        (0.5, -0.25, 0.25),
    )
    sample = make_sample(1)
    sample = make_sample(1, conversation=(sample.conversation[0], (spoken,), sample.conversation[2]))
    data = encode_json(sample.to_json())
    assert [piece.get("text") for piece in json.loads(data)["conversation"][1][0]["content"]] == [
        "tell",
        None,
        "me",
    ]
    assert SampleResult.from_bytes("exact", data).conversation[1] == (spoken,)


def _without(key: str) -> dict[str, Any]:
    return {name: value for name, value in make_sample(1).to_json().items() if name != key}


def _with(path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    data = copy.deepcopy(make_sample(1).to_json())
    target: Any = data
    for part in path[:-1]:
        target = target[part]
    target[path[-1]] = value
    return data


MAY_LACK = {"model_calls", "neyman_steps", "standard_errors", "efficiency_residual"}
"""Fields that earlier versions did not write."""


@pytest.mark.parametrize(
    ("data", "words"),
    [
        *[(_without(key), key) for key in _without("schema_version") if key not in MAY_LACK],
        (_with(("raw_values",), [0.1, "x"]), "raw_values"),
        (_with(("neyman_steps",), "2"), "neyman_steps"),
        (_with(("standard_errors",), [0.1, "x"]), "standard_errors"),
        (_with(("efficiency_residual",), "0"), "efficiency_residual"),
        (_with(("row_index",), "1"), "row_index"),
        (_with(("row_index",), True), "row_index"),
        (_with(("row_index",), 1.5), "row_index"),
        (_with(("runtime_sec",), None), "runtime_sec"),
        (_with(("language",), None), "language"),
        (_with(("prompt_texts",), "text"), "prompt_texts"),
        (_with(("attr_summary", "frac_text"), "0.5"), "attr_summary.frac_text"),
        (_with(("conversation", 1, 0, "content"), ["say "]), "differ in length"),
        (_with(("conversation", 1, 0, "shap_values"), [0.1]), "differ in length"),
        (_with(("conversation", 1, 0, "content_type"), 2), "content_type"),
        (_with(("conversation", 1, 0, "roles", 0), 3), "roles"),
        (_with(("conversation", 1, 0, "shap_values", 0), "x"), "shap_values"),
        ([1], "object"),
        (None, "object"),
    ],
)
def test_a_wrong_field_is_refused_by_name(data: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_sample(json.dumps(data).encode())


@pytest.mark.parametrize(
    "content", [b"", b"\0\0", b"{", b"\xff", b'{"row_index": NaN}', b"[" * 100_000, b"null"]
)
def test_bytes_that_are_no_sample_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError):
        parse_sample(content)


def test_a_sum_is_exact_in_any_order() -> None:
    numbers = [1e16, 1.0, -1e16, 1e-8, 3.3] * 50 + [random.Random(1).uniform(-1, 1) for _ in range(500)]
    totals = set()
    for seed in range(5):
        random.Random(seed).shuffle(numbers)
        summary = RunSummary()
        for number in numbers:
            summary.add(make_sample(1, runtime_sec=number))
        totals.add(summary.to_json()["runtime_sec_total"])
    assert totals == {math.fsum(numbers)}


def test_a_summary_holds_the_contracts_fields_and_does_not_hang_on_order() -> None:
    samples = [make_sample(row, values_sum=0.375 + row / 1000 + 1e-3 * (row == 4)) for row in range(30)]
    texts = set()
    for seed in range(4):
        random.Random(seed).shuffle(samples)
        summary = RunSummary()
        for sample in samples:
            summary.add(sample)
        summary.add_failure()
        texts.add(json.dumps(summary.to_json()))
    assert len(texts) == 1
    data = json.loads(texts.pop())
    assert data["n_samples"] == 30
    assert data["n_failed"] == 1
    assert data["n_calls_total"] == data["model_calls_total"] == 240
    assert data["runtime_sec_total"] == pytest.approx(46.5)
    assert data["runtime_sec_avg"] == pytest.approx(1.55)
    assert data["avg_frac_text"] == 1.0
    assert data["avg_frac_audio"] == 0.0
    assert data["efficiency_residual_max"] == pytest.approx(1e-3)
    assert data["efficiency_residual_mean"] == pytest.approx(1e-3 / 30)
    assert [(row["language"], row["n_samples"]) for row in data["by_language"]] == [("en", 15), ("pl", 15)]


def test_a_summary_of_nothing_is_all_zeros() -> None:
    data = RunSummary().to_json()
    assert data.pop("by_language") == []
    assert data.pop("standard_error_mean") is None
    assert set(data.values()) == {0}


def test_a_summary_leaves_out_unknown_numbers() -> None:
    summary = RunSummary()
    summary.add(make_sample(1, base_value=math.nan))
    summary.add(make_sample(2))
    data = summary.to_json()
    assert data["n_samples"] == 2
    assert data["efficiency_residual_max"] < 1e-12
    json.dumps(data, allow_nan=False)


def test_a_summary_says_how_faithful_the_values_are_where_that_was_measured() -> None:
    """Means and shares are over the rows with curves; a tie is not better than random."""

    def measured(row: int, deletion: float, insertion: float) -> SampleResult:
        areas = Areas(deletion, insertion, 0.5)
        return make_sample(row, faithfulness=Faithfulness((0, 3), (0.1, 1.0), (0.1, 1.0), (), areas))

    summary = RunSummary()
    for sample in (measured(1, 0.2, 0.9), measured(3, 0.5, 0.5 + 1e-15), make_sample(5)):
        data = encode_json(sample.to_json())
        assert SampleResult.from_bytes("exact", data) == sample
        summary.add(sample)
    found = summary.to_json()
    assert (found["n_samples"], found["n_curves"]) == (3, 2)
    assert found["deletion_area_mean"] == pytest.approx(0.35)
    assert found["insertion_area_mean"] == pytest.approx(0.7)
    assert found["random_area_mean"] == 0.5
    assert (found["deletion_better"], found["insertion_better"]) == (0.5, 0.5)
    assert found["by_language"][0]["n_curves"] == 2
    assert "n_curves" not in RunSummary().to_json()


def test_sure_samples_are_counted_from_the_first_one_on() -> None:
    summary = RunSummary()
    assert "n_sure" not in summary.to_json()
    summary.add(make_sample(1, stopped="budget"))
    assert json.dumps(summary.to_json()["n_sure"]) == "0"
    summary.add(make_sample(2, stopped="standard_error"))
    assert json.dumps(summary.to_json()["n_sure"]) == "1"


def test_a_summary_takes_less_than_50_bytes_for_each_sample() -> None:
    import tracemalloc

    summary = RunSummary()
    samples = [make_sample(row) for row in range(1000)]
    for sample in samples:
        summary.add(sample)
    tracemalloc.start()
    for _ in range(19):
        for sample in samples:
            summary.add(sample)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert summary.n_samples == 20_000
    assert grown < 20_000 * 50


def test_a_failure_is_the_same_after_its_file() -> None:
    failure = FailureRecord(
        3,
        "exact",
        "worker_died",
        "the worker was killed",
        3,
        quarantined=True,
        node="n1",
        log_tail=("a", "b"),
        at=5.5,
    )
    data = json.loads(encode_json(failure.to_json()))
    assert FailureRecord.from_json({**data, "later": 1}) == failure


@pytest.mark.parametrize("data", [None, [], {}, {"row_index": "x"}])
def test_data_that_is_no_failure_is_refused(data: Any) -> None:
    with pytest.raises(ValueError):
        FailureRecord.from_json(data)

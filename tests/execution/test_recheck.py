"""`verify --again`: stored answers come out again, and what does not is told by dtype."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from records_kit import files_below
from small_study import MODEL, Study

from mllm_shapx.records.layout import GenerationLayout
from mllm_shapx.records.storage import LocalStorage
from mllm_shapx.records.store import CoalitionStore, StoreHeader
from mllm_shapx.records.store_codec import encode_answers

EXACT = [{"explainer_type": "exact"}]
BFLOAT16 = {"connector_kwargs": {"model_id": str(MODEL), "dtype": "bfloat16"}}


def finished(folder: Path, **settings: Any) -> Study:
    study = Study(folder, rows=2, words=4, settings={"experiments": EXACT, **settings})
    assert study.call("--inline").code == 0
    return study


def falsify(study: Study, *, all_of_row: int) -> None:
    """Change the text of every stored answer of a row."""
    store = CoalitionStore(LocalStorage(study.output))
    (entry,) = [entry for entry in store.info() if entry.row_index == all_of_row]
    stored = store.peek(all_of_row, entry.key)
    header = StoreHeader(entry.settings, stored.snapshot_id, stored.num_players)
    answers = {mask: replace(row, text=f"not {row.text}") for mask, row in stored.answers.items()}
    path = GenerationLayout(all_of_row, entry.key).answers
    LocalStorage(study.output).write_bytes(path, encode_answers(header, answers))


def test_answers_of_a_batch_come_out_again_one_at_a_time_and_nothing_is_touched(tmp_path: Path) -> None:
    study = finished(tmp_path)
    before = files_below(study.output)
    found = study.call("--again", "8", verb="verify")
    assert found.code == 0, found.out
    assert "exact (float32 on cpu): 8 of 8 answers agree (100.0%)" in found.out
    assert files_below(study.output) == before
    all_of_them = study.call("--again", "1000", verb="verify")
    assert "32 of 32 answers agree" in all_of_them.out


def test_in_float32_an_answer_that_comes_out_otherwise_is_a_finding(tmp_path: Path) -> None:
    study = finished(tmp_path)
    falsify(study, all_of_row=1)
    found = study.call("--again", "32", verb="verify")
    assert found.code == 1
    assert "16 of 32 answers agree (50.0%)" in found.out
    assert "row 1, coalition 0x0: stored 'not " in found.out
    again = study.call("--again", "5", "--seed", "3", "--json", verb="verify")
    twice = study.call("--again", "5", "--seed", "3", "--json", verb="verify")
    assert again.out == twice.out, "a seed draws the same coalitions"
    (key,) = json.loads(again.out)["again"][0]["generation_keys"]
    assert key["answers"] == 5
    assert key["agree"] == 5 - len(key["differences"])
    assert {each["row_index"] for each in key["differences"]} <= {1}


def test_in_bfloat16_the_share_is_reported_and_is_no_fault(tmp_path: Path) -> None:
    study = finished(tmp_path, **BFLOAT16)
    falsify(study, all_of_row=0)
    falsify(study, all_of_row=1)
    found = study.call("--again", "4", verb="verify")
    assert found.code == 0, found.out
    assert "exact (bfloat16 on cpu): 0 of 4 answers agree (0.0%)" in found.out
    assert "in bfloat16 an answer may change with the batch" in found.out


def test_sampled_answers_come_out_again_with_their_seeds(tmp_path: Path) -> None:
    study = finished(tmp_path, generation={"max_new_tokens": 6, "text_temperature": 0.9})
    found = study.call("--again", "12", verb="verify")
    assert found.code == 0, found.out
    assert "12 of 12 answers agree" in found.out


def test_another_model_than_the_answers_own_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    kwargs = {"model_id": str(model), "dtype": "float32"}
    study = finished(tmp_path / "study", connector_kwargs=kwargs)
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**config, "top_k": 7}))
    found = study.call("--again", "4", verb="verify")
    assert found.code == 2
    assert "given by another model" in found.out


def test_a_directory_without_answers_is_refused(tmp_path: Path) -> None:
    study = finished(tmp_path)
    shutil.rmtree(study.output / "generations")
    found = study.call("--again", "4", verb="verify")
    assert found.code == 2
    assert "holds no stored answers" in found.out


def test_answers_of_a_row_that_has_changed_are_counted_and_not_compared(tmp_path: Path) -> None:
    study = finished(tmp_path)
    study.write_prompts("tell us about the harbor")
    found = study.call("--again", "32", verb="verify")
    assert "32 answer(s) could not be compared" in found.out


@pytest.mark.parametrize("number", ["0", "-1", "many"])
def test_a_number_of_answers_that_is_none_is_refused(tmp_path: Path, number: str) -> None:
    study = Study(tmp_path)
    assert study.call("--again", number, verb="verify").code == 2

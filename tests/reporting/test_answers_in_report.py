"""What the model says without the most important piece, from the store: the right answer, or none."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from results_on_disk import make_sample, planted_word, write_study
from small_study import untouched

from mllm_shapx.planning.runs import settings_digest
from mllm_shapx.records.answer import Answer
from mllm_shapx.records.storage import open_storage
from mllm_shapx.records.store import CoalitionStore, StoreHeader
from mllm_shapx.reporting.reading import open_study
from mllm_shapx.reporting.stored_answers import StoredAnswersOfRuns

ASKED = {"model_id": "made-up", "dtype": "auto", "generation": {"max_new_tokens": 4}}
WHOLE = (1 << 8) - 1


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two rows and two runs, whose specs name the generation key of `ASKED`."""
    directory = write_study(tmp_path / "study", range(2), runs={"exact": 0.0, "mc": 0.1})
    for spec in directory.glob("*/spec.json"):
        spec.write_text(
            json.dumps({**json.loads(spec.read_text()), "generation_key": settings_digest(ASKED)})
        )
    return directory


def store(study: Path, row: int, answers: Mapping[int, str], *, key: str = "aa", commit: str = "1") -> None:
    header = StoreHeader({**ASKED, "dtype": "float32", "model_commit": commit}, num_players=8)
    rows = {mask: Answer(text) for mask, text in answers.items()}
    CoalitionStore(open_storage(str(study))).merge(row, key, header, rows)


def found(study: Path, row: int) -> list[str | None]:
    files = open_study(str(study))
    with untouched(study):
        samples: list[Any] = [run.sample(row) for run in files.runs]
        return StoredAnswersOfRuns(files.runs).without_most_important(row, samples)


def planted(row: int) -> int:
    return make_sample("exact", row).prompt_texts[0].split().index(planted_word(row))


def test_each_run_gets_the_answer_without_its_own_most_important_player(study: Path) -> None:
    said = make_sample("exact", 0).response
    store(study, 0, {WHOLE: said, WHOLE ^ (1 << planted(0)): "nothing to say", 0: "hm"})
    assert found(study, 0) == ["nothing to say"] * 2
    assert found(study, 1) == [None, None]


def test_a_coalition_that_was_never_asked_has_no_answer(study: Path) -> None:
    store(study, 0, {WHOLE: make_sample("exact", 0).response, 1: "another"})
    assert found(study, 0) == [None, None]


def test_answers_of_another_model_are_not_taken_for_the_sample_s(study: Path) -> None:
    part = WHOLE ^ (1 << planted(0))
    store(study, 0, {WHOLE: "another answer", part: "wrong"}, key="aa", commit="1")
    assert found(study, 0) == [None, None]
    store(study, 0, {WHOLE: make_sample("exact", 0).response, part: "right"}, key="bb", commit="2")
    assert found(study, 0) == ["right"] * 2
    (study / "generations" / "00000-bb.parquet").write_bytes(b"damaged")
    assert found(study, 0) == [None, None]


def test_answers_to_other_players_are_not_taken(study: Path) -> None:
    header = StoreHeader({**ASKED, "dtype": "float32", "model_commit": "1"}, num_players=9)
    rows = {WHOLE: Answer(make_sample("exact", 0).response), WHOLE ^ (1 << planted(0)): Answer("wrong")}
    CoalitionStore(open_storage(str(study))).merge(0, "aa", header, rows)
    assert found(study, 0) == [None, None]

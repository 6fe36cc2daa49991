"""The table at the end of a run, and the figures in it."""

import io
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner
from results_on_disk import PLANTED, make_sample, planted_word, text_entry, write_study
from rich.cells import cell_len
from small_study import Study

from mllm_shapx.cli import main
from mllm_shapx.errors import UsageError
from mllm_shapx.records.results import AUDIO, USER, AudioPiece, ConversationEntry
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.storage import open_storage
from mllm_shapx.reporting.agreement import correlation
from mllm_shapx.reporting.comparison import Mark, compare_runs, evenly
from mllm_shapx.reporting.pieces import prompt_pieces, rank_of
from mllm_shapx.reporting.reading import open_study
from mllm_shapx.reporting.table import format_value, results_table, wants_color

ROWS = range(8)
MARKS = {row: Mark("planted_word", planted_word(row)) for row in ROWS}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path / "study", ROWS, players=14)


def test_each_word_stands_over_its_value(study: Path) -> None:
    """Every word begins in the column in which its value begins, and the strongest is in brackets."""
    text = results_table(str(study), rows=[3], marks=MARKS, width=80)
    sample = RunRecords(open_storage(str(study)), "exact").read_sample(3)
    lines = text.split("\n\n")[0].splitlines()
    words = [word for line in lines[1:5:2] for word in line.split()]
    values = [value for line in lines[2:6:2] for value in line.split()]
    assert words == sample.prompt_texts[0].split()
    assert [float(value.strip("[]")) for value in values] == pytest.approx(sample.player_values(), abs=0.006)
    for over, under in ((lines[1], lines[2]), (lines[3], lines[4])):
        starts = [match.start() for match in re.finditer(r"\S+", over)]
        assert starts == [match.start() for match in re.finditer(r"\S+", under)]
    strongest = values.index(next(value for value in values if value.startswith("[")))
    assert words[strongest] == planted_word(3)


def test_answer_rank_and_file_are_shown(study: Path) -> None:
    """A row's block says what the model answered, where the marked word ranks, and where the file is."""
    text = results_table(str(study), rows=[3], marks=MARKS, width=120)
    assert "answer: You asked about violin." in text
    assert "planted_word “violin”: rank 1 of 14 in exact; rank 1 in " in text
    assert str(study / "exact" / "samples" / "sample_00003_result.json") in text


@pytest.mark.parametrize("width", [40, 80, 120])
def test_nothing_but_paths_is_wider_than_the_terminal(study: Path, width: int) -> None:
    """Prompts wrap and tables give way; file paths alone stay whole."""
    text = results_table(str(study), marks=MARKS, width=width)
    assert all(cell_len(line) <= width for line in text.splitlines() if str(study) not in line)


def test_colour_changes_nothing_but_the_colour(study: Path) -> None:
    """With colour the text is the same, and the strongest word is highlighted."""
    plain = results_table(str(study), marks=MARKS)
    coloured = results_table(str(study), marks=MARKS, color=True)
    assert "\x1b" not in plain
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
    assert re.search(rf"\x1b\[1;30;42m({'|'.join(PLANTED)})\x1b\[0m", coloured)


def test_runs_are_compared_with_the_exact_one(study: Path) -> None:
    """Runs with noisier values correlate less with the exact run, and marked words are counted."""
    exact, near, far = compare_runs(open_study(str(study)), MARKS)
    assert (exact.name, exact.agreement.pearson, exact.marked_first) == ("exact", None, 1.0)
    assert (exact.samples, exact.mean_n_calls, exact.model_calls) == (8, 2**14, 8 * 2**14)
    assert near.agreement.pearson is not None
    assert far.agreement.pearson is not None
    assert 0.6 < near.agreement.pearson < 1.0
    assert far.agreement.pearson < near.agreement.pearson
    assert near.seconds_per_sample == pytest.approx(11.0 / 8.0)


def test_exact_run_of_other_settings_is_no_reference(tmp_path: Path) -> None:
    """A run whose other settings differ from the exact run's is not compared with it."""
    directory = write_study(tmp_path / "study", ROWS)
    spec = directory / "exact" / "spec.json"
    spec.write_text(spec.read_text().replace('"hf_text"', '"liquid_audio"'))
    assert [run.agreement.pearson for run in compare_runs(open_study(str(directory)))] == [None, None, None]


def test_columns_without_content_are_left_out(tmp_path: Path) -> None:
    """Without an exact run and marks the table has neither of their columns, nor one of failures."""
    text = results_table(str(write_study(tmp_path / "study", ROWS, runs={"mc_ns50": 0.1})))
    assert "n_calls" in text
    for title in ("r exact", "first", "failed"):
        assert title not in text


def test_one_run_and_unreadable_samples_are_no_obstacle(tmp_path: Path) -> None:
    """One run's directory can be shown, and a damaged sample is passed over."""
    directory = write_study(tmp_path / "study", ROWS)
    (directory / "exact" / "samples" / "sample_00000_result.json").write_text("{")
    text = results_table(str(directory / "exact"), rows=[0, 1])
    assert "row 0" not in text
    assert "row 1" in text
    with pytest.raises(UsageError):
        results_table(str(tmp_path / "nothing"))


def test_long_prompts_show_their_strongest_pieces(tmp_path: Path) -> None:
    """Of a prompt of a hundred words the sixty with the largest values are shown, and that is said."""
    directory = write_study(tmp_path / "study", [1], runs={"mc": 0.0}, players=100)
    text = results_table(str(directory))
    assert "(the 60 strongest of 100 pieces)" in text
    assert f"{planted_word(1)}" in text


def test_sound_and_context_are_told_apart() -> None:
    """A piece of sound is shown as a note with its value, a piece that is no player without one."""
    sound = ConversationEntry(AUDIO, (USER, USER), (AudioPiece(640), AudioPiece(640)), (0.5, None))
    sample = replace(make_sample("exact", 1), conversation=((text_entry(USER, ["What?"], [0.25]),), (sound,)))
    pieces = prompt_pieces(sample)
    assert [(piece.label, piece.value) for piece in pieces] == [("What?", 0.25), ("♪", 0.5), ("♪", None)]


def test_rank_looks_past_case_and_punctuation() -> None:
    """“Harbor,” is the word harbor; ties share the better rank; a word that is not there has no rank."""
    entry = text_entry(USER, ["the", " Harbor,", " tall", " ships."], [0.1, 0.3, 0.3, 0.5])
    pieces = prompt_pieces(replace(make_sample("exact", 1), conversation=((entry,),)))
    assert rank_of("harbor", pieces) == (2, 4)
    assert rank_of("tall ships", pieces) == (1, 4)
    assert rank_of("boat", pieces) is None


def test_pearson_is_the_textbook_one() -> None:
    """Correlation is 1 for a rising line, -1 for a falling one, and undefined for a constant."""
    pearson = partial(correlation, method="linear")
    assert pearson([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1.0)
    assert pearson([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    assert pearson([1.0, 2.0, 4.0], [1.0, 3.0, 2.0]) == pytest.approx(0.3273268)
    assert pearson([1.0, 1.0], [1.0, 2.0]) is None
    assert pearson([1.0], [1.0]) is None


def test_values_are_written_with_the_digits_they_need() -> None:
    """Small values get more decimals, and nothing reads as minus zero."""
    assert [format_value(value, 0.5) for value in (0.5, -0.123, -0.001, 0.0)] == [
        "+0.50",
        "-0.12",
        "0.00",
        "0.00",
    ]
    assert format_value(0.0123, 0.05) == "+0.012"
    assert format_value(0.0012, 0.002) == "+1e-03"
    assert evenly(list(range(10)), 3) == [0, 3, 6]


def test_colour_is_for_terminals() -> None:
    """What is no terminal gets no colour."""
    assert not wants_color(io.StringIO())


def test_a_terminal_gets_colours_and_not_their_codes_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `run --table` prints on a terminal has control sequences, none of them written out."""
    monkeypatch.setattr("mllm_shapx.reporting.table.wants_color", lambda _: True)
    study = Study(tmp_path, rows=1, words=3)
    call = ["run", "--config", str(study.config), "--inline", "--table"]
    output = CliRunner().invoke(main, call, color=True).output
    assert "\x1b[1;30;42m" in output
    assert "\\x1b" not in output

"""The HTML report: its data and its safety."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import data_of
from results_on_disk import NOISE, make_sample, text_entry, write_study

from mllm_shapx.errors import StorageError, UsageError
from mllm_shapx.records.measures import Interactions
from mllm_shapx.records.results import AUDIO, USER, AudioPiece, ConversationEntry
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.storage import open_storage
from mllm_shapx.reporting import html as module
from mllm_shapx.reporting.html import PageSettings, report


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of 130 rows and three runs, which the tests only read."""
    return write_study(tmp_path_factory.mktemp("html") / "study", range(130))


def test_page_holds_every_value_of_every_run(study: Path) -> None:
    """Prompts, answers and values of all rows and runs are in the one file, as they are on disk."""
    path = report(str(study))
    assert path == study / "report.html"
    data = data_of(path.read_text("utf-8"))
    assert [run["name"] for run in data["runs"]] == list(NOISE)
    assert len(data["rows"]) == 130
    row = data["rows"][7]
    for position, (name, noise) in enumerate(NOISE.items()):
        sample = make_sample(name, 7, noise=noise)
        run = row["r"][position]
        assert run["v"] == sample.player_values()
        assert "".join(piece[0] for piece in row["p"][run["q"]]["t"]) == sample.prompt_texts[0]
        assert data["answers"][run["a"]] == sample.response


def test_page_needs_nothing_from_elsewhere(study: Path) -> None:
    """No address of another resource is in the page, and its policy forbids loading any."""
    page = report(str(study)).read_text("utf-8")
    assert not re.search(r"https?://|\ssrc=|\shref=|@import|url\(|fetch\(", page)
    assert "default-src 'none'" in page


def test_words_cannot_become_markup(tmp_path: Path) -> None:
    """A prompt that ends a script element stays text: it neither breaks the data nor adds an element."""
    directory = write_study(tmp_path / "study", [0], runs={"exact": 0.0})
    evil = "</script><script>document.title='owned'</script> \u2028 ' \" /*DATA*/ <!--PLOTS--> \ud800"
    sample = make_sample("exact", 0)
    entry = text_entry(USER, [evil, " word"], [0.5, 0.1])
    records = RunRecords(open_storage(str(directory)), "exact")
    records.write_sample(replace(sample, response=evil, conversation=((entry,),)))
    page = report(str(directory)).read_text("utf-8")
    assert page.count("</script>") == 2
    data = data_of(page)
    assert data["rows"][0]["p"][0]["t"][0][0] == evil.replace("\ud800", "?")
    assert data["answers"] == [evil.replace("\ud800", "?")]
    assert "\u2028" not in page


def test_large_studies_are_thinned_and_that_is_said(study: Path, tmp_path: Path) -> None:
    """Of more rows than asked for, evenly spread ones are kept, and a note says how many."""
    data = data_of(
        report(str(study), tmp_path / "thin.html", settings=PageSettings(most_rows=13)).read_text("utf-8")
    )
    assert [row["i"] for row in data["rows"]] == list(range(0, 130, 10))
    assert "13 of 130 rows" in data["notes"][0]
    # Figures are of all rows.
    assert [run["samples"] for run in data["runs"]] == [130] * 3


def test_missing_damaged_and_infinite_are_told_apart_from_zero(tmp_path: Path) -> None:
    """A row that one run lacks stays in the others; values that are not finite become null."""
    directory = write_study(tmp_path / "study", range(3), runs={"exact": 0.0, "mc": 0.1})
    (directory / "mc" / "samples" / "sample_00001_result.json").write_text("{")
    records = RunRecords(open_storage(str(directory)), "exact")
    records.write_sample(replace(make_sample("exact", 2), base_value=float("nan")))
    data = data_of(report(str(directory)).read_text("utf-8"))
    rows = data["rows"]
    assert "mc: 1 sample(s) cannot be read and are left out; `verify` names them." in data["notes"]
    assert rows[1]["r"][1] is None
    assert rows[1]["r"][0] is not None
    assert rows[2]["r"][0]["b"] is None


def test_interactions_become_a_symmetric_table(tmp_path: Path) -> None:
    """Pairs stand on both sides, own values on the diagonal; larger sets are left out, and rounding is 0."""
    directory = write_study(tmp_path / "study", [0, 1], runs={"exact": 0.0}, players=3)
    sets = ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2))
    values = (0.5, 0.25, 0.0, -0.125, 1e-17, float("nan"), 9.0)
    records = RunRecords(open_storage(str(directory)), "exact")
    sample = replace(make_sample("exact", 0, players=3), interactions=Interactions("k-SII", 3, sets, values))
    records.write_sample(sample)
    first, second = data_of(report(str(directory)).read_text("utf-8"))["rows"]
    assert first["r"][0]["x"] == {
        "i": "k-SII",
        "o": 3,
        "m": [[0.5, -0.125, 0.0], [-0.125, 0.25, None], [0.0, None, 0.0]],
    }
    assert "x" not in second["r"][0]


def test_sound_and_messages_are_kept(tmp_path: Path) -> None:
    """Pieces of sound are marked as such, and each message begins anew."""
    directory = write_study(tmp_path / "study", [0], runs={"exact": 0.0})
    sound = ConversationEntry(AUDIO, (USER, USER), (AudioPiece(640), AudioPiece(640)), (0.5, -0.5))
    turns = ((text_entry(USER, ["Say", "?"], [0.1, None]),), (sound,))
    RunRecords(open_storage(str(directory)), "exact").write_sample(
        replace(make_sample("exact", 0), conversation=turns)
    )
    row = data_of(report(str(directory)).read_text("utf-8"))["rows"][0]
    assert row["p"] == [{"t": [["Say", 1, 0], ["?", 0, 0], [None, 1, 1, 320], [None, 1, 0, 320]]}]
    assert row["r"][0]["v"] == [0.1, 0.5, -0.5]


def test_what_cannot_be_done_is_said(study: Path, tmp_path: Path) -> None:
    """A directory without results and a place that cannot be written are refused in words."""
    with pytest.raises(UsageError, match="holds no results"):
        report(str(tmp_path / "nothing"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        report(str(study), tmp_path / "file" / "report.html")


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_stays_readable_on_the_strongest_shades(scheme: int) -> None:
    """Both ends of the scale leave the text a contrast of at least 7 to 1 (WCAG 2.2, AAA)."""
    style = (Path(module.__file__).parent / "page" / "report.css").read_text("utf-8")

    def luminance(name: str) -> float:
        color = re.findall(rf"--{name}: #(\w{{6}})", style)[scheme]
        shares = [int(color[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for end in ("high", "low", "paper"):
        dark, light = sorted((luminance("ink"), luminance(end)))
        assert (light + 0.05) / (dark + 0.05) >= 7.0, end


def test_a_page_without_the_plotting_library_says_what_to_install(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_plots = report(str(study), tmp_path / "with.html").read_text("utf-8")
    assert with_plots.count('<svg class="plot"') == with_plots.count("<figure>") == 4
    assert not data_of(with_plots)["notes"][1:]
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    without = report(str(study), tmp_path / "without.html").read_text("utf-8")
    assert "<figure>" not in without
    assert "pip install 'mllm-shapx[plots]'" in data_of(without)["notes"][-1]
    assert data_of(without)["rows"] == data_of(with_plots)["rows"]


def test_long_rows_make_the_page_hold_fewer(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page stays below its limit of bytes, and says how many rows it holds."""
    whole = data_of(report(str(study), tmp_path / "whole.html").read_text("utf-8"))
    size = len(json.dumps([whole["rows"], whole["answers"]]))
    monkeypatch.setattr(module, "MOST_DATA", size // 4)
    data = data_of(report(str(study), tmp_path / "less.html").read_text("utf-8"))
    assert 20 <= len(data["rows"]) <= 45
    assert len(json.dumps([data["rows"], data["answers"]])) < size / 3
    assert f"{len(data['rows'])} of 130 rows" in data["notes"][0]


def values(run: str, row: int, noise: float) -> Any:
    return np.array(make_sample(run, row, noise=noise).player_values(), float)


def test_the_error_is_the_mean_difference_from_the_exact_values(study: Path) -> None:
    runs = data_of(report(str(study)).read_text("utf-8"))["runs"]
    assert runs[0]["error"] is None
    for run, noise in list(zip(runs, NOISE.values(), strict=True))[1:]:
        errors = [
            np.mean(np.abs(values(run["name"], row, noise) - values("exact", row, 0.0))) for row in range(130)
        ]
        assert run["error"] == pytest.approx(np.mean(errors))
        assert run["n_calls"] == 40

"""The HTML report: its data, its safety, and how it behaves in a real browser."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from results_on_disk import NOISE, make_sample, planted_word, text_entry, write_study

from mllm_shapx.errors import StorageError, UsageError
from mllm_shapx.records.results import AUDIO, USER, AudioPiece, ConversationEntry
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.storage import open_storage
from mllm_shapx.reporting.html import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of 130 rows and three runs, which the tests only read."""
    return write_study(tmp_path_factory.mktemp("html") / "study", range(130))


def data_of(page: str) -> Any:
    """Return the data that a page holds."""
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


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
        assert run["v"] == pytest.approx(sample.player_values(), rel=1e-4)
        assert "".join(piece[0] for piece in row["p"][run["q"]]) == sample.prompt_texts[0]
        assert data["answers"][run["a"]] == sample.response


def test_page_needs_nothing_from_elsewhere(study: Path) -> None:
    """No address of another resource is in the page, and its policy forbids loading any."""
    page = report(str(study)).read_text("utf-8")
    assert not re.search(r"https?://|\ssrc=|\shref=|@import|url\(|fetch\(", page)
    assert "default-src 'none'" in page


def test_words_cannot_become_markup(tmp_path: Path) -> None:
    """A prompt that ends a script element stays text: it neither breaks the data nor adds an element."""
    directory = write_study(tmp_path / "study", [0], runs={"exact": 0.0})
    evil = "</script><script>document.title='owned'</script>"
    sample = make_sample("exact", 0)
    entry = text_entry(USER, [evil, " word"], [0.5, 0.1])
    records = RunRecords(open_storage(str(directory)), "exact")
    records.write_sample(replace(sample, response=evil, conversation=((entry,),)))
    page = report(str(directory)).read_text("utf-8")
    assert page.count("</script>") == 2
    data = data_of(page)
    assert data["rows"][0]["p"][0][0][0] == evil
    assert data["answers"] == [evil]


def test_large_studies_are_thinned_and_that_is_said(study: Path, tmp_path: Path) -> None:
    """Of more rows than asked for, evenly spread ones are kept, and a note says how many."""
    data = data_of(report(str(study), tmp_path / "thin.html", most_rows=13).read_text("utf-8"))
    assert [row["i"] for row in data["rows"]] == list(range(0, 130, 10))
    assert "13 of 130 rows" in data["notes"][0]


def test_missing_damaged_and_infinite_are_told_apart_from_zero(tmp_path: Path) -> None:
    """A row that one run lacks stays in the others; values that are not finite become null."""
    directory = write_study(tmp_path / "study", range(3), runs={"exact": 0.0, "mc": 0.1})
    (directory / "mc" / "samples" / "sample_00001_result.json").write_text("{")
    records = RunRecords(open_storage(str(directory)), "exact")
    records.write_sample(replace(make_sample("exact", 2), base_value=float("nan")))
    rows = data_of(report(str(directory)).read_text("utf-8"))["rows"]
    assert rows[1]["r"][1] is None
    assert rows[1]["r"][0] is not None
    assert rows[2]["r"][0]["b"] is None


def test_sound_and_messages_are_kept(tmp_path: Path) -> None:
    """Pieces of sound are marked as such, and each message begins anew."""
    directory = write_study(tmp_path / "study", [0], runs={"exact": 0.0})
    sound = ConversationEntry(AUDIO, (USER, USER), (AudioPiece(640), AudioPiece(640)), (0.5, -0.5))
    turns = ((text_entry(USER, ["Say", "?"], [0.1, None]),), (sound,))
    RunRecords(open_storage(str(directory)), "exact").write_sample(
        replace(make_sample("exact", 0), conversation=turns)
    )
    row = data_of(report(str(directory)).read_text("utf-8"))["rows"][0]
    assert row["p"][0] == [["Say", 1, 0], ["?", 0, 0], [None, 1, 1], [None, 1, 0]]
    assert row["r"][0]["v"] == [0.1, 0.5, -0.5]


def test_what_cannot_be_done_is_said(study: Path, tmp_path: Path) -> None:
    """A directory without results and a place that cannot be written are refused in words."""
    with pytest.raises(UsageError, match="holds no results"):
        report(str(tmp_path / "nothing"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        report(str(study), tmp_path / "file" / "report.html")


def test_text_stays_readable_on_the_darkest_shades() -> None:
    """Both ends of the scale leave the text a contrast of at least 7 to 1 (WCAG 2.2, AAA)."""
    import mllm_shapx.reporting.html as module

    page = (Path(module.__file__).parent / "report.html").read_text("utf-8")
    ink = re.search(r"--ink: #(\w{6})", page)
    assert ink is not None
    ends = re.search(r"HIGH = \[([\d, ]+)\], LOW = \[([\d, ]+)\]", page)
    assert ends is not None

    def luminance(channels: list[int]) -> float:
        shares = [channel / 255 for channel in channels]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark = luminance([int(ink[1][place : place + 2], 16) for place in (0, 2, 4)])
    for end in ends.groups():
        light = luminance([int(channel) for channel in end.split(",")])
        assert (light + 0.05) / (dark + 0.05) >= 7.0


def dom_after(page: Path, script: str, tmp_path: Path) -> str:
    """Return the page's elements in a browser after `script` ran in it."""
    assert BROWSER is not None
    acted = tmp_path / "acted.html"
    acted.write_text(page.read_text("utf-8").replace("</body>", f"<script>{script}</script></body>"), "utf-8")
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--virtual-time-budget=2000",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            acted.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


@in_browser
@pytest.mark.slow
def test_paging_filter_and_run_work_in_a_browser(study: Path, tmp_path: Path) -> None:
    """The second page, a filter, a row number, another run and one scale do what they say."""
    page = report(str(study))
    act = """
        const get = id => document.getElementById(id), said = [];
        const note = () => said.push([get("list").children.length, get("count").textContent,
            get("page").textContent, get("list").querySelector("b").textContent]);
        const fill = text => { get("filter").value = text; get("filter").dispatchEvent(new Event("input")); };
        note();
        get("next").click(); note();
        fill("harbor");
        setTimeout(() => { note(); fill("row:77"); }, 300);
        setTimeout(() => {
            note();
            get("run").value = 2; get("run").dispatchEvent(new Event("change"));
            get("shared").click(); get("numbers").click();
            note();
            document.body.dataset.said = JSON.stringify(said);
        }, 900);
    """
    dom = dom_after(page, act, tmp_path)
    found = re.search(r'data-said="([^"]*)"', dom)
    assert found is not None
    said = json.loads(found[1].replace("&quot;", '"'))
    harbors = [row for row in range(130) if planted_word(row) == "harbor"]
    assert said == [
        [50, "130 of 130 samples", "page 1 of 3", "row 0"],
        [50, "130 of 130 samples", "page 2 of 3", "row 50"],
        [len(harbors), f"{len(harbors)} of 130 samples", "page 1 of 1", f"row {harbors[0]}"],
        [1, "1 of 130 samples", "page 1 of 1", "row 77"],
        [1, "1 of 130 samples", "page 1 of 1", "row 77"],
    ]
    # The strongest word is outlined, and every word carries its value.
    sample = make_sample("standard_cc_ns32", 77, noise=NOISE["standard_cc_ns32"])
    values = [value or 0.0 for value in sample.player_values()]
    strongest = sample.prompt_texts[0].split()[max(range(8), key=lambda place: abs(values[place]))]
    assert re.search(rf'class="p( neg)? top"[^>]*>{strongest}</span>', dom)
    assert len(re.findall(r'data-tip="[-+0-9.e]+ · player', dom)) == 8

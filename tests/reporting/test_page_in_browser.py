"""The report in a real browser: both demos, filters, sorting, playing, all runs of a row, hostile text."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browser import chromium, in_browser, opened, until
from results_on_disk import NOISE, make_sample, planted_word, text_entry, write_study

import mllm_shapx
from mllm_shapx.records.results import USER
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.storage import open_storage
from mllm_shapx.reporting.html import report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "</script><script>document.title='owned'</script> \u2028 ' \" & <b>bold</b>"

pytestmark = [in_browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of 130 rows and three runs; row 5 holds text that looks like markup."""
    directory = write_study(tmp_path_factory.mktemp("browser") / "study", range(130))
    sample = make_sample("exact", 5)
    turns = ((text_entry(USER, [HOSTILE, " word"], [0.5, 0.1]),),)
    RunRecords(open_storage(str(directory)), "exact").write_sample(
        replace(sample, conversation=turns, response=HOSTILE)
    )
    report(str(directory))
    return directory


def run_demo(name: str, folder: Path, rows: int, *more: dict[str, Any]) -> Path:
    """Run some rows of a demo, with more runs and with interactions; return the set's directory."""
    config = json.loads((ROOT / "configs" / f"{name}.json").read_text())
    config["connector_kwargs"]["model_id"] = str(ROOT / config["connector_kwargs"]["model_id"])
    config["dataset"]["path"] = str(ROOT / config["dataset"]["path"])
    config["output_root"] = str(folder)
    config["experiments"][0]["interactions"] = {"index": "k-SII", "order": 2}
    config["experiments"] += more
    outcome = mllm_shapx.run(config, inline=True, progress=False, max_samples=rows)
    assert outcome.exit_code == 0, outcome
    return folder / name


def samples(directory: Path) -> dict[tuple[str, int], Any]:
    return {
        (path.parts[-3], data["row_index"]): data
        for path in directory.glob("*/samples/*.json")
        for data in [json.loads(path.read_text())]
    }


def values_of(sample: dict[str, Any]) -> list[float]:
    return [
        value
        for turn in sample["conversation"]
        for entry in turn
        for value in entry["shap_values"] or ()
        if value is not None
    ]


def shown_values(panel: "Locator") -> list[float]:
    tips = panel.locator(".p").evaluate_all("pieces => pieces.map(piece => piece.dataset.tip)")
    return [float(re.match(r"[-+0-9.e]+", tip)[0]) for tip in tips]  # type: ignore[index]


def rows_shown(page: "Page") -> list[int]:
    return [
        int(row) for row in page.locator("article").evaluate_all("all => all.map(one => one.dataset.row)")
    ]


def test_the_text_demo_shows_what_its_files_say(browser: "Browser", tmp_path: Path) -> None:
    stopping = {"explainer_type": "standard_mc", "num_samples": 110, "stop_when": {"standard_error": 0.06}}
    directory = run_demo("demo", tmp_path, 4, stopping)
    files = samples(directory)
    why = {
        None: "",
        "standard_error": "stopped: standard errors ≤ 0.06",
        "budget": "stopped: budget spent",
    }
    assert {sample["stopped"] for _, sample in files.items() if "stopped" in sample} == {*why} - {None}
    with opened(browser, report(str(directory))) as page:
        runs = [each.inner_text() for each in page.locator("#run option").all()]
        assert runs == [
            "exact",
            "limited_mc_frac0_3",
            "limited_neyman_lin1_0",
            "standard_cc_ns32",
            "standard_mc_ns110_se0_06",
        ]
        assert page.locator("figure svg.plot").count() == 4
        page.check("#side")
        for row in sorted({row for _, row in files}):
            article = page.locator(f"article[data-row='{row}']")
            article.scroll_into_view_if_needed()
            assert article.locator(".panel .head b").all_text_contents() == runs
            for run, panel in zip(runs, article.locator(".panel").all(), strict=True):
                sample = files[run, row]
                assert shown_values(panel) == pytest.approx(values_of(sample), abs=5e-4, rel=1e-2)
                assert panel.locator(".prompt").inner_text() == sample["prompt_texts"][0]
                said = [each for each in panel.locator(".head span").all_inner_texts() if "stopped" in each]
                assert "".join(said) == why[sample.get("stopped")]
                answers = panel.locator(".answer").all_inner_texts()
                assert answers[0] == f"answer{sample['response']}"
                # Without the planted word, which is the most important, the demo's model has nothing to say.
                assert re.fullmatch(r"without “\w+”.*nothing special comes to mind.*", answers[1])
        summary = json.loads((directory / "exact" / "summary" / "aggregate_metrics.json").read_text())
        cells = page.locator("#runs tr[data-run='0'] td").all_inner_texts()
        assert cells[:4] == ["exact", "4", "0", f"{summary['n_calls_total'] / 4:.1f}"]


def test_the_page_of_the_text_demo_filters_sorts_and_compares(browser: "Browser", tmp_path: Path) -> None:
    directory = run_demo("demo", tmp_path, 4)
    with opened(browser, report(str(directory))) as page:
        files = samples(directory)
        check_handling(page, files)
        for row in sorted({row for _, row in files}):
            check_interactions(page.locator(f"article[data-row='{row}']"), files["exact", row])


def check_handling(page: "Page", files: dict[tuple[str, int], Any]) -> None:
    """Filter, sort and show side by side on a demo's page; what is shown is what the files say."""
    runs, rows = sorted({run for run, _ in files}), sorted({row for _, row in files})
    word = files["exact", rows[1]]["response"].split()[-1]
    page.fill("#filter", word.upper())
    page.dispatch_event("#filter", "change")
    texts = {row: [files["exact", row]["response"], *files["exact", row]["prompt_texts"]] for row in rows}
    found = [row for row in rows if word in " ".join(texts[row])]
    assert rows_shown(page) == found
    page.fill("#filter", f"row:{rows[-1]}")
    page.dispatch_event("#filter", "change")
    assert rows_shown(page) == rows[-1:]
    page.fill("#filter", "")
    page.dispatch_event("#filter", "change")
    page.select_option("#order", "players")
    players = [files["exact", row]["num_players"] for row in rows_shown(page)]
    assert players == sorted(players, reverse=True)
    page.select_option("#order", "row")
    calls = {run: sum(files[run, row]["n_calls"] for row in rows) for run in runs}
    names = page.locator("#runs tbody td:first-child")
    page.get_by_role("button", name="coalitions / sample").click()
    assert names.all_inner_texts() == sorted(runs, key=lambda run: -calls[run])
    page.get_by_role("button", name="coalitions / sample").click()
    assert names.all_inner_texts() == sorted(runs, key=lambda run: calls[run])
    page.check("#side")
    for row in rows:
        panels = page.locator(f"article[data-row='{row}'] .panel").all()
        for run, panel in zip(runs, panels, strict=True):
            assert panel.locator(".head b").text_content() == run
            expected = values_of(files[run, row])
            assert shown_values(panel) == pytest.approx(expected, abs=5e-4, rel=1e-2)
    page.uncheck("#side")


def check_interactions(article: "Locator", sample: dict[str, Any]) -> None:
    """Hold that the table has each pair's interaction twice, and colours by size the strongest most."""
    found = sample["interactions"]
    pairs = {tuple(each): value for each, value in zip(found["players"], found["values"], strict=True)}
    count = sample["num_players"]
    cells = article.locator(".interactions tbody td")
    tips = cells.evaluate_all("all => all.map(one => one.dataset.tip.split(': ').pop())")
    expected = [pairs[tuple(sorted({one, other}))] for one in range(count) for other in range(count)]
    assert [float(tip) for tip in tips] == pytest.approx(expected, abs=5e-4, rel=1e-2)
    heads = article.locator(".interactions tbody th").all_text_contents()
    assert len(heads) == count
    strongest = max((abs(value) for pair, value in pairs.items() if len(pair) > 1), default=0.0)
    shades = cells.evaluate_all("all => all.map(one => parseFloat(one.style.getPropertyValue('--s')))")
    if strongest > 1e-9:
        assert max(shades) == 100.0
        place = shades.index(100.0)
        assert abs(expected[place]) == pytest.approx(strongest)


def test_the_audio_demo_is_coloured_and_plays(browser: "Browser", tmp_path: Path) -> None:
    pytest.importorskip("liquid_audio")
    more = {"explainer_type": "limited_mc", "num_samples": [20]}
    directory = run_demo("demo_audio", tmp_path, 2, more)
    files = samples(directory)
    with opened(browser, report(str(directory))) as page:
        check_handling(page, files)
        for row in (0, 1):
            check_interactions(page.locator(f"article[data-row='{row}']"), files["exact", row])
            sample = files["exact", row]
            article = page.locator(f"article[data-row='{row}']")
            assert shown_values(article) == pytest.approx(values_of(sample), abs=5e-4)
            top = values_of(sample).index(max(values_of(sample)))
            seconds = f"{0.24 * top:.2f}\u2013{0.24 * (top + 1):.2f} s"
            assert article.locator(".p.top").get_attribute("data-tip").endswith(seconds)  # type: ignore[union-attr]
            assert seconds in article.locator(".answer b").nth(1).inner_text()
            # The strongest segment has the strongest colour, and the waveform lies over all of them.
            colors = article.locator(".wave .p").evaluate_all(
                "all => all.map(one => one.style.getPropertyValue('--s'))"
            )
            assert colors[top] == "100.0%"
            assert article.locator(".wave svg path").get_attribute("d")
        length = files["exact", 1]["audio_artifacts"]["inputs"][0]["seconds"]
        article = page.locator("article[data-row='1']")
        article.locator("button.play").click()
        until(page, "document.getElementById('player').currentTime > 0.1")
        assert page.evaluate("document.getElementById('player').duration") == pytest.approx(length, abs=0.01)
        assert article.locator(".at").count() == 1
        assert article.locator("button.play").inner_text() == "❚❚"
        article.locator("button.play").click()
        until(page, "document.getElementById('player').paused")
        # A click on a segment plays that segment alone.
        article.locator(".wave .p").nth(2).click()
        until(page, "document.getElementById('player').currentTime > 0.48")
        until(page, "document.getElementById('player').paused")
        assert 0.7 < page.evaluate("document.getElementById('player').currentTime") < 1.0


def test_filters_orders_and_pages(browser: "Browser", study: Path) -> None:
    with opened(browser, study / "report.html") as page:
        assert rows_shown(page) == list(range(50))
        page.click("#next")
        assert rows_shown(page) == list(range(50, 100))
        assert page.locator("#page").inner_text() == "page 2 of 3"
        page.fill("#filter", "HARBOR")
        harbors = [row for row in range(130) if planted_word(row) == "harbor"]
        until(page, f"document.getElementById('count').textContent === '{len(harbors)} of 130 samples'")
        assert rows_shown(page) == harbors
        page.select_option("#language", "en")
        assert rows_shown(page) == [row for row in harbors if row % 2 == 0]
        page.select_option("#language", "pl")
        assert page.locator("#list .none").inner_text() == "No sample matches."
        page.select_option("#language", "")
        page.fill("#filter", "row:77")
        until(page, "document.querySelectorAll('article').length === 1")
        assert rows_shown(page) == [77]
        page.select_option("#run", label="standard_cc_ns32")
        sample = make_sample("standard_cc_ns32", 77, noise=NOISE["standard_cc_ns32"])
        assert shown_values(page.locator("article")) == pytest.approx(sample.player_values(), abs=5e-4)
        assert page.locator("#runs tr.chosen td").first.inner_text() == "standard_cc_ns32"
        page.fill("#filter", "")
        until(page, "document.querySelectorAll('article').length === 50")
        page.select_option("#order", "largest")
        tops = {
            row: max(
                abs(value or 0.0) for value in make_sample("standard_cc_ns32", row, noise=0.6).player_values()
            )
            for row in range(130)
        }
        assert rows_shown(page)[:10] == sorted(tops, key=lambda row: -tops[row])[:10]
        # All rows have one language of input, so that there is nothing to choose.
        assert not page.locator("#modality").is_visible()


def test_rows_are_filtered_by_what_they_are_made_of(browser: "Browser", tmp_path: Path) -> None:
    """The choice of a modality shows its rows and no others, and counts them; language and text narrow it."""
    directory = write_study(tmp_path / "study", range(8), runs={"exact": 0.0, "mc": 0.1})
    for run in ("exact", "mc"):
        records = RunRecords(open_storage(str(directory)), run)
        for row in range(8):
            kind = ("text", "audio__original", "interleaved__text_first__male")[row % 3]
            records.write_sample(replace(make_sample(run, row), input_modality=kind))
    with opened(browser, report(str(directory))) as page:
        choices = page.locator("#modality option").all_inner_texts()
        assert choices == ["all", "audio__original", "interleaved__text_first__male", "text"]
        page.select_option("#modality", "audio__original")
        assert rows_shown(page) == [1, 4, 7]
        assert page.locator("#count").inner_text() == "3 of 8 samples"
        page.select_option("#language", "en")
        assert rows_shown(page) == [4]
        page.select_option("#language", "")
        page.check("#side")
        assert rows_shown(page) == [1, 4, 7]
        page.select_option("#modality", "text")
        assert rows_shown(page) == [0, 3, 6]
        page.select_option("#modality", "")
        assert rows_shown(page) == list(range(8))


def test_the_table_of_runs_sorts_and_chooses(browser: "Browser", study: Path) -> None:
    with opened(browser, study / "report.html") as page:
        names = page.locator("#runs tbody td:first-child")
        assert names.all_inner_texts() == list(NOISE)
        page.get_by_role("button", name="error").click()
        # The exact run has no error, and stays last.
        assert names.all_inner_texts() == ["standard_cc_ns32", "limited_mc_frac0_3", "exact"]
        page.get_by_role("button", name="error").click()
        assert names.all_inner_texts() == ["limited_mc_frac0_3", "standard_cc_ns32", "exact"]
        assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
        page.get_by_role("button", name="run", exact=True).click()
        assert names.all_inner_texts() == sorted(NOISE)
        names.nth(1).click()
        assert page.locator("#run option:checked").inner_text() == "limited_mc_frac0_3"


def test_one_row_shows_all_its_runs(browser: "Browser", study: Path) -> None:
    with opened(browser, study / "report.html", width=400, scheme="dark") as page:
        article = page.locator("article[data-row='3']")
        article.get_by_role("button", name="all runs").click()
        assert article.locator(".panel .head b").all_text_contents() == list(NOISE)
        for panel, (run, noise) in zip(article.locator(".panel").all(), NOISE.items(), strict=True):
            expected = make_sample(run, 3, noise=noise).player_values()
            assert shown_values(panel) == pytest.approx(expected, abs=5e-4)
        # Nothing is wider than the screen, and others stay as they are.
        assert page.evaluate("document.documentElement.scrollWidth") == 400
        assert page.locator(".panels").count() == 1
        article.get_by_role("button", name="this run alone").click()
        assert page.locator(".panels").count() == 0


def test_numbers_and_plots_are_read_by_hovering(browser: "Browser", study: Path) -> None:
    with opened(browser, study / "report.html") as page:
        piece = page.locator("article[data-row='3'] .p").first
        piece.hover()
        value = make_sample("exact", 3).player_values()[0]
        tip = page.locator(".tip")
        assert tip.inner_text().endswith("player 1 of 8")
        assert float(tip.inner_text().split()[0]) == pytest.approx(value, abs=5e-4)
        page.locator("svg.plot path[aria-label^='limited_mc_frac0_3: error']").first.hover()
        assert re.fullmatch(
            r"limited_mc_frac0_3: error 0.0\d+ with 40.0 coalitions, half of 129 samples from .*",
            tip.inner_text(),
        )
        page.check("#numbers")
        assert piece.evaluate("one => getComputedStyle(one, '::after').content") == f'"{value:+.2f}"'


def test_text_that_looks_like_markup_stays_text(browser: "Browser", study: Path) -> None:
    with opened(browser, study / "report.html") as page:
        article = page.locator("article[data-row='5']")
        assert page.title() == "study"
        assert article.locator(".p").first.evaluate("one => one.textContent") == HOSTILE
        assert article.locator(".answer").evaluate("one => one.lastChild.textContent") == HOSTILE
        assert article.locator("script, .p b").count() == 0
        page.fill("#filter", "</SCRIPT>")
        until(page, "document.querySelectorAll('article').length === 1")


def test_colours_follow_the_reader_and_print(browser: "Browser", study: Path) -> None:
    with opened(browser, study / "report.html") as page:
        background = "getComputedStyle(document.body).backgroundColor"
        top = "getComputedStyle(document.querySelector('article[data-row=\"3\"] .p.top')).backgroundColor"
        light = [page.evaluate(background), page.evaluate(top)]
        page.emulate_media(color_scheme="dark")
        dark = [page.evaluate(background), page.evaluate(top)]
        assert light[0] == "rgb(255, 255, 255)"
        assert not {*light} & {*dark}
        page.emulate_media(media="print", color_scheme="light")
        assert not page.locator(".controls").is_visible()
        assert page.locator("article").first.is_visible()
        assert page.pdf().startswith(b"%PDF")

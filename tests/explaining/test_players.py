"""Words, tokens, sentences and messages as players: what is counted before is what is explained after."""

import asyncio
import json
import random
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from explaining_kit import Generator, RuleBackend, explain, row_of, runs_of
from mllm_shap import ExplainRunner
from tokenizer_kit import CHATML, TOKENIZERS, tokenizer_of

from mllm_shapx.config.models import ExperimentSet, ModalityConfig, SelectionConfig
from mllm_shapx.config.sources import TokenizerSource
from mllm_shapx.data.conversations import load_row
from mllm_shapx.data.selection import select_rows
from mllm_shapx.data.sources import open_table
from mllm_shapx.errors import RowError
from mllm_shapx.explaining.sample import open_row
from mllm_shapx.explaining.settings import GameSettings, explain_config
from mllm_shapx.models.text_tokens import _of_transformers, token_spans
from mllm_shapx.planning.players import PlayerRule, players_under
from mllm_shapx.planning.sweep import expand, player_rule

ROOT = Path(__file__).resolve().parents[2]
TEXTS = (
    "The quick brown fox jumps. Over it? A lazy dog!",
    "  Leading space, and  two inside.\n\nA new paragraph without an end",
    "Emoji 🙂🙂 and e\u0301 and ﬁ. 「日本語。」 — … done?!",
    "one",
    "Not this: NOT (that), not. 3 + 4 = 7",
    "...",
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenizerSource]:
    folder = tmp_path_factory.mktemp("tokenizers")
    found = {}
    for kind in TOKENIZERS:
        tokenizer_of(kind, CHATML).save_pretrained(folder / kind)
        found[kind] = TokenizerSource(str(folder / kind))
    return found


def random_texts(count: int) -> list[str]:
    draw = random.Random(7)
    letters = "ab Cz.!?\n ,-é🙂ß日　'\u0301"
    return ["".join(draw.choice(letters) for _ in range(draw.randrange(1, 60))) for _ in range(count)]


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_tokens_are_stretches_that_give_the_text_and_are_the_tokenizers(
    tokenizers: dict[str, TokenizerSource], kind: str
) -> None:
    source = tokenizers[kind]
    spans_of, of_transformers = token_spans(source), _of_transformers(source)
    rule = PlayerRule("none", "tokens", tokenizer=source)
    for text in (*TEXTS, *random_texts(60)):
        spans = spans_of(text)
        assert all(start < end for start, end in spans)
        assert all(left[1] <= right[0] for left, right in pairwise(spans))
        starts = {start for start, _ in spans}
        assert starts <= {start for start, _ in of_transformers(text)}, "as transformers cuts it"
        if not spans:
            continue
        (run,) = runs_of(
            {"explainer_type": "loo"}, shap={"players": "tokens", "token_filter": "none"},
            connector_kwargs={"model_id": source.model},
        )  # fmt: skip
        assert run.player_rule == rule
        sample = explain(row_of(text), run)
        pieces = [entry for turn in sample.conversation[1:-1] for entry in turn]
        assert "".join(str(piece) for entry in pieces for piece in entry.content) == text
        assert sample.num_players == len(spans)


def test_bytes_of_one_character_are_one_token(tokenizers: dict[str, TokenizerSource]) -> None:
    text = "fox 🙂 dog"
    spans = token_spans(tokenizers["bpe_with_bos"])(text)
    assert [text[start:end].strip() for start, end in spans].count("🙂") == 1


@cache
def demo_table(folder: Path) -> Any:
    path = folder / "rows.parquet"
    rows = [[text] for text in TEXTS] + [list(TEXTS[:3]), list(TEXTS[2:5])]
    pq.write_table(pa.table({"sentences": rows}), path)
    return path


@pytest.mark.parametrize("setup", ["SYSTEM_ASSISTANT", "ASSISTANT"])
@pytest.mark.parametrize("keep", [None, {"words": ["Not", "fox", "one"]}, {"roles": ["system"]}])
@pytest.mark.parametrize("token_filter", ["exclude_punctuation", "none"])
@pytest.mark.parametrize("kind", ["words", "tokens", "sentences", "messages"])
def test_the_selection_counts_the_players_that_are_explained(
    tmp_path_factory: pytest.TempPathFactory, kind: str, token_filter: str, keep: Any, setup: str
) -> None:
    path = demo_table(tmp_path_factory.getbasetemp())
    settings = ExperimentSet.model_validate(
        {
            "experiment_set_id": "study",
            "connector": "hf_text",
            "connector_kwargs": {"model_id": str(ROOT / "demo" / "model")},
            "dataset": {"source": "local_parquet", "path": str(path)},
            "chat": {"system_roles_setup": setup, "system_prompt": "Be kind. Not rude!"},
            "shap": {"players": kind, "token_filter": token_filter, "keep": keep},
            "experiments": [
                {"explainer_type": "exact"},
                {"explainer_type": "exact", "name": "words", "shap_override": {"players": "words"}},
            ],
        }
    )
    runs = expand(settings).runs
    table = open_table(settings.dataset, None)
    selection = select_rows(
        table,
        settings.dataset,
        SelectionConfig(shuffle_seed=None),
        ModalityConfig(),
        player_rule(settings, None),
        other_rules=[run.player_rule for run in runs],
    )
    for run in runs:
        counts = players_under(selection.players, run.player_rule)
        assert counts is not None
        for row_index, counted in counts.items():
            row = load_row(table, row_index, settings.dataset, settings.modality)
            if counted == 0:
                with pytest.raises(RowError, match="could be a player"):
                    open_row(row, run)
            else:
                assert open_row(row, run).players.num_players == counted, (run.name, row.texts)
    bounded = select_rows(
        table,
        settings.dataset,
        SelectionConfig(shuffle_seed=None, min_prompt_tokens=2),
        ModalityConfig(),
        player_rule(settings, None),
    )
    mine = players_under(selection.players, runs[0].player_rule) or {}
    assert set(bounded.rows) == {row for row, count in mine.items() if count >= 2}


@pytest.mark.parametrize("kind", ["sentences", "messages"])
@pytest.mark.parametrize("explainer", [{"explainer_type": "exact"}, {"explainer_type": "cc", "linear": 1}])
def test_sentences_and_messages_are_the_librarys(kind: str, explainer: dict[str, Any]) -> None:
    texts = ("The fox jumps. Over dogs? Near the old bridge!\n\nToday again", "One. Two.", "Three")
    row = row_of(*texts, row_index=2)
    (run,) = runs_of(explainer, shap={"players": kind})
    coalitions = open_row(row, run)
    count = coalitions.players.num_players
    assert count == {"sentences": 7, "messages": 3}[kind]
    config = explain_config(run, GameSettings(run.explainer_type, run.budget, run.seed_for(2)), count)
    theirs = asyncio.run(ExplainRunner(config, backend=RuleBackend()).explain(coalitions.snapshot))
    assert theirs.player_set is not None
    assert [span.text for span in coalitions.players.spans] == [span.text for span in theirs.player_set.spans]
    assert explain(row, run).player_values() == pytest.approx(list(theirs.result.values), abs=1e-12)


def test_sentences_of_any_text_end_where_the_librarys_end() -> None:
    from mllm_shap.masking.partitions import _sentence_bounds

    from mllm_shapx.data.tokens import player_spans

    for text in (*TEXTS, *random_texts(300)):
        assert player_spans(text, PlayerRule("none", "sentences")) == _sentence_bounds(text)


def test_kept_words_are_in_every_prompt_and_have_no_value() -> None:
    (run,) = runs_of({"explainer_type": "exact"}, shap={"keep": {"words": ["FOX"]}})
    row = row_of("red (Fox), jumps over")
    coalitions = open_row(row, run)
    assert [span.text for span in coalitions.players.spans] == ["red", "jumps", "over"]
    assert coalitions.render(0).messages()[-1].text.strip() == "(Fox),"
    sample = explain(row, run, generator=Generator())
    (entry,) = sample.conversation[1]
    assert "".join(map(str, entry.content)) == "red (Fox), jumps over"


def test_a_plan_of_token_players_imports_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    config = {
        "experiment_set_id": "study",
        "output_root": str(tmp_path / "out"),
        "connector": "hf_text",
        "connector_kwargs": {"model_id": str(ROOT / "demo" / "model")},
        "dataset": {"source": "local_parquet", "path": str(ROOT / "demo" / "rows.parquet")},
        "selection": {"max_samples": 3},
        "generation": {"text_temperature": 0},
        "shap": {"players": "tokens"},
        "experiments": [{"explainer_type": "mc", "num_samples": -1}],
    }
    path.write_text(json.dumps(config))
    code = (
        "import sys, atexit\n"
        "heavy = {'torch', 'transformers', 'ray'}\n"
        "atexit.register(lambda: print('IMPORTED', sorted(heavy & set(sys.modules))))\n"
        "from mllm_shapx.cli import main\n"
        f"main(['plan', '--config', {str(path)!r}, '--json'], standalone_mode=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "IMPORTED []" in done.stdout
    assert '"num_players"' in done.stdout

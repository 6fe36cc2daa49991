"""Row selection: order, filters, bounds, balance, slice, and what is said when nothing is left."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from data_kit import local, select, table_of, write_parquet

from mllm_shapx.config.models import ModalityConfig, SelectionConfig
from mllm_shapx.data.selection import select_rows
from mllm_shapx.data.sources import open_table
from mllm_shapx.errors import DatasetError
from mllm_shapx.planning.players import PlayerRule, players_under

WORDS = ["one", "one two", "one two three !", "a b c d", "", None]


def test_order_is_the_permutation_of_the_seed(tmp_path: Path) -> None:
    """Rows come in the order of RandomState(seed).permutation; a null seed keeps file order."""
    table, config = table_of(tmp_path, prompt=[f"row {i}" for i in range(50)])
    assert select(table, config, shuffle_seed=7).rows == tuple(np.random.RandomState(7).permutation(50))
    assert select(table, config, shuffle_seed=None).rows == tuple(range(50))


def test_a_filter_takes_rows_away_without_reordering(tmp_path: Path) -> None:
    """Filtered rows keep their places; start_index and max_samples count what is left."""
    table, config = table_of(tmp_path, prompt=["x"] * 40, part=[i % 4 for i in range(40)])
    order = [int(row) for row in np.random.RandomState(0).permutation(40)]
    odd = [row for row in order if row % 4 == 1]
    filters = [{"column": "part", "op": "==", "value": 1}]
    assert list(select(table, config, shuffle_seed=0, filters=filters).rows) == odd
    sliced = select(table, config, shuffle_seed=0, filters=filters, start_index=2, max_samples=3)
    assert list(sliced.rows) == odd[2:5]


def test_players_are_counted_per_row(tmp_path: Path) -> None:
    """Text input tells the players of each selected row; punctuation and missing text count as none."""
    table, config = table_of(tmp_path, prompt=WORDS)
    assert select(table, config).players == {0: 1, 1: 2, 2: 3, 3: 4, 4: 0, 5: 0}
    every_word = select(table, config, token_filter="none")  # noqa: S106
    assert every_word.players == {0: 1, 1: 2, 2: 4, 3: 4, 4: 0, 5: 0}


def test_players_are_counted_under_the_filters_of_variants_too(tmp_path: Path) -> None:
    """Bounds look at the config's own filter; each variant is planned with its own."""
    table, config = table_of(tmp_path, prompt=WORDS)
    found = select_rows(
        table,
        config,
        SelectionConfig(shuffle_seed=None, max_prompt_tokens=3),
        ModalityConfig(),
        PlayerRule(),
        other_rules=[PlayerRule("none"), PlayerRule()],
    )
    assert players_under(found.players, PlayerRule()) == {0: 1, 1: 2, 2: 3, 4: 0, 5: 0}
    assert players_under(found.players, PlayerRule("none")) == {0: 1, 1: 2, 2: 4, 4: 0, 5: 0}


def test_players_of_list_valued_text_add_up(tmp_path: Path) -> None:
    """`sentences` is preferred over `prompt`, and its sentences count together."""
    table, config = table_of(
        tmp_path, prompt=["no", "no"], sentences=[["Hello there.", " ", "Who are you ?"], [None]]
    )
    assert select(table, config).players == {0: 5, 1: 0}


def test_selected_rows_without_spaces_between_words_are_told_once(tmp_path: Path) -> None:
    """The number of such rows among the selected ones, and what the user can do."""
    prompts = ["one two", "今天天气怎么样", "今天 天气 怎么样", "วันนี้อากาศดีมากเราไปเที่ยวกันไหม"]
    table, config = table_of(tmp_path, prompt=prompts)
    (warning,) = select(table, config).warnings
    assert warning.startswith("2 of 4 row(s) are in a script that puts no spaces between words")
    assert "segmenter" in warning
    assert "list of phrases" in warning
    assert select(table, config, max_samples=1).warnings == (), "the other rows are not selected"
    listed, config = table_of(
        tmp_path / "listed", sentences=[["今天天气", "怎么样"], ["今天天气怎么样今天天气怎么样"]]
    )
    (warning,) = select(listed, config).warnings
    assert warning.startswith("1 of 2 row(s)"), "phrases of their own are players of their own"


def test_player_bounds_hold_for_text_input(tmp_path: Path) -> None:
    """min_prompt_tokens and max_prompt_tokens are both inclusive."""
    table, config = table_of(tmp_path, prompt=WORDS)
    assert select(table, config, min_prompt_tokens=2, max_prompt_tokens=3).rows == (1, 2)
    assert select(table, config, max_prompt_tokens=1).rows == (0, 4, 5)


def test_player_bounds_on_audio_are_told_and_not_applied(tmp_path: Path) -> None:
    """Audio players are not known before the audio is cut: the bounds are left out with a warning."""
    table, config = table_of(tmp_path, prompt=WORDS, audio__male=[b""] * 6)
    selection = select(table, config, modality="audio__male", min_prompt_tokens=2)
    assert len(selection.rows) == 6
    assert selection.players is None
    assert "text input only" in selection.warnings[0]


VALUES: dict[str, Any] = {
    "n": pa.array([1, 2, None, 4, 5], pa.int32()),
    "x": pa.array([0.5, float("nan"), 1.5, None, 2.0]),
    "s": ["en", "fr", None, "de", "en"],
    "cat": pa.array(["en", "fr", None, "de", "en"]).dictionary_encode(),
    "big": pa.array(["en", "fr", None, "de", "en"], pa.large_string()),
    "b": [True, False, None, True, False],
    "day": pa.array([0, 1, None, 3, 4], pa.date32()),
    "empty": pa.nulls(5),
}


@pytest.mark.parametrize(
    ("column", "op", "value", "rows"),
    [
        ("n", "==", 2, (1,)),
        ("n", "!=", 2, (0, 2, 3, 4)),
        ("n", "<", 4, (0, 1)),
        ("n", "<=", 4, (0, 1, 3)),
        ("n", ">", 2.5, (3, 4)),
        ("n", ">=", 4, (3, 4)),
        ("n", "between", [2, 4], (1, 3)),
        ("n", "in", [1, 5, 9], (0, 4)),
        ("n", "not_in", [1, 5], (1, 2, 3)),
        ("n", "in", [], ()),
        ("n", "==", None, (2,)),
        ("n", "!=", None, (0, 1, 3, 4)),
        ("n", "in", [None, 1], (0, 2)),
        ("n", "not_in", [None], (0, 1, 3, 4)),
        ("n", "==", 2.0, (1,)),
        ("x", "==", None, (1, 3)),
        ("x", "!=", 1.5, (0, 1, 3, 4)),
        ("x", ">", 1, (2, 4)),
        ("x", "between", [0.5, 1.5], (0, 2)),
        ("s", "==", "en", (0, 4)),
        ("s", "not_in", ["en"], (1, 2, 3)),
        ("s", ">", "en", (1,)),
        ("s", "between", ["de", "en"], (0, 3, 4)),
        ("cat", "in", ["fr", "de"], (1, 3)),
        ("big", "!=", "en", (1, 2, 3)),
        ("b", "==", True, (0, 3)),
        ("b", "!=", True, (1, 2, 4)),
        ("day", ">=", "1970-01-04", (3, 4)),
        ("empty", "==", "x", ()),
        ("empty", "!=", "x", (0, 1, 2, 3, 4)),
        ("empty", ">", 3, ()),
    ],
)
def test_each_filter_operation(
    tmp_path: Path, column: str, op: str, value: Any, rows: tuple[int, ...]
) -> None:
    """A missing value passes `!=` and `not_in` alone; null as the filter's value means missing."""
    table, config = table_of(tmp_path, prompt=["x"] * 5, **VALUES)
    filters = [{"column": column, "op": op, "value": value}]
    if rows:
        assert select(table, config, filters=filters).rows == rows
    else:
        with pytest.raises(DatasetError, match="leaves no row"):
            select(table, config, filters=filters)


@pytest.mark.parametrize(
    ("column", "op", "value"),
    [
        ("n", "==", "2"),
        ("n", "<", True),
        ("s", "<", 3),
        ("s", "in", ["en", 3]),
        ("b", "==", 1),
        ("n", "between", [None, 3]),
        ("labels", "==", "a"),
        ("day", "==", "yesterday"),
        ("n", "==", 10**30),
        ("n", "==", [2]),
    ],
)
def test_a_filter_that_does_not_fit_its_column_is_named(
    tmp_path: Path, column: str, op: str, value: Any
) -> None:
    """Comparing text with numbers names the filter's place, the column's type and the value."""
    table, config = table_of(tmp_path, prompt=["x"] * 5, labels=[["a"]] * 5, **VALUES)
    filters = [{"column": "n", "op": ">", "value": 0}, {"column": column, "op": op, "value": value}]
    with pytest.raises(DatasetError, match=r"selection\.filters\[1\]") as caught:
        select(table, config, filters=filters)
    assert "cannot be compared" in str(caught.value)


def test_a_missing_filter_column_is_named(tmp_path: Path) -> None:
    """The message has the filter's place, the columns there are and the nearest one."""
    table, config = table_of(tmp_path, prompt=["x"], language=["en"])
    with pytest.raises(DatasetError) as caught:
        select(table, config, filters=[{"column": "langauge", "op": "==", "value": "en"}])
    message = str(caught.value)
    assert "selection.filters[0].column" in message
    assert "did you mean 'language'" in message
    assert "prompt, language" in message


def test_balanced_selection_takes_as_many_of_each_count(tmp_path: Path) -> None:
    """Buckets come in the config's order, rows inside a bucket in selection order."""
    counts = [3, 2, 3, 2, 3, 4, 2]
    table, config = table_of(tmp_path, prompt=["x"] * 7, token_count=pa.array(counts, pa.int32()))
    chosen = select(
        table, config, shuffle_seed=1, balanced_token_counts=[3, 2], samples_per_token_count=2
    ).rows
    order = [int(row) for row in np.random.RandomState(1).permutation(7)]
    threes, twos = ([row for row in order if counts[row] == count][:2] for count in (3, 2))
    assert list(chosen) == threes + twos


def test_balanced_selection_counts_players_where_no_column_does(tmp_path: Path) -> None:
    """Without a token_count column text players are counted; a mapped column is used."""
    table, config = table_of(tmp_path, prompt=["a b", "a", "b c", "d"], other=[1, 1, 1, 2])
    balance: dict[str, Any] = {"balanced_token_counts": [2], "samples_per_token_count": 1}
    assert select(table, config, **balance).rows == (0,)
    mapped = local(config.path or "", column_mapping={"token_count": "other"})
    assert select(table, mapped, **balance).rows == (3,)


def test_a_short_bucket_is_an_error_with_numbers_unless_allowed(tmp_path: Path) -> None:
    """The error says how many of each count there are; allowed, the rest is taken with a warning."""
    table, config = table_of(tmp_path, prompt=["x"] * 4, token_count=[2, 2, 2, 3])
    balance: dict[str, Any] = {"balanced_token_counts": [2, 3, 9], "samples_per_token_count": 2}
    with pytest.raises(DatasetError) as caught:
        select(table, config, **balance)
    assert "3 tokens: 1 of 2 rows; 9 tokens: 0 of 2 rows" in str(caught.value)
    partial = select(table, config, **balance, allow_partial_token_count_buckets=True)
    assert partial.rows == (0, 1, 3)
    assert "1 of 2" in partial.warnings[0]


def test_a_token_count_column_that_holds_no_whole_numbers_is_named(tmp_path: Path) -> None:
    """Balancing by text or fractions names the column and its type."""
    for counts in (["a", "b"], [1.5, 2.0]):
        table, config = table_of(tmp_path, prompt=["x", "y"], token_count=counts)
        with pytest.raises(DatasetError, match="'token_count' holds"):
            select(table, config, balanced_token_counts=[2], samples_per_token_count=1)


def test_balancing_audio_needs_the_column(tmp_path: Path) -> None:
    """Audio rows without token counts cannot be balanced, and the mapping key is named."""
    table, config = table_of(tmp_path, audio__male=[b""])
    with pytest.raises(DatasetError, match=r"column_mapping\.token_count"):
        select(table, config, modality="audio__male", balanced_token_counts=[2], samples_per_token_count=1)


def test_an_empty_selection_says_which_step_removed_how_many(tmp_path: Path) -> None:
    """Every step's share stands in the message."""
    table, config = table_of(tmp_path, prompt=["a b"] * 10, part=list(range(10)))
    with pytest.raises(DatasetError) as caught:
        select(
            table,
            config,
            filters=[{"column": "part", "op": "<", "value": 4}],
            min_prompt_tokens=2,
            start_index=9,
        )
    message = str(caught.value)
    assert "10 rows" in message
    assert "filters[0] (part < 4) removed 6" in message
    assert "min_prompt_tokens 2 removed 0" in message
    assert "start_index removed 4" in message
    empty, empty_config = table_of(tmp_path, prompt=pa.array([], pa.string()))
    with pytest.raises(DatasetError, match="holds no rows"):
        select(empty, empty_config)


def test_a_missing_text_column_names_the_mapping(tmp_path: Path) -> None:
    """Neither `sentences` nor `prompt`: the columns there are and the key to set are named."""
    table, config = table_of(tmp_path, question=["x"])
    with pytest.raises(DatasetError) as caught:
        select(table, config)
    message = str(caught.value)
    assert "'sentences' or 'prompt'" in message
    assert "question" in message
    assert "dataset.column_mapping.text" in message
    mapped = local(config.path or "", column_mapping={"text": "question"})
    assert select(table, mapped).rows == (0,)
    typo = local(config.path or "", column_mapping={"text": "questoin"})
    with pytest.raises(DatasetError, match="did you mean 'question'"):
        select(table, typo)


@pytest.mark.parametrize("cells", [[{"role": "user", "content": "x"}], [[{"role": "user"}]], [b"x"]])
def test_a_text_column_that_holds_no_text_is_named(tmp_path: Path, cells: list[Any]) -> None:
    """Structures or bytes in the text column are an error of the config, not of each row."""
    table, config = table_of(tmp_path, prompt=cells)
    with pytest.raises(DatasetError, match=r"'prompt' holds .*column_mapping\.text"):
        select(table, config)


def test_only_the_needed_columns_are_read(tmp_path: Path) -> None:
    """Damage in a recording column does not touch the selection: it is never read."""
    path = write_parquet(
        tmp_path / "t.parquet",
        {"audio__male": [bytes([i]) * 5000 for i in range(100)], "prompt": ["a b"] * 100},
    )
    data = bytearray(path.read_bytes())
    data[4:300] = b"\xff" * 296
    path.write_bytes(bytes(data))
    table = open_table(local(path), None)
    assert len(select(table, local(path), min_prompt_tokens=2).rows) == 100
    with pytest.raises(DatasetError):
        table.column("audio__male")


def test_csv_is_filtered_by_its_own_types(tmp_path: Path) -> None:
    """Numbers and truth values in CSV files are compared as such."""
    path = tmp_path / "t.csv"
    path.write_text("prompt,n,ok\na,1,true\nb,,false\nc,3,true\n")
    table = open_table(local(path), None)
    filters = [{"column": "n", "op": ">=", "value": 1}, {"column": "ok", "op": "==", "value": True}]
    assert select(table, local(path), filters=filters).rows == (0, 2)


_PLAN = """
import sys
from pathlib import Path
from mllm_shapx.config.models import DatasetConfig, ModalityConfig, SelectionConfig
from mllm_shapx.data.selection import select_rows
from mllm_shapx.data.sources import open_table
from mllm_shapx.planning.players import PlayerRule
filters = [{"column": "n", "op": ">", "value": 1}, {"column": "prompt", "op": "not_in", "value": ["x"]}]
selection = SelectionConfig.model_validate(
    {"filters": filters, "balanced_token_counts": [2], "samples_per_token_count": 1}
)
for source, path in (("local_parquet", sys.argv[1]), ("local_csv", sys.argv[2])):
    config = DatasetConfig(source=source, path=path)
    rows = select_rows(open_table(config, None), config, selection, ModalityConfig(), PlayerRule("none")).rows
    assert rows == (1,), rows
heavy = {"torch", "datasets", "pandas", "mllm_shap", "ray", "transformers", "soundfile", "huggingface_hub"}
print(sorted(heavy & set(sys.modules)))
"""


def test_selecting_imports_nothing_heavy(tmp_path: Path) -> None:
    """`plan` and `validate --check-dataset` on local files pay for pyarrow alone."""
    path = write_parquet(tmp_path / "t.parquet", {"prompt": ["x", "a b"], "n": [1, 2], "token_count": [1, 2]})
    (tmp_path / "t.csv").write_text("prompt,n,token_count\nx,1,1\na b,2,2\n")
    done = subprocess.run(
        [sys.executable, "-c", _PLAN, str(path), str(tmp_path / "t.csv")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_a_hundred_thousand_rows_are_selected_in_seconds(tmp_path: Path) -> None:
    """Filters, player counts and balance over a large shard stay within seconds."""
    total = 100_000
    table, config = table_of(
        tmp_path,
        prompt=["the quick brown fox jumps over the lazy dog ."] * total,
        part=np.arange(total) % 10,
        token_count=np.arange(total) % 7,
    )
    started = time.perf_counter()
    selection = select(
        table,
        config,
        shuffle_seed=0,
        filters=[{"column": "part", "op": "<", "value": 9}],
        max_prompt_tokens=9,
        balanced_token_counts=[3, 4],
        samples_per_token_count=500,
    )
    assert len(selection.rows) == 1000
    assert time.perf_counter() - started < 10

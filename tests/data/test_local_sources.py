"""Local parquet and CSV: reading, and what is said when they cannot be read."""

import csv
import io
import os
import pickle
import random
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from data_kit import local, write_parquet

from mllm_shapx.config.models import DatasetConfig
from mllm_shapx.data.sources import open_table
from mllm_shapx.errors import DatasetError, RowError


def _message(config: DatasetConfig, config_path: Path | None = None) -> str:
    with pytest.raises(DatasetError) as caught:
        open_table(config, config_path)
    return str(caught.value)


def test_rows_across_files_and_row_groups(tmp_path: Path) -> None:
    """A row's index counts through all files in name order, whatever the row groups."""
    write_parquet(tmp_path / "b.parquet", {"prompt": [f"b{i}" for i in range(5)]}, rows_per_group=2)
    write_parquet(tmp_path / "a.parquet", {"prompt": [f"a{i}" for i in range(3)]}, rows_per_group=1)
    table = open_table(local(tmp_path / "*.parquet"), None)
    expected = ["a0", "a1", "a2", "b0", "b1", "b2", "b3", "b4"]
    assert table.num_rows == 8
    assert table.column("prompt") == expected
    assert [table.row(i, ["prompt"])["prompt"] for i in range(8)] == expected
    assert table.columns == ("prompt",)
    assert table.commit is None


def test_one_row_of_a_large_row_group(tmp_path: Path) -> None:
    """A row far inside a row group is found, list values included."""
    columns = {"sentences": [[f"s{i}", "x"] for i in range(300)], "audio": [[b"1", None]] * 300}
    table = open_table(local(write_parquet(tmp_path / "big.parquet", columns)), None)
    assert table.row(257, ["audio", "sentences"]) == {"sentences": ["s257", "x"], "audio": [b"1", None]}


def test_a_row_costs_its_row_group_not_the_file(tmp_path: Path) -> None:
    """Reading one recording decodes a part of one row group: memory does not grow with the file."""
    recordings = [bytes([i % 251]) * 100 + os.urandom(100_000) for i in range(200)]
    path = write_parquet(tmp_path / "rows.parquet", {"audio__male": recordings}, rows_per_group=20)
    table = open_table(local(path), None)
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        assert table.row(130, ["audio__male"])["audio__male"] == recordings[130]
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < path.stat().st_size / 3


def test_an_open_table_survives_pickling_and_threads(tmp_path: Path) -> None:
    """Workers may carry a table to another process and read rows from several threads."""
    columns = {"prompt": [f"p{i}" for i in range(200)]}
    opened = open_table(local(write_parquet(tmp_path / "t.parquet", columns)), None)
    table = pickle.loads(pickle.dumps(opened))  # noqa: S301
    wrong: list[int] = []

    def read(start: int) -> None:
        wrong.extend(i for i in range(start, 200, 4) if table.row(i, ["prompt"])["prompt"] != f"p{i}")

    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_relative_paths_start_at_the_working_directory_then_at_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path works from where the command is run, and beside the config file."""
    here, there = tmp_path / "here", tmp_path / "there"
    write_parquet(there / "rows.parquet", {"prompt": ["beside the config"]})
    here.mkdir()
    monkeypatch.chdir(here)
    config, config_path = local("rows.parquet"), there / "config.json"
    assert open_table(config, config_path).column("prompt") == ["beside the config"]
    assert open_table(local("*.parquet"), config_path).num_rows == 1
    write_parquet(here / "rows.parquet", {"prompt": ["here"]})
    assert open_table(config, config_path).column("prompt") == ["here"]


def test_a_directory_like_a_hub_repository_is_read_by_subset_and_split(tmp_path: Path) -> None:
    """A cloned dataset repository gives the rows of the config's subset and split alone."""
    write_parquet(tmp_path / "single_sentence/test/0000.parquet", {"prompt": ["right"]})
    write_parquet(tmp_path / "single_sentence/train/0000.parquet", {"prompt": ["wrong split"]})
    write_parquet(tmp_path / "multi_turn/test/0000.parquet", {"prompt": ["wrong subset"]})
    assert open_table(local(tmp_path), None).column("prompt") == ["right"]
    assert open_table(local(tmp_path, split="train"), None).column("prompt") == ["wrong split"]


def test_any_other_directory_is_read_whole(tmp_path: Path) -> None:
    """Files that speak of no split are all read; hidden and underscored ones are not."""
    for name in ("part-1.parquet", "part-0.parquet", ".hidden.parquet", "_meta.parquet"):
        write_parquet(tmp_path / name, {"prompt": [name]})
    assert open_table(local(tmp_path), None).column("prompt") == ["part-0.parquet", "part-1.parquet"]


def test_what_is_wrong_with_a_path_is_said(tmp_path: Path) -> None:
    """Missing, empty, cut short, no parquet, not readable: each names the file and the fix."""
    good = write_parquet(tmp_path / "good.parquet", {"prompt": ["x"] * 100})
    message = _message(local(tmp_path / "absent.parquet"))
    assert "absent.parquet" in message
    assert "no such file" in message

    (tmp_path / "empty.parquet").touch()
    assert "empty.parquet" in _message(local(tmp_path / "empty.parquet"))

    (tmp_path / "cut.parquet").write_bytes(good.read_bytes()[:-20])
    assert "not a parquet file, or is cut short" in _message(local(tmp_path / "cut.parquet"))

    (tmp_path / "text.parquet").write_text("prompt\nhello\n" * 10)
    assert "not a parquet file" in _message(local(tmp_path / "text.parquet"))

    (tmp_path / "void").mkdir()
    assert "holds no .parquet file" in _message(local(tmp_path / "void"))

    assert "dataset.path" in _message(DatasetConfig(source="local_parquet"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file_is_said(tmp_path: Path) -> None:
    """A file without read permission names the permissions."""
    path = write_parquet(tmp_path / "locked.parquet", {"prompt": ["x"]})
    path.chmod(0)
    assert "permissions" in _message(local(path))


def test_files_of_different_columns_are_refused(tmp_path: Path) -> None:
    """Mixing schemas names the file and the columns that differ."""
    write_parquet(tmp_path / "a.parquet", {"prompt": ["x"]})
    write_parquet(tmp_path / "b.parquet", {"prompt": ["x"], "extra": [1]})
    message = _message(local(tmp_path / "*.parquet"))
    assert "b.parquet" in message
    assert "extra" in message


def test_damage_inside_a_parquet_is_a_failure_of_its_rows(tmp_path: Path) -> None:
    """A row group whose pages are damaged fails its rows in words; the rows of the others are read."""
    words = [f"{i:06d} {i * 7919 % 100_003}" for i in range(2000)]
    path = write_parquet(tmp_path / "rows.parquet", {"prompt": words}, rows_per_group=1000)
    data = bytearray(path.read_bytes())
    data[4:600] = b"\xff" * 596
    path.write_bytes(bytes(data))
    table = open_table(local(path), None)
    with pytest.raises(RowError, match="row 3 cannot be read") as caught:
        table.row(3, ["prompt"])
    assert caught.value.reason == "unreadable_row"
    assert table.row(1500, ["prompt"])["prompt"] == words[1500]
    with pytest.raises(DatasetError, match=r"rows\.parquet"):
        table.column("prompt")


# -- CSV ----------------------------------------------------------------------------------------------


def _csv(path: Path, text: str | bytes) -> Any:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return open_table(local(path), None)


def test_csv_values_with_commas_quotes_and_line_breaks(tmp_path: Path) -> None:
    """Quoted commas, doubled quotes and line breaks inside values do not shift rows."""
    table = _csv(
        tmp_path / "t.csv",
        '\ufeffprompt,n\r\n"a, b",1\r\n\r\n"line one\nline ""two""",2\r\nplain,3\r\n"",4',
    )
    assert table.columns == ("prompt", "n")
    assert table.column("prompt") == ["a, b", 'line one\nline "two"', "plain", ""]
    assert [table.row(i, ["n"])["n"] for i in range(4)] == [1, 2, 3, 4]
    assert table.row(1, ["prompt"]) == {"prompt": 'line one\nline "two"'}


def test_any_quoted_csv_reads_back(tmp_path: Path) -> None:
    """Random values of commas, quotes and line breaks come back cell by cell."""
    draw = random.Random(1)
    alphabet = ["a", "é", ",", '"', "\n", "\r\n", " ", ".", "[", "'"]
    for _ in range(100):
        width = draw.randint(1, 4)
        rows = [
            ["".join(draw.choices(alphabet, k=draw.randint(1, 6))) + "z" for _ in range(width)]
            for _ in range(draw.randint(0, 12))
        ]
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer, lineterminator=draw.choice(["\n", "\r\n"]))
        writer.writerows([[f"c{number}" for number in range(width)], *rows])
        written = buffer.getvalue()
        table = _csv(tmp_path / "t.csv", written.rstrip() if draw.random() < 0.3 else written)
        assert [list(table.row(i, table.columns).values()) for i in range(table.num_rows)] == rows
        assert [list(cells) for cells in zip(*map(table.column, table.columns), strict=True)] == rows


def test_csv_types_hold_for_the_whole_file(tmp_path: Path) -> None:
    """A column that turns from whole numbers to fractions or text far down has one type everywhere."""
    lines = [f"{i},{i},2024-01-0{i % 9 + 1}," for i in range(20_000)] + ["0.5,word,x,"]
    table = _csv(tmp_path / "t.csv", "x,y,day,none\n" + "\n".join(lines) + "\n")
    assert table.num_rows == 20_001
    assert table.row(7, table.columns) == {"x": 7.0, "y": "7", "day": "2024-01-08", "none": None}
    assert table.row(20_000, ["x", "y"]) == {"x": 0.5, "y": "word"}
    assert {str(batch.schema.field("x").type) for batch in table.batches(["x"])} == {"double"}


def test_csv_files_share_the_types_of_all(tmp_path: Path) -> None:
    """Numbers of one file are the text that was written where another file holds words."""
    (tmp_path / "a.csv").write_text("x,y\n007,1\n")
    (tmp_path / "b.csv").write_text("x,y\nbond,1.5\n")
    table = open_table(DatasetConfig(source="local_csv", path=str(tmp_path)), None)
    assert table.column("x") == ["007", "bond"]
    assert table.column("y") == [1.0, 1.5]


def test_csv_cells_that_hold_lists_are_lists(tmp_path: Path) -> None:
    """A column whose every cell is a JSON or Python list of texts is list-valued; others stay text."""
    table = _csv(tmp_path / "t.csv", 'sentences,other\n"[""Hi."", ""Who?""]",[1]\n"[\'So\', None]",[x\n')
    assert table.column("sentences") == [["Hi.", "Who?"], ["So", None]]
    assert table.row(0, ["sentences"]) == {"sentences": ["Hi.", "Who?"]}
    assert table.column("other") == ["[1]", "[x"]


def test_several_csv_files_are_one_table(tmp_path: Path) -> None:
    """Rows count through the files; a differing header is refused."""
    (tmp_path / "a.csv").write_text("prompt\nx\n")
    (tmp_path / "b.csv").write_text("prompt\ny\nz\n")
    config = DatasetConfig(source="local_csv", path=str(tmp_path))
    assert open_table(config, None).column("prompt") == ["x", "y", "z"]
    (tmp_path / "c.csv").write_text("text\ny\n")
    assert "c.csv: its header differs" in _message(config)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"prompt,n\nx\n", "Expected 2 columns, got 1"),
        (b"prompt\ncaf\xe9\n", "not in UTF-8"),
        (b'prompt\n5" pipe\nx\ny\n', "quote"),
        (b"a,a\n1,2\n", "names a column twice: a"),
    ],
)
def test_what_is_wrong_with_a_csv_is_said(tmp_path: Path, content: bytes, said: str) -> None:
    """A CSV file that cannot be read right names itself and the reason."""
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    message = _message(local(path))
    assert said in message
    assert str(path) in message


def test_schema_differences_of_type_alone_are_read(tmp_path: Path) -> None:
    """Files that store one column as string and large_string are one table."""
    write_parquet(tmp_path / "a.parquet", {"prompt": pa.array(["x"], pa.string())})
    write_parquet(tmp_path / "b.parquet", {"prompt": pa.array(["y"], pa.large_string())})
    assert open_table(local(tmp_path / "*.parquet"), None).column("prompt") == ["x", "y"]

"""A row's digest follows everything that is read of the row, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
from data_kit import local, tone, wav, write_parquet

from mllm_shapx.config.models import DatasetConfig, ModalityConfig
from mllm_shapx.data.conversations import load_row
from mllm_shapx.data.digests import digests_of, row_digest
from mllm_shapx.data.sources import open_table

TEXT = ModalityConfig()
SPOKEN = ModalityConfig(input_modality="audio__original")


def sound(hertz: float) -> bytes:
    return wav(tone(hertz=hertz))


COLUMNS: dict[str, Any] = {
    "prompt": ["one", "two", "three"],
    "audio": [sound(440.0), sound(550.0), sound(660.0)],
    "language": ["en", "pl", None],
    "note": ["a", "b", "c"],
}


def full(dataset: DatasetConfig, modality: ModalityConfig) -> list[str]:
    table = open_table(dataset, None)
    found = digests_of(table, dataset, modality, range(table.num_rows))
    return [found[row].full for row in sorted(found)]


@pytest.mark.parametrize("modality", [TEXT, SPOKEN], ids=["text", "spoken"])
@pytest.mark.parametrize("rows_per_group", [1, 2, 100])
def test_the_digest_of_a_loaded_row_is_the_one_that_a_pass_over_the_file_finds(
    tmp_path: Path, modality: ModalityConfig, rows_per_group: int
) -> None:
    dataset = local(write_parquet(tmp_path / "rows.parquet", COLUMNS, rows_per_group=rows_per_group))
    table = open_table(dataset, None)
    loaded = [row_digest(load_row(table, row, dataset, modality)) for row in range(3)]
    assert full(dataset, modality) == loaded
    assert len(set(loaded)) == 3
    some = digests_of(table, dataset, modality, [2, 0, 7])
    assert {row: digests.full for row, digests in some.items()} == {0: loaded[0], 2: loaded[2]}


@pytest.mark.parametrize(
    ("column", "value", "in_text", "in_speech"),
    [
        ("prompt", "TWO", True, True),
        ("audio", sound(551.0), False, True),
        ("language", "de", True, True),
        ("note", "B", False, False),
    ],
)
def test_what_is_read_of_a_row_decides(
    tmp_path: Path, column: str, value: Any, in_text: bool, in_speech: bool
) -> None:
    changed = {**COLUMNS, column: [COLUMNS[column][0], value, COLUMNS[column][2]]}
    before = local(write_parquet(tmp_path / "before.parquet", COLUMNS))
    after = local(write_parquet(tmp_path / "after.parquet", changed))
    for modality, expected in ((TEXT, in_text), (SPOKEN, in_speech)):
        one, other = full(before, modality), full(after, modality)
        assert [a != b for a, b in zip(one, other, strict=True)] == [False, expected, False]


def test_recordings_in_files_of_their_own_count_by_their_content(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(sound(440.0))
    dataset = local(write_parquet(tmp_path / "rows.parquet", {"prompt": ["one"], "audio": ["a.wav"]}))
    before = full(dataset, SPOKEN)
    (tmp_path / "a.wav").write_bytes(sound(441.0))
    assert full(dataset, SPOKEN) != before


def test_csv_rows_have_the_digests_of_the_same_rows_in_parquet(tmp_path: Path) -> None:
    lines = ["prompt,language", *(f"prompt {n},en" for n in range(20_000))]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    written = local(tmp_path / "rows.csv")
    texts = [f"prompt {n}" for n in range(20_000)]
    same = local(write_parquet(tmp_path / "r.parquet", {"prompt": texts, "language": ["en"] * 20_000}))
    wanted = [0, 8191, 8192, 19_999]
    one, other = (digests_of(open_table(each, None), each, TEXT, wanted) for each in (written, same))
    assert one == other
    assert list(one) == wanted


def test_a_row_in_a_damaged_part_of_the_file_equals_nothing(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", COLUMNS, rows_per_group=1)
    dataset = local(path)
    before = digests_of(open_table(dataset, None), dataset, TEXT, range(3))
    data = bytearray(path.read_bytes())
    at = data.index(b"two")
    data[at - 40 : at + 3] = b"\xff" * 43
    path.write_bytes(data)
    after = digests_of(open_table(dataset, None), dataset, TEXT, range(3))
    assert [after[row].fits(before[row].full) for row in range(3)] == [True, False, True]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_the_content_of_local_files_stands_for_a_commit(tmp_path: Path, kind: str) -> None:
    def content(first: str) -> str | None:
        path = tmp_path / f"rows.{kind}"
        if kind == "csv":
            path.write_text(f"prompt\n{first}\nfour\n")
        else:
            write_parquet(path, {"prompt": [first, "four"]})
        return open_table(local(path), None).content(["prompt"])

    one = content("abcd")
    assert one is not None
    assert one == content("abcd")
    assert one != content("abce"), "of the same size"

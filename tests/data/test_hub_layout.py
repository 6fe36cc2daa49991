"""Where dataset repositories keep their parquet files."""

import pytest

from mllm_shapx.data.hub_layout import check_complete, local_split_files, split_files
from mllm_shapx.errors import DatasetError

CARD = """---
license: apache-2.0
configs:
- config_name: single_sentence__voice_bench
  data_files:
  - split: test
    path: single_sentence__voice_bench/test/*
- config_name: nested
  data_files:
  - split: test
    path:
    - deep/**/t*.parquet
    - more/t-[0-9].parquet
  - split: dev
    path: deep/a/dev.parquet
- config_name: mapped
  data_files:
    test: plain/x.parquet
- config_name: bare
  data_files: plain/*.parquet
- config_name: folder
  data_dir: by_folder
- config_name: tables
  data_files:
  - split: test
    path: tables/test.csv
---
# A card
"""

FILES = [
    "README.md",
    "by_folder/test-00000-of-00001.parquet",
    "by_folder/train-00000-of-00001.parquet",
    "deep/a/b/t1.parquet",
    "deep/a/dev.parquet",
    "deep/a/t0.parquet",
    "more/t-1.parquet",
    "more/t-x.parquet",
    "plain/x.parquet",
    "plain/y.parquet",
    "single_sentence__voice_bench/test/0000.parquet",
    "single_sentence__voice_bench/test/0001.parquet",
    "tables/test.csv",
]


def _find(files: list[str], subset: str, split: str = "test", readme: str | None = None) -> list[str]:
    return split_files(files, readme, subset, split, "owner/name")


@pytest.mark.parametrize(
    ("subset", "split", "expected"),
    [
        ("single_sentence__voice_bench", "test", FILES[10:12]),
        ("nested", "test", ["deep/a/b/t1.parquet", "deep/a/t0.parquet", "more/t-1.parquet"]),
        ("nested", "dev", ["deep/a/dev.parquet"]),
        ("mapped", "test", ["plain/x.parquet"]),
        ("bare", "train", ["plain/x.parquet", "plain/y.parquet"]),
        ("folder", "test", ["by_folder/test-00000-of-00001.parquet"]),
    ],
)
def test_the_card_says_where_a_config_lies(subset: str, split: str, expected: list[str]) -> None:
    """Every form of `configs` that dataset cards use is followed, globs included."""
    assert sorted(_find(FILES, subset, split, CARD)) == sorted(expected)


@pytest.mark.parametrize(
    ("name", "subset", "split"),
    [
        ("single_sentence/test/0000.parquet", "single_sentence", "test"),
        ("multi_turn/partial-train/0000.parquet", "multi_turn", "train"),
        ("multi_turn/test/part-00000-of-00001.parquet", "multi_turn", "test"),
        ("en/test-00000-of-00002.parquet", "en", "test"),
        ("en/validation.parquet", "en", "validation"),
        ("data/en/test-00000-of-00001.parquet", "en", "test"),
        ("data/train.clean.100-00000-of-00001.parquet", "default", "train.clean.100"),
        ("data/test-00000-of-00001-0a1b2c3d4e5f6a7b.parquet", "default", "test"),
        ("test-00000-of-00001.parquet", "default", "test"),
        ("test.parquet", "default", "test"),
        ("test/anything.parquet", "default", "test"),
        ("default/test/0000.parquet", "default", "test"),
        ("data/test_2.parquet", "default", "test"),
    ],
)
def test_folders_say_it_where_the_card_does_not(name: str, subset: str, split: str) -> None:
    """The layouts that the hub's own tools write are found without a card."""
    assert _find([name, "README.md"], subset, split) == [name]


def test_shards_come_in_name_order() -> None:
    """Rows keep their order whatever order the hub lists files in."""
    shards = [f"s/test-{number:05d}-of-00012.parquet" for number in range(12)]
    assert _find(shards[::-1], "s") == shards


def test_an_unknown_subset_names_the_near_one() -> None:
    """The subsets that exist and the nearest are in the message."""
    with pytest.raises(DatasetError) as caught:
        _find(FILES, "single_sentence_voice_bench", readme=CARD)
    message = str(caught.value)
    assert "did you mean 'single_sentence__voice_bench'" in message
    assert "folder" in message
    assert "dataset.subset" in message


def test_an_unknown_split_names_the_splits() -> None:
    """The splits of the subset are in the message."""
    with pytest.raises(DatasetError, match=r"no split 'tset' \(did you mean 'test'\?\).*test, train"):
        _find(FILES, "folder", "tset", CARD)


def test_other_formats_point_to_datasets() -> None:
    """A subset of CSV files, or a repository without parquet, says which source reads it."""
    with pytest.raises(DatasetError, match="hf_datasets"):
        _find(FILES, "tables", readme=CARD)
    with pytest.raises(DatasetError, match="refs/convert/parquet"):
        _find(["data.csv"], "default")


@pytest.mark.parametrize(
    "card", ["---\nconfigs: [", "---\n- a\n---\n", "---\nconfigs: 3\n---\n", "# no front matter"]
)
def test_a_broken_card_does_not_hide_the_folders(card: str) -> None:
    """YAML that cannot be read leaves the folders to tell."""
    assert _find(["s/test/0000.parquet"], "s", readme=card) == ["s/test/0000.parquet"]


def test_a_missing_shard_is_named() -> None:
    """Of `-of-00003` shards all three must be there."""
    check_complete([f"d/t-{n:05d}-of-00003.parquet" for n in range(3)], "here")
    with pytest.raises(DatasetError, match="the shard d/t-00001-of-00003 is missing"):
        check_complete(["d/t-00000-of-00003.parquet", "d/t-00002-of-00003.parquet"], "here")


def test_local_folders_are_matched_or_left() -> None:
    """A directory of unrelated names is not taken for a layout."""
    assert local_split_files(["x/part-0.parquet"], "single_sentence", "test") == []
    assert local_split_files(["data/test-0.parquet"], "single_sentence", "test") == ["data/test-0.parquet"]

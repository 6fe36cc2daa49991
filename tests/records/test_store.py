"""Answers are stored once, found again by any reader, and never believed when their file is damaged."""

import random
import uuid
from pathlib import Path

import numpy as np
import pytest
from records_kit import files_below

from mllm_shapx.records.answer import Answer
from mllm_shapx.records.storage import FsspecStorage, LocalStorage
from mllm_shapx.records.store import CoalitionStore, StoreHeader

HEADER = StoreHeader({"model_id": "m", "commit": "abc", "dtype": "float32"}, "snapshot", 10)
KEY = "0123456789abcdef"


def _answers(masks: range, *, spoken: bool = False, logprobs: bool = False) -> dict[int, Answer]:
    generator = random.Random(masks.start)
    found = {}
    for mask in masks:
        tokens = tuple(generator.randrange(50_000) for _ in range(mask % 5))
        found[mask] = Answer(
            text=f"zażółć {mask % 7}",
            token_ids=tokens,
            logprobs=tuple(generator.uniform(-9, 0) for _ in tokens) if logprobs else None,
            audio_frames=tuple((mask, 2, 2049) for _ in range(mask % 3)) if spoken else (),
            asked_by="exact" if mask % 2 else "",
        )
    return found


@pytest.mark.parametrize("spoken", [False, True])
@pytest.mark.parametrize("logprobs", [False, True])
def test_answers_are_read_back_exactly(tmp_path: Path, spoken: bool, logprobs: bool) -> None:
    store = CoalitionStore(LocalStorage(tmp_path))
    answers = _answers(range(1024), spoken=spoken, logprobs=logprobs)
    answers[3] = Answer("", (), () if logprobs else None)
    store.merge(355, KEY, HEADER, answers)
    assert store.read(355, KEY, HEADER).answers == answers
    assert list(files_below(tmp_path)) == [f"generations/00355-{KEY}.parquet"]


def test_a_row_that_was_never_asked_has_no_answers_and_no_file(tmp_path: Path) -> None:
    store = CoalitionStore(LocalStorage(tmp_path))
    stored = store.read(1, KEY, HEADER)
    assert (stored.answers, stored.notes) == ({}, ())
    assert store.merge(1, KEY, HEADER) == ()
    assert list(store.info()) == []
    assert files_below(tmp_path) == {}


def test_coalitions_of_more_players_than_a_machine_word_has_bits_keep_their_bits(tmp_path: Path) -> None:
    store = CoalitionStore(LocalStorage(tmp_path))
    answers = {mask: Answer(str(mask)) for mask in (0, 1, 1 << 69, (1 << 70) - 1)}
    store.merge(1, KEY, StoreHeader({}, "s", 70), answers)
    assert store.read(1, KEY, StoreHeader({}, "s", 70)).answers == answers


def test_flushed_parts_are_found_before_and_after_they_are_packed_into_one_file(tmp_path: Path) -> None:
    store = CoalitionStore(LocalStorage(tmp_path))
    for start in (0, 100, 200):
        store.append(7, KEY, HEADER, _answers(range(start, start + 100)))
    store.append(7, KEY, HEADER, {})
    expected = _answers(range(100)) | _answers(range(100, 200)) | _answers(range(200, 300))
    assert CoalitionStore(LocalStorage(tmp_path)).read(7, KEY, HEADER).answers == expected
    assert len(files_below(tmp_path)) == 3
    late = _answers(range(300, 310))
    assert store.merge(7, KEY, HEADER, late) == ()
    assert store.read(7, KEY, HEADER).answers == expected | late
    assert list(files_below(tmp_path)) == [f"generations/00007-{KEY}.parquet"]
    assert [path.name for path in (tmp_path / "generations").iterdir()] == [f"00007-{KEY}.parquet"]


def test_an_answer_that_is_stored_is_kept_and_packing_nothing_new_writes_nothing(tmp_path: Path) -> None:
    store = CoalitionStore(LocalStorage(tmp_path))
    store.merge(7, KEY, HEADER, {1: Answer("first")})
    before = files_below(tmp_path)
    store.merge(7, KEY, HEADER, {1: Answer("second")})
    assert files_below(tmp_path) == before
    store.append(7, KEY, HEADER, {1: Answer("third")})
    assert store.read(7, KEY, HEADER).answers == {1: Answer("first")}


def test_rows_and_keys_do_not_mix(tmp_path: Path) -> None:
    store = CoalitionStore(LocalStorage(tmp_path))
    store.merge(1, "aa", HEADER, {1: Answer("a")})
    store.append(1, "ab", HEADER, {1: Answer("b")})
    store.merge(11, "aa", HEADER, {1: Answer("c")})
    assert store.read(1, "aa", HEADER).answers[1].text == "a"
    assert store.read(1, "ab", HEADER).answers[1].text == "b"
    assert store.read(11, "aa", HEADER).answers[1].text == "c"


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (StoreHeader({**HEADER.settings, "dtype": "bfloat16"}, "snapshot", 10), "other generation settings"),
        (StoreHeader(HEADER.settings, "another", 10), "another conversation"),
        (StoreHeader(HEADER.settings, "snapshot", 9), "10 players, not 9"),
    ],
)
def test_answers_to_something_else_are_moved_aside_and_said(
    tmp_path: Path, other: StoreHeader, words: str
) -> None:
    store = CoalitionStore(LocalStorage(tmp_path))
    store.merge(1, KEY, HEADER, _answers(range(8)))
    store.append(1, KEY, HEADER, _answers(range(8, 16)))
    stored = store.read(1, KEY, other)
    assert stored.answers == {}
    assert len(stored.notes) == 2
    assert all(words in note and "asked again" in note for note in stored.notes)
    assert len(files_below(tmp_path / "generations" / "damaged")) == 2
    assert store.read(1, KEY, HEADER).answers == {}


def test_packing_by_a_writer_that_does_not_know_the_row_keeps_its_conversation_and_players(
    tmp_path: Path,
) -> None:
    store = CoalitionStore(LocalStorage(tmp_path))
    store.append(1, KEY, HEADER, _answers(range(8)))
    store.merge(1, KEY, StoreHeader(HEADER.settings))
    stored = store.read(1, KEY, StoreHeader(HEADER.settings))
    assert (stored.snapshot_id, stored.num_players) == (HEADER.snapshot_id, HEADER.num_players)


def test_looking_at_answers_leaves_damaged_files_where_they_are(tmp_path: Path) -> None:
    store = CoalitionStore(LocalStorage(tmp_path))
    store.merge(1, KEY, HEADER, _answers(range(8)))
    store.append(1, KEY, HEADER, _answers(range(8, 16)))
    store.append(1, KEY, HEADER, _answers(range(16, 24)))
    part = tmp_path / f"generations/00001-{KEY}.parts/000001.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    before = files_below(tmp_path)
    seen = store.peek(1, KEY)
    assert seen.answers == _answers(range(8)) | _answers(range(16, 24))
    assert (seen.snapshot_id, seen.num_players) == (HEADER.snapshot_id, HEADER.num_players)
    assert store.peek(2, KEY).answers == {}
    assert files_below(tmp_path) == before


def test_a_reader_that_does_not_know_the_conversation_takes_what_is_there(tmp_path: Path) -> None:
    store = CoalitionStore(LocalStorage(tmp_path))
    store.merge(1, KEY, HEADER, _answers(range(8)))
    assert store.read(
        1, KEY, StoreHeader(dict(sorted(HEADER.settings.items(), reverse=True)))
    ).answers == _answers(range(8))


def test_any_file_cut_anywhere_is_set_aside_and_costs_its_own_answers_only(tmp_path: Path) -> None:
    names = [f"00001-{KEY}.parquet", f"00001-{KEY}.parts/000001.parquet", f"00001-{KEY}.parts/000002.parquet"]
    for number, name in enumerate(names):
        whole = len(next(iter(_write_three(tmp_path / "x").values())))
        for cut in (0, 1, 4, whole // 2, whole - 9, whole - 8, whole - 1):
            root = tmp_path / f"{number}-{cut}"
            path = root / "generations" / name
            _write_three(root)
            data = path.read_bytes()
            path.write_bytes(data[: min(cut, len(data) - 1)])
            store = CoalitionStore(LocalStorage(root))
            stored = store.read(1, KEY, HEADER)
            assert len(stored.answers) == 20
            assert len(stored.notes) == 1
            assert name in stored.notes[0]
            assert store.read(1, KEY, HEADER).notes == ()
            store.append(1, KEY, HEADER, _answers(range(30)))
            store.merge(1, KEY, HEADER)
            assert set(store.read(1, KEY, HEADER).answers) == set(range(30))


def _write_three(root: Path) -> dict[str, bytes]:
    store = CoalitionStore(LocalStorage(root))
    store.merge(1, KEY, HEADER, _answers(range(10)))
    store.append(1, KEY, HEADER, _answers(range(10, 20)))
    store.append(1, KEY, HEADER, _answers(range(20, 30)))
    return files_below(root)


def test_a_flipped_bit_anywhere_never_gives_a_wrong_answer(tmp_path: Path) -> None:
    store = CoalitionStore(LocalStorage(tmp_path))
    answers = _answers(range(64), logprobs=True)
    store.merge(1, KEY, HEADER, answers)
    path = tmp_path / "generations" / f"00001-{KEY}.parquet"
    data = path.read_bytes()
    generator = random.Random(5)
    for _ in range(100):
        broken = bytearray(data)
        broken[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(bytes(broken))
        assert store.read(1, KEY, HEADER).answers == {}
    path.write_bytes(data)
    assert store.read(1, KEY, HEADER).answers == answers


def test_appending_writes_what_is_new_however_much_is_stored(tmp_path: Path) -> None:
    store = CoalitionStore(LocalStorage(tmp_path))
    header = StoreHeader({}, "s", 14)
    store.merge(1, KEY, header, _answers(range(1 << 14), logprobs=True))
    before = files_below(tmp_path)
    store.append(1, KEY, header, _answers(range(64), logprobs=True))
    after = files_below(tmp_path)
    (part,) = after.keys() - before.keys()
    assert {name: after[name] for name in before} == before
    assert len(after[part]) < 0.02 * sum(len(data) for data in before.values())


def test_vectors_are_kept_exactly_once_for_each_answer_and_kind(tmp_path: Path) -> None:
    store = CoalitionStore(LocalStorage(tmp_path))
    rows = [Answer("blue", (1, 2)), Answer("red", (3,)), Answer("blue", (1, 2), asked_by="exact")]
    generator = np.random.default_rng(0)
    vectors = {row.content_id: generator.normal(size=size) for row, size in zip(rows, (8, 0, 8), strict=True)}
    assert len(vectors) == 2
    store.merge_embeddings(1, KEY, HEADER, "own/STATIC/MeanReducer", vectors)
    store.merge_embeddings(1, KEY, HEADER, "own/CONTEXTUAL/MaxReducer", {rows[1].content_id: np.ones(3)})
    found, notes = store.read_embeddings(1, KEY, HEADER, "own/STATIC/MeanReducer")
    assert notes == ()
    assert found.keys() == vectors.keys()
    assert all(np.array_equal(found[key], vectors[key]) for key in vectors)
    other, _ = store.read_embeddings(1, KEY, HEADER, "own/CONTEXTUAL/MaxReducer")
    assert {key: vector.tolist() for key, vector in other.items()} == {rows[1].content_id: [1.0, 1.0, 1.0]}
    path = tmp_path / "generations" / f"00001-{KEY}.embeddings.parquet"
    path.write_bytes(path.read_bytes()[:100])
    found, notes = store.read_embeddings(1, KEY, HEADER, "own/STATIC/MeanReducer")
    assert (found, len(notes)) == ({}, 1)


def test_answers_of_different_content_never_share_vectors() -> None:
    rows = [
        Answer("a"),
        Answer("a", (1,)),
        Answer("a", (), None, ((1,),)),
        Answer("a", (), None, ((1, 2),)),
        Answer("a", (), None, ((1,), (2,))),
    ]
    assert len({row.content_id for row in rows}) == len(rows)


def test_info_says_what_is_stored_and_changes_nothing(tmp_path: Path) -> None:
    store = CoalitionStore(LocalStorage(tmp_path))
    store.merge(2, "aa", HEADER, _answers(range(8)))
    store.append(2, "aa", HEADER, _answers(range(4, 12)))
    store.merge_embeddings(2, "aa", HEADER, "own/STATIC/MeanReducer", {b"x" * 16: np.ones(2)})
    store.merge(1, "bb", HEADER, _answers(range(3)))
    (tmp_path / "generations" / "00001-bb.parquet").write_bytes(b"PAR1")
    before = files_below(tmp_path)
    first, second = store.info()
    assert (first.row_index, first.key, first.answers, first.num_bytes) == (1, "bb", 0, 4)
    assert first.problem is not None
    assert "00001-bb.parquet: it is damaged" in first.problem
    assert (second.row_index, second.key, second.answers, second.embeddings) == (2, "aa", 12, 1)
    assert second.num_players == 10
    assert second.settings == HEADER.settings
    assert second.problem is None
    assert second.num_bytes == sum(len(data) for name, data in before.items() if "00002" in name)
    assert files_below(tmp_path) == before


def test_pruning_removes_what_no_run_needs(tmp_path: Path) -> None:
    store = CoalitionStore(LocalStorage(tmp_path))
    for row in (1, 2):
        store.merge(row, "aa", HEADER, _answers(range(8)))
        store.append(row, "bb", HEADER, _answers(range(8)))
        store.merge_embeddings(row, "bb", HEADER, "k", {b"x" * 16: np.ones(2)})
    before = files_below(tmp_path)
    result = store.prune({"aa"})
    assert result.entries == 2
    assert result.num_bytes == sum(len(data) for name, data in before.items() if "-bb" in name)
    assert list(files_below(tmp_path)) == ["generations/00001-aa.parquet", "generations/00002-aa.parquet"]
    assert store.prune({"aa"}, rows_in_use={2}).entries == 1
    assert list(files_below(tmp_path)) == ["generations/00002-aa.parquet"]


def test_what_interrupted_writes_left_behind_is_removed(tmp_path: Path) -> None:
    store = CoalitionStore(LocalStorage(tmp_path))
    store.append(1, KEY, HEADER, _answers(range(8)))
    before = files_below(tmp_path)
    (tmp_path / "generations" / ".tmp-1").write_bytes(b"PAR1")
    (tmp_path / "generations" / f"00001-{KEY}.parts" / ".tmp-2").write_bytes(b"PAR1")
    assert store.read(1, KEY, HEADER).answers == _answers(range(8))
    assert store.remove_leftovers() == 2
    assert files_below(tmp_path) == before


def test_the_store_works_the_same_on_a_remote_storage() -> None:
    store = CoalitionStore(FsspecStorage(f"memory://{uuid.uuid4().hex}"))
    store.append(1, KEY, HEADER, _answers(range(8)))
    store.append(1, KEY, HEADER, _answers(range(8, 16)))
    store.merge(1, KEY, HEADER)
    assert store.read(1, KEY, HEADER).answers == _answers(range(8)) | _answers(range(8, 16))
    assert [entry.answers for entry in store.info()] == [16]
    assert store.prune(()).entries == 1
    assert list(store.info()) == []


def test_text_that_is_no_text_does_not_cost_the_answers(tmp_path: Path) -> None:
    store = CoalitionStore(LocalStorage(tmp_path))
    store.merge(1, KEY, HEADER, {0: Answer("half a pair: \ud83d"), 1: Answer("nul \0 byte")})
    answers = store.read(1, KEY, HEADER).answers
    assert answers[0].text == "half a pair: ?"
    assert answers[1].text == "nul \0 byte"

"""Likelihoods in the store: kept exactly, by what is forced and the coalition, in a file of their own."""

from pathlib import Path

import numpy as np
import pytest
from records_kit import files_below

from mllm_shapx.records.answer import Answer
from mllm_shapx.records.likelihood import Likelihood, LikelihoodKey, forced_id
from mllm_shapx.records.storage import LocalStorage
from mllm_shapx.records.store import CoalitionStore, StoreHeader

HEADER = StoreHeader({"model_id": "m", "commit": "abc", "dtype": "float32"}, "snapshot", 70)
KEY = "0123456789abcdef"
MASKS = (0, 1, 6, 1 << 69, (1 << 70) - 1)
FILE = f"generations/00003-{KEY}.likelihoods.parquet"


def drawn(tokens: int, top_k: int, seed: int = 0, asked_by: str = "exact") -> Likelihood:
    rng = np.random.default_rng(seed)
    return Likelihood(
        rng.normal(size=tokens).astype(np.float32),
        rng.integers(0, 50_000, (tokens, top_k), dtype=np.int32),
        rng.normal(size=(tokens, top_k)).astype(np.float32),
        top_k,
        asked_by,
    )


def same(one: Likelihood, other: Likelihood) -> bool:
    arrays = ("logprobs", "top_ids", "top_logprobs")
    return (one.top_k, one.asked_by) == (other.top_k, other.asked_by) and all(
        np.array_equal(getattr(one, name), getattr(other, name))
        and getattr(one, name).dtype == getattr(other, name).dtype
        for name in arrays
    )


def read(store: CoalitionStore, header: StoreHeader = HEADER) -> dict[LikelihoodKey, Likelihood]:
    return store.read_likelihoods(3, KEY, header)[0]


@pytest.fixture
def store(tmp_path: Path) -> CoalitionStore:
    return CoalitionStore(LocalStorage(tmp_path))


def test_likelihoods_are_read_back_exactly(store: CoalitionStore) -> None:
    """Texts of several lengths, with and without distributions, of 70 players; no tokens at all too."""
    texts = [forced_id("an answer"), forced_id(""), forced_id((5, 6, 7))]
    written = {
        (text, mask): drawn(4 + mask % 3, 20 * (mask % 2), mask % 97) for text in texts for mask in MASKS
    }
    written[texts[1], 0] = Likelihood.of_nothing(20, "jsd")
    assert store.read_likelihoods(3, KEY, HEADER) == ({}, None, ())
    assert store.merge_likelihoods(3, KEY, HEADER, written) == ()
    found = read(store)
    assert found.keys() == written.keys()
    assert all(same(found[key], written[key]) or key[0] == texts[1] for key in written)
    assert (len(found[texts[1], 0].logprobs), found[texts[1], 0].asked_by) == (0, "jsd")


def test_what_is_forced_tells_likelihoods_apart() -> None:
    """Another answer to the whole prompt never meets the likelihoods of this one, nor do its tokens."""
    ids = {forced_id(each) for each in ("ab", "ab ", "", (1, 2), (1,), (12,), "[1, 2]")}
    assert len(ids) == 7
    assert forced_id((1, 2)) == forced_id((1, 2))


def test_a_stored_likelihood_is_replaced_only_by_one_that_knows_more_tokens(store: CoalitionStore) -> None:
    """What is stored stays as it was, so that a resumed study gives the same values."""
    key = (forced_id("an answer"), 3)
    store.merge_likelihoods(3, KEY, HEADER, {key: drawn(4, 5, 1)})
    store.merge_likelihoods(3, KEY, HEADER, {key: drawn(4, 5, 2), (key[0], 4): drawn(4, 0, 3)})
    assert same(read(store)[key], drawn(4, 5, 1))
    store.merge_likelihoods(3, KEY, HEADER, {key: drawn(4, 20, 4)})
    assert same(read(store)[key], drawn(4, 20, 4))
    assert same(read(store)[key[0], 4], drawn(4, 0, 3))


@pytest.mark.parametrize("fault", ["damaged", "another conversation"])
def test_a_file_that_is_damaged_or_of_a_changed_row_is_moved_aside(
    store: CoalitionStore, tmp_path: Path, fault: str
) -> None:
    """Nothing of it is believed, and nothing of it is lost."""
    store.merge_likelihoods(3, KEY, HEADER, {(forced_id("a"), 3): drawn(4, 5)})
    content = (tmp_path / FILE).read_bytes()
    header = HEADER
    if fault == "damaged":
        content = content[:40] + b"?" + content[41:]
        (tmp_path / FILE).write_bytes(content)
    else:
        header = StoreHeader(HEADER.settings, "another", 70)
    found, _, notes = store.read_likelihoods(3, KEY, header)
    assert found == {}
    assert fault in " ".join(notes)
    assert [path.read_bytes() for path in (tmp_path / "generations/damaged").iterdir()] == [content]


def test_likelihoods_are_counted_apart_from_answers_and_pruned_with_them(
    store: CoalitionStore, tmp_path: Path
) -> None:
    store.merge(3, KEY, HEADER, {7: Answer("a")})
    store.merge_likelihoods(3, KEY, HEADER, {(forced_id("a"), mask): drawn(2, 0) for mask in MASKS})
    (entry,) = store.info()
    assert (entry.answers, entry.embeddings, entry.likelihoods) == (1, 0, len(MASKS))
    assert store.set_aside([3]) == 2
    store.merge_likelihoods(3, KEY, HEADER, {(forced_id("a"), 1): drawn(2, 0)})
    assert store.prune(frozenset()).entries == 1
    assert [path for path in files_below(tmp_path) if "set_aside" not in path] == []

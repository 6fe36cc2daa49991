"""The tree of prompts: every prompt can be read back from it, and no shared beginning is there twice."""

import itertools

import numpy as np
import pytest

from mllm_shapx.models.prefix_tree import PrefixTree, build_tree

Prompts = list[tuple[int, ...]]


def read_back(tree: PrefixTree) -> Prompts:
    """Return the prompts along their paths, in the order they were given."""
    tokens = np.concatenate([np.array(tree.trunk, dtype=int), *(piece.tokens for piece in tree.pieces)])
    found: dict[int, tuple[int, ...]] = {}
    for place, path in zip(tree.order.tolist(), tree.paths, strict=True):
        found[place] = tuple(tokens[path].tolist())
    return [found[place] for place in range(len(found))]


def game(players: int) -> Prompts:
    """Return the prompts of all coalitions of `players` one-token players between a start and an end."""
    choices = itertools.product([0, 1], repeat=players)
    return [
        (1, 2, 3, 4, *(10 + place for place, present in enumerate(chosen) if present), 7, 8)
        for chosen in choices
    ]


@pytest.mark.parametrize("most_nodes", [1, 7, 64, 10_000])
def test_every_prompt_is_read_back_along_its_path(most_nodes: int) -> None:
    """Cut into pieces of any size, the tree holds exactly the prompts that went in."""
    random = np.random.default_rng(3)
    prompts = [tuple(random.integers(0, 3, size=random.integers(1, 9)).tolist()) for _ in range(60)]
    for each in (prompts, game(5), [(4,)], [(1, 2), (1, 2), (1,)]):
        assert read_back(build_tree(each, most_nodes)) == each


@pytest.mark.parametrize("most_nodes", [6, 10_000])
def test_a_node_reads_the_tokens_before_it_in_its_prompts_and_nothing_else(most_nodes: int) -> None:
    """Each row of `ancestors` is the path to that node."""
    tree = build_tree(game(4), most_nodes)
    trunk = len(tree.trunk)
    offset = trunk
    ends = iter(tree.paths)
    for piece in tree.pieces:
        for end in piece.ends:
            path = next(ends)[trunk:] - offset
            for depth, node in enumerate(path):
                assert np.flatnonzero(piece.ancestors[node]).tolist() == path[: depth + 1].tolist()
                assert piece.positions[node] == trunk + depth
            assert path[-1] == end
        offset += len(piece.tokens)


def test_an_exact_game_costs_about_one_player_and_the_prompts_end_per_coalition() -> None:
    """Of 1024 coalitions' 11264 tokens the tree keeps the start once and three tokens each."""
    prompts = game(10)
    tree = build_tree(prompts, 10**6)
    assert sum(map(len, prompts)) == 11264
    assert tree.size == 4 + 1023 + 2 * 1024


def test_equal_prompts_are_computed_once() -> None:
    """A hundred times the same prompt is one path."""
    assert build_tree([(5, 6, 7)] * 100, 64).size == 3

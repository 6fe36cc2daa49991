"""The prefix tree of a batch's prompts: shared prefixes are computed once.

The coalitions of a row differ in a few words, and all share the chat template's beginning. In sorted order,
each prompt adds only the tokens after the prefix shared with its neighbour. For an exact game, the tree holds
about one player and the template's end per coalition, not the whole conversation.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TreePart:
    """Tokens of the tree that go through the model together, after the trunk."""

    tokens: NDArray[np.int64]
    """Token of each node, (nodes,)."""
    positions: NDArray[np.int64]
    """Position of each node in its prompts, (nodes,)."""
    ancestors: NDArray[np.bool_]
    """Whether node i reads node j (itself and its ancestors), (nodes, nodes)."""
    ends: NDArray[np.int64]
    """Last node of each of the piece's prompts, (prompts,)."""


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """All tokens of a batch of prompts; shared prefixes occur once."""

    trunk: Ids
    """The common prefix of all prompts; empty when there is only one piece."""
    pieces: tuple[TreePart, ...]
    order: NDArray[np.int64]
    """Prompts in the order of the pieces' `ends`, (prompts,)."""
    paths: tuple[NDArray[np.int64], ...]
    """For each prompt in that order, its nodes numbered over trunk and pieces, (tokens of the prompt,)."""

    @property
    def size(self) -> int:
        """Return the number of tokens that the model computes."""
        return len(self.trunk) + sum(len(piece.tokens) for piece in self.pieces)


def build_tree(prompts: Sequence[Ids], most_nodes: int, most_trunk: int | None = None) -> PrefixTree:
    """Return the tree of `prompts` (token ids, none empty), cut into pieces of about `most_nodes` tokens.

    A piece holds whole prompts, so a longer prompt makes a larger piece. The trunk has at most `most_trunk`
    tokens; by default each prompt keeps one token after it, because its output is needed.
    """
    order = sorted(range(len(prompts)), key=lambda each: prompts[each])
    ordered = [prompts[each] for each in order]
    shared = [0, *(_common(left, right) for left, right in itertools.pairwise(ordered))]
    groups = _groups(ordered, shared, most_nodes, trunk=0)
    trunk = 0
    if len(groups) > 1:
        # In sorted order, the first and the last prompt have the shortest common prefix.
        most_trunk = min(map(len, ordered)) - 1 if most_trunk is None else most_trunk
        trunk = min(_common(ordered[0], ordered[-1]), most_trunk)
        groups = _groups(ordered, shared, most_nodes, trunk)
    pieces, paths, offset = [], [], trunk
    for first, last in groups:
        piece, nodes = _piece(ordered[first:last], [trunk, *shared[first + 1 : last]], trunk)
        pieces.append(piece)
        paths += [np.concatenate([np.arange(trunk), offset + each]) for each in nodes]
        offset += len(piece.tokens)
    return PrefixTree(ordered[0][:trunk], tuple(pieces), np.array(order), tuple(paths))


def _common(left: Ids, right: Ids) -> int:
    """Return the length of two prompts' common prefix."""
    for place, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return place
    return min(len(left), len(right))


def _groups(ordered: Sequence[Ids], shared: Sequence[int], most: int, trunk: int) -> list[tuple[int, int]]:
    """Cut the sorted prompts into runs whose trees hold at most `most` nodes after the trunk."""
    groups, first, nodes = [], 0, 0
    for place, prompt in enumerate(ordered):
        new = len(prompt) - max(shared[place], trunk) if nodes else len(prompt) - trunk
        if nodes and nodes + new > most:
            groups.append((first, place))
            first, nodes, new = place, 0, len(prompt) - trunk
        nodes += new
    return [*groups, (first, len(ordered))]


def _piece(
    ordered: Sequence[Ids], shared: Sequence[int], trunk: int
) -> tuple[TreePart, list[NDArray[np.int64]]]:
    """Return the tree of sorted prompts after the trunk, and each prompt's nodes in it."""
    tokens: list[int] = []
    positions: list[int] = []
    spans: list[tuple[int, NDArray[np.int64]]] = []
    paths: list[NDArray[np.int64]] = []
    before = np.zeros(0, dtype=np.int64)
    for prompt, alike in zip(ordered, shared, strict=True):
        depth = max(alike, trunk)
        start = len(tokens)
        tokens += prompt[depth:]
        positions += range(depth, len(prompt))
        path = np.concatenate([before[: depth - trunk], np.arange(start, len(tokens))])
        spans.append((start, path))
        paths.append(path)
        before = path
    piece = TreePart(
        tokens=np.array(tokens),
        positions=np.array(positions),
        ancestors=_ancestors(len(tokens), spans),
        ends=np.array([path[-1] for path in paths]),
    )
    return piece, paths


def _ancestors(nodes: int, spans: Sequence[tuple[int, NDArray[np.int64]]]) -> NDArray[np.bool_]:
    reads = np.zeros((nodes, nodes), dtype=np.bool_)
    for start, path in spans:
        stop = int(path[-1]) + 1
        reads[start:stop, path] = True
    return reads & np.tri(nodes, dtype=np.bool_)

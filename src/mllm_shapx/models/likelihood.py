"""Teacher forcing with a causal model of transformers: log-probabilities of given tokens after prompts.

Where the own loop may be used, prompts and continuations form one prefix tree, which computes shared prefixes
once. Other models read prompts of equal length together, without padding.
"""

import inspect
from collections.abc import Sequence
from itertools import batched
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mllm_shapx.errors import ModelError
from mllm_shapx.models.base import Decoding, Likelihood
from mllm_shapx.models.decoder_choice import Decoder
from mllm_shapx.models.decoding import OwnLoop
from mllm_shapx.models.plain_generate import grouped, in_groups
from mllm_shapx.models.prefix_tree import build_tree
from mllm_shapx.models.sampling import not_finite

MOST_LOGITS = 1 << 26
"""Most logits per pass (256 MiB in float32), unless a single prompt needs more."""
LOGITS_TAKEN = 1 << 23
"""Logits converted to probabilities at a time."""
TRIAL = ((11, 18, 25, 32), (5, 18, 31))
"""Trial prompts: forward passes must give the probabilities of their generated answers."""
TOLERANCE = {torch.float32: 1e-2}
"""Largest difference of a trial's log-probabilities; `LOW_TOLERANCE` for other dtypes."""
LOW_TOLERANCE = 0.5

Ids = Sequence[int]


class Likelihoods:
    """Reads continuations' log-probabilities with the model of a decoder.

    Args:
        decoder: Knows which ways of batching equal single prompts.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._model = model = decoder.model
        self._loop = OwnLoop(model, decoder.settings)
        self._parameters = inspect.signature(model.forward).parameters
        self._rows: int = model.get_input_embeddings().num_embeddings
        self.most_nodes: int = max(1, min(self._loop.most_nodes, MOST_LOGITS // self._rows))
        """About how many positions one forward pass takes; a single prompt may be longer."""
        self._checked = False

    def read(self, prompts: Sequence[Ids], continuations: Sequence[Ids], top_k: int = 0) -> list[Likelihood]:
        """Return the likelihood of `continuations[i]` after `prompts[i]`; neither may be empty.

        Raises:
            ModelError: When the forward pass does not give the probabilities of generated answers.
            RowError: When the model's logits are not numbers.
        """
        if not self._checked:
            self._check()
            self._checked = True
        return self._read(prompts, continuations, top_k)

    def _check(self) -> None:
        """Compare with the probabilities of generated answers: some models attend to later tokens."""
        prompts = [[each % self._rows for each in ids] for ids in TRIAL]
        answers = self._decoder.answer(prompts, Decoding(max_new_tokens=3, logprobs=True), [0, 0])
        read = self._read(prompts, [answer.token_ids for answer in answers], 0)
        allowed = TOLERANCE.get(self._model.dtype, LOW_TOLERANCE)
        for answer, found in zip(answers, read, strict=True):
            if not np.allclose(found.logprobs, answer.logprobs or (), rtol=0, atol=allowed):
                kind = getattr(self._model.config, "model_type", type(self._model).__name__)
                raise ModelError(
                    f"the probabilities of a forward pass of this model ({kind}) are not those that it "
                    "generates with, so teacher-forced value functions cannot be had; use a similarity"
                )

    def _read(self, prompts: Sequence[Ids], continuations: Sequence[Ids], top_k: int) -> list[Likelihood]:
        lengths = [len(prompt) + len(tokens) for prompt, tokens in zip(prompts, continuations, strict=True)]
        self._decoder.prove(max(lengths))
        shared = [self._decoder.shares_beginnings(length) for length in lengths]

        def read(places: Sequence[int]) -> list[Likelihood]:
            way = self._in_a_tree if shared[places[0]] else self._of_equal_lengths
            return way([prompts[each] for each in places], [continuations[each] for each in places], top_k)

        return in_groups(grouped(shared), read)

    def _in_a_tree(
        self, prompts: Sequence[Ids], continuations: Sequence[Ids], top_k: int
    ) -> list[Likelihood]:
        # The last token is not an input: nothing follows it.
        rows = [(*prompt, *tokens[:-1]) for prompt, tokens in zip(prompts, continuations, strict=True)]
        tree = build_tree(rows, self.most_nodes, most_trunk=min(map(len, prompts)) - 1)
        order = tree.order.tolist()
        wanted = [path[len(prompts[place]) - 1 :] for place, path in zip(order, tree.paths, strict=True)]
        groups: list[list[int]] = []
        nodes: list[NDArray[np.int64]] = []
        first, offset = 0, len(tree.trunk)
        for piece in tree.pieces:
            stop = first + len(piece.ends)
            nodes.append(np.concatenate(wanted[first:stop]) - offset)
            groups.append(order[first:stop])
            first, offset = stop, offset + len(piece.tokens)
        logits = self._loop.logits_at(tree, nodes)
        return in_groups(
            groups,
            lambda places: likelihoods(next(logits), [continuations[each] for each in places], top_k),
        )

    def _of_equal_lengths(
        self, prompts: Sequence[Ids], continuations: Sequence[Ids], top_k: int
    ) -> list[Likelihood]:
        rows = [(*prompt, *tokens[:-1]) for prompt, tokens in zip(prompts, continuations, strict=True)]

        def read(places: Sequence[int]) -> list[Likelihood]:
            tails = [continuations[place] for place in places]
            logits = self._logits([rows[place] for place in places], max(map(len, tails)))
            kept = [each[-len(tail) :] for each, tail in zip(logits, tails, strict=True)]
            return likelihoods(torch.cat(kept), tails, top_k)

        groups = grouped(map(len, rows))
        return in_groups(
            (places for group in groups for places in batched(group, self._rows_together(rows[group[0]]))),
            read,
        )

    def _rows_together(self, row: Ids) -> int:
        """Return how many rows of the length of `row` go through the model together."""
        is_alone = self._decoder.way_for(len(row) + 1).endswith("one prompt at a time")
        return 1 if is_alone else max(1, self.most_nodes // len(row))

    def _logits(self, rows: Sequence[Ids], tail: int) -> torch.Tensor:
        """Return the logits of rows of one length, at least those of their last `tail` tokens."""
        further: dict[str, Any] = {}
        if "logits_to_keep" in self._parameters:
            further["logits_to_keep"] = tail
        if "use_cache" in self._parameters:
            further["use_cache"] = False
        with self._decoder.changing_positions.reset():
            output = self._model(input_ids=torch.tensor(rows, device=self._model.device), **further)
        logits: torch.Tensor = output.logits
        return logits


def likelihoods(logits: torch.Tensor, continuations: Sequence[Ids], top_k: int) -> list[Likelihood]:
    """Return the likelihoods of continuations from the logits of all their tokens, (tokens, vocabulary).

    Raises:
        RowError: When the logits are not numbers.
    """
    tokens = torch.tensor([token for each in continuations for token in each], device=logits.device)
    most = min(top_k, logits.shape[-1])
    chosen, top_ids, top_logprobs = [], [], []
    size = max(1, LOGITS_TAKEN // logits.shape[-1])
    for part, ids in zip(logits.split(size), tokens.split(size), strict=True):
        logprobs = part.float().log_softmax(dim=-1)
        chosen.append(logprobs.gather(1, ids[:, None])[:, 0])
        top = logprobs.topk(most, dim=-1)
        top_ids.append(top.indices.int())
        top_logprobs.append(top.values)
    if not all(bool(part.isfinite().all()) for part in chosen):
        raise not_finite()
    lengths = [len(each) for each in continuations]
    columns = (torch.cat(each).cpu().numpy() for each in (chosen, top_ids, top_logprobs))
    cuts = np.cumsum(lengths)[:-1]
    parts = zip(*(np.split(each, cuts) for each in columns), strict=True)
    return [Likelihood(logprobs, ids, tops, top_k) for logprobs, ids, tops in parts]

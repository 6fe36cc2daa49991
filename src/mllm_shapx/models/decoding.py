"""Our decoding loop: it computes shared prefixes once, and finished answers leave the batch.

The model must have plain attention over cached keys and values (see `decoder_choice`). Its answers equal
those of `generate` with the same settings.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from mllm_shapx.models.base import Decoding
from mllm_shapx.models.generation_settings import GenerationSettings, LogitsRules
from mllm_shapx.models.plain_generate import Generated, PromptBatch, in_groups, token_logprobs
from mllm_shapx.models.prefix_tree import PrefixTree, TreePart, build_tree
from mllm_shapx.models.sampling import Sampler, draws_for, not_finite

PIECE_NODES = {"cpu": 512, "cuda": 2048, "mps": 1024}
"""Tokens prefilled in one pass: enough to use the whole device, few enough for cheap attention."""
LEAVE_SHARE = 8
"""Finished answers leave the batch when they are at least 1 / LEAVE_SHARE of it."""


class _Slots(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """One layer's keys and values of all answers, in a preallocated buffer.

    Buffers are (heads, answers, columns, size); the model sees (answers, heads, columns so far, size).
    """

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, filled: int) -> None:
        super().__init__()
        self._keys, self._values, self._filled = keys, values, filled
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the buffers exist from the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one column; return all columns so far."""
        del args, kwargs
        column = self._filled
        self._keys[:, :, column] = key_states[:, :, 0].transpose(0, 1)
        self._values[:, :, column] = value_states[:, :, 0].transpose(0, 1)
        self._filled = column + 1
        return self._seen(self._keys), self._seen(self._values)

    def keep(self, rows: torch.Tensor) -> None:
        """Keep the answers `rows` only."""
        self._keys = self._keys.index_select(1, rows)
        self._values = self._values.index_select(1, rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (columns, offset) of a mask."""
        return self._filled + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of columns written."""
        return self._filled

    def get_max_length(self) -> int:
        """Return the number of columns."""
        return int(self._keys.shape[2])

    def _seen(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer[:, :, : self._filled].transpose(0, 1)


class OwnLoop:
    """Answers batches of prompts with a causal language model with plain attention."""

    def __init__(self, model: Any, settings: GenerationSettings) -> None:
        self._model = model
        self._settings = settings
        self._device = model.device
        self.most_nodes = PIECE_NODES.get(self._device.type, PIECE_NODES["cpu"])

    def logits_at(self, tree: PrefixTree, nodes: Sequence[NDArray[np.int64]]) -> Iterator[torch.Tensor]:
        """Yield each piece's logits, (nodes, vocabulary), at the given nodes; keep no states."""
        trunk = self._trunk(tree)
        for piece, wanted in zip(tree.pieces, nodes, strict=True):
            yield self._run_piece(replace(piece, ends=wanted), trunk, len(tree.trunk))[0]

    def logits_along(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Return the logits at each token of given answers of one length, (prompts, tokens, vocabulary)."""
        steps = len(answers[0])
        tree = build_tree([tuple(prompt) for prompt in prompts], self.most_nodes)
        logits, states = self._prefill(tree)
        cache, lengths = self._spread(tree, states, steps)
        mask = self._columns(cache.get_seq_length(), lengths, steps)
        given = torch.tensor([list(answers[place]) for place in tree.order], device=self._device)
        further = [self._step(given[:, step], cache, mask, lengths + step) for step in range(steps - 1)]
        back = torch.from_numpy(np.argsort(tree.order)).to(self._device)
        return torch.stack([logits, *further], dim=1)[back]

    def generate(self, batch: PromptBatch) -> list[Generated]:
        """Answer prompts, in their order.

        Raises:
            RowError: When the model's logits are not numbers.
        """
        tree = build_tree([tuple(prompt) for prompt in batch.prompts], self.most_nodes)
        logits, states = self._prefill(tree)
        cache, lengths = self._spread(tree, states, batch.decoding.max_new_tokens)
        order = tree.order.tolist()
        choose = _Chooser(self._settings, batch.part(order), self._device)
        answers = self._decode(logits, cache, lengths, batch.decoding, choose)
        return in_groups([order], lambda _: answers)

    # --- prompts

    def _prefill(self, tree: PrefixTree) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Return the logits after each prompt, (prompts, vocabulary), and the states of all nodes."""
        trunk = self._trunk(tree)
        logits, parts = [], []
        for piece in tree.pieces:
            ends, layers = self._run_piece(piece, trunk, len(tree.trunk))
            logits.append(ends)
            parts.append(layers)
        states = [
            (
                _joined([layers[depth].keys for layers in parts], len(tree.trunk)),
                _joined([layers[depth].values for layers in parts], len(tree.trunk)),
            )
            for depth in range(len(parts[0]))
        ]
        return torch.cat(logits), states

    def _trunk(self, tree: PrefixTree) -> list[DynamicLayer]:
        """Return the states of the trunk; an empty list without a trunk."""
        if not tree.trunk:
            return []
        chain = np.arange(len(tree.trunk))
        piece = TreePart(np.array(tree.trunk), chain, np.tri(len(chain), dtype=np.bool_), chain[-1:])
        return self._run_piece(piece, [], 0)[1]

    def _run_piece(
        self, piece: TreePart, trunk: list[DynamicLayer], behind: int
    ) -> tuple[torch.Tensor, list[DynamicLayer]]:
        cache = Cache(layer_class_to_replicate=DynamicLayer)
        for depth, layer in enumerate(trunk):
            cache.update(layer.keys, layer.values, depth)
        reads = np.concatenate(
            [np.ones((len(piece.tokens), behind), dtype=np.bool_), piece.ancestors], axis=1
        )
        output = self._model(
            input_ids=torch.from_numpy(piece.tokens)[None].to(self._device),
            attention_mask=self._mask(torch.from_numpy(reads).to(self._device))[None, None],
            position_ids=torch.from_numpy(piece.positions)[None].to(self._device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.from_numpy(piece.ends).to(self._device),
        )
        return output.logits[0], list(cache.layers)

    def _spread(
        self, tree: PrefixTree, states: list[tuple[torch.Tensor, torch.Tensor]], new_tokens: int
    ) -> tuple[Cache, torch.Tensor]:
        """Return a right-aligned cache with one row per prompt, and the prompts' lengths."""
        lengths = np.array([len(path) for path in tree.paths])
        width = int(lengths.max())
        places = np.zeros((len(lengths), width), dtype=np.int64)
        for row, path in enumerate(tree.paths):
            places[row, width - len(path) :] = path
        index = torch.from_numpy(places.reshape(-1)).to(self._device)
        layers = [
            _Slots(
                _rows(keys, index, len(lengths), width, new_tokens),
                _rows(values, index, len(lengths), width, new_tokens),
                width,
            )
            for keys, values in states
        ]
        return Cache(layers=layers), torch.from_numpy(lengths).to(self._device)

    # --- answers

    def _decode(
        self,
        logits: torch.Tensor,
        cache: Cache,
        lengths: torch.Tensor,
        decoding: Decoding,
        choose: "_Chooser",
    ) -> list[Generated]:
        answers = _Answers(len(lengths), decoding, self._settings.eos, self._device)
        mask = self._columns(cache.get_seq_length(), lengths, decoding.max_new_tokens)
        for step in range(decoding.max_new_tokens):
            chosen = choose(logits, step)
            running = answers.add(chosen, logits, step)
            if running is None:
                break
            if (len(chosen) - len(running)) * LEAVE_SHARE >= len(chosen):
                chosen, lengths, mask = chosen[running], lengths[running], mask[running]
                choose.keep(running)
                answers.keep(running)
                for layer in cache.layers:
                    layer.keep(running)
            logits = self._step(chosen, cache, mask, lengths + step)
        return answers.read()

    def _step(
        self, chosen: torch.Tensor, cache: Cache, mask: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Run one token of each answer through the model; return the next logits."""
        output = self._model(
            input_ids=chosen[:, None],
            attention_mask=mask[..., : cache.get_seq_length() + 1],
            position_ids=positions[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _columns(self, width: int, lengths: torch.Tensor, new_tokens: int) -> torch.Tensor:
        """Return each answer's mask over the cache's columns, (answers, 1, 1, columns)."""
        columns = torch.arange(width + new_tokens, device=self._device)
        return self._mask(columns >= (width - lengths)[:, None])[:, None, None]

    def _mask(self, reads: torch.Tensor) -> torch.Tensor:
        """Return the additive attention mask: 0 where a token is read, the lowest number elsewhere."""
        mask = torch.zeros(reads.shape, dtype=self._model.dtype, device=self._device)
        return mask.masked_fill_(~reads, torch.finfo(mask.dtype).min)


class _Chooser:
    """Chooses the next token of each answer: the likeliest, or one from the answer's own draws.

    First it applies the settings of the model's generation config that change logits.
    """

    def __init__(self, settings: GenerationSettings, batch: PromptBatch, device: torch.device) -> None:
        self._rules = _RulesOfRows(settings, batch, device) if settings.honoured else None
        self._draws: torch.Tensor | None = None
        if batch.decoding.text_temperature > 0:
            self._sample = Sampler.of(settings.config, batch.decoding)
            self._draws = draws_for(batch.seeds, batch.decoding.max_new_tokens, device)

    def __call__(self, logits: torch.Tensor, step: int) -> torch.Tensor:
        """Return one token per row of `logits`, (answers, vocabulary)."""
        if self._rules is not None:
            logits = self._rules(logits, step)
        chosen = logits.argmax(dim=-1) if self._draws is None else self._sample(logits, self._draws[:, step])
        if self._rules is not None:
            self._rules.add(chosen, step)
        return chosen

    def keep(self, rows: torch.Tensor) -> None:
        """Keep the answers `rows` only."""
        if self._draws is not None:
            self._draws = self._draws[rows]
        if self._rules is not None:
            self._rules.keep(rows)


class _RulesOfRows:
    """Applies `LogitsRules` to answers whose prompts differ in length, grouped by length."""

    def __init__(self, settings: GenerationSettings, batch: PromptBatch, device: torch.device) -> None:
        new_tokens = batch.decoding.max_new_tokens
        self._rules = LogitsRules(settings, new_tokens, device)
        self._lengths = torch.tensor([len(prompt) for prompt in batch.prompts], device=device)
        width = int(self._lengths.max()) + new_tokens
        rows = [[*prompt, *([0] * (width - len(prompt)))] for prompt in batch.prompts]
        self._ids = torch.tensor(rows, device=device)

    def __call__(self, logits: torch.Tensor, step: int) -> torch.Tensor:
        """Return the logits of step `step` after the settings, in float32 as in `generate`."""
        changed = logits.float().clone()
        for length in self._lengths.unique().tolist():
            rows = (self._lengths == length).nonzero()[:, 0]
            changed[rows] = self._rules(length, self._ids[rows, : length + step], changed[rows])
        return changed

    def add(self, chosen: torch.Tensor, step: int) -> None:
        """Append the token of step `step` to each answer."""
        self._ids.scatter_(1, (self._lengths + step)[:, None], chosen[:, None])

    def keep(self, rows: torch.Tensor) -> None:
        """Keep the answers `rows` only."""
        self._lengths, self._ids = self._lengths[rows], self._ids[rows]


class _Answers:
    """The tokens generated so far, of running and of finished answers."""

    def __init__(self, rows: int, decoding: Decoding, eos: Sequence[int], device: torch.device) -> None:
        most = decoding.max_new_tokens
        self._eos, self._most = torch.tensor(eos, dtype=torch.long, device=device), most
        self._tokens = torch.zeros((rows, most), dtype=torch.long, device=device)
        self._logprobs = torch.zeros((rows, most), device=device) if decoding.logprobs else None
        self._counts = torch.full((rows,), most, device=device)
        self._active = torch.arange(rows, device=device)
        self._running = torch.ones(rows, dtype=torch.bool, device=device)
        self._finite = torch.ones(rows, dtype=torch.bool, device=device)

    def add(self, chosen: torch.Tensor, logits: torch.Tensor, step: int) -> torch.Tensor | None:
        """Append one token per active answer; return which answers continue, None when all ended."""
        self._tokens[self._active, step] = chosen
        # A NaN among the logits makes the largest one NaN.
        self._finite[self._active] &= ~self._running | logits.amax(dim=-1).isfinite()
        if self._logprobs is not None:
            self._logprobs[self._active, step] = token_logprobs(logits, chosen)
        if step + 1 == self._most:
            return None
        if not len(self._eos):
            return self._active
        ended = self._running & torch.isin(chosen, self._eos)
        self._counts[self._active[ended]] = step + 1
        self._running &= ~ended
        running = self._running.nonzero()[:, 0]
        return running if len(running) else None

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only `rows` of the active answers active."""
        self._active, self._running = self._active[rows], self._running[rows]

    def read(self) -> list[Generated]:
        """Return the answers.

        Raises:
            RowError: When the logits of an answer were not numbers.
        """
        if not bool(self._finite.all()):
            raise not_finite()
        tokens, counts = self._tokens.tolist(), self._counts.tolist()
        logprobs = [None] * len(counts) if self._logprobs is None else self._logprobs.tolist()
        return [
            Generated(ids[:count], known and known[:count])
            for ids, count, known in zip(tokens, counts, logprobs, strict=True)
        ]


def _joined(parts: list[torch.Tensor], trunk: int) -> torch.Tensor:
    """Return one layer's states of all nodes, (heads, nodes, size); every part begins with the trunk."""
    return torch.cat([parts[0][0], *(part[0][:, trunk:] for part in parts[1:])], dim=1)


def _rows(states: torch.Tensor, index: torch.Tensor, rows: int, width: int, new_tokens: int) -> torch.Tensor:
    """Return a buffer (heads, rows, width + new_tokens, size) that begins with the states at `index`."""
    heads, _, size = states.shape
    buffer = states.new_empty((heads, rows, width + new_tokens, size))
    buffer[:, :, :width] = states.index_select(1, index).view(heads, rows, width, size)
    return buffer

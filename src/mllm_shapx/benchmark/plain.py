"""The bare model: transformers' `generate` on the same prompts, left-padded and sorted by length."""

import random
import time
from collections.abc import Iterator, Sequence
from itertools import batched, cycle
from typing import Any

from mllm_shap import ConversationSnapshot

from mllm_shapx.models.base import Decoding
from mllm_shapx.models.hf_text import HfTextModel
from mllm_shapx.models.plain_generate import left_padded

BATCH_SIZES = (8, 32, 64, 128, 256, 512, 1024, 2048, 4096)
ALWAYS_TRIED = 64
"""Batch sizes up to it are always tried, also with a slow model."""
SEARCH_SHARE = 0.05
"""Measuring time of each batch size, as a share of the time; at least one batch."""
SLOWER = 0.97
LARGER = 2
"""A batch size more than twice the best one and below `SLOWER` of its rate ends the search. One slower size
alone does not: the machine may have been busy."""


class PlainGenerate:
    """Answers prompts with `model.generate` alone, on our own model.

    Prompts are tokenized before and answers are not decoded, so only the model's time counts.
    """

    def __init__(self, model: HfTextModel, decoding: Decoding) -> None:
        self._model = model
        self._network = model.network
        self._decoding = decoding
        self._settings = model.settings
        self.batch_size = BATCH_SIZES[0]
        """The best one of `find_batch_size`."""
        self.rates: dict[int, float] = {}
        """Batch size -> prompts per second in `find_batch_size`."""

    def find_batch_size(self, snapshots: Sequence[ConversationSnapshot], seconds: float) -> None:
        """Measure increasing batch sizes until they get slower or one batch takes `seconds`."""
        prompts = self._encode(snapshots)
        self._answer(prompts[: BATCH_SIZES[0]])
        for size in BATCH_SIZES:
            best = self.rates.get(self.batch_size, 0.0)
            if size > ALWAYS_TRIED and size > seconds * best:
                break
            rate = self._rate_at(size, prompts, SEARCH_SHARE * seconds)
            if rate is None:
                break
            self.rates[size] = rate
            if rate >= best:
                self.batch_size = size
            elif size > LARGER * self.batch_size and rate < SLOWER * best:
                break

    def seconds_for(self, snapshots: Sequence[ConversationSnapshot]) -> float:
        """Return the seconds to answer all, in even batches of at most the best size."""
        prompts = self._encode(snapshots)
        batches = -(-len(prompts) // self.batch_size)
        started = time.perf_counter()
        for batch in batched(prompts, -(-len(prompts) // batches)):
            self._answer(batch)
        return time.perf_counter() - started

    def _rate_at(self, size: int, prompts: list[tuple[int, ...]], seconds: float) -> float | None:
        """Return prompts per second; None if such a batch does not fit into memory."""
        import torch

        answered, started = 0, time.perf_counter()
        batches = _batches(prompts, size)
        try:
            while answered == 0 or time.perf_counter() - started < seconds:
                self._answer(next(batches))
                answered += size
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None
        return answered / (time.perf_counter() - started)

    def _encode(self, snapshots: Sequence[ConversationSnapshot]) -> list[tuple[int, ...]]:
        encoded = [self._model.encode(snapshot, self._decoding).token_ids for snapshot in snapshots]
        return sorted(encoded, key=len, reverse=True)

    def _answer(self, prompts: Sequence[tuple[int, ...]]) -> None:
        import torch

        ids, mask = left_padded(prompts, self._settings.pad, self._network.device)
        with torch.inference_mode():
            output = self._network.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self._decoding.max_new_tokens,
                pad_token_id=self._settings.pad,
                eos_token_id=list(self._settings.eos) or None,
                **self._sampling(),
            )
        output.cpu()  # waits: accelerators compute asynchronously

    def _sampling(self) -> dict[str, Any]:
        if self._decoding.text_temperature == 0:
            return {"do_sample": False}
        settings: dict[str, Any] = {"do_sample": True, "temperature": self._decoding.text_temperature}
        top_k = self._decoding.text_top_k
        return settings if top_k is None else {**settings, "top_k": top_k}


def _batches(prompts: list[tuple[int, ...]], size: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Yield an endless sequence of full batches of similar lengths; few prompts are repeated.

    The order is random, so that a few batches cover short and long prompts.
    """
    pool = prompts * -(-size // len(prompts))
    batches = [batch for batch in batched(pool, size) if len(batch) == size]
    random.Random(0).shuffle(batches)
    return cycle(batches)

"""Teacher forcing with LFM2-Audio: log-probabilities of given text after spoken and written prompts."""

from collections.abc import Sequence
from typing import Any

import torch

from mllm_shapx.models.base import Likelihood
from mllm_shapx.models.likelihood import likelihoods
from mllm_shapx.models.liquid_encoding import PrefillBatch


def read_batch(
    model: Any, batch: PrefillBatch, continuations: Sequence[Sequence[int]], top_k: int
) -> list[Likelihood]:
    """Return the likelihood of `continuations[i]` (text tokens, not empty) after prompt i of the batch.

    Raises:
        RowError: When the model's logits are not numbers.
    """
    table, device = model.lfm.embed_tokens, batch.embeddings.device
    longest = max(map(len, continuations))
    # The last token is not an input. Padding comes after shorter continuations, which never attend to it.
    rows = [[*tokens[:-1], *[0] * (longest - len(tokens))] for tokens in continuations]
    given = table(torch.tensor(rows, dtype=torch.long, device=device))
    width = batch.embeddings.shape[1]
    mask = batch.mask()
    lengths = torch.tensor(batch.lengths, device=device)
    columns = torch.arange(width + longest - 1, device=device)
    output = model.lfm(
        inputs_embeds=torch.cat([batch.embeddings, given], dim=1),
        attention_mask=None if mask is None else torch.nn.functional.pad(mask, (0, longest - 1), value=1),
        position_ids=(columns[None] - (width - lengths)[:, None]).clamp(min=0),
        use_cache=False,
    )
    states = output.last_hidden_state[:, width - 1 :]
    kept = [each[: len(tokens)] for each, tokens in zip(states, continuations, strict=True)]
    return likelihoods(torch.nn.functional.linear(torch.cat(kept), table.weight), continuations, top_k)

"""The hf_text connector: the library's own texts and numbers, whatever the batch."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from model_kit import ARCHITECTURES, answer_in_batches, conversations, library_records

from mllm_shapx.models.base import Decoding
from mllm_shapx.models.hf_text import HfTextModel

Directories = Callable[[str], Path]
NEW_TOKENS = 10


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_texts_and_logprobs_equal_the_librarys_backend_for_every_batch_size(
    model_directory: Directories, architecture: str
) -> None:
    """Greedy answers of mixed lengths are those of mllm_shap's backend at batch sizes 1, 3 and 16."""
    directory = model_directory(architecture)
    snapshots = conversations(20)
    expected = asyncio.run(library_records(directory, snapshots, NEW_TOKENS))
    model = HfTextModel.load(directory, dtype="float32", device="cpu")
    decoding = Decoding(max_new_tokens=NEW_TOKENS, logprobs=True)
    ends = {len(record.logprobs) for record in expected}
    assert len(ends) > 1, "the model should end answers at different times"
    for size in (1, 3, 16):
        answers = answer_in_batches(model, snapshots, decoding, size)
        assert [answer.text for answer in answers] == [record.text for record in expected]
        for answer, record in zip(answers, expected, strict=True):
            assert answer.logprobs is not None
            assert len(answer.logprobs) == len(answer.token_ids)
            np.testing.assert_allclose(answer.logprobs, record.logprobs, atol=1e-4)

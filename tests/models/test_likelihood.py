"""Teacher forcing: the log-probabilities of given tokens are those of one forward pass per coalition."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import CHANGES, build, rows
from mllm_shap import (
    ConversationSnapshot,
    ExplainConfig,
    PluginContext,
    TransformersTextBackend,
    default_registry,
)
from model_kit import conversation, conversations, load_text_model
from tokenizer_kit import WITH_BOS, as_messages, chat, coalitions, save_model
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mllm_shapx.errors import ModelError, RowError
from mllm_shapx.models.base import Decoding, Forcing, Likelihood
from mllm_shapx.models.decoder_choice import Decoder
from mllm_shapx.models.engine import Engine
from mllm_shapx.models.generation_settings import read_settings
from mllm_shapx.models.likelihood import Likelihoods

FAMILIES = (
    "llama",
    "gpt2",
    "gpt_neox",
    "qwen2",
    "gemma",
    "gemma2",
    "mistral",
    "mixtral",
    "mamba",
    "lfm2",
    "rwkv",
)
TOP_K = 5


class Tokenizer:
    """What of a tokenizer decides how answers end."""

    pad_token_id: int | None = None
    eos_token_id: int | None = None
    eos_token: str | None = None


def likelihoods_of(model_type: str) -> tuple[Any, Likelihoods]:
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    model = build(CONFIG_MAPPING[model_type], model_class, CHANGES.get(model_type, {}))
    return model, Likelihoods(Decoder(model, read_settings(model, Tokenizer())))


def one_pass(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """Return the log-probabilities at each of `tokens`, (tokens, vocabulary), from a pass at batch 1."""
    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0]
    return logits[len(prompt) - 1 : -1].float().log_softmax(dim=-1)


def check(found: Likelihood, expected: torch.Tensor, tokens: Sequence[int]) -> None:
    chosen = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    np.testing.assert_allclose(found.logprobs, chosen, atol=1e-4)
    np.testing.assert_allclose(found.top_logprobs, expected.topk(TOP_K).values, atol=1e-4)
    of_ids = expected.gather(1, torch.tensor(found.top_ids).long())
    np.testing.assert_allclose(found.top_logprobs, of_ids, atol=1e-4)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_gives_every_coalition_the_probabilities_of_its_own_forward_pass(model_type: str) -> None:
    """With windows shorter than the prompts, recurrent layers and experts, in float32."""
    model, likelihoods = likelihoods_of(model_type)
    with torch.inference_mode():
        for prompts in rows():
            # Tokens of several lengths; the fourth prompt's begin with the token that ends the third.
            tokens = [
                [(7 * place + step) % 300 for step in range(1 + place % 6)] for place in range(len(prompts))
            ]
            tokens[3] = [prompts[2][-1], *tokens[3]]
            found = likelihoods.read(prompts, tokens, TOP_K)
            for prompt, given, each in zip(prompts, tokens, found, strict=True):
                check(each, one_pass(model, prompt, given), given)


def test_a_prompt_that_begins_all_others_and_their_continuations_is_read_right() -> None:
    """Without a cue for the answer, the empty prompt and its answer begin like the other prompts."""
    model, likelihoods = likelihoods_of("llama")
    prompts = [[5, 6], *([5, 6, 7, 8, 9, 10 + place] for place in range(200))]
    given = [7, 8, 9, 10]
    with torch.inference_mode():
        found = likelihoods.read(prompts, [given] * len(prompts), TOP_K)
        for prompt, each in zip(prompts, found, strict=True):
            check(each, one_pass(model, prompt, given), given)


def test_a_model_whose_tokens_see_what_follows_is_refused() -> None:
    """XLNet's forward pass is no causal one; only its generation is."""
    _, likelihoods = likelihoods_of("xlnet")
    with torch.inference_mode(), pytest.raises(ModelError, match=r"xlnet.*teacher-forced value functions"):
        likelihoods.read([[5, 6, 7]], [[8, 9]])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "mistral_sliding", "lfm2_hybrid"])
def test_scores_are_those_of_mllm_shaps_backend(
    model_directory: Callable[[str], Path], architecture: str
) -> None:
    """The same text is forced as the same tokens, and its top tokens are the same."""
    directory = model_directory(architecture)
    snapshots = conversations(12)
    texts = [" stone bridges sing", "rain"]
    expected = asyncio.run(library_scores(directory, snapshots, texts))
    model = load_text_model(directory)
    for column, text in enumerate(texts):
        found = forced(model, snapshots, text)
        for each, scores in zip(found, expected, strict=True):
            np.testing.assert_allclose(each.logprobs, scores[column].token_logprobs, atol=1e-5)
            np.testing.assert_allclose(each.top_logprobs, scores[column].top_logprobs, atol=1e-5)
            assert each.top_ids.tolist() == [list(ids) for ids in scores[column].top_ids]


async def library_scores(
    directory: Path, snapshots: Sequence[ConversationSnapshot], texts: Sequence[str]
) -> list[Any]:
    config = ExplainConfig.model_validate(
        {"backend": {"kind": "transformers", "model_id": str(directory), "options": {"dtype": "float32"}}}
    )
    backend = TransformersTextBackend(PluginContext(config=config, registry=default_registry()))
    return [await backend.score_continuations(snapshot, texts, TOP_K) for snapshot in snapshots]


def forced(model: Any, snapshots: Sequence[ConversationSnapshot], text: str) -> list[Likelihood]:
    """Return the likelihoods of one text behind all of `snapshots`, through an engine."""
    tokens = model.tokens_of(text)

    async def work() -> list[Likelihood]:
        engine = Engine(model)
        decoding = Decoding(max_new_tokens=4)
        return await engine.likelihoods(Forcing(snapshots, [tokens] * len(snapshots), decoding, TOP_K))

    return asyncio.run(work())


def test_prompts_are_those_of_the_chat_template_with_one_bos(tmp_path: Path) -> None:
    """The tokenizer and the template write a BOS each; the model sees one, and the answer has none."""
    model = load_text_model(save_model(tmp_path, "bpe_with_bos", WITH_BOS))
    snapshots = coalitions(chat("quick brown fox jumps"))
    tokens = model.tokens_of("old stone")
    assert tokens[0] != model.tokenizer.bos_token_id
    with torch.inference_mode():
        for snapshot, each in zip(snapshots, forced(model, snapshots, "old stone"), strict=True):
            ids = model.tokenizer.apply_chat_template(as_messages(snapshot), add_generation_prompt=True)
            check(each, one_pass(model.network, ids["input_ids"], tokens), tokens)


def test_an_answer_that_runs_past_the_models_positions_is_a_fault_of_the_row(
    model_directory: Callable[[str], Path],
) -> None:
    """GPT-2 has 160 learned positions here; the given text counts, whatever max_new_tokens says."""
    model = load_text_model(model_directory("gpt2"))
    with pytest.raises(RowError, match="160 positions"):
        forced(model, [conversation("fox")], "bridges " * 100)

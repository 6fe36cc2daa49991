"""Every family of causal models: each coalition's answer is the one that `generate` gives for it alone."""

import copy
from typing import Any

import pytest
import torch
import transformers
from families import CHANGES, build, compare
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mllm_shapx.models.base import Decoding
from mllm_shapx.models.decoder_choice import Decoder
from mllm_shapx.models.generation_settings import read_settings

FAMILIES = (
    *("llama", "gpt2", "gpt_neox", "phi", "phi3", "opt", "xglm", "codegen", "gptj", "gpt_neo", "gpt_bigcode"),
    *("granite", "granitemoe", "mixtral", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"),
    *("deepseek_v2", "deepseek_v3", "gemma", "gemma2", "gemma3_text", "gpt_oss", "llama4_text", "cohere2"),
    *("glm4", "olmo2", "stablelm", "starcoder2", "ministral", "nemotron", "biogpt", "ctrl", "persimmon"),
    *("bloom", "falcon", "mpt", "xlnet", "mamba", "mamba2", "jamba", "zamba2", "minimax", "lfm2"),
    *("recurrent_gemma", "rwkv", "bamba", "falcon_h1", "qwen3_next", "openai-gpt"),
)
"""Model types of transformers; `scripts/check_families.py` goes through all of them."""
ENOUGH_DISTINCT = 10


class Tokenizer:
    """What of a tokenizer decides how answers end."""

    pad_token_id: int | None = None
    eos_token_id: int | None = None
    eos_token: str | None = None


def family(model_type: str, **changes: Any) -> Any:
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    return build(CONFIG_MAPPING[model_type], model_class, {**CHANGES.get(model_type, {}), **changes})


def decoder_of(model: Any) -> Decoder:
    return Decoder(model, read_settings(model, Tokenizer()))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_answers_every_coalition_as_generate_does_alone(model_type: str) -> None:
    """In float32, with windows shorter than the prompts, batches change no token."""
    model = family(model_type)
    found = compare(copy.deepcopy(model), decoder_of(model))
    assert found.equal == found.total
    assert found.distinct >= ENOUGH_DISTINCT


@pytest.mark.parametrize(
    ("model_type", "rope"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 4.0}),
        ("llama", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
        ("llama", {"rope_type": "linear", "factor": 4.0}),
        (
            "phi3",
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "original_max_position_embeddings": 16,
            },
        ),
    ],
)
def test_positions_that_change_with_the_length_do_not_depend_on_the_batch(
    model_type: str, rope: dict[str, Any]
) -> None:
    """Prompts on both sides of the trained length share batches with their own side only."""
    positions = {"max_position_embeddings": 16} if rope["rope_type"] == "dynamic" else {}
    model = family(
        model_type, rope_parameters={"rope_theta": 10_000.0, **rope}, sliding_window=None, **positions
    )
    found = compare(copy.deepcopy(model), decoder_of(model))
    assert found.equal == found.total
    assert found.distinct >= ENOUGH_DISTINCT


def test_a_recurrent_model_that_no_batch_suits_answers_one_prompt_at_a_time_and_says_so() -> None:
    """RWKV in a batch gives other answers than alone."""
    decoder = decoder_of(family("rwkv"))
    assert decoder.way == "generate, one prompt at a time"
    (note,) = decoder.notes
    assert "one prompt at a time" in note


def test_a_window_ends_the_own_loop_where_it_begins_to_matter() -> None:
    """The own loop lets every token see all before it; beyond the window `generate` answers."""
    decoder = decoder_of(family("mistral", sliding_window=24))
    assert decoder.way_for(24) == "own loop"
    assert decoder.way_for(25) == "generate"


def test_a_limit_that_nothing_names_is_found_by_trying_longer_prompts() -> None:
    """A layer that begins to look elsewhere at position 40 ends the own loop before it, not the study."""
    model = family("llama")
    decoder = decoder_of(model)
    attention = model.model.layers[0].self_attn
    plain = attention.forward

    def forward(hidden_states: torch.Tensor, **options: Any) -> Any:
        cache = options.get("past_key_values")
        seen = hidden_states.shape[1] + (cache.get_seq_length(0) if cache is not None else 0)
        output = plain(hidden_states, **options)
        # Own loops run many prompts in one sequence, which makes it longer than any of them.
        return (output[0] * (2.0 if seen > 40 else 1.0), *output[1:])

    attention.forward = forward
    assert decoder.way_for(16) == "own loop"
    decoder.prove(64)
    assert decoder.way_for(16) == "own loop"
    assert decoder.way_for(64) != "own loop"


def test_a_trial_that_the_memory_does_not_hold_leaves_the_prompts_answerable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trials are longer than the prompts: these are answered alone, and nothing says that they failed."""
    model = family("llama")
    decoder = decoder_of(model)
    attention = model.model.layers[0].self_attn
    plain = attention.forward

    def forward(hidden_states: torch.Tensor, **options: Any) -> Any:
        if hidden_states.shape[1] > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(hidden_states, **options)

    monkeypatch.setattr(attention, "forward", forward)
    prompts = [[5 + place % 7 for place in range(length)] for length in (34, 35)]
    answers = decoder.answer(prompts, Decoding(max_new_tokens=3), [0, 0])
    assert [len(each.token_ids) for each in answers] == [3, 3]
    assert (decoder.way_for(16), decoder.way) == ("own loop", "generate, one prompt at a time")
    assert "memory does not hold a trial" in decoder.notes[0]

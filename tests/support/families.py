"""Small random models of every causal family of transformers, where possible."""

from dataclasses import dataclass
from typing import Any

import torch

from mllm_shapx.models.positions import ChangingPositions

VOCABULARY = 320
WIDTH = 32
LAYERS = 2

SMALL: dict[str, Any] = {
    "hidden_size": WIDTH,
    "n_embd": WIDTH,
    "d_model": WIDTH,
    "embed_dim": WIDTH,
    "dim": WIDTH,
    "word_embed_proj_dim": WIDTH,
    "embedding_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_layers": LAYERS,
    "decoder_layers": LAYERS,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "d_inner": 64,
    "n_inner": 64,
    "dff": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "lru_width": WIDTH,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "sliding_window": 24,
    "attention_window_size": 24,
    "attention_chunk_size": 24,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}
"""Config key -> small value, for all families; a family uses the keys that it knows."""


HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
MLA = {"head_dim": 8, "num_key_value_heads": 4, "qk_head_dim": 16}
CHANGES: dict[str, dict[str, Any]] = {
    "axk1": MLA,
    "axk2": MLA,
    "bamba": {"attn_layer_indices": [1], "mamba_expand": 2},
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": MLA,
    "falcon_h1": {"mamba_d_ssm": 64},
    "glm4_moe_lite": MLA,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 12},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["full_attention", "conv"], "conv_L_cache": 3, "block_ff_dim": 64},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"], "conv_L_cache": 3, "num_dense_layers": 1},
    "longcat_flash": MLA,
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "minicpm3": MLA,
    "modernbert-decoder": {"pad_token_id": 0},
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_hidden_layers": 2},
    "xlm": {"causal": True, "is_encoder": False},
    "youtu": MLA,
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1]},
}
"""Model type -> its config keys besides `SMALL`."""


@dataclass(frozen=True)
class Comparison:
    """How many answers of a family equal those of `generate` for one prompt alone."""

    equal: int
    total: int
    distinct: int
    way: str


def rows() -> list[list[list[int]]]:
    """Return the prompts of all coalitions of two rows, as token ids: 32 and 16 of them."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for players, size in ((5, 3), (4, 4)):
        draw = torch.randint(3, VOCABULARY - 10, (players + 2, size + 1), generator=generator).tolist()
        before, behind, words = draw[0], draw[1], draw[2:]
        masks = range(1 << players)
        kept = [
            [token for place in range(players) if mask >> place & 1 for token in words[place]]
            for mask in masks
        ]
        found.append([before + each + behind[:2] for each in kept])
    return found


def compare(model: Any, decoder: Any, new_tokens: int = 6) -> Comparison:
    """Compare a row's coalitions, answered together by `decoder`, with `model.generate` for each alone.

    Args:
        model: A fresh copy of the decoder's model.
        decoder: Answers batches.
        new_tokens: Length of the answers.
    """
    from mllm_shapx.models.base import Decoding

    decoding = Decoding(max_new_tokens=new_tokens)
    found: list[list[int]] = []
    expected: list[list[int]] = []
    state = ChangingPositions(model)
    with torch.inference_mode():
        for prompts in rows():
            answers = decoder.answer(prompts, decoding, [0] * len(prompts))
            found += [answer.token_ids for answer in answers]
            for prompt in prompts:
                ids = torch.tensor([prompt])
                # `dynamic` positions depend on the longest prompt of earlier calls.
                with state.reset():
                    output = model.generate(
                        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
                        num_beams=1, pad_token_id=0,
                    )  # fmt: skip
                expected.append(output[0, len(prompt) :].tolist())
    equal = sum(left == right for left, right in zip(found, expected, strict=True))
    return Comparison(equal, len(found), len({tuple(each) for each in expected}), decoder.way)


def build(
    config_class: Any,
    model_class: Any,
    changes: dict[str, Any] | None = None,
    *,
    seed: int = 7,
    largest: int | None = None,
) -> Any:
    """Return a small random model of one family.

    Raises:
        ValueError: When it still has more than `largest` parameters.
    """
    known = config_class().to_dict()
    asked = {key: value for key, value in SMALL.items() if key in known or key.endswith("token_id")}
    asked |= {"tie_word_embeddings": False, **(changes or {})}
    config = config_class(**asked)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(config).parameters())
    if largest is not None and count > largest:
        msg = f"{count:,} parameters: its config has sizes of its own"
        raise ValueError(msg)
    torch.manual_seed(seed)
    model = model_class(config).eval()
    scatter(model, seed)
    return model


def scatter(model: Any, seed: int) -> None:
    """Make the weights so large that answers differ between prompts."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "norm" not in name:
            noise = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            parameter.data.copy_(1.5 * noise)

"""Writes small LFM2-Audio checkpoints: the layout of the `liquid_audio` package, at any size."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

START, PAD, IM_START, IM_END = 1, 0, 6, 7
AUDIO_START, TEXT_END = 128, 130
END_OF_AUDIO = 2048
FIXED_TOKENS = {
    "<|pad|>": PAD,
    "<|startoftext|>": START,
    "<|im_start|>": IM_START,
    "<|im_end|>": IM_END,
    "<|audio_start|>": AUDIO_START,
    "<|text_end|>": TEXT_END,
}
"""Special token -> its id in the package's code."""


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a checkpoint. The defaults give about 2.5M parameters."""

    hidden: int = 64
    layer_types: tuple[str, ...] = ("conv", "full_attention", "conv", "full_attention")
    heads: int = 4
    key_value_heads: int = 2
    feed_forward: int = 192
    vocabulary: int = 512
    codebooks: int = 8
    depth_layers: int = 1
    depth_dim: int = 64
    """A multiple of 64: the package's depth transformer has 32 heads of an even size."""
    encoder_dim: int = 64
    encoder_layers: int = 2
    encoder_heads: int = 4
    encoder_channels: int = 32
    encoder_norm: str = "batch_norm"
    dropout: float = 0.1
    """Of the encoder, during training."""
    interleaved_text: int = 6
    interleaved_audio: int = 12


def checkpoint_config(size: Dimensions) -> dict[str, Any]:
    """Return the `config.json` of a checkpoint of `size`."""
    return {
        "architectures": ["Lfm2AudioForConditionalGeneration"],
        "codebooks": size.codebooks,
        "tie_audio_embeddings": True,
        "semantic_codebook_factor": 100,
        "codebook_weight": "log",
        "interleaved_n_text": size.interleaved_text,
        "interleaved_n_audio": size.interleaved_audio,
        "preprocessor": {
            "sample_rate": 16000,
            "normalize": "per_feature",
            "window_size": 0.025,
            "window_stride": 0.01,
            "window": "hann",
            "features": 128,
            "n_fft": 512,
            "log": True,
            "frame_splicing": 1,
            "dither": 1e-05,
            "pad_to": 0,
            "pad_value": 0.0,
        },
        "encoder": {
            "feat_in": 128,
            "feat_out": -1,
            "n_layers": size.encoder_layers,
            "d_model": size.encoder_dim,
            "subsampling": "dw_striding",
            "subsampling_factor": 8,
            "subsampling_conv_channels": size.encoder_channels,
            "causal_downsampling": False,
            "reduction": None,
            "reduction_position": None,
            "reduction_factor": 1,
            "ff_expansion_factor": 4,
            "self_attention_model": "rel_pos",
            "n_heads": size.encoder_heads,
            "att_context_size": [-1, -1],
            "xscaling": False,
            "untie_biases": True,
            "pos_emb_max_len": 5000,
            "conv_kernel_size": 9,
            "conv_norm_type": size.encoder_norm,
            "conv_context_size": None,
            "dropout": size.dropout,
            "dropout_pre_encoder": size.dropout,
            "dropout_emb": 0.0,
            "dropout_att": size.dropout,
        },
        "lfm": {
            "hidden_size": size.hidden,
            "num_hidden_layers": len(size.layer_types),
            "layer_types": list(size.layer_types),
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.key_value_heads,
            "intermediate_size": size.feed_forward,
            "vocab_size": size.vocabulary,
            "conv_L_cache": 3,
            "conv_bias": False,
            "block_auto_adjust_ff_dim": False,
            "max_position_embeddings": 128_000,
            "norm_eps": 1e-05,
            "bos_token_id": START,
            "eos_token_id": IM_END,
            "pad_token_id": PAD,
        },
        "depthformer": {"layers": size.depth_layers, "dim": size.depth_dim, "tie": True},
    }


def build_tokenizer(words: Iterable[str], vocabulary: int) -> Any:
    """Return a byte-level tokenizer for any text, with each of `words` as one token.

    The special tokens have the package's ids; the others fill the free ids.

    Raises:
        ValueError: When `words` do not fit into `vocabulary`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trained.train_from_iterator([form for word in sorted(set(words)) for form in (word, f" {word}")], trainer)
    learned = json.loads(trained.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    free = [index for index in range(vocabulary) if index not in FIXED_TOKENS.values()]
    if len(pieces) > len(free):
        msg = f"{len(pieces)} pieces do not fit into a vocabulary of {vocabulary}"
        raise ValueError(msg)
    table = {**FIXED_TOKENS, **dict(zip(pieces, free, strict=False))}
    merges = [tuple(merge) for merge in learned["merges"]]
    core = Tokenizer(BPE(vocab=table, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in FIXED_TOKENS])
    roles = {"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **roles)


def build_model(config: dict[str, Any], seed: int) -> Any:
    """Return the package's own model with random weights, on the CPU, in float32, deterministic in `seed`."""
    import torch
    from liquid_audio.model.conformer.encoder import ConformerEncoderConfig
    from liquid_audio.model.lfm2_audio import DepthformerConfig, LFM2AudioConfig, LFM2AudioModel
    from liquid_audio.processor import PreprocessorConfig
    from transformers import Lfm2Config

    blocks = {
        "lfm": Lfm2Config(**config["lfm"]),
        "encoder": ConformerEncoderConfig(**config["encoder"]),
        "depthformer": DepthformerConfig(**config["depthformer"]),
        "preprocessor": PreprocessorConfig(**config["preprocessor"]),
    }
    torch.manual_seed(seed)
    return LFM2AudioModel(LFM2AudioConfig(**{**config, **blocks}))


def write_checkpoint(
    folder: Path, config: dict[str, Any], model: Any, tokenizer: Any, dtype: Any = None
) -> None:
    """Write `config.json`, `model.safetensors` (in `dtype` if given) and the tokenizer."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights: dict[str, Any] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen:  # tied weights are stored once
            continue
        seen.add(tensor.data_ptr())
        narrow = dtype is not None and tensor.is_floating_point()
        weights[name] = tensor.detach().to(dtype).contiguous() if narrow else tensor.detach().contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)


def write_random_checkpoint(folder: Path, size: Dimensions, seed: int = 0) -> Path:
    """Write a checkpoint of random weights to `folder`; return `folder`."""
    config = checkpoint_config(size)
    model = build_model(config, seed)
    _spread(model, seed)
    write_checkpoint(folder, config, model, build_tokenizer((), size.vocabulary))
    return folder


def _spread(model: Any, seed: int) -> None:
    """Make the random model's answers depend on the prompt, use both modalities and differ in length."""
    import torch

    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith(("lfm.layers", "conformer", "audio_adapter")) and weight.ndim > 1:
                far = name.endswith(("self_attn.v_proj.weight", "self_attn.out_proj.weight"))
                scale = (4.0 if far else 1.5) / weight[0].numel() ** 0.5
                weight.copy_(torch.randn(weight.shape, generator=draws) * scale)
        embedding = model.lfm.embed_tokens.weight
        embedding.copy_(torch.randn(embedding.shape, generator=draws))
        embedding[[IM_END, AUDIO_START, TEXT_END]] *= 2.4
        model.depth_embeddings[0].embedding.weight[END_OF_AUDIO] *= 2.4


def describe(size: Dimensions) -> dict[str, Any]:
    """Return the sizes as plain data, for benchmarks' output."""
    return asdict(size)

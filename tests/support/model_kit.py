"""Small random language models of several architectures, with a small tokenizer, for the model tests."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from mllm_shap import ConversationSnapshot, Message, Role, Turn
from mllm_shap.domain.config import GenerationConfig

from mllm_shapx.config.model_settings import ModelSettings
from mllm_shapx.config.models import ChatConfig, ConnectorKwargs
from mllm_shapx.models.base import Answer, Decoding
from mllm_shapx.models.hf_text import HfTextModel, load

WORDS = (  # noqa: SIM905 -- a sentence reads better than a list
    "the quick brown fox jumps over a lazy dog while seven small birds sing about rain and old stone bridges "
    "near our quiet river town where nobody ever asks why clocks run late in spring"
).split()
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
ARCHITECTURES = ("llama", "gpt2", "qwen2", "mistral_sliding", "gemma2_hybrid", "lfm2_hybrid")
SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
}


def load_text_model(
    directory: Path,
    *,
    name: str | None = None,
    device: str = "cpu",
    chat: ChatConfig | None = None,
    **kwargs: Any,
) -> HfTextModel:
    """Load a directory as `hf_text` does, in float32 unless `kwargs` (connector_kwargs) say otherwise."""
    settings = ModelSettings(
        "hf_text",
        name or str(directory),
        kwargs=ConnectorKwargs(**{"dtype": "float32", **kwargs}),
        device=device,
        chat=chat or ChatConfig(),
    )
    return load(settings, directory, None)


def build_tokenizer() -> Any:
    """Train a small byte-level tokenizer with a chat template and no end token yet."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=TEMPLATE)


def build_config(architecture: str, vocabulary: int) -> Any:
    """Return the configuration of a small model."""
    import transformers as hf

    common = {
        **SIZES,
        "vocab_size": vocabulary,
        "bos_token_id": 0,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if architecture == "llama":
        return hf.LlamaConfig(**common, num_key_value_heads=2, max_position_embeddings=512)
    if architecture == "gpt2":
        return hf.GPT2Config(
            vocab_size=vocabulary, n_positions=160, n_embd=48, n_layer=2, n_head=4, initializer_range=0.25,
            bos_token_id=0, eos_token_id=None,
        )  # fmt: skip
    if architecture == "qwen2":
        return hf.Qwen2Config(**common, num_key_value_heads=4, max_position_embeddings=512)
    if architecture == "mistral_sliding":
        return hf.MistralConfig(**common, num_key_value_heads=2, sliding_window=16, head_dim=12)
    if architecture == "gemma2_hybrid":
        return hf.Gemma2Config(
            **common, num_key_value_heads=2, head_dim=12, sliding_window=16, query_pre_attn_scalar=12
        )
    return hf.Lfm2Config(
        **common,
        num_key_value_heads=2,
        block_ff_dim=96,
        layer_types=["full_attention", "conv"],
        conv_L_cache=3,
    )


def build_model(architecture: str, directory: Path) -> Path:
    """Save a random model with an early end token in some answers, and a late one or none in others."""
    from transformers import AutoModelForCausalLM

    tokenizer = build_tokenizer()
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(build_config(architecture, len(tokenizer))).eval()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(_frequent_token(model, tokenizer))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _frequent_token(model: Any, tokenizer: Any) -> int:
    """Return the token whose first place varies most between the answers."""
    places: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for snapshot in conversations(24):
        text = tokenizer.apply_chat_template(
            [{"role": m.role.value, "content": m.text} for m in snapshot.messages()],
            tokenize=False,
            add_generation_prompt=True,
        )
        ids = torch.tensor([tokenizer.encode(text)])
        new = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, pad_token_id=0
        )
        answer = new[0, ids.shape[1] :].tolist()
        for token in set(answer):
            places[token][answer.index(token)] += 1
    spread = {token: counts.total() - max(counts.values()) for token, counts in places.items()}
    return max(spread, key=lambda token: (spread[token], token))


def conversations(count: int, seed: int = 0) -> list[ConversationSnapshot]:
    """Return prompts of 0 to 17 words after a system prompt; neighbours share beginnings."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        length = int(torch.randint(0, 18, (1,), generator=generator))
        words = [WORDS[(index % 3 + place) % len(WORDS)] for place in range(length)]
        found.append(conversation(" ".join(words)))
    return found


def conversation(text: str, system: str = "You are a helpful assistant.") -> ConversationSnapshot:
    """Return one user message after a system prompt."""
    messages = (Message(role=Role.SYSTEM, text=system), Message(role=Role.USER, text=text))
    return ConversationSnapshot.from_turns((Turn(messages=messages),))


def answer_in_batches(
    model: HfTextModel, snapshots: list[ConversationSnapshot], decoding: Decoding, size: int, seed: int = 0
) -> list[Answer]:
    """Answer in batches of `size`, in the order given."""
    prompts = [model.encode(snapshot, decoding) for snapshot in snapshots]
    found: list[Answer] = []
    for first in range(0, len(prompts), size):
        seeds = range(seed + first, seed + min(first + size, len(prompts)))
        found += model.answer(prompts[first : first + size], decoding, list(seeds))
    return found


async def library_records(
    directory: Path, snapshots: list[ConversationSnapshot], new_tokens: int, *, embeddings: bool = False
) -> list[Any]:
    """Answer with mllm_shap's own transformers backend, one prompt at a time."""
    from mllm_shap import ExplainConfig, PluginContext, TransformersTextBackend, default_registry

    config = ExplainConfig.model_validate(
        {"backend": {"kind": "transformers", "model_id": str(directory), "options": {"dtype": "float32"}}}
    )
    backend = TransformersTextBackend(PluginContext(config=config, registry=default_registry()))
    generation = GenerationConfig(max_new_tokens=new_tokens, compute_embeddings=embeddings)
    records = [await backend.generate(snapshot, generation) for snapshot in snapshots]
    await backend.aclose()
    return records

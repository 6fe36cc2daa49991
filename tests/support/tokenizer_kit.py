"""Small tokenizers of several kinds, and chat templates of published models."""
# ruff: noqa: S106 -- a vocabulary's words are no secrets

from functools import cache
from pathlib import Path
from typing import Any

from mllm_shap import ConversationSnapshot, Message, Role, Turn
from model_kit import WORDS

from mllm_shapx.explaining.coalitions import RowCoalitions
from mllm_shapx.explaining.players import text_player_set
from mllm_shapx.planning.players import PlayerRule

ROOT = Path(__file__).resolve().parents[2]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<think>"]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BOS = (
    "{{ bos_token }}{% for message in messages %}[INST] {{ message['role'] }}: "
    "{{ message['content'] | trim }} [/INST]{% endfor %}"
)
ROLES_AT_ODDS = "Conversation roles must alternate user/assistant/user/assistant/..."
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('" + ROLES_AT_ODDS + "') }}{% endif %}<start_of_turn>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
THINKING = (
    CHATML.removesuffix("{% endif %}")
    + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    + "{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "with_bos": WITH_BOS, "no_system": NO_SYSTEM, "thinking": THINKING}


def _fast(raw: Any, **tokens: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **tokens)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[:-1]})
    tokenizer.add_tokens(SPECIAL[-1:])
    return tokenizer


def _bpe_with_bos() -> Any:
    """Byte-level pieces; the post-processor writes a BOS, as for Llama and Gemma."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return _fast(raw, bos_token="<s>", eos_token="</s>")


def _unigram() -> Any:
    """Pieces like sentencepiece's: a space before the text, NFKC, unknown characters, a BOS."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    raw = Tokenizer(models.Unigram())
    raw.normalizer = normalizers.NFKC()
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=120, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>"
    )
    raw.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _fast(raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _wordpiece() -> Any:
    """Lower-case word pieces between [CLS] and [SEP], like BERT's."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=150, show_progress=False, special_tokens=["[UNK]", "[CLS]", "[SEP]"]
    )
    raw.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return _fast(raw, bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]")


def _demo() -> Any:
    """Return the demo's byte-level tokenizer, with the templates' tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "model", bos_token="<|system|>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[:-1]})
    tokenizer.add_tokens(SPECIAL[-1:])
    return tokenizer


TOKENIZERS = {"demo": _demo, "bpe_with_bos": _bpe_with_bos, "unigram": _unigram, "wordpiece": _wordpiece}


def tokenizer_of(kind: str, template: str | None) -> Any:
    """Return a new tokenizer of `kind` with a chat template."""
    import copy

    tokenizer = copy.deepcopy(_built(kind))
    tokenizer.chat_template = template
    return tokenizer


@cache
def _built(kind: str) -> Any:
    return TOKENIZERS[kind]()


def chat(*texts: str, system: str = "You are a helpful assistant.") -> ConversationSnapshot:
    """Return user messages after a system prompt, if that is not empty."""
    messages = [Message(role=Role.SYSTEM, text=system)] if system else []
    messages += [Message(role=Role.USER, text=text) for text in texts]
    return ConversationSnapshot.from_turns(tuple(Turn(messages=(message,)) for message in messages))


def coalitions(snapshot: ConversationSnapshot) -> list[ConversationSnapshot]:
    """Return the prompts of all coalitions of a conversation's words."""
    players = text_player_set(snapshot, PlayerRule("none"))
    row = RowCoalitions(snapshot, players, share_prompts=True)
    return [row.render(mask) for mask in range(1 << players.num_players)]


def as_messages(snapshot: ConversationSnapshot) -> list[dict[str, str]]:
    """Return a conversation in transformers' format."""
    return [{"role": message.role.value, "content": message.text} for message in snapshot.messages()]


def save_model(directory: Path, kind: str, template: str | None) -> Path:
    """Save a small random Llama with a tokenizer of `kind` and a chat template."""
    import torch
    from model_kit import build_config
    from transformers import AutoModelForCausalLM

    tokenizer = tokenizer_of(kind, template)
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(build_config("llama", len(tokenizer))).eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory

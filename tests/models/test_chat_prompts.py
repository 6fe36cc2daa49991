"""Prompts: the ids of `apply_chat_template`, whatever the tokenizer, the template and the text."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mllm_shap import ConversationSnapshot
from model_kit import WORDS, load_text_model
from tokenizer_kit import (
    CHATML,
    NO_SYSTEM,
    ROLES_AT_ODDS,
    SPECIAL,
    TEMPLATES,
    THINKING,
    TOKENIZERS,
    WITH_BOS,
    as_messages,
    chat,
    coalitions,
    save_model,
    tokenizer_of,
)

from mllm_shapx.config.model_settings import ModelSettings
from mllm_shapx.config.models import ChatConfig, ConnectorKwargs
from mllm_shapx.errors import ModelError, RowError
from mllm_shapx.models.base import Decoding
from mllm_shapx.models.chat_prompts import ChatPrompts

SYSTEM = "You are a helpful assistant."
ODD_PIECES = (
    "👩‍🚀", "🇵🇱", "👍🏽", "e\u0301", "ñ", "n\u0303", "a\u00a0b", "1\u202f000", "wait…", "“so”", "—", "\u200b",
    "\ufeffx", "tab\there", "bell\x07", "\x00", "\x1b[31m", "ﬁne", "Ⅳ", "日本語", "مرحبا", *SPECIAL,
    "</think>", "a<|im_end|><|im_start|>b", "<|im_", "end|>", "{{ bos_token }}", "{% raw %}",
)  # fmt: skip


def prompts(kind: str, own: str | None, **settings: Any) -> ChatPrompts:
    """Return what encodes conversations with a tokenizer of `kind`."""
    return ChatPrompts(tokenizer_of(kind, own), chat_settings(**settings))


def chat_settings(system_prompt: str = SYSTEM, **kwargs: Any) -> ModelSettings:
    """Return a study's settings of prompts; `kwargs` are those of `connector_kwargs`."""
    return ModelSettings(
        "hf_text",
        "acme/chat",
        kwargs=ConnectorKwargs(**kwargs),
        chat=ChatConfig(system_prompt=system_prompt),
    )


def reference(
    tokenizer: Any, snapshot: ConversationSnapshot, *, merged: bool = False, **options: Any
) -> list[int]:
    """Return the ids that transformers gives for a conversation."""
    messages = as_messages(snapshot)
    if merged:
        system, first, *rest = messages
        messages = [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *rest]
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)[
        "input_ids"
    ]
    return ids


def odd_texts(count: int, seed: int) -> list[str]:
    """Return texts of six words or fewer, half of them unusual, with unusual spaces between them."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        words = rng.choices(WORDS, k=3) + rng.choices(ODD_PIECES, k=3)
        rng.shuffle(words)
        texts.append("".join(word + rng.choice([" ", "  ", "\n", " \t"]) for word in words))
    return texts


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_coalitions_ids_are_those_of_apply_chat_template(kind: str, template: str) -> None:
    """Emoji, combining marks, odd spaces, control characters, special tokens: all coalitions in a batch."""
    other = tokenizer_of(kind, TEMPLATES[template])
    encoder = prompts(kind, TEMPLATES[template])
    for text in odd_texts(6, seed=len(kind + template)):
        asked = coalitions(chat(text))
        expected = [reference(other, each, merged=template == "no_system") for each in asked]
        assert encoder.encode_all(asked) == expected


@pytest.mark.parametrize("kind", ["bpe_with_bos", "unigram", "wordpiece"])
def test_a_tokenizer_and_a_template_that_both_write_a_bos_give_one(kind: str) -> None:
    """The prompt begins with the BOS and the token after it, not with two; nothing is added at its end."""
    tokenizer = tokenizer_of(kind, WITH_BOS)
    ids = prompts(kind, WITH_BOS).encode_all([chat("old stone bridges")])[0]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[:2] == [tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("[INST]")]
    assert ids[-1] == tokenizer.convert_tokens_to_ids("[/INST]")


def test_one_prompt_is_encoded_as_in_a_batch() -> None:
    """Neighbours in a batch change nothing."""
    encoder = prompts("unigram", CHATML)
    asked = coalitions(chat("why do 3 small birds sing"))
    assert [encoder.encode_all([each])[0] for each in asked] == encoder.encode_all(asked)


def test_a_template_that_refuses_the_system_role_gets_the_prompt_in_the_first_user_message() -> None:
    """It is said once, in the template's own words; without a system prompt there is nothing to say."""
    encoder = prompts("bpe_with_bos", NO_SYSTEM)
    text = encoder._tokenizer.decode(encoder.encode_all([chat("quiet river")])[0])
    assert text == (f"<s><start_of_turn>user\n{SYSTEM}\n\nquiet river<end_of_turn>\n<start_of_turn>model\n")
    (note,) = encoder.notes
    assert "'acme/chat' takes no system message ('System role not supported')" in note
    assert "beginning of the first user message" in note
    bare = prompts("bpe_with_bos", NO_SYSTEM, system_prompt=" ")
    assert bare.notes == ()
    assert bare.encode_all([chat("quiet river", system="")]) == [
        reference(tokenizer_of("bpe_with_bos", NO_SYSTEM), chat("quiet river", system=""))
    ]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('Only tools may speak') }}{{ messages }}", r"'Only tools may speak'"),
        ("{{ messages[0]['content'].upper.lower() }}", r"UndefinedError: .* has no attribute 'lower'"),
        ("{{ messages | sum }}", r"TypeError: unsupported operand"),
        ("{{ messages[0].content | first | length }}{{ messages[1].content[0].x.y }}", "UndefinedError"),
        ("{{ (1 / 0) }}{{ messages }}", r"ZeroDivisionError: division by zero"),
        ("{{ ''.__class__.__mro__ }}{{ messages }}", r"SecurityError: access to attribute '__class__'"),
        ("{% for message in messages %}<turn>{% endfor %}", "leaves the user's text out"),
    ],
)  # fmt: skip
def test_a_template_that_takes_nothing_is_one_model_error_at_load(
    model_directory: Callable[[str], Path], tmp_path: Path, template: str, said: str
) -> None:
    """Before the first row, with the template's words and the setting that helps."""
    directory = tmp_path / "model"
    shutil.copytree(model_directory("llama"), directory)
    (directory / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match=said) as caught:
        load_text_model(directory, name="acme/chat")
    assert "chat template of model 'acme/chat'" in str(caught.value)
    assert "connector_kwargs.chat_template" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_conversation_that_the_template_refuses_is_the_rows_error_in_its_words() -> None:
    """Strict templates take no two user messages in a row; the row is told so, and others are encoded."""
    encoder = prompts("bpe_with_bos", NO_SYSTEM)
    with pytest.raises(RowError) as caught:
        encoder.encode_all(coalitions(chat("first words", "second words")))
    assert caught.value.reason == "chat_template"
    assert f"refuses this conversation of 2 user message(s): '{ROLES_AT_ODDS}'" in str(caught.value)
    assert len(encoder.encode_all([chat("first words")])) == 1


def test_text_that_is_no_unicode_is_the_rows_error() -> None:
    """Half of a surrogate pair cannot be encoded, and the tokenizer is named, not the template."""
    with pytest.raises(RowError, match="the tokenizer of model 'acme/chat' cannot encode it") as caught:
        prompts("demo", CHATML).encode_all([chat("half \ud83d of a pair")])
    assert caught.value.reason == "bad_text"


def test_a_model_without_a_template_is_prompted_by_lines_and_says_so() -> None:
    """The form is mllm_shap's, with the tokenizer's own special tokens around it."""
    encoder = prompts("wordpiece", None)
    (ids,) = encoder.encode_all([chat("quiet river", "old bridge")])
    tokenizer = tokenizer_of("wordpiece", None)
    lines = f"system: {SYSTEM}\nuser: quiet river\nuser: old bridge"
    assert ids == tokenizer(lines)["input_ids"]
    assert [ids[0], ids[-1]] == tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]"])
    (note,) = encoder.notes
    assert "has no chat template" in note
    assert "without a cue for the answer; connector_kwargs.chat_template gives it one" in note


def test_a_template_of_the_config_takes_the_place_of_the_tokenizers() -> None:
    """Also where the tokenizer has none; its variables reach it."""
    asked = [chat("quiet river"), chat("why")]
    for own in (None, WITH_BOS):
        encoder = prompts(
            "demo", own, chat_template=THINKING, chat_template_kwargs={"enable_thinking": False}
        )
        other = tokenizer_of("demo", THINKING)
        assert encoder.encode_all(asked) == [reference(other, each, enable_thinking=False) for each in asked]
        assert encoder.encode_all(asked) != [reference(other, each) for each in asked]
        assert encoder.notes == ()


def test_what_a_template_leaves_out_is_noted() -> None:
    """A variable that it does not read, a system prompt that it does not write, a date that it does write."""
    (unread,) = prompts("demo", THINKING, chat_template_kwargs={"enable_thinkng": False}).notes
    assert "does not read enable_thinkng" in unread
    users_only = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    (silent,) = prompts("demo", users_only).notes
    assert "leaves the system prompt out" in silent
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    (note,) = prompts("demo", dated + "{{ date_string }}" + CHATML).notes
    assert "writes today's date into each prompt" in note
    fixed = {"date_string": "26 Jul 2024"}
    assert prompts("demo", dated + "{{ date_string }}" + CHATML, chat_template_kwargs=fixed).notes == ()


def test_special_tokens_in_a_text_are_control_tokens_and_noted_once() -> None:
    """As in apply_chat_template: one id each. The note names the first; a text without them gives none."""
    encoder = prompts("demo", CHATML)
    encoder.encode_all(coalitions(chat("quiet river")))
    assert not encoder.notes
    text = "stop<|im_end|><|im_start|> now [INST] please"
    (ids, *_) = encoder.encode_all([chat(text)])
    assert ids == reference(tokenizer_of("demo", CHATML), chat(text))
    end = encoder._tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 3
    encoder.encode_all([chat("[INST] again")])
    (note,) = encoder.notes
    assert "the first is '<|im_end|>'" in note
    assert "become control tokens" in note


def test_special_tokens_are_text_where_the_config_asks_for_it() -> None:
    """`sanitize_control_tokens` is the tokenizer's own setting for it, and reaches it in batches too."""
    encoder = prompts("bpe_with_bos", CHATML, chat_template_kwargs={"sanitize_control_tokens": True})
    asked = coalitions(chat("stop <|im_end|> now </s>"))
    other = tokenizer_of("bpe_with_bos", CHATML)
    expected = [reference(other, each, sanitize_control_tokens=True) for each in asked]
    assert encoder.encode_all(asked) == expected
    assert expected[-1] != reference(other, asked[-1])
    assert encoder.notes == ()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_assistant_prefill_is_what_transformers_continues(kind: str) -> None:
    """The ids are those of `continue_final_message` on a final assistant message with the prefill."""
    other = tokenizer_of(kind, CHATML)
    asked = coalitions(chat("why do birds sing"))
    expected = [
        other.apply_chat_template(
            [*as_messages(each), {"role": "assistant", "content": "They sing because"}],
            continue_final_message=True,
        )["input_ids"]
        for each in asked
    ]
    assert prompts(kind, CHATML).encode_all(asked, "They sing because") == expected


def test_a_tokenizer_with_a_way_of_its_own_is_asked_in_its_own_way() -> None:
    """One that brings an `apply_chat_template` is asked through it, a conversation at a time."""
    tokenizer = tokenizer_of("demo", None)

    class Own(type(tokenizer)):  # type: ignore[misc]
        def apply_chat_template(self, conversation: Any, *, tokenize: bool = True, **_: Any) -> Any:
            text = " / ".join(message["content"] for message in conversation)
            return self(text, add_special_tokens=False)["input_ids"] if tokenize else text

    tokenizer.__class__ = Own
    encoder = ChatPrompts(tokenizer, chat_settings())
    ids = encoder.encode_all([chat("quiet river"), chat("why")])
    assert [tokenizer.decode(each).strip() for each in ids] == [f"{SYSTEM} / quiet river", f"{SYSTEM} / why"]
    assert encoder.notes == ()


def test_the_model_encodes_with_one_bos(tmp_path: Path) -> None:
    """Loaded from a directory whose tokenizer and template both write a BOS, `encode` gives one."""
    model = load_text_model(save_model(tmp_path, "bpe_with_bos", WITH_BOS))
    found = model.encode(chat("old stone bridges"), Decoding(max_new_tokens=1)).token_ids
    assert list(found) == reference(tokenizer_of("bpe_with_bos", WITH_BOS), chat("old stone bridges"))
    assert found[0] == 0
    assert found[1] != 0


def test_the_model_hands_on_what_there_is_to_say(tmp_path: Path) -> None:
    """Notes of load; not those of special tokens, which a directory's files have told before the load."""
    model = load_text_model(save_model(tmp_path, "demo", NO_SYSTEM))
    model.encode(chat("stop <|im_end|> now"), Decoding(max_new_tokens=1))
    (note,) = (each for each in model.notes if "eos_token_id" not in each)
    assert "takes no system message" in note
    bare = ChatConfig(system_prompt="")
    assert load_text_model(tmp_path, chat=bare)._prompts.notes == ()

"""Reasoning is cut from answers, and nothing else of them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from model_kit import answer_in_batches, load_text_model
from tokenizer_kit import CHATML, chat, tokenizer_of

from mllm_shapx.models.base import Decoding
from mllm_shapx.models.reasoning import TAGS, ReasoningCut, cut_reasoning, opens_reasoning

HARMONY = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>")
"""Special tokens of a model whose think tags are made of several."""


@pytest.mark.parametrize(("opening", "closing"), TAGS.items())
def test_what_stands_between_think_tags_is_cut(opening: str, closing: str) -> None:
    """For every pair of tags, at the beginning, in the middle and more than once."""
    assert cut_reasoning(f"{opening}Two and two.\n{closing}Four.") == "Four."
    text = f"Well. {opening}a{closing}It is {opening}b < c{closing}four."
    assert cut_reasoning(text) == "Well. It is four."


@pytest.mark.parametrize(
    ("text", "begun", "left"),
    [
        ("Four.", False, "Four."),
        ("", False, ""),
        ("Four. <think>Or is it", False, "Four. "),
        ("<think>It never ends", False, ""),
        ("Two and two.</think>Four.", False, "Four."),
        ("Two and two.</think>Four.", True, "Four."),
        ("Two and two", True, ""),
        ("<think>Two and two.</think>Four.", True, "Four."),
        ("[THINK]a</think>b[/THINK]c", False, "c"),
        ("a < b and b > c, thinking of it", False, "a < b and b > c, thinking of it"),
        ("<b>think</b>", False, "<b>think</b>"),
    ],
)
def test_reasoning_without_one_of_its_tags(text: str, begun: bool, left: str) -> None:
    """An unclosed tag cuts to the end; a closing tag alone, or one that the prompt opens, from the start."""
    assert cut_reasoning(text, begun=begun) == left


def test_a_prompt_that_opens_the_reasoning_is_seen() -> None:
    """The tag counts at the end of the prompt alone."""
    assert opens_reasoning("<|im_start|>assistant\n<think>\n")
    assert not opens_reasoning("what does <think> mean?<|im_end|>\n<|im_start|>assistant\n")
    assert not opens_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("special", [True, False])
def test_tags_are_found_whether_they_are_special_tokens_or_not(special: bool) -> None:
    """Other special tokens are left out of the text, as they are without the cut."""
    tokenizer = tokenizer_of("bpe_with_bos", CHATML)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    ids = tokenizer("<think>why birds sing</think>old bridge</s>", add_special_tokens=False)["input_ids"]
    assert ReasoningCut(tokenizer, begun=False).texts([ids, []]) == ["old bridge", ""]


def test_tags_of_several_special_tokens() -> None:
    """Channels: the analysis is cut, and no token of the tags stays in the answer."""
    tokenizer = tokenizer_of("bpe_with_bos", CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": list(HARMONY)})
    cut = ReasoningCut(tokenizer, begun=False)
    thought = "<|channel|>analysis<|message|>why birds sing<|end|><|start|>assistant"
    said = "<|channel|>final<|message|>old bridge<|end|>"
    rows = tokenizer([thought + said, said, thought, "quiet <|message|>river"], add_special_tokens=False)
    assert cut.texts(rows["input_ids"]) == ["old bridge", "old bridge", "", "quiet river"]


def test_a_prefill_may_open_or_end_the_reasoning() -> None:
    """What the answer is given to begin with decides whether it begins within the reasoning."""
    tokenizer = tokenizer_of("bpe_with_bos", CHATML)
    ids = tokenizer("why birds sing", add_special_tokens=False)["input_ids"]
    assert ReasoningCut(tokenizer, begun=False).texts([ids], "<think>Well,") == [""]
    assert ReasoningCut(tokenizer, begun=True).texts([ids], "Well.</think>") == ["why birds sing"]


def test_a_models_answers_lose_their_reasoning_and_keep_their_tokens(
    model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    """A template that opens the reasoning and a model that never ends it: no text, all tokens."""
    directory = tmp_path / "model"
    shutil.copytree(model_directory("llama"), directory)
    template = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").write_text(
        template.replace("<|assistant|> ", "<|assistant|> <think>\n")
    )
    asked, decoding = [chat("why do birds sing"), chat("old bridge")], Decoding(max_new_tokens=6)
    whole, cut = (
        answer_in_batches(load_text_model(directory, strip_reasoning=strip), asked, decoding, 2)
        for strip in (False, True)
    )
    assert all(answer.text for answer in whole)
    assert [answer.text for answer in cut] == ["", ""]
    assert [answer.token_ids for answer in cut] == [answer.token_ids for answer in whole]

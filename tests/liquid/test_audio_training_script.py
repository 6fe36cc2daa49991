"""The script that trains the audio demo's model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import train_demo_audio_model as script
from demo_audio_task import NEUTRAL, QUESTION, SENTENCES, SYSTEM_PROMPT
from liquid_checkpoint import build_tokenizer


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """Give the process its torch settings back: the script sets threads and determinism."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(mode=False)


@pytest.mark.usefixtures("torch_settings")
def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    """Model, tokenizer and rows hang on the seed alone."""
    found = []
    for name in ("first", "second"):
        folder = tmp_path / name
        options = ["--steps", "2", "--batch-size", "3", "--rows", "2"]
        paths = ["--out-model", str(folder / "model"), "--out-rows", str(folder / "rows.parquet")]
        assert script.main([*options, *paths]) == 1, "two steps teach nothing, and the script says so"
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        found.append({path.relative_to(folder): path.read_bytes() for path in files})
    assert found[0] == found[1]
    assert len(found[0]) == 5


def test_every_word_of_the_task_is_one_token() -> None:
    """Sentences take as many tokens as words, so that answers end within the config's tokens."""
    tokenizer = build_tokenizer(script.vocabulary_words(), script.SIZE.vocabulary)
    for text in [QUESTION, NEUTRAL, *SENTENCES.values()]:
        assert len(tokenizer.encode(text)) == len(text.split())
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(SYSTEM_PROMPT + " Źdźbło?")) == SYSTEM_PROMPT + " Źdźbło?"

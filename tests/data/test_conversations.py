"""Rows to conversations, in every modality, and what is wrong with a row."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from data_kit import local, table_of, tone, wav, write_parquet
from mllm_shap import AudioPart, ConversationSnapshot

from mllm_shapx.config.models import ChatConfig, DatasetConfig, ModalityConfig
from mllm_shapx.config.vocabulary import context_roles
from mllm_shapx.data.conversations import Row, load_row, to_snapshot
from mllm_shapx.data.sources import Table, open_table
from mllm_shapx.errors import DatasetError, RowError

A, B, C = (wav(tone(hertz=hertz), rate) for hertz, rate in ((300, 16_000), (400, 24_000), (500, 8_000)))


def _modality(name: str) -> ModalityConfig:
    return ModalityConfig.model_validate({"input_modality": name})


def _row(table: Table, config: DatasetConfig, modality: str = "text", index: int = 0) -> Row:
    return load_row(table, index, config, _modality(modality))


def _failure(table: Table, config: DatasetConfig, modality: str = "text", index: int = 0) -> RowError:
    with pytest.raises(RowError) as caught:
        _row(table, config, modality, index)
    assert f"row {index}: " in str(caught.value)
    return caught.value


def _said(snapshot: ConversationSnapshot) -> list[tuple[str, Any]]:
    """Role and text, or role and (bytes, rate), of each message."""
    return [
        (
            message.role.value,
            (message.content[0].data(), message.content[0].sample_rate)
            if isinstance(message.content[0], AudioPart)
            else message.text,
        )
        for message in snapshot.messages()
    ]


def test_a_text_row_is_a_system_turn_and_a_user_turn(tmp_path: Path) -> None:
    """The system prompt stands first, in a turn of its own; the user's text follows unchanged."""
    table, config = table_of(tmp_path, prompt=["  Who are  you ?"], language=["fr"])
    row = _row(table, config)
    assert (row.texts, row.recordings, row.language, row.original_language) == (
        ("  Who are  you ?",),
        (None,),
        "fr",
        "unknown",
    )
    snapshot = to_snapshot(row, ChatConfig(system_prompt="Be kind."))
    assert len(snapshot.turns) == 2
    assert _said(snapshot) == [("system", "Be kind."), ("user", "  Who are  you ?")]


def test_an_empty_system_prompt_gives_no_turn(tmp_path: Path) -> None:
    """Without a system prompt the conversation begins with the user."""
    table, config = table_of(tmp_path, prompt=["Hi"])
    snapshot = to_snapshot(_row(table, config), ChatConfig(system_prompt=""))
    assert _said(snapshot) == [("user", "Hi")]


def test_list_valued_text_gives_one_message_per_item(tmp_path: Path) -> None:
    """`sentences` wins over `prompt`; blank items are left out."""
    table, config = table_of(tmp_path, prompt=["no"], sentences=[["One.", " ", None, "Two."]])
    row = _row(table, config)
    assert row.texts == ("One.", "Two.")
    assert len(to_snapshot(row, ChatConfig()).turns) == 3


def test_columns_are_mapped(tmp_path: Path) -> None:
    """Text and languages come from the mapped columns; numbers become text."""
    table, config = table_of(tmp_path, q=["Hi"], lang=[7], orig=[None])
    mapped = local(
        config.path or "",
        column_mapping={"text": "q", "language": "lang", "original_language": "orig"},
    )
    row = _row(table, mapped)
    assert (row.texts, row.language, row.original_language) == (("Hi",), "7", "unknown")
    wrong = local(config.path or "", column_mapping={"text": "q", "language": "langs"})
    with pytest.raises(DatasetError, match=r"'langs'.*did you mean 'lang'.*column_mapping\.language"):
        _row(table, wrong)
    usual = local(config.path or "", column_mapping={"text": "q", "language": "language"})
    assert _row(table, usual).language == "unknown"


@pytest.mark.parametrize(
    ("modality", "columns"),
    [
        ("audio__male", ["audio__male"]),
        ("audio__female", ["audio__female"]),
        ("audio__original", ["audio__original"]),
        ("audio__original", ["audio"]),
        ("audio__male", ["audio_male"]),
    ],
)
def test_a_spoken_row_takes_the_column_of_its_voice(
    tmp_path: Path, modality: str, columns: list[str]
) -> None:
    """Each audio modality reads its voice's column, with the recording's own rate."""
    data = {"sentences": [["Hello."]], "audio__other": [[A]], **{name: [[B]] for name in columns}}
    table, config = table_of(tmp_path, **data)
    row = _row(table, config, modality)
    assert (row.texts, row.recordings, row.sample_rates) == (("Hello.",), (B,), (24_000,))
    said = _said(to_snapshot(row, ChatConfig()))
    assert said[1] == ("user", (B, 24_000))


def test_a_missing_audio_column_names_the_mapping(tmp_path: Path) -> None:
    """A voice that the dataset lacks is no reason to take another; the key to set is named."""
    table, config = table_of(tmp_path, prompt=["x"], audio=[A])
    with pytest.raises(DatasetError, match=r"audio__male.*prompt, audio.*column_mapping\.audio"):
        _row(table, config, "audio__male")
    mapped = local(config.path or "", column_mapping={"audio": "audio"})
    assert _row(table, mapped, "audio__male").recordings == (A,)


@pytest.mark.parametrize(
    ("modality", "spoken"),
    [
        ("interleaved__text_first__male", [None, B, None]),
        ("interleaved__audio_first__male", [A, None, C]),
    ],
)
def test_interleaved_rows_alternate(tmp_path: Path, modality: str, spoken: list[bytes | None]) -> None:
    """Text first: even pieces are written, odd ones spoken; audio first the other way round."""
    table, config = table_of(tmp_path, sentences=[["One.", "Two.", "Three."]], audio__male=[[A, B, C]])
    row = _row(table, config, modality)
    assert list(row.recordings) == spoken
    assert row.texts == ("One.", "Two.", "Three.")
    said = _said(to_snapshot(row, ChatConfig()))[1:]
    for (_, piece), sentence, recording in zip(said, row.texts, spoken, strict=True):
        assert piece == sentence if recording is None else piece[0] == recording


def test_recordings_that_are_not_spoken_may_be_missing(tmp_path: Path) -> None:
    """An interleaved row needs the recordings of its spoken pieces only."""
    table, config = table_of(tmp_path, sentences=[["One.", "Two."]], audio__male=[[None, B]])
    assert _row(table, config, "interleaved__text_first__male").recordings == (None, B)
    failure = _failure(table, config, "interleaved__audio_first__male")
    assert failure.reason == "no_audio"
    assert "recording 1 of 2" in str(failure)


def test_a_blank_sentence_goes_with_its_recording(tmp_path: Path) -> None:
    """Blank sentences do not shift recordings against texts."""
    table, config = table_of(tmp_path, sentences=[["One.", "", "Three."]], audio__male=[[A, B, C]])
    row = _row(table, config, "audio__male")
    assert (row.texts, row.recordings) == (("One.", "Three."), (A, C))


def test_audio_needs_no_text(tmp_path: Path) -> None:
    """A dataset of recordings alone can be explained; transcripts are then empty."""
    table, config = table_of(tmp_path, audio__original=[[A, B]])
    row = _row(table, config, "audio__original")
    assert (row.texts, row.sample_rates) == (("", ""), (16_000, 24_000))


def test_a_transcript_stands_beside_its_recording_when_asked(tmp_path: Path) -> None:
    """An aligning partition gets the words in the message of the recording."""
    table, config = table_of(tmp_path, sentences=[["Hello there."]], audio__male=[[A]])
    row = _row(table, config, "audio__male")
    message = to_snapshot(row, ChatConfig(), with_transcripts=True).messages()[1]
    assert message.text == "Hello there."
    assert isinstance(message.content[1], AudioPart)
    assert to_snapshot(row, ChatConfig()).messages()[1].text == ""


def test_recordings_as_audio_features_and_paths(tmp_path: Path) -> None:
    """Bytes, `datasets` Audio features with bytes or a path, sample arrays and plain paths are read."""
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/a.wav").write_bytes(A)
    cells: list[Any] = [
        {"bytes": A, "path": "elsewhere.wav"},
        {"bytes": None, "path": "clips/a.wav"},
        {"bytes": None, "path": str(tmp_path / "clips/a.wav")},
    ]
    table, config = table_of(tmp_path, prompt=["x"] * 3, audio__male=cells)
    assert [_row(table, config, "audio__male", index).recordings for index in range(3)] == [(A,)] * 3

    table, config = table_of(tmp_path, prompt=["x"], audio__male=["clips/a.wav"])
    assert _row(table, config, "audio__male").recordings == (A,)

    (tmp_path / "rows.csv").write_text("prompt,audio__male\nx,clips/a.wav\ny,\n")
    config = local(tmp_path / "rows.csv")
    table = open_table(config, None)
    assert _row(table, config, "audio__male").recordings == (A,)
    assert _failure(table, config, "audio__male", 1).reason == "no_audio"

    samples = {"array": tone().tolist(), "sampling_rate": 16_000}
    table, config = table_of(tmp_path, prompt=["x"], audio__male=[samples])
    assert _row(table, config, "audio__male").sample_rates == (16_000,)


@pytest.mark.parametrize(
    ("columns", "modality", "reason", "words"),
    [
        ({"prompt": [None]}, "text", "no_text", "no text"),
        ({"prompt": [" \n"]}, "text", "no_text", "no text"),
        ({"sentences": pa.array([[]], pa.list_(pa.string()))}, "text", "no_text", "no text"),
        ({"sentences": pa.array([None], pa.list_(pa.string()))}, "text", "no_text", "no text"),
        ({"prompt": [[{"role": "user"}]]}, "text", "bad_text", "neither text"),
        (
            {"prompt": ["x"], "audio__male": pa.array([None], pa.binary())},
            "audio__male",
            "no_audio",
            "missing",
        ),
        ({"prompt": ["x"], "audio__male": [b"junk" * 50]}, "audio__male", "bad_audio", "cannot be decoded"),
        ({"prompt": ["x"], "audio__male": [b""]}, "audio__male", "empty_audio", "no bytes"),
        ({"prompt": ["x"], "audio__male": ["lost.wav"]}, "audio__male", "no_audio", "lost.wav"),
        ({"prompt": ["x"], "audio__male": [12]}, "audio__male", "bad_audio", "int"),
        (
            {"sentences": [["x", "y"]], "audio__male": [[A]]},
            "audio__male",
            "audio_text_mismatch",
            "2 sentence",
        ),
        ({"prompt": ["x"], "audio__male": [wav(tone() * 0)]}, "audio__male", "silent_audio", "silent"),
        (
            {"prompt": [None], "audio__male": pa.array([[None]], pa.list_(pa.binary()))},
            "audio__male",
            "no_audio",
            "no recording",
        ),
        ({"prompt": [None], "audio__male": [[A]]}, "interleaved__audio_first__male", "no_text", "no text"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(
    tmp_path: Path, columns: dict[str, Any], modality: str, reason: str, words: str
) -> None:
    """Each defect has a stable reason and the row's number in its message."""
    table, config = table_of(tmp_path, **columns)
    failure = _failure(table, config, modality)
    assert failure.reason == reason
    assert words in str(failure)


def test_context_roles_follow_the_setup() -> None:
    """system_roles_setup says which roles are never players."""
    roles = {setup: context_roles(setup) for setup in ("SYSTEM", "ASSISTANT", "SYSTEM_ASSISTANT")}
    assert roles == {
        "SYSTEM": {"system"},
        "ASSISTANT": {"assistant"},
        "SYSTEM_ASSISTANT": {"system", "assistant"},
    }


def test_equal_rows_have_equal_snapshots(tmp_path: Path) -> None:
    """A conversation's id hangs on its content alone, so it is the same in every process."""
    table, config = table_of(tmp_path, prompt=["x", "x", "y"])
    ids = [to_snapshot(_row(table, config, index=i), ChatConfig()).snapshot_id for i in range(3)]
    assert ids[0] == ids[1] != ids[2]


def test_a_row_beyond_the_end_is_a_dataset_error(tmp_path: Path) -> None:
    """A row that the dataset lacks (it shrank since) is said with the dataset's size."""
    path = write_parquet(tmp_path / "t.parquet", {"prompt": ["x"]})
    with pytest.raises(DatasetError, match="no row 5; it has 1 rows"):
        _row(open_table(local(path), None), local(path), index=5)

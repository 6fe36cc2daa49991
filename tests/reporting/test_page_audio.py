"""Recordings in the report: each once, with its segments' places, up to a limit."""

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from browser import data_of
from click.testing import CliRunner
from results_on_disk import make_sample, text_entry, write_study

from mllm_shapx.cli import main
from mllm_shapx.data.audio import encode_wav
from mllm_shapx.records.results import AUDIO, USER, AudioPiece, ConversationEntry
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.storage import open_storage
from mllm_shapx.reporting.html import PageSettings, report

RATE = 16_000


def tone(seconds: float, hertz: float) -> bytes:
    waves = np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)
    return encode_wav(0.5 * waves * np.linspace(0.0, 1.0, len(waves)), RATE)


def speak(study: Path, run: str, row: int, recordings: list[bytes], **more: Any) -> None:
    """Give a row a written message and then one spoken message of two segments for each recording."""
    names = [f"audio/sample_{row:05d}/input_{place + 2:02d}.wav" for place in range(len(recordings))]
    turns = [(text_entry(USER, ["listen"], [0.2]),)]
    for recording in recordings:
        half = len(soundfile.read(io.BytesIO(recording))[0])  # bytes of half of it, two for each sample
        turns.append(
            (
                ConversationEntry(
                    AUDIO, (USER, USER), (AudioPiece(half), AudioPiece(half, "bell")), (0.5, -0.3)
                ),
            )
        )
    inputs = [
        {
            "path": name,
            "message_index": place + 2,
            "sample_rate": RATE,
            "seconds": 1.0,
            "num_bytes": len(content),
        }
        for place, (name, content) in enumerate(zip(names, recordings, strict=True))
    ]
    sample = replace(
        make_sample(run, row),
        conversation=tuple(turns),
        input_modality="interleaved__text_first__male",
        audio_artifacts={"inputs": inputs, "answer": None},
        num_players=1 + 2 * len(recordings),
        audio_files=dict(zip(names, recordings, strict=True)),
    )
    RunRecords(open_storage(str(study)), run).write_sample(replace(sample, **more))


def page(study: Path, output: Path, **settings: Any) -> Any:
    return data_of(report(str(study), output, settings=PageSettings(**settings)).read_text("utf-8"))


def test_a_recording_of_several_runs_is_held_once_with_its_outline(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", [0, 1], runs={"exact": 0.0, "mc": 0.1})
    low, high = tone(1.0, 100), tone(0.5, 400)
    for run in ("exact", "mc"):
        speak(study, run, 0, [low, high])
        speak(study, run, 1, [high])
    data = page(study, tmp_path / "page.html")
    assert [base64.b64decode(each["u"]) for each in data["recordings"]] == [low, high]
    assert [each["d"] for each in data["recordings"]] == [1.0, 0.5]
    levels = data["recordings"][0]["k"]
    # The tone grows evenly from silence to its loudest.
    assert (len(levels), max(levels)) == (240, 99)
    assert abs(levels[120] - 50) <= 2
    first, second = data["rows"]
    assert (first["m"], len(first["p"])) == ("interleaved__text_first__male", 1)
    assert [first["p"][0]["a"], second["p"][0]["a"]] == [[0, 1], [1]]
    segments = [piece for piece in first["p"][0]["t"] if len(piece) > 3]
    assert segments == [[None, 1, 1, 0.5], ["bell", 1, 0, 0.5], [None, 1, 1, 0.25], ["bell", 1, 0, 0.25]]


def test_a_spoken_answer_is_held_too(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", [0], runs={"exact": 0.0})
    said = tone(0.3, 200)
    path = "audio/sample_00000/answer.wav"
    artifacts = {
        "inputs": [],
        "answer": {"path": path, "num_frames": 3, "codebooks": 8, "num_bytes": len(said)},
    }
    sample = replace(make_sample("exact", 0), audio_artifacts=artifacts, audio_files={path: said})
    RunRecords(open_storage(str(study)), "exact").write_sample(sample)
    data = page(study, tmp_path / "page.html")
    assert base64.b64decode(data["recordings"][data["rows"][0]["r"][0]["k"]]["u"]) == said


def test_recordings_beyond_the_limit_are_counted(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", range(4), runs={"exact": 0.0})
    for row in range(4):
        speak(study, "exact", row, [tone(1.0, 100 + row)])
    data = page(study, tmp_path / "page.html", most_sound=70_000)
    assert len(data["recordings"]) == 2
    assert [row["p"][0]["a"] for row in data["rows"]] == [[0], [1], [None], [None]]
    assert "The page takes 0.07 MB of recordings: 2 more are left out" in data["notes"][0]
    call = ["report", str(study), "--audio-limit", "0", "--output", str(tmp_path / "silent.html")]
    assert CliRunner().invoke(main, call).exit_code == 0
    assert data_of((tmp_path / "silent.html").read_text("utf-8"))["recordings"] == []


def test_a_broken_or_foreign_recording_is_left_out(tmp_path: Path) -> None:
    """A sample's file cannot make the page hold a file of another place."""
    study = write_study(tmp_path / "study", range(3), runs={"exact": 0.0})
    (tmp_path / "secret.wav").write_bytes(tone(0.1, 50))
    for row, path in ((0, "../../secret.wav"), (1, "audio/nothing.wav"), (2, "audio/broken.wav")):
        about = {"path": path, "sample_rate": RATE, "seconds": 1.0}
        speak(study, "exact", row, [tone(0.2, 100)], audio_artifacts={"inputs": [about], "answer": None})
    (study / "exact" / "audio" / "broken.wav").write_bytes(b"RIFF and nothing else")
    data = page(study, tmp_path / "page.html")
    assert data["recordings"] == []
    assert [row["p"][0]["a"] for row in data["rows"]] == [[None]] * 3
    assert "2 recording(s) cannot be read and are left out." in data["notes"]


def test_two_recordings_of_one_message_each_have_their_sound(tmp_path: Path) -> None:
    """As other runners write them: one entry for each recording of a message."""
    study = write_study(tmp_path / "study", [0], runs={"exact": 0.0})
    low, high = tone(1.0, 100), tone(0.5, 400)
    names = ["audio/sample_00000/a.wav", "audio/sample_00000/b.wav"]
    spoken = [
        ConversationEntry(AUDIO, (USER, USER), (AudioPiece(size), AudioPiece(size, "bell")), (0.5, -0.3))
        for size in (RATE, RATE // 2)
    ]
    sample = replace(
        make_sample("exact", 0),
        conversation=((text_entry(USER, ["listen"], [0.2]), *spoken),),
        audio_artifacts={"inputs": [{"path": name, "sample_rate": RATE} for name in names], "answer": None},
        num_players=5,
        audio_files=dict(zip(names, (low, high), strict=True)),
    )
    RunRecords(open_storage(str(study)), "exact").write_sample(sample)
    (row,) = page(study, tmp_path / "page.html")["rows"]
    assert row["p"][0]["a"] == [0, 1]
    assert row["p"][0]["t"] == [
        ["listen", 1, 0],
        [None, 1, 1, 0.5],
        ["bell", 1, 0, 0.5],
        [None, 1, 1, 0.25],
        ["bell", 1, 0, 0.25],
    ]

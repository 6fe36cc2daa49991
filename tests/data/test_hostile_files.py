"""Datasets and recordings that are damaged, odd or made to exhaust the machine: a reason, and soon."""

import contextlib
import io
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from data_kit import TEXT, local, select, tone, wav, write_parquet

from mllm_shapx.config.models import DatasetConfig, ModalityConfig
from mllm_shapx.data import table as table_module
from mllm_shapx.data.audio import MOST_SECONDS, check_recording, decode
from mllm_shapx.data.conversations import load_row
from mllm_shapx.data.sources import open_table
from mllm_shapx.data.table import MOST_ROWS, ScanNotice
from mllm_shapx.errors import DatasetError, RowError


def csv_table(folder: Path, content: str | bytes) -> tuple[Any, DatasetConfig]:
    path = folder / "rows.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    config = local(path)
    return open_table(config, None), config


def parquet_table(folder: Path, **columns: Any) -> tuple[Any, DatasetConfig]:
    config = local(write_parquet(folder / "rows.parquet", columns))
    return open_table(config, None), config


def reason(table: Any, config: DatasetConfig, row: int = 0, modality: ModalityConfig = TEXT) -> str:
    with pytest.raises(RowError) as caught:
        load_row(table, row, config, modality)
    return caught.value.reason


@pytest.mark.parametrize(
    "column",
    [
        pa.array([float("nan"), 1.5]),
        pa.array(["nan", "a b"]),
        pa.array([" NaN ", "a b"]),
        pa.array([["nan", None], ["a"]]),
        pa.array([[float("nan")], [1.0]]),
    ],
    ids=["number", "text", "blanks", "list", "list of numbers"],
)
def test_nan_is_no_prompt(tmp_path: Path, column: pa.Array) -> None:
    """A missing value that a tool wrote as NaN is a row without text, and has no player to select it by."""
    table, config = parquet_table(tmp_path, prompt=column)
    assert reason(table, config) == "no_text"
    assert select(table, config, min_prompt_tokens=1).rows == (1,)


def test_nan_in_a_csv_cell_is_a_missing_value(tmp_path: Path) -> None:
    table, config = csv_table(tmp_path, "prompt,score\nNaN,1\none two,nan\nnan,3\n")
    assert [reason(table, config, row) for row in (0, 2)] == ["no_text", "no_text"]
    assert load_row(table, 1, config, TEXT).texts == ("one two",)
    assert table.column("score") == [1, None, 3]


def test_words_that_hold_nan_are_prompts(tmp_path: Path) -> None:
    table, config = csv_table(tmp_path, "prompt\nmy nan says hello\nbanana\nNAN!\n")
    assert [load_row(table, row, config, TEXT).texts[0] for row in range(3)] == [
        "my nan says hello",
        "banana",
        "NAN!",
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_quote_that_is_never_closed_is_refused_with_its_line(tmp_path: Path, end: str) -> None:
    """Without a refusal one value takes in all rows that follow."""
    lines = ["prompt,language", "one,en", 'two,"en', *(f"row {place},en" for place in range(20))]
    with pytest.raises(DatasetError, match=r"begins in line 3 is never closed, and the 21 line\(s\)"):
        csv_table(tmp_path, end.join(lines) + end)


def test_a_header_with_an_open_quote_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="line 1 is never closed"):
        csv_table(tmp_path, '"prompt,language\none,en\n')


NO_TEXT = {
    "program": b"\x7fELF\x02\x01\x01\0\0\0\n\xff\xfe\n",
    "random": random.Random(3).randbytes(5000),
    "zeros": b"\0" * 100,
    "lone surrogate": "prompt\n\ud800".encode("utf-8", "surrogatepass"),
}


def opened_and_selected(folder: Path, content: bytes) -> None:
    table, config = csv_table(folder, content)
    select(table, config)


@pytest.mark.parametrize("kind", NO_TEXT)
def test_a_csv_that_is_no_text_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DatasetError, match=r"rows\.csv"):
        opened_and_selected(tmp_path, NO_TEXT[kind])


def test_a_column_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    batch = pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(batch, tmp_path / "rows.parquet")
    with pytest.raises(DatasetError, match="names a column twice: prompt"):
        open_table(local(tmp_path / "rows.parquet"), None)
    with pytest.raises(DatasetError, match="names a column twice: prompt"):
        csv_table(tmp_path, "prompt,prompt\na,b\n")


def test_one_text_that_is_not_utf8_costs_its_row_alone(tmp_path: Path) -> None:
    data = b"one two\xff\xfethree four five"
    offsets = b"".join(place.to_bytes(4, "little") for place in (0, 7, 9, len(data)))
    column = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(offsets), pa.py_buffer(data)])
    table, config = parquet_table(tmp_path, prompt=column)
    assert select(table, config).players == {0: 2, 1: 0, 2: 3}
    assert reason(table, config, 1) == "unreadable_row"
    assert load_row(table, 2, config, TEXT).texts == ("three four five",)
    assert [isinstance(row, RowError) for _, row in table.some_rows([0, 1, 2], ["prompt"])] == [
        False,
        True,
        False,
    ]


ODD = {
    "half": pa.array([1.5, 2.5]).cast(pa.float16()),
    "uint64": pa.array([2**64 - 1, 1], pa.uint64()),
    "decimal": pa.array(["1.25", "2.5"]).cast(pa.decimal128(10, 2)),
    "decimal256": pa.array(["1.25", "2.5"]).cast(pa.decimal256(50, 2)),
    "time": pa.array([1, 2], pa.int64()).cast(pa.time64("ns")),
    "duration": pa.array([1, 2], pa.int64()).cast(pa.duration("ns")),
    "timestamp": pa.array([2**61, 2], pa.int64()).cast(pa.timestamp("ns", "No/Where")),
    "binary": pa.array([b"a", b"\xff"]),
    "fixed binary": pa.array([b"ab", b"cd"], pa.binary(2)),
    "string view": pa.array(["a", "b"]).cast(pa.string_view()),
    "large string": pa.array(["a", "b"]).cast(pa.large_string()),
    "dictionary": pa.array(["a", "b"]).dictionary_encode(),
    "run ends": pa.RunEndEncodedArray.from_arrays([2], ["a"]),
    "list": pa.array([["a"], ["b"]]),
    "struct": pa.array([{"a": 1}, {"a": 2}]),
    "map": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
    "null": pa.nulls(2),
}


@pytest.mark.parametrize("value", ["a", 1, 1.5, True, None, 10**30, ["a"], {"a": 1}], ids=repr)
@pytest.mark.parametrize("op", ["==", "<", "in", "between"])
@pytest.mark.parametrize("kind", ODD)
def test_a_filter_on_an_unusual_type_compares_or_says_why_not(kind: str, op: str, value: Any) -> None:
    from mllm_shapx.config.models import RowFilter
    from mllm_shapx.data.filters import passes

    given = [value, value] if op in {"in", "between"} else value
    row_filter = RowFilter.model_validate({"column": "x", "op": op, "value": given})
    try:
        mask = passes(ODD[kind], row_filter, 0, "rows.parquet")
    except DatasetError as error:
        said = str(error)
    else:
        said = f"rows.parquet: selection.filters[0] (x: {mask.shape}"
        assert mask.shape == (2,)
    assert said.startswith("rows.parquet: selection.filters[0] (x")


@pytest.mark.parametrize("kind", ["string view", "large string", "dictionary", "run ends"])
def test_a_filter_finds_text_in_every_encoding(kind: str) -> None:
    from mllm_shapx.config.models import RowFilter
    from mllm_shapx.data.filters import passes

    row_filter = RowFilter.model_validate({"column": "x", "op": "==", "value": "a"})
    assert passes(ODD[kind], row_filter, 0, "rows")[0]


@pytest.mark.parametrize("kind", sorted(ODD.keys() - {"run ends"}))
def test_a_text_column_of_any_type_is_explained_or_refused(tmp_path: Path, kind: str) -> None:
    table, config = parquet_table(tmp_path, prompt=ODD[kind])
    if kind in {"binary", "fixed binary", "struct", "map"}:
        with pytest.raises(DatasetError, match=r"dataset\.column_mapping\.text"):
            select(table, config)
    elif kind == "null":
        assert reason(table, config) == "no_text"
    elif kind == "timestamp":
        assert select(table, config).rows == (0, 1)
        assert reason(table, config) == "unreadable_row"
    else:
        assert load_row(table, 0, config, TEXT).texts


def test_a_parquet_of_too_many_rows_is_refused_before_any_is_read(tmp_path: Path) -> None:
    """A few kB hold a constant column of any length."""
    path = tmp_path / "rows.parquet"
    index = pa.array(np.zeros(MOST_ROWS + 1, dtype=np.int8))
    pq.write_table(
        pa.table({"prompt": pa.DictionaryArray.from_arrays(index, ["a b"])}), path, compression="zstd"
    )
    assert path.stat().st_size < 100_000
    with pytest.raises(DatasetError, match="10,000,001 rows, and at most 10,000,000 are taken"):
        open_table(local(path), None)


def test_rows_count_over_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "MOST_ROWS", 5)
    for name in ("a", "b"):
        write_parquet(tmp_path / f"{name}.parquet", {"prompt": ["x"] * 3})
        (tmp_path / f"{name}.csv").write_text("prompt\nx\ny\nz\n")
    for pattern in ("*.parquet", "*.csv"):
        with pytest.raises(DatasetError, match="has 6 rows, and at most 5 are taken"):
            open_table(local(tmp_path / pattern), None)


def test_a_long_scan_says_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    at = iter([0.0, 1.0, 6.0, 6.0, 7.0, 12.0, 12.0])
    notice = ScanNotice("rows\x1b[31m", 1_000_000, clock=lambda: next(at))
    for done in (10, 400_000, 500_000, 900_000):
        notice.show(done)
    assert capsys.readouterr().err.splitlines() == [
        "rows\\x1b[31m: 400,000 of 1,000,000 rows looked at",
        "rows\\x1b[31m: 900,000 of 1,000,000 rows looked at",
    ]


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_pipe_or_device_is_not_waited_for(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(DatasetError, match="is a pipe or a device"):
        open_table(local(path), None)


def constant(seconds: float, rate: int, channels: int) -> bytes:
    buffer = io.BytesIO()
    block = np.full((rate, channels), 0.25, dtype=np.float32)
    with soundfile.SoundFile(buffer, "w", rate, channels, format="FLAC", subtype="PCM_16") as stream:
        for _ in range(int(seconds)):
            stream.write(block)
    return buffer.getvalue()


def test_a_recording_that_is_too_long_is_refused_before_it_is_decoded() -> None:
    """Constant sound packs a thousand times: decoded, this file is 230 MB."""
    data = constant(MOST_SECONDS + 1, 48_000, 2)
    assert len(data) < 1_000_000
    tracemalloc.start()
    try:
        with pytest.raises(RowError, match=r"601 s long, and at most 600 s are taken") as caught:
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert caught.value.reason == "long_audio"


def test_channels_are_averaged_block_by_block() -> None:
    """Eight channels of two minutes take the memory of one channel and a block."""
    data = constant(120, 16_000, 8)
    tracemalloc.start()
    try:
        waveform, rate = decode(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (len(waveform), rate) == (120 * 16_000, 16_000)
    assert np.allclose(waveform, 0.25, atol=1e-4)
    assert peak < 3 * waveform.nbytes


def test_a_header_that_promises_more_than_there_is_costs_nothing() -> None:
    data = bytearray(wav(tone(0.1)))
    data[40:44] = (2**31 - 2).to_bytes(4, "little")
    tracemalloc.start()
    try:
        with contextlib.suppress(RowError):
            assert check_recording(bytes(data)) == 16_000
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("rate", [0, 1, 2**31 - 1])
def test_a_rate_that_no_recording_has_is_refused(rate: int) -> None:
    data = bytearray(wav(tone(0.1)))
    data[24:28] = rate.to_bytes(4, "little")
    with pytest.raises(RowError) as caught:
        check_recording(bytes(data))
    assert caught.value.reason in {"bad_audio", "long_audio"}


@pytest.mark.parametrize(
    ("recording", "expected"),
    [
        ({"bytes": 10**10, "path": None}, "no_audio"),
        ({"bytes": None, "path": "a\0b"}, "no_audio"),
        ({"bytes": None, "path": "~nobody-has-this-name/a.wav"}, "no_audio"),
        ({"bytes": None, "path": "x" * 5000}, "no_audio"),
        ({"bytes": None, "path": "/dev/zero"}, "bad_audio"),
        ({"array": [0.1, 0.2], "sampling_rate": 2**40}, "bad_audio"),
        ({"array": [0.1, 0.2], "sampling_rate": -1}, "bad_audio"),
    ],
)
def test_a_recording_that_cannot_be_one_costs_its_row(
    tmp_path: Path, recording: dict[str, Any], expected: str
) -> None:
    table, config = parquet_table(tmp_path, prompt=["a"], audio=pa.array([recording]))
    modality = ModalityConfig(input_modality="audio__original")
    assert reason(table, config, 0, modality) == expected

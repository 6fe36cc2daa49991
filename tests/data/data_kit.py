"""What the data tests share: small tables on disk and recordings."""

import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mllm_shapx.config.models import DatasetConfig, ModalityConfig, SelectionConfig
from mllm_shapx.config.vocabulary import TokenFilter
from mllm_shapx.data.selection import Selection, select_rows
from mllm_shapx.data.sources import Table, open_table
from mllm_shapx.planning.players import PlayerRule

TEXT = ModalityConfig()


def write_parquet(path: Path, columns: dict[str, Any], *, rows_per_group: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group)
    return path


def parquet_bytes(columns: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def local(path: Path | str, **settings: Any) -> DatasetConfig:
    source = "local_csv" if str(path).endswith(".csv") else "local_parquet"
    return DatasetConfig.model_validate({"source": source, "path": str(path), **settings})


def table_of(tmp_path: Path, **columns: Any) -> tuple[Table, DatasetConfig]:
    config = local(write_parquet(tmp_path / "rows.parquet", columns))
    return open_table(config, None), config


def select(
    table: Table,
    config: DatasetConfig,
    *,
    modality: str = "text",
    token_filter: TokenFilter = "exclude_punctuation",  # noqa: S107
    **selection: Any,
) -> Selection:
    return select_rows(
        table,
        config,
        SelectionConfig.model_validate({"shuffle_seed": None, **selection}),
        ModalityConfig.model_validate({"input_modality": modality}),
        PlayerRule(token_filter),
    )


def tone(seconds: float = 0.1, rate: int = 16_000, hertz: float = 440.0) -> NDArray[np.float32]:
    time = np.arange(int(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def wav(samples: NDArray[Any], rate: int = 16_000, *, width: int = 2) -> bytes:
    """WAV bytes by the standard library: shape (frames,) or (frames, channels), full scale 1."""
    frames = samples if samples.ndim > 1 else samples[:, None]
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as stream:
        stream.setnchannels(frames.shape[1])
        stream.setsampwidth(width)
        stream.setframerate(rate)
        scaled = (frames * 127 + 128).astype(np.uint8) if width == 1 else (frames * 32767).astype("<i2")
        stream.writeframes(scaled.tobytes())
    return buffer.getvalue()

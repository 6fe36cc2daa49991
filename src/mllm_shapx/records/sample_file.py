"""The shape of a sample's file, checked in full as fast as it can be parsed."""

import math
from functools import lru_cache
from typing import Annotated, Any, Literal, NotRequired, TypedDict, cast

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

MOST_ROW = (1 << 53) - 1
"""The largest row index: what a float holds exactly, so that every reader of JSON agrees on it."""

# Strict: "3" is no number. NaN is no JSON. Unknown fields are welcome: later versions add some.
_CONFIG = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")

# Sums, squares and products of them must not overflow; no similarity comes near the bound.
Real = Annotated[float, Field(ge=-1e100, le=1e100)]
Whole = Annotated[int, Field(ge=0, le=MOST_ROW)]


class AudioPieceFile(TypedDict):
    """A piece of audio: its length, and the word that it speaks where that is known."""

    __pydantic_config__ = _CONFIG  # type: ignore[misc]

    num_bytes: Whole
    text: NotRequired[str | None]


class EntryFile(TypedDict):
    """One entry of a turn."""

    __pydantic_config__ = _CONFIG  # type: ignore[misc]

    content_type: Literal[0, 1]
    roles: list[Literal[0, 1, 2]]
    content: list[str | AudioPieceFile]
    shap_values: list[Real | None] | None


class AttributionFile(TypedDict):
    """The share of each modality."""

    __pydantic_config__ = _CONFIG  # type: ignore[misc]

    abs_sum_text: Real | None
    abs_sum_audio: Real | None
    frac_text: Real | None
    frac_audio: Real | None
    count_text_tokens: Whole
    count_audio_segments: Whole


class SampleFile(TypedDict):
    """`samples/sample_*_result.json` (docs/formats.md), as `parse_sample` and `check_sample` return it.

    What the older runner's files lack is filled in; in files of this package it must be there.
    """

    __pydantic_config__ = _CONFIG  # type: ignore[misc]

    schema_version: NotRequired[Whole]

    row_index: Whole
    language: str
    original_language: str
    runtime_sec: Real
    n_calls: Whole
    model_calls: NotRequired[Whole]
    prompt_texts: list[str]
    input_modality: str
    output_modality: str
    attr_summary: AttributionFile
    conversation: list[list[EntryFile]]
    base_value: NotRequired[Real | None]
    grand_value: NotRequired[Real | None]
    values_sum: NotRequired[Real | None]
    response: NotRequired[str]
    seed: NotRequired[Whole | None]
    num_players: NotRequired[Whole]
    raw_values: NotRequired[list[Real | None]]
    neyman_steps: NotRequired[Whole | None]
    distinct_answers: NotRequired[Whole | None]
    audio_artifacts: NotRequired[dict[str, Any] | None]
    num_levels: NotRequired[Whole | None]
    row_digest: NotRequired[str]
    environment: NotRequired[str]
    tokens_in: NotRequired[Whole]
    tokens_out: NotRequired[Whole]


def parse_sample(data: bytes) -> SampleFile:
    """Return the content of a sample's file.

    Raises:
        ValueError: When it is not JSON, or a field is missing or of the wrong type; the message names it.
    """
    if not data.strip(b" \t\r\n\0"):
        raise ValueError("it is empty")
    try:
        return _complete(_consistent(_adapter().validate_json(data)))
    except ValidationError as error:
        raise ValueError(_in_words(error)) from error


def check_sample(data: Any) -> SampleFile:
    """Return a sample's JSON data once it is known to fit.

    Raises:
        ValueError: When a field is missing or of the wrong type; the message names it.
    """
    try:
        return _complete(_consistent(_adapter().validate_python(data)))
    except ValidationError as error:
        raise ValueError(_in_words(error)) from error


def nan_for_null(value: float | None) -> float:
    """Return the number that null stands for in a file: NaN, which JSON does not know."""
    return math.nan if value is None else value


@lru_cache(maxsize=1)
def _adapter() -> TypeAdapter[SampleFile]:
    return TypeAdapter(SampleFile)


def _consistent(sample: SampleFile) -> SampleFile:
    for turn in sample["conversation"]:
        for entry in turn:
            pieces, values = len(entry["content"]), entry["shap_values"]
            if len(entry["roles"]) != pieces or (values is not None and len(values) != pieces):
                raise ValueError("conversation: an entry's roles, content and shap_values differ in length")
    return sample


_OURS = ("base_value", "grand_value", "values_sum", "response", "seed", "num_players")
"""Fields that every file with a `schema_version` has, and the older runner's have not."""


def _complete(sample: SampleFile) -> SampleFile:
    """Return the sample with the fields that the older runner does not write."""
    if "schema_version" in sample:
        missing = next((field for field in _OURS if field not in sample), None)
        if missing is not None:
            raise ValueError(f"it lacks the field {missing}")
        return sample if "model_calls" in sample else {**sample, "model_calls": sample["n_calls"]}
    counts = sample["attr_summary"]
    unknown: dict[str, Any] = {
        "model_calls": sample["n_calls"],
        "base_value": None,
        "grand_value": None,
        "values_sum": None,
        "response": _answer(sample),
        "seed": None,
        "num_players": counts["count_text_tokens"] + counts["count_audio_segments"],
    }
    return cast("SampleFile", {**unknown, **sample})


def _answer(sample: SampleFile) -> str:
    """Return the text of the last turn, which is the model's answer."""
    turn = sample["conversation"][-1] if sample["conversation"] else []
    return "".join(piece for entry in turn for piece in entry["content"] if isinstance(piece, str))


def _in_words(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "json_invalid":
        return f"it is not JSON ({first['msg'].removeprefix('Invalid JSON: ')})"
    if first["type"] == "missing":
        return f"it lacks the field {where}"
    return f"{where or 'it'}: {first['msg']}"

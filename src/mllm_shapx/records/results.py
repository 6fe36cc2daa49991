"""One row explained by one run: `samples/sample_*_result.json` (docs/formats.md)."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from mllm_shapx.records.fields import STRICT, AllKnown, Known, Real, Whole, in_file, in_words
from mllm_shapx.records.measures import Faithfulness, Interactions
from mllm_shapx.records.storage import refuse_deep

SCHEMA_VERSION = 2

Stopped = Literal["standard_error", "budget"]
"""What ended a run's sampling: its values were sure enough, or its budget was spent."""

TEXT, AUDIO = 0, 1
USER, ASSISTANT, SYSTEM = 0, 1, 2


@dataclass(frozen=True, slots=True)
class AudioPiece:
    """A piece of audio."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    num_bytes: Whole
    text: str | None = None
    """The spoken word, None if unknown."""

    def to_json(self) -> dict[str, Any]:
        """Return the piece as JSON data."""
        spoken = {} if self.text is None else {"text": self.text}
        return {"_binary": True, "num_bytes": self.num_bytes, **spoken}


@dataclass(frozen=True, slots=True)
class ConversationEntry:
    """One entry of a turn: pieces of one content type."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    content_type: Annotated[int, Field(ge=TEXT, le=AUDIO)]
    """0 text, 1 audio."""
    roles: tuple[Annotated[int, Field(ge=USER, le=SYSTEM)], ...]
    """0 user, 1 assistant, 2 system; one per piece."""
    content: tuple[str | AudioPiece, ...]
    """Text pieces join to the text."""
    shap_values: tuple[Real | None, ...] | None
    """One per piece, None for a piece that is not a player; None for a turn without players."""

    @property
    def is_consistent(self) -> bool:
        """Whether every piece has a role, and a value if there are values."""
        pieces = len(self.content)
        return len(self.roles) == pieces and (self.shap_values is None or len(self.shap_values) == pieces)


@dataclass(frozen=True, slots=True)
class AttributionSummary:
    """The shares of text and audio in the attribution (docs/formats.md, `attr_summary`)."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    abs_sum_text: Known
    abs_sum_audio: Known
    frac_text: Known
    """Share of text players in the absolute values, in [0, 1]; 0 when all values are 0."""
    frac_audio: Known
    count_text_tokens: Whole
    count_audio_segments: Whole


@dataclass(frozen=True, kw_only=True)
class SampleFile:
    """The fields of a sample's file, in file order.

    Unknown values are NaN here and null in the file.
    """

    # Later versions add fields. Current fields may be missing only if they have a default.
    __pydantic_config__: ClassVar[ConfigDict] = {**STRICT, "extra": "allow"}

    row_index: Whole
    language: str
    original_language: str
    runtime_sec: Real
    """Seconds from the first requested coalition to the values, including time shared with other runs."""
    n_calls: Whole
    """Coalitions that the run evaluated."""
    model_calls: Whole
    """Answers generated for this run, not for another one; including earlier attempts of a resumed or
    repeated row."""
    prompt_texts: tuple[str, ...]
    input_modality: str
    output_modality: str
    attr_summary: AttributionSummary
    conversation: tuple[tuple[ConversationEntry, ...], ...]
    base_value: Known
    """v(empty coalition)."""
    grand_value: Known
    """v(all players)."""
    values_sum: Known
    """Sum of the values before normalizing; equals grand - base when the estimator is efficient."""
    response: str
    """The model's answer to the whole prompt."""
    seed: Whole | None
    """Seed of the run's draws; None in samples of the older runner."""
    num_players: Whole
    neyman_steps: Whole | None = None
    """Sampling steps of a Neyman explainer, 2: pilot and allocation; None for all others."""
    efficiency_residual: Known | None = None
    """Sum of the values before normalizing - (v(N) - v(empty)). None in samples of earlier versions."""
    standard_errors: AllKnown | None = None
    """Standard error of each value before normalizing, in player order, over draws of coalitions. None for
    explainers without standard errors, and in samples of earlier versions."""
    raw_values: AllKnown | None = None
    """The values before normalizing, in player order. This and all following fields are None in samples of
    earlier versions."""
    distinct_answers: Whole | None = None
    """Different answers among the run's coalitions."""
    audio_artifacts: dict[str, Any] | None = None
    num_levels: Whole | None = None
    row_digest: str | None = None
    """Digest of the row: 32 hex digits over its texts, recordings and languages."""
    environment: str | None = None
    """Id of its environment in `environments` of `spec.json`."""
    tokens_in: Whole | None = None
    """Tokens of the prompts of `model_calls`, as counted by the model's server; None without a server."""
    tokens_out: Whole | None = None
    """Tokens of the answers of `model_calls`."""
    faithfulness: Faithfulness | None = None
    """Deletion and insertion curves, if the run measures them."""
    interactions: Interactions | None = None
    """Interactions of the players, if an exact run computes them."""
    stopped: Stopped | None = None
    """Why sampling ended, if the run may stop early."""

    @property
    def imbalance(self) -> float:
        """|sum of values - (v(N) - v(empty))|, before normalizing."""
        return abs(self.values_sum - (self.grand_value - self.base_value))

    @property
    def is_constant(self) -> bool:
        """Whether every coalition is known to have the same answer, which makes the values meaningless."""
        return self.distinct_answers == 1

    @property
    def made_from(self) -> str:
        """Return the row's digest; the digest of its texts if the sample has no other."""
        return self.row_digest or texts_digest(self.prompt_texts)

    def player_values(self) -> list[float | None]:
        """Return the values in player order."""
        return [
            value
            for turn in self.conversation
            for entry in turn
            for value in entry.shap_values or ()
            if value is not None
        ]


FIELDS = tuple(each.name for each in fields(SampleFile))
"""Names of the file's fields besides `schema_version`."""

_LEFT_OUT = frozenset(FIELDS[FIELDS.index("raw_values") :])
"""Fields that are absent from the file when None."""


@dataclass(frozen=True, kw_only=True)
class SampleResult(SampleFile):
    """A sample: one dataset row explained by one run."""

    run_name: str
    audio_files: Mapping[str, bytes] = field(default_factory=dict, compare=False, repr=False)
    """Audio files written beside the sample: path below the run's directory -> content. Not part of the JSON
    and not read back."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Unknown fields of a file; kept."""

    def to_json(self) -> dict[str, Any]:
        """Return the file's JSON data, without NaN or infinities."""
        values = ((name, getattr(self, name)) for name in FIELDS)
        known = {name: in_file(value) for name, value in values if value is not None or name not in _LEFT_OUT}
        return {**self.extra, "schema_version": SCHEMA_VERSION, **known}

    @classmethod
    def from_bytes(cls, run_name: str, data: bytes) -> Self:
        """Read a file back.

        Raises:
            ValueError: When it is not JSON, or a field is missing or of the wrong type; the message names the
                field.
        """
        content = dict(vars(parse_sample(data)))
        known = {name: content.pop(name) for name in FIELDS}
        content.pop("schema_version", None)
        return cls(run_name=run_name, extra=content, **known)


def parse_sample(data: bytes) -> SampleFile:
    """Return the content of a sample's file, fully validated.

    Raises:
        ValueError: When it is not JSON, or a field is missing or of the wrong type; the message names the
            field.
    """
    if not data.strip(b" \t\r\n\0"):
        raise ValueError("it is empty")
    try:
        sample = _adapter().validate_json(data)
    except ValidationError as error:
        sample = _parse_older(data, error)
    if not all(entry.is_consistent for turn in sample.conversation for entry in turn):
        raise ValueError("conversation: an entry's roles, content and shap_values differ in length")
    if len(vars(sample)) > len(FIELDS) + 1 or sample.audio_artifacts is not None:
        refuse_deep([value for name, value in vars(sample).items() if name not in FIELDS])
        refuse_deep(sample.audio_artifacts)
    return sample


def texts_digest(texts: Sequence[str]) -> str:
    """Return a digest of a prompt's texts, with a mark that distinguishes it from a `row_digest`."""
    content = json.dumps(list(texts)).encode()
    return f"texts:{hashlib.blake2b(content, digest_size=16).hexdigest()}"


@lru_cache(maxsize=1)
def _adapter() -> TypeAdapter[SampleFile]:
    return TypeAdapter(SampleFile)


def _parse_older(data: bytes, error: ValidationError) -> SampleFile:
    """Return a sample of the older runner, or of a version that did not count model calls.

    Raises:
        ValueError: When the file has another error.
    """
    if any(each["type"] != "missing" for each in error.errors(include_url=False)):
        raise ValueError(in_words(error)) from error
    content = json.loads(data)
    filled = {"model_calls": content.get("n_calls")}
    if "schema_version" not in content:
        filled |= dict.fromkeys(("base_value", "grand_value", "values_sum", "seed"))
        filled |= {"response": "", "num_players": 0}
    try:
        sample = _adapter().validate_json(json.dumps({**filled, **content}))
    except ValidationError as left:
        raise ValueError(in_words(left)) from left
    if "schema_version" in content:
        return sample
    counts, turn = sample.attr_summary, sample.conversation[-1] if sample.conversation else ()
    # The last turn is the model's answer.
    derived = {
        "response": "".join(piece for entry in turn for piece in entry.content if isinstance(piece, str)),
        "num_players": counts.count_text_tokens + counts.count_audio_segments,
    }
    vars(sample).update({name: value for name, value in derived.items() if name not in content})
    return sample

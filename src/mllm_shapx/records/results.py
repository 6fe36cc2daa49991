"""One row explained by one run, as it stands in `samples/sample_*_result.json` (docs/formats.md)."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from mllm_shapx.records.sample_file import AttributionFile, EntryFile, SampleFile, check_sample, nan_for_null

SCHEMA_VERSION = 2

TEXT, AUDIO = 0, 1
USER, ASSISTANT, SYSTEM = 0, 1, 2

_KNOWN_FIELDS = frozenset(SampleFile.__annotations__)


@dataclass(frozen=True, slots=True)
class ConversationEntry:
    """One entry of a turn: pieces of one content type."""

    content_type: int
    """0 text, 1 audio."""
    roles: tuple[int, ...]
    """0 user, 1 assistant, 2 system; one per piece."""
    content: tuple[str | int, ...]
    """Pieces: text, or for audio the number of bytes of the piece. Text pieces joined give the text."""
    shap_values: tuple[float | None, ...] | None
    """One per piece, None for a piece that is no player; None altogether for a turn without players."""
    words: tuple[str | None, ...] | None = None
    """For audio, the word that each piece speaks, None where it is not known; None altogether for text, and
    where the segmentation knows no words."""

    def to_json(self) -> dict[str, Any]:
        """Return the entry as JSON data; values that JSON cannot hold become null."""
        words = self.words or (None,) * len(self.content)
        content = [_piece(piece, word) for piece, word in zip(self.content, words, strict=True)]
        values = None if self.shap_values is None else [_finite(value) for value in self.shap_values]
        return {
            "content_type": self.content_type,
            "roles": list(self.roles),
            "content": content,
            "shap_values": values,
        }


@dataclass(frozen=True, slots=True)
class AttributionSummary:
    """How much of the attribution lies on text and on audio (docs/formats.md, `attr_summary`)."""

    abs_sum_text: float
    abs_sum_audio: float
    frac_text: float
    """Share of the absolute values that lies on text players, in [0, 1]; 0 when all values are 0."""
    frac_audio: float
    count_text_tokens: int
    count_audio_segments: int


@dataclass(frozen=True, slots=True)
class SampleResult:
    """A sample: one dataset row explained by one run."""

    run_name: str
    row_index: int
    language: str
    original_language: str
    runtime_sec: float
    """Seconds from the first coalition asked to the values, time shared with other runs included."""
    n_calls: int
    """Coalitions that the run evaluated."""
    model_calls: int
    """Answers that were generated for this run and not for another one. Where the row was resumed or done
    again, those of the earlier tries count."""
    prompt_texts: tuple[str, ...]
    input_modality: str
    output_modality: str
    attr_summary: AttributionSummary
    conversation: tuple[tuple[ConversationEntry, ...], ...]
    base_value: float
    """v(empty coalition); NaN where it is not known."""
    grand_value: float
    """v(all players); NaN where it is not known."""
    response: str
    """The model's answer to the whole prompt."""
    seed: int | None
    """Seed of the run's draws; None in samples of the older runner, which does not record it."""
    num_players: int
    values_sum: float
    """Sum of the values before normalizing; equals grand - base when the estimator is efficient."""
    raw_values: tuple[float, ...] | None = None
    """The values before normalizing, in player order; None in samples that were written before they were
    kept."""
    neyman_steps: int | None = None
    """Sampling steps of a Neyman explainer, 2: pilot and allocation; None for all others."""
    distinct_answers: int | None = None
    """Different answers among the run's coalitions; None in samples that were written before it was kept."""
    audio_artifacts: dict[str, Any] | None = None
    num_levels: int | None = None
    row_digest: str | None = None
    """What the row was: 32 hex digits over its texts, recordings and languages; None in old files."""
    environment: str | None = None
    """Id of the entry of `environments` in `spec.json` that it was made in; None where that is not known."""
    tokens_in: int | None = None
    """Tokens of the prompts behind `model_calls`, as the model's server counted them; None without one."""
    tokens_out: int | None = None
    """Tokens of the answers behind `model_calls`."""
    audio_files: Mapping[str, bytes] = field(default_factory=dict, compare=False, repr=False)
    """Recordings and answers that are written beside the sample: path below the run's directory ->
    content. They are not part of the JSON, and are not read back with it."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields read from a file that this version does not know; kept."""

    @property
    def efficiency_residual(self) -> float:
        """|sum of values - (v(N) - v(empty))|, before normalizing."""
        return abs(self.values_sum - (self.grand_value - self.base_value))

    def to_json(self) -> dict[str, Any]:
        """Return the file's JSON data, without NaN or infinities."""
        summary = self.attr_summary
        data: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "row_index": self.row_index,
            "language": self.language,
            "original_language": self.original_language,
            "runtime_sec": self.runtime_sec,
            "n_calls": self.n_calls,
            "model_calls": self.model_calls,
            "prompt_texts": list(self.prompt_texts),
            "input_modality": self.input_modality,
            "output_modality": self.output_modality,
            "attr_summary": {
                "abs_sum_text": _finite(summary.abs_sum_text),
                "abs_sum_audio": _finite(summary.abs_sum_audio),
                "frac_text": _finite(summary.frac_text),
                "frac_audio": _finite(summary.frac_audio),
                "count_text_tokens": summary.count_text_tokens,
                "count_audio_segments": summary.count_audio_segments,
            },
            "conversation": [[entry.to_json() for entry in turn] for turn in self.conversation],
            "base_value": _finite(self.base_value),
            "grand_value": _finite(self.grand_value),
            "values_sum": _finite(self.values_sum),
            "response": self.response,
            "seed": self.seed,
            "num_players": self.num_players,
            "neyman_steps": self.neyman_steps,
        }
        if self.raw_values is not None:
            data["raw_values"] = [_finite(value) for value in self.raw_values]
        if self.distinct_answers is not None:
            data["distinct_answers"] = self.distinct_answers
        if self.audio_artifacts is not None:
            data["audio_artifacts"] = self.audio_artifacts
        if self.num_levels is not None:
            data["num_levels"] = self.num_levels
        if self.row_digest is not None:
            data["row_digest"] = self.row_digest
        if self.environment is not None:
            data["environment"] = self.environment
        if self.tokens_in is not None:
            data["tokens_in"] = self.tokens_in
        if self.tokens_out is not None:
            data["tokens_out"] = self.tokens_out
        return {**self.extra, **data}

    @classmethod
    def from_json(cls, run_name: str, data: Any) -> Self:
        """Read the file's JSON data back.

        Raises:
            ValueError: When a field is missing or of the wrong type; the message names it.
        """
        file = check_sample(data)
        number = nan_for_null
        return cls(
            run_name=run_name,
            row_index=file["row_index"],
            language=file["language"],
            original_language=file["original_language"],
            runtime_sec=file["runtime_sec"],
            n_calls=file["n_calls"],
            model_calls=file["model_calls"],
            prompt_texts=tuple(file["prompt_texts"]),
            input_modality=file["input_modality"],
            output_modality=file["output_modality"],
            attr_summary=_attribution_from_file(file["attr_summary"]),
            conversation=tuple(
                tuple(_entry_from_file(entry) for entry in turn) for turn in file["conversation"]
            ),
            base_value=number(file["base_value"]),
            grand_value=number(file["grand_value"]),
            values_sum=number(file["values_sum"]),
            response=file["response"],
            seed=file["seed"],
            num_players=file["num_players"],
            raw_values=_raw_values(file),
            neyman_steps=file.get("neyman_steps"),
            distinct_answers=file.get("distinct_answers"),
            audio_artifacts=file.get("audio_artifacts"),
            num_levels=file.get("num_levels"),
            row_digest=file.get("row_digest"),
            environment=file.get("environment"),
            tokens_in=file.get("tokens_in"),
            tokens_out=file.get("tokens_out"),
            extra={key: value for key, value in data.items() if key not in _KNOWN_FIELDS},
        )

    @property
    def is_constant(self) -> bool:
        """Whether every coalition is known to have the same answer, so that the values say nothing."""
        return self.distinct_answers == 1

    @property
    def made_from(self) -> str:
        """Return the row's digest; the digest of its texts where the sample records no other."""
        return self.row_digest or texts_digest(self.prompt_texts)

    def player_values(self) -> list[float | None]:
        """Return the values in player order."""
        return [
            value
            for turn in self.conversation
            for entry in turn
            if entry.shap_values is not None
            for value in entry.shap_values
            if value is not None
        ]


def texts_digest(texts: Sequence[str]) -> str:
    """Return a digest of a prompt's texts alone, marked so that it cannot be taken for a `row_digest`."""
    content = json.dumps(list(texts)).encode()
    return f"texts:{hashlib.blake2b(content, digest_size=16).hexdigest()}"


def _entry_from_file(entry: EntryFile) -> ConversationEntry:
    values = entry["shap_values"]
    return ConversationEntry(
        content_type=entry["content_type"],
        roles=tuple(entry["roles"]),
        content=tuple(piece if isinstance(piece, str) else piece["num_bytes"] for piece in entry["content"]),
        shap_values=None if values is None else tuple(values),
        words=_words(entry),
    )


def _words(entry: EntryFile) -> tuple[str | None, ...] | None:
    words = tuple(None if isinstance(piece, str) else piece.get("text") for piece in entry["content"])
    return words if any(word is not None for word in words) else None


def _piece(content: str | int, word: str | None) -> str | dict[str, Any]:
    if isinstance(content, str):
        return content
    spoken = {} if word is None else {"text": word}
    return {"_binary": True, "num_bytes": content, **spoken}


def _raw_values(file: SampleFile) -> tuple[float, ...] | None:
    values = file.get("raw_values")
    return None if values is None else tuple(nan_for_null(value) for value in values)


def _attribution_from_file(summary: AttributionFile) -> AttributionSummary:
    return AttributionSummary(
        abs_sum_text=nan_for_null(summary["abs_sum_text"]),
        abs_sum_audio=nan_for_null(summary["abs_sum_audio"]),
        frac_text=nan_for_null(summary["frac_text"]),
        frac_audio=nan_for_null(summary["frac_audio"]),
        count_text_tokens=summary["count_text_tokens"],
        count_audio_segments=summary["count_audio_segments"],
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

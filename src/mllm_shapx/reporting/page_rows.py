"""The rows of a page: prompts, values and answers as compact JSON data."""

import math
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

from mllm_shapx.records.measures import Interactions
from mllm_shapx.records.results import SampleResult
from mllm_shapx.reporting.page_audio import Recordings
from mllm_shapx.reporting.pieces import Piece, prompt_pieces
from mllm_shapx.reporting.reading import RunFiles
from mllm_shapx.reporting.stored_answers import StoredAnswersOfRuns

_ROUNDING = 1e-9
"""Interactions smaller than this share of the largest one are 0."""

_BYTES_PER_SAMPLE = 2
"""One sample of sound in `num_bytes`."""


class PageRows:
    """Makes the page's data of one row after another; report.js explains each letter."""

    def __init__(self, runs: Sequence[RunFiles], recordings: Recordings) -> None:
        self.answers: dict[str, int] = {}
        """Every answer's position: most runs of a row have the same."""
        self._runs = runs
        self._recordings = recordings
        self._stored = StoredAnswersOfRuns(runs)

    def row(self, index: int, samples: Sequence[SampleResult | None]) -> dict[str, Any] | None:
        """Return a row with each run's values, None when no sample can be read."""
        first = next((sample for sample in samples if sample is not None), None)
        if first is None:
            return None
        prompts: list[dict[str, Any]] = []
        without = self._stored.without_most_important(index, samples)
        runs = [
            None if sample is None else self._sample(run, sample, prompts, answer)
            for run, sample, answer in zip(self._runs, samples, without, strict=True)
        ]
        return {
            "i": index,
            "l": first.language,
            "o": first.original_language,
            "m": first.input_modality,
            "p": prompts,
            "r": runs,
        }

    def _sample(
        self, run: RunFiles, sample: SampleResult, prompts: list[dict[str, Any]], without: str | None
    ) -> dict[str, Any]:
        """Return a run's part of a row; its prompt is added to `prompts` unless another run has the same."""
        pieces = prompt_pieces(sample)
        prompt = self._prompt(run, sample, pieces)
        if prompt not in prompts:
            prompts.append(prompt)
        data: dict[str, Any] = {
            "q": prompts.index(prompt),
            "v": [_finite(piece.value) for piece in pieces if piece.value is not None],
            "a": self._answer(sample.response),
            "b": _finite(sample.base_value),
            "g": _finite(sample.grand_value),
            "n": sample.n_calls,
            "m": sample.model_calls,
            "s": _finite(sample.runtime_sec),
        }
        if sample.stopped is not None:
            data["t"] = int(sample.stopped == "standard_error")
        errors, raw = sample.standard_errors, sample.raw_values
        if errors is not None and raw is not None and len(errors) == len(raw) == len(data["v"]):
            data["u"], data["e"] = list(map(_finite, raw)), list(map(_finite, errors))
        if sample.interactions is not None and sample.interactions.order > 1:
            data["x"] = _pairs(sample.interactions, len(data["v"]))
        if without is not None:
            data["w"] = self._answer(without)
        spoken = _artifacts(sample, "answer")
        if spoken and (place := self._recording(run, spoken[0])) is not None:
            data["k"] = place
        return data

    def _answer(self, text: str) -> int:
        return self.answers.setdefault(text, len(self.answers))

    def _prompt(self, run: RunFiles, sample: SampleResult, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return `t`, the pieces, and `a`, for each stretch of sound its recording or null.

        A piece is [text, 1 for a player, 1 where a message or a recording begins]; one of sound is
        [word or null, 1 for a player, 1 where a message or a recording begins, seconds].
        """
        places = [_place(piece) for piece in pieces]
        begins = [0, *(int(place != before) for before, place in pairwise(places))]
        recordings = _artifacts(sample, "inputs")
        stretches = [place for place, _ in groupby(places) if place[1] is not None]
        rates = {place: about.get("sample_rate") for place, about in zip(stretches, recordings, strict=False)}
        shown = []
        for piece, begin, place in zip(pieces, begins, places, strict=False):
            is_player = int(piece.value is not None)
            if piece.num_bytes is None:
                shown.append([piece.text, is_player, begin])
            else:
                seconds = _seconds(piece.num_bytes, rates.get(place))
                shown.append([piece.text or None, is_player, begin, seconds])
        if not recordings or len(recordings) != len(stretches):
            return {"t": shown}
        return {"t": shown, "a": [self._recording(run, about) for about in recordings]}

    def _recording(self, run: RunFiles, about: dict[str, Any]) -> int | None:
        path = about.get("path")
        if not isinstance(path, str) or not path.endswith(".wav") or ".." in path.split("/"):
            return None
        return self._recordings.place(run, path)


def _pairs(found: Interactions, players: int) -> dict[str, Any]:
    """Return `i`, the index, `o`, the order, and `m`, a row for each player: its values with each player.

    The value of a player with itself is its own. Sets of three and more players are left out. Values of the
    size of rounding errors become 0: the page would draw them like real interactions.
    """
    least = _ROUNDING * max((abs(value) for value in found.values if math.isfinite(value)), default=0.0)
    matrix: list[list[float | None]] = [[None] * players for _ in range(players)]
    for members, value in zip(found.players, found.values, strict=False):
        if len(members) <= 2 and max(members, default=players) < players:  # noqa: PLR2004 -- a pair
            told = 0.0 if abs(value) < least else _finite(value)
            matrix[members[0]][members[-1]] = matrix[members[-1]][members[0]] = told
    return {"i": found.index, "o": found.order, "m": matrix}


def _artifacts(sample: SampleResult, key: str) -> list[dict[str, Any]]:
    """Return a sample's entries on its recordings (`inputs`) or its spoken answer (`answer`)."""
    artifacts = sample.audio_artifacts or {}
    found = artifacts.get(key)
    entries = found if isinstance(found, list) else [found]
    return [entry for entry in entries if isinstance(entry, dict)]


def _place(piece: Piece) -> tuple[int, int | None]:
    """Return the numbers of a piece's message and of its recording there, None for text."""
    return piece.turn, None if piece.num_bytes is None else piece.entry


def _seconds(num_bytes: int, rate: Any) -> float:
    """Return a piece's seconds; its number of samples where the sample rate is not known."""
    samples = num_bytes / _BYTES_PER_SAMPLE
    return round(samples / rate, 4) if isinstance(rate, int) and rate > 0 else samples


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

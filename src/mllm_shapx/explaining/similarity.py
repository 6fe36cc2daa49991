"""Similarities of a coalition's answer to the answer to the whole prompt.

TF-IDF and cosine follow mllm_shap, but are computed once per distinct answer, not once per coalition. The
Euclidean similarity and the reducers are our own.
"""

import asyncio
import functools
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mllm_shapx.models.base import Answer

Vector = NDArray[np.float64]
_Content = tuple[str, tuple[tuple[int, ...], ...]]
Embedder = Callable[[Sequence[Answer]], Awaitable[list[Vector]]]
"""Gives one vector per answer, pooled by the run's reducer."""

_EPSILON = 1e-8
"""Lower bound of the norms in a cosine, as in mllm_shap."""


class Similarity(Protocol):
    """Scores answers against a base answer; `answers` is the game's whole corpus so far."""

    async def score(self, base: Answer, answers: Sequence[Answer]) -> list[float]:
        """Return one score per answer, in order."""


class TfIdfCosine:
    """Cosine of TF-IDF vectors over the words and audio frames of an answer.

    As mllm_shap's `tfidf_cosine`: tf(t, d) = count / largest count in d and
    idf(t) = ln((N + 1) / (df(t) + 1)) + 1 over the N answers of the game, the base answer counted once
    more. Values lie in [0, 1].
    """

    async def score(self, base: Answer, answers: Sequence[Answer]) -> list[float]:
        """Return the similarity of each answer to `base`."""
        # In a thread: thousands of answers take a second, and other rows must not wait.
        return await asyncio.to_thread(self._score, base, answers)

    @staticmethod
    def _score(base: Answer, answers: Sequence[Answer]) -> list[float]:
        contents = [_content(answer) for answer in answers]
        repeats = Counter(contents)
        base_content = _content(base)
        repeats[base_content] += 1
        documents = {content: _term_frequencies(*content) for content in repeats}
        frequency: Counter[Hashable] = Counter()
        for content, document in documents.items():
            count = repeats[content]
            for term in document:
                frequency[term] += count
        total = len(answers) + 1
        idf = {term: math.log((total + 1) / (count + 1)) + 1.0 for term, count in frequency.items()}
        vectors = {
            content: {term: share * idf[term] for term, share in document.items()}
            for content, document in documents.items()
        }
        base_vector = vectors[base_content]
        base_norm = _norm(base_vector)
        scores = {
            content: _dot(base_vector, vector) / (base_norm * _norm(vector))
            for content, vector in vectors.items()
        }
        return [scores[content] for content in contents]


class EmbeddingSimilarity:
    """A similarity of vectors. Each distinct answer is embedded once, however often it is scored."""

    def __init__(self, embed: Embedder, compare: Callable[[Vector, Vector], float]) -> None:
        self._embed = embed
        self._compare = compare
        self._vectors: dict[_Content, Vector] = {}

    async def score(self, base: Answer, answers: Sequence[Answer]) -> list[float]:
        """Return the similarity of each answer to `base`."""
        distinct = {_content(answer): answer for answer in (base, *answers)}
        fresh = {key: answer for key, answer in distinct.items() if key not in self._vectors}
        if fresh:
            self._vectors.update(zip(fresh, await self._embed(list(fresh.values())), strict=True))
        base_vector = self._vectors[_content(base)]
        scores = {key: self._compare(base_vector, self._vectors[key]) for key in distinct}
        return [scores[_content(answer)] for answer in answers]


def cosine(first: Vector, second: Vector) -> float:
    """Return the cosine of two vectors in [-1, 1]; the shorter one is padded with zeros."""
    first, second = _same_length(first, second)
    norms = max(float(np.linalg.norm(first)), _EPSILON) * max(float(np.linalg.norm(second)), _EPSILON)
    return float(np.dot(first, second) / norms)


def euclidean(first: Vector, second: Vector) -> float:
    """Return 1 / (1 + Euclidean distance) in (0, 1]; the shorter vector is padded with zeros."""
    first, second = _same_length(first, second)
    return 1.0 / (1.0 + float(np.linalg.norm(first - second)))


_COMPARE = {"CosineSimilarity": cosine, "EuclideanSimilarity": euclidean}


def build_similarity(name: str, embed: Embedder) -> Similarity:
    """Return the similarity of the config's `shap.similarity`."""
    return TfIdfCosine() if name == "TfIdfCosineSimilarity" else EmbeddingSimilarity(embed, _COMPARE[name])


def _content(answer: Answer) -> _Content:
    return (answer.text, answer.audio_frames)


@functools.lru_cache(maxsize=1 << 14)
def _term_frequencies(text: str, audio_frames: tuple[tuple[int, ...], ...]) -> dict[Hashable, float]:
    """Return tf of an answer's terms. Cached: all runs of a row score the same answers."""
    counts: Counter[Hashable] = Counter(text.split())
    counts.update(audio_frames)
    largest = max(counts.values(), default=1)
    return {term: count / largest for term, count in counts.items()}


def _dot(first: dict[Hashable, float], second: dict[Hashable, float]) -> float:
    return sum(weight * second[term] for term, weight in first.items() if term in second)


def _norm(vector: dict[Hashable, float]) -> float:
    return max(math.hypot(*vector.values()), _EPSILON)


def _same_length(first: Vector, second: Vector) -> tuple[Vector, Vector]:
    length = max(len(first), len(second))
    if len(first) == len(second):
        return first, second
    return np.pad(first, (0, length - len(first))), np.pad(second, (0, length - len(second)))

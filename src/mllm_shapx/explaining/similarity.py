"""Value functions: how close a coalition's answer is to the answer to the whole prompt.

TF-IDF and cosine are mllm_shap's, computed here once per distinct answer instead of once per coalition;
the Euclidean similarity and the reducers are ours.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mllm_shapx.models.base import Answer

Vector = NDArray[np.float64]
Embedder = Callable[[Sequence[Answer]], Awaitable[list[Vector]]]
"""Gives one vector per answer, pooled by the run's reducer."""

_EPSILON = 1e-8
"""Smallest norm that a cosine divides by, as in mllm_shap."""


class Similarity(Protocol):
    """Scores answers against a base answer; `answers` is the whole corpus of the game so far."""

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
        # In a thread: thousands of answers take a second, in which other rows want to go on.
        return await asyncio.to_thread(self._score, base, answers)

    @staticmethod
    def _score(base: Answer, answers: Sequence[Answer]) -> list[float]:
        term_ids: dict[Hashable, int] = {}
        documents: dict[Hashable, Counter[int]] = {}
        repeats: Counter[Hashable] = Counter()
        for answer in (base, *answers):
            key = _content(answer)
            repeats[key] += 1
            if key not in documents:
                documents[key] = Counter(term_ids.setdefault(term, len(term_ids)) for term in _terms(answer))
        frequency: Counter[int] = Counter()
        for key, document in documents.items():
            for term in document:
                frequency[term] += repeats[key]
        total = len(answers) + 1
        idf = {term: math.log((total + 1) / (count + 1)) + 1.0 for term, count in frequency.items()}
        vectors = {key: _tf_idf(document, idf) for key, document in documents.items()}
        base_vector = vectors[_content(base)]
        scores = {key: _sparse_cosine(base_vector, vector) for key, vector in vectors.items()}
        return [scores[_content(answer)] for answer in answers]


class EmbeddingSimilarity:
    """A similarity of vectors, embedding each distinct answer once."""

    def __init__(self, embed: Embedder, compare: Callable[[Vector, Vector], float]) -> None:
        self._embed = embed
        self._compare = compare

    async def score(self, base: Answer, answers: Sequence[Answer]) -> list[float]:
        """Return the similarity of each answer to `base`."""
        distinct = {_content(answer): answer for answer in (base, *answers)}
        vectors = dict(zip(distinct, await self._embed(list(distinct.values())), strict=True))
        base_vector = vectors[_content(base)]
        scores = {key: self._compare(base_vector, vector) for key, vector in vectors.items()}
        return [scores[_content(answer)] for answer in answers]


def cosine(first: Vector, second: Vector) -> float:
    """Return the cosine of two vectors in [-1, 1]; the shorter one is filled up with zeros."""
    first, second = _same_length(first, second)
    norms = max(float(np.linalg.norm(first)), _EPSILON) * max(float(np.linalg.norm(second)), _EPSILON)
    return float(np.dot(first, second) / norms)


def euclidean(first: Vector, second: Vector) -> float:
    """Return 1 / (1 + Euclidean distance) in (0, 1]; the shorter vector is filled up with zeros."""
    first, second = _same_length(first, second)
    return 1.0 / (1.0 + float(np.linalg.norm(first - second)))


def build_similarity(name: str, embed: Embedder) -> Similarity:
    """Return the similarity of the config's `shap.similarity`."""
    if name == "TfIdfCosineSimilarity":
        return TfIdfCosine()
    return EmbeddingSimilarity(embed, cosine if name == "CosineSimilarity" else euclidean)


def _content(answer: Answer) -> Hashable:
    return (answer.text, answer.audio_frames)


def _terms(answer: Answer) -> list[Hashable]:
    return [*answer.text.split(), *answer.audio_frames]


def _tf_idf(document: Counter[int], idf: dict[int, float]) -> dict[int, float]:
    if not document:
        return {}
    largest = max(document.values())
    return {term: (count / largest) * idf[term] for term, count in document.items()}


def _sparse_cosine(first: dict[int, float], second: dict[int, float]) -> float:
    vocabulary = sorted(first.keys() | second.keys())
    return cosine(
        np.array([first.get(term, 0.0) for term in vocabulary], dtype=np.float64),
        np.array([second.get(term, 0.0) for term in vocabulary], dtype=np.float64),
    )


def _same_length(first: Vector, second: Vector) -> tuple[Vector, Vector]:
    length = max(len(first), len(second))
    if len(first) == len(second):
        return first, second
    return np.pad(first, (0, length - len(first))), np.pad(second, (0, length - len(second)))

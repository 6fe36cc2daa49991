"""The engine: many callers, few batches, and nobody waits forever."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from mllm_shap import ConversationSnapshot
from model_kit import conversation
from numpy.typing import NDArray

from mllm_shapx.errors import ModelError, RowError
from mllm_shapx.models.base import (
    Answer,
    Decoding,
    EmbeddingMode,
    EngineStoppedError,
    Forcing,
    Likelihood,
    ModelIdentity,
    ModelReport,
    OutOfMemory,
)
from mllm_shapx.models.engine import Engine

DECODING = Decoding(max_new_tokens=4)


@dataclass(frozen=True)
class WordPrompt:
    """A prompt of as many positions as it has words."""

    words: tuple[str, ...]

    @property
    def length(self) -> int:
        return max(1, len(self.words))


@dataclass
class EchoModel:
    """A model without weights: it answers the prompt itself and its seed, and can be made to fail or wait."""

    max_batch_size: int | None = 8
    memory: int = 10**9
    """Most prompts it holds."""
    gate: threading.Event | None = None
    """Each batch waits for it."""
    batches: list[list[str]] = field(default_factory=list)
    kinds: list[Decoding] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    closed: bool = False

    @property
    def report(self) -> ModelReport:
        return ModelReport()

    @property
    def identity(self) -> ModelIdentity:
        return ModelIdentity("echo", "echo", None, "none", "cpu")

    def encode(self, snapshot: ConversationSnapshot, decoding: Decoding) -> WordPrompt:
        del decoding
        text = snapshot.messages()[-1].text
        if text == "unreadable":
            raise RowError("unreadable", "this prompt cannot be encoded")
        return WordPrompt(tuple(text.split()))

    def answer(self, prompts: Sequence[WordPrompt], decoding: Decoding, seeds: Sequence[int]) -> list[Answer]:
        if self.gate is not None:
            self.gate.wait(20)
        if len(prompts) > self.memory:
            raise OutOfMemory(f"{len(prompts)} prompts")
        texts = [" ".join(prompt.words) for prompt in prompts]
        if "broken" in texts:
            raise RuntimeError("the model broke")
        self.batches.append(texts)
        self.kinds.append(decoding)
        self.threads.add(threading.current_thread().name)
        return [Answer(f"{text}/{seed}", (1, 2)) for text, seed in zip(texts, seeds, strict=True)]

    def embed(
        self, answers: Sequence[Answer], mode: EmbeddingMode, reducer: str
    ) -> list[NDArray[np.float64]]:
        del mode, reducer
        if len(answers) > self.memory:
            raise OutOfMemory(f"{len(answers)} answers")
        return [np.array([float(len(answer.text))]) for answer in answers]

    def likelihoods(
        self, prompts: Sequence[WordPrompt], continuations: Sequence[Sequence[int]], top_k: int
    ) -> list[Likelihood]:
        if len(prompts) > self.memory:
            raise OutOfMemory(f"{len(prompts)} prompts")
        self.batches.append([" ".join(prompt.words) for prompt in prompts])
        self.threads.add(threading.current_thread().name)
        ids, logprobs = np.zeros((0, top_k), dtype=np.int32), np.zeros((0, top_k), dtype=np.float32)
        return [
            Likelihood(np.array([-prompt.length, -len(tokens)], dtype=np.float32), ids, logprobs)
            for prompt, tokens in zip(prompts, continuations, strict=True)
        ]

    def close(self) -> None:
        self.closed = True


def texts(*words: str) -> list[ConversationSnapshot]:
    return [conversation(word) for word in words]


def numbered(count: int, tag: str = "p") -> list[ConversationSnapshot]:
    return texts(*(f"{tag}{place}" for place in range(count)))


def with_engine[T](model: EchoModel, work: Callable[[Engine], Awaitable[T]]) -> T:
    async def main() -> T:
        engine = Engine(model)
        try:
            return await asyncio.wait_for(work(engine), 30)
        finally:
            await engine.aclose()

    return asyncio.run(main())


def test_answers_come_in_the_order_of_the_prompts_with_their_own_seeds() -> None:
    """Whatever order batches take, prompt i gets answer i, drawn with seed i."""
    model = EchoModel()
    words = [" ".join(["w"] * (place % 7)) + f" n{place}" for place in range(50)]

    async def work(engine: Engine) -> list[Answer]:
        return await engine.answer(texts(*words), DECODING, range(100, 150))

    found = with_engine(model, work)
    expected = [f"{' '.join(word.split())}/{100 + place}" for place, word in enumerate(words)]
    assert [answer.text for answer in found] == expected
    assert max(map(len, model.batches)) == 8


def test_single_prompts_that_await_together_share_batches() -> None:
    """Sixty-four callers with one prompt each need eight batches, not sixty-four."""
    model = EchoModel()

    async def work(engine: Engine) -> None:
        await asyncio.gather(*(engine.answer([each], DECODING, [0]) for each in numbered(64)))

    with_engine(model, work)
    assert len(model.batches) == 8


def test_rows_share_a_batch_at_their_boundary_and_the_first_row_ends_first() -> None:
    """The tail of one row is filled up with the next row's prompts."""
    gate = threading.Event()
    model = EchoModel(gate=gate)
    ended: list[str] = []

    async def row(engine: Engine, tag: str, count: int) -> None:
        await engine.answer(numbered(count, tag), DECODING, [0] * count)
        ended.append(tag)

    async def work(engine: Engine) -> None:
        first = asyncio.create_task(row(engine, "a", 13))
        await asyncio.sleep(0.1)
        second = asyncio.create_task(row(engine, "b", 11))
        await asyncio.sleep(0.1)
        gate.set()
        await asyncio.gather(first, second)

    with_engine(model, work)
    assert [len(batch) for batch in model.batches] == [8, 8, 8]
    assert {text[0] for text in model.batches[1]} == {"a", "b"}
    assert ended == ["a", "b"]


def test_batches_hold_prompts_of_like_length() -> None:
    """Sorted by length, batches pad less than they would in the order of arrival."""
    model = EchoModel()
    words = [" ".join(["w"] * (1 + place % 8)) for place in range(64)]

    async def work(engine: Engine) -> None:
        await engine.answer(texts(*words), DECODING, [0] * 64)

    with_engine(model, work)
    assert all(len({len(text.split()) for text in batch}) == 1 for batch in model.batches)


def test_different_decodings_never_share_a_batch() -> None:
    """Greedy and sampled prompts that arrive together are answered apart, each with its own settings."""
    model = EchoModel()
    sampled = Decoding(max_new_tokens=4, text_temperature=0.7)

    async def work(engine: Engine) -> None:
        await asyncio.gather(
            engine.answer(numbered(6, "g"), DECODING, [0] * 6),
            engine.answer(numbered(6, "s"), sampled, [0] * 6),
        )

    with_engine(model, work)
    seen = {text[0]: kind for batch, kind in zip(model.batches, model.kinds, strict=True) for text in batch}
    assert seen == {"g": DECODING, "s": sampled}
    assert all(len({text[0] for text in batch}) == 1 for batch in model.batches)


def test_running_out_of_memory_halves_the_batch_and_answers_everything() -> None:
    """A model that holds five prompts gets eight, then four, and no answer is lost."""
    model = EchoModel(memory=5)

    async def work(engine: Engine) -> list[Answer]:
        return await engine.answer(numbered(40), DECODING, range(40))

    found = with_engine(model, work)
    assert [answer.text for answer in found] == [f"p{place}/{place}" for place in range(40)]
    assert {len(batch) for batch in model.batches} == {4}


def test_memory_errors_of_python_count_as_out_of_memory() -> None:
    """What the model lets through as MemoryError is handled alike."""

    class Hungry(EchoModel):
        def answer(
            self, prompts: Sequence[WordPrompt], decoding: Decoding, seeds: Sequence[int]
        ) -> list[Answer]:
            if len(prompts) > 2:
                raise MemoryError
            return super().answer(prompts, decoding, seeds)

    async def work(engine: Engine) -> list[Answer]:
        return await engine.answer(numbered(9), DECODING, [0] * 9)

    assert len(with_engine(Hungry(), work)) == 9


def test_one_prompt_that_does_not_fit_says_what_to_change() -> None:
    """The error names the model, the lengths and the settings that help; others are answered."""
    model = EchoModel(memory=0)

    async def work(engine: Engine) -> None:
        with pytest.raises(ModelError, match=r"'echo' on cpu.*one prompt of 1 .*max_new_tokens"):
            await engine.answer(numbered(3), DECODING, [0] * 3)
        model.memory = 8
        assert len(await engine.answer(numbered(3), DECODING, [0] * 3)) == 3

    with_engine(model, work)


def test_a_failing_model_call_fails_the_callers_of_that_batch_only() -> None:
    """One row's batch breaks; another row is answered, and the engine goes on."""
    model = EchoModel()
    sampled = Decoding(max_new_tokens=4, text_temperature=0.7)

    async def work(engine: Engine) -> None:
        bad, good = await asyncio.gather(
            engine.answer(texts("broken", "x"), DECODING, [0, 0]),
            engine.answer(numbered(20), sampled, [0] * 20),
            return_exceptions=True,
        )
        assert isinstance(bad, RuntimeError)
        assert isinstance(good, list)
        assert len(await engine.answer(numbered(3), DECODING, [0] * 3)) == 3

    with_engine(model, work)


def test_who_shared_a_batch_with_a_prompt_that_breaks_the_model_is_answered() -> None:
    """The batch holds prompts of three callers; one of them gets the error, and the others their answers."""
    tried: list[int] = []

    class Noting(EchoModel):
        def answer(
            self, prompts: Sequence[WordPrompt], decoding: Decoding, seeds: Sequence[int]
        ) -> list[Answer]:
            tried.append(len(prompts))
            return super().answer(prompts, decoding, seeds)

    async def work(engine: Engine) -> None:
        first, error, last = await asyncio.gather(
            engine.answer(texts("a", "b"), DECODING, [0, 0]),
            engine.answer(texts("broken"), DECODING, [0]),
            engine.answer(texts("c"), DECODING, [0]),
            return_exceptions=True,
        )
        assert isinstance(error, RuntimeError)
        assert isinstance(first, list)
        assert isinstance(last, list)
        assert (len(first), len(last)) == (2, 1)

    with_engine(Noting(), work)
    assert tried == [4, 2, 1, 1]


def test_a_prompt_that_cannot_be_encoded_fails_its_own_call_only() -> None:
    """The row's error reaches the row; prompts beside it are answered."""

    async def work(engine: Engine) -> None:
        bad, good = await asyncio.gather(
            engine.answer(texts("fine", "unreadable"), DECODING, [0, 0]),
            engine.answer(numbered(3), DECODING, [0] * 3),
            return_exceptions=True,
        )
        assert isinstance(bad, RowError)
        assert isinstance(good, list)

    with_engine(EchoModel(), work)


def test_cancelling_a_call_drops_its_pending_prompts() -> None:
    """Only the batch already under way is finished for a caller that has gone."""
    gate = threading.Event()
    model = EchoModel(gate=gate)

    async def work(engine: Engine) -> None:
        doomed = asyncio.create_task(engine.answer(numbered(800, "d"), DECODING, [0] * 800))
        await asyncio.sleep(0.1)
        doomed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        gate.set()
        await engine.answer(numbered(5, "k"), DECODING, [0] * 5)

    with_engine(model, work)
    answered = [text for batch in model.batches for text in batch]
    assert sum(text.startswith("d") for text in answered) <= 8
    assert sum(text.startswith("k") for text in answered) == 5


def test_answers_are_handed_over_as_they_come_in() -> None:
    """`on_answer` is called in the caller's loop, before the call ends, once per prompt."""
    seen: list[tuple[int, str, bool]] = []
    main_thread = threading.get_ident()

    async def work(engine: Engine) -> None:
        def on_answer(index: int, answer: Answer) -> None:
            seen.append((index, answer.text, threading.get_ident() == main_thread))

        await engine.answer(numbered(20), DECODING, range(20), on_answer)

    with_engine(EchoModel(), work)
    assert sorted(seen) == [(place, f"p{place}/{place}", True) for place in range(20)]


def test_an_error_in_on_answer_fails_that_call_and_nothing_else() -> None:
    """The callback is the caller's own."""

    async def work(engine: Engine) -> None:
        def on_answer(index: int, answer: Answer) -> None:
            raise LookupError(f"{index} {answer.text}")

        with pytest.raises(LookupError):
            await engine.answer(numbered(3), DECODING, [0] * 3, on_answer)
        assert len(await engine.answer(numbered(3), DECODING, [0] * 3)) == 3

    with_engine(EchoModel(), work)


def test_embedding_halves_what_does_not_fit_and_keeps_the_order() -> None:
    """Three hundred answers through a model that holds fifty."""
    model = EchoModel(memory=50)
    answers = [Answer("x" * place, (1,)) for place in range(300)]

    async def work(engine: Engine) -> list[NDArray[np.float64]]:
        return await engine.embed(answers, "STATIC", "MeanReducer")

    assert [vector[0] for vector in with_engine(model, work)] == [float(place) for place in range(300)]


def test_the_model_runs_on_one_thread() -> None:
    """It never sees two threads, answers each prompt once, and its time is counted."""
    model = EchoModel()

    async def work(engine: Engine) -> float:
        await asyncio.gather(*(engine.answer(numbered(30), DECODING, [0] * 30) for _ in range(3)))
        return engine.stats.busy_seconds

    assert with_engine(model, work) > 0
    assert sum(map(len, model.batches)) == 90
    assert len(model.threads) == 1


def test_several_event_loops_may_use_one_engine() -> None:
    """Callers of different threads, each with a loop of its own, get their own answers."""
    model = EchoModel()
    engine = Engine(model)
    found: dict[str, list[str]] = {}

    def caller(tag: str) -> None:
        answers = asyncio.run(engine.answer(numbered(20, tag), DECODING, [0] * 20))
        found[tag] = [answer.text for answer in answers]

    threads = [threading.Thread(target=caller, args=(tag,)) for tag in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    engine.close()
    assert found == {tag: [f"{tag}{place}/0" for place in range(20)] for tag in "abc"}


def test_closing_fails_what_waits_and_refuses_what_comes() -> None:
    """Nobody waits forever on an engine that is gone, and the model is closed."""
    gate = threading.Event()
    model = EchoModel(gate=gate)

    async def main() -> None:
        engine = Engine(model)
        waiting = asyncio.create_task(engine.answer(numbered(100), DECODING, [0] * 100))
        await asyncio.sleep(0.1)
        threading.Timer(0.2, gate.set).start()
        await engine.aclose()
        with pytest.raises(ModelError, match="closed"):
            await asyncio.wait_for(waiting, 10)
        with pytest.raises(ModelError, match="closed"):
            await engine.answer(numbered(1), DECODING, [0])
        await engine.aclose()

    asyncio.run(main())
    assert model.closed


def test_an_engine_whose_thread_breaks_says_so_to_those_who_wait() -> None:
    """Even a SystemExit out of the model does not leave callers hanging."""

    class Quitting(EchoModel):
        def answer(
            self, prompts: Sequence[WordPrompt], decoding: Decoding, seeds: Sequence[int]
        ) -> list[Answer]:
            del prompts, decoding, seeds
            raise SystemExit(3)

    async def work(engine: Engine) -> None:
        for count in (1, 30):  # all in the batch in hand; after it broke
            with pytest.raises(EngineStoppedError, match=r"stopped working: SystemExit\(3\)"):
                await asyncio.wait_for(engine.answer(numbered(count), DECODING, [0] * count), 10)

    with_engine(Quitting(), work)


def test_the_engine_costs_little_per_prompt() -> None:
    """2^13 prompts with a model that answers at once take well under a millisecond each."""
    snapshots = numbered(2**13)

    async def work(engine: Engine) -> float:
        started = time.perf_counter()
        await engine.answer(snapshots, DECODING, [0] * len(snapshots))
        return time.perf_counter() - started

    assert with_engine(EchoModel(max_batch_size=128), work) / len(snapshots) < 1e-3


def forcing_of(words: Sequence[str]) -> Forcing:
    return Forcing(texts(*words), [[1] * (1 + place % 3) for place in range(len(words))], DECODING)


def test_likelihoods_come_in_the_order_of_the_prompts_each_told_of_once() -> None:
    """Whatever batches the prompts share, prompt i gets the likelihood of its own continuation."""
    model = EchoModel()
    words = [" ".join(["w"] * (1 + place % 7)) for place in range(50)]
    told: dict[int, float] = {}

    async def work(engine: Engine) -> list[Likelihood]:
        found = await engine.likelihoods(
            forcing_of(words), lambda place, each: told.__setitem__(place, float(each.logprobs[0]))
        )
        answers = await engine.answer(texts("w"), DECODING, [3])
        assert [answer.text for answer in answers] == ["w/3"]
        return found

    found = with_engine(model, work)
    assert [each.logprobs.tolist() for each in found] == [
        [-(1.0 + place % 7), -(1.0 + place % 3)] for place in range(50)
    ]
    assert told == {place: -(1.0 + place % 7) for place in range(50)}
    assert max(map(len, model.batches)) == 8
    assert model.threads == {"shapx-device"}


def test_likelihoods_that_do_not_fit_are_read_in_halves() -> None:
    """Memory for three prompts is enough for batches of eight."""
    model = EchoModel(memory=3)

    async def work(engine: Engine) -> list[Likelihood]:
        return await engine.likelihoods(forcing_of(["w"] * 16))

    assert len(with_engine(model, work)) == 16
    assert [len(batch) for batch in model.batches] == [2] * 8


def test_a_prompt_that_does_not_fit_with_its_continuation_fails_its_caller_alone() -> None:
    """The message says what to change, and the engine goes on."""
    model = EchoModel(memory=0)

    async def work(engine: Engine) -> None:
        with pytest.raises(ModelError, match="does not hold one prompt of 2 positions with an answer of 1"):
            await engine.likelihoods(forcing_of(["w w"]))
        with pytest.raises(RowError, match="cannot be encoded"):
            await engine.likelihoods(forcing_of(["w", "unreadable"]))
        model.memory = 1
        assert len(await engine.likelihoods(forcing_of(["w"]))) == 1
        assert await engine.likelihoods(forcing_of([])) == []

    with_engine(model, work)

"""The engine of a model behind a server: it sends the prompts of many rows as concurrent requests."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from mllm_shap import ConversationSnapshot

from mllm_shapx.errors import (
    BudgetError,
    ModelChangedError,
    ModelError,
    RowError,
    ServerError,
    StudyError,
    first_of,
)
from mllm_shapx.models.base import (
    Answer,
    Decoding,
    EmbeddingMode,
    EngineStats,
    Forcing,
    Likelihood,
    ServerDiedError,
    Vector,
)
from mllm_shapx.models.server_budget import CallBudget, ServerLimits
from mllm_shapx.models.server_client import Reply, ServerClient, Setback
from mllm_shapx.models.server_identity import ServedModel, look
from mllm_shapx.models.server_text import ServerModel, ServerPrompt
from mllm_shapx.models.server_throttle import Throttle

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 8.0
"""Each setback doubles the pause, which is drawn between half of it and all of it."""
TRIES = 6
"""Failures of one prompt, while others are answered, after which its row is put aside."""
QUIET_S = 3.0
"""Seconds without an answer after which the user is told."""


@dataclass(slots=True)
class _Trouble:
    """The failures of one prompt."""

    failures: int = 0
    answered_before: int = 0
    """Answers to other prompts when it first failed."""


class ServerEngine:
    """Answers prompts of many concurrent callers through one server. For one event loop.

    Requests are sent in the order of the prompts' texts, which suits the server's prefix cache. `Throttle`
    limits how many are in flight. After a setback the engine waits and tries again, for at most `patience_s`
    without any answer. A prompt fails only if it fails repeatedly while others are answered.

    Args:
        model: The model behind the server; the engine owns it and closes it.
        limits: How long the engine waits for answers, and how many requests and tokens it may use.
    """

    def __init__(self, model: ServerModel, limits: ServerLimits) -> None:
        self.model = model
        self.most_rows = model.service.max_concurrency
        """Each of the requests in flight may be of another row."""
        model.begin()
        self._patience_s = limits.patience_s
        self._budget = CallBudget(limits)
        self._client = ServerClient(model.service)
        self._throttle = Throttle(model.service.max_concurrency)
        self._looking = asyncio.Lock()
        self._served: ServedModel | None = None
        self._is_sure = False
        """Whether the server's model was compared since the connection last broke."""
        self._broken: StudyError | None = None
        self._answered = 0
        self._setbacks = 0
        """Setbacks in a row, of which all requests in flight at one time make one."""
        self._set_back_at = 0.0
        """Time of the last of them."""
        self._silent_since: float | None = None
        self._last = ""

    @property
    def stats(self) -> EngineStats:
        """See `PromptEngine.stats`; the batch size is the number of requests in flight."""
        return EngineStats(
            busy_seconds=self._throttle.busy_seconds,
            batch_size=self._throttle.limit,
            spent=self._budget.spent,
        )

    @property
    def waiting_for(self) -> str:
        """See `PromptEngine.waiting_for`."""
        if self._silent_since is None or time.monotonic() - self._silent_since < QUIET_S:
            return ""
        return (
            f"the server at {self.model.service.base_url} gives no answers: {self._last}; waiting up to "
            f"{self._patience_s:g} s for it"
        )

    def order(self, snapshot: ConversationSnapshot) -> tuple[str, ...]:
        """Return a key that puts prompts with the same beginning next to each other."""
        return tuple(message.text for message in snapshot.messages())

    async def answer(
        self,
        snapshots: Sequence[ConversationSnapshot],
        decoding: Decoding,
        seeds: Sequence[int],
        on_answer: Callable[[int, Answer], None] | None = None,
    ) -> list[Answer]:
        """See `PromptEngine.answer`."""
        prompts = [self.model.encode(snapshot, decoding) for snapshot in snapshots]
        answers: dict[int, Answer] = {}

        async def ask(index: int) -> None:
            answers[index] = answer = await self._ask(prompts[index], decoding, seeds[index])
            if on_answer is not None:
                on_answer(index, answer)

        try:
            async with asyncio.TaskGroup() as group:
                for index in sorted(range(len(prompts)), key=lambda each: self.order(snapshots[each])):
                    group.create_task(ask(index))
        except ExceptionGroup as failures:
            raise first_of(failures) from None
        return [answers[index] for index in range(len(prompts))]

    async def embed(self, answers: Sequence[Answer], mode: EmbeddingMode, reducer: str) -> list[Vector]:
        """Raise `ModelError`: a server gives no states."""
        return self.model.embed(answers, mode, reducer)

    async def likelihoods(
        self,
        forcing: Forcing,  # noqa: ARG002
        on_likelihood: Callable[[int, Likelihood], None] | None = None,  # noqa: ARG002
    ) -> list[Likelihood]:
        """Raise `ModelError`: a server reads no given tokens."""
        raise ModelError("connector 'openai' reads no probabilities of given tokens")

    async def aclose(self, *, keep_model: bool = False) -> None:
        """Close the connections; end the server that the worker started, unless `keep_model`."""
        self._broken = ServerError("the engine is closed: it answers no more prompts")
        await self._client.aclose()
        if not keep_model:
            await asyncio.to_thread(self.model.close)

    async def _ask(self, prompt: ServerPrompt, decoding: Decoding, seed: int) -> Answer:
        trouble = _Trouble()
        while True:
            async with self._throttle.slot() as sent_at:
                if self._broken is not None:
                    raise self._broken
                try:
                    await self._make_sure()
                    reserved = await self._budget.enter(prompt.size, decoding.max_new_tokens)
                    try:
                        reply = await self._client.ask(prompt.messages, self._asked(decoding), seed)
                    finally:
                        self._budget.leave(reserved)
                    self._budget.count(prompt.size, reserved, reply.answer.tokens_in, reply.answer.tokens_out)
                    return self._accept(reply)
                except Setback as setback:
                    pause_s = self._note(setback, sent_at, trouble)
                except StudyError as error:
                    if self._broken is None:  # else another request has failed meanwhile
                        self._broken = error
                    raise
            await asyncio.sleep(pause_s)

    def _asked(self, decoding: Decoding) -> Decoding:
        """Return how a prompt is asked: with log-probabilities where the server gives them."""
        if self._served is None or not self._served.gives_logprobs:
            return decoding
        return replace(decoding, logprobs=True)

    def _accept(self, reply: Reply) -> Answer:
        if self._broken is not None and not isinstance(self._broken, BudgetError):
            raise self._broken
        served = self._served
        assert served is not None  # noqa: S101 -- for the type checker
        if how := served.difference(replace(served, model=reply.model, fingerprint=reply.fingerprint)):
            self._changed(how)
        self._answered += 1
        self._setbacks, self._silent_since = 0, None
        self._throttle.succeeded()
        self.model.count(reply)
        return reply.answer

    async def _make_sure(self) -> None:
        """Compare the server's model: at first, and after each broken connection."""
        if self._is_sure:
            return
        async with self._looking:
            if self._is_sure:
                return
            try:
                served = await look(self._client)
            except ModelError as error:
                self._changed(str(error))
            before = self._served
            # What a server of our own has is decided by its command; it must only stay the same.
            expected = (
                self.model.identity.revision if self.model.server is None else (before or served).commit
            )
            if served.commit != expected:
                self._changed((before.difference(served) if before else "") or f"it has {served}")
            self._served, self._is_sure = served, True

    def _changed(self, how: str) -> NoReturn:
        raise ModelChangedError(
            f"the server at {self.model.service.base_url} is not what the study began with: {how}. No answer "
            "of it was kept since. Start the old model again and go on with --resume, or explain the new one "
            "under another experiment_set_id"
        )

    def _note(self, setback: Setback, sent_at: float, trouble: _Trouble) -> float:
        """Record a setback; return the seconds that its prompt waits.

        Raises:
            ServerError: When there has been no answer for too long.
            RowError: When it is this prompt alone that fails.
        """
        now = time.monotonic()
        if sent_at > self._set_back_at:
            self._set_back_at = now
            self._setbacks += 1
        self._last = setback.why
        if self._silent_since is None:
            self._silent_since = now
        self._give_up_if_silent(setback, now)
        if setback.kind == "away":
            self._check_own_server()
            # The server may come back with another model.
            self._is_sure = False
            self._throttle.away()
        elif setback.kind in {"busy", "late"}:
            self._throttle.too_many(sent_at)
        if setback.kind != "failed" or setback.wait_s:
            self._throttle.pause(setback.wait_s or _pause_s(max(1, self._setbacks)))
        if setback.kind in {"away", "busy"}:
            return 0.0
        if not trouble.failures:
            trouble.answered_before = self._answered
        trouble.failures += 1
        if trouble.failures >= TRIES and self._answered - trouble.answered_before >= TRIES:
            raise RowError(
                "server_failed",
                f"the server failed {trouble.failures} times at one of its prompts while it answered others: "
                f"{setback.why}",
            )
        return 0.0 if setback.kind == "late" or setback.wait_s else _pause_s(trouble.failures)

    def _check_own_server(self) -> None:
        """Raise `ServerDiedError` when the server of this worker has ended."""
        server = self.model.server
        if server is not None and server.exit_code is not None:
            raise ServerDiedError(
                f"the server of this worker ended with exit code {server.exit_code}; its log ends with\n"
                f"{server.log_tail}"
            )

    def _give_up_if_silent(self, setback: Setback, now: float) -> None:
        silent = now - (self._silent_since or now)
        if max(silent, setback.wait_s or 0.0) <= self._patience_s:
            return
        self._broken = self._broken or ServerError(
            f"the server at {self.model.service.base_url} has given no answer for {silent:.0f} s: "
            f"{setback.why}"
            + (f", and asks to be left alone for {setback.wait_s:.0f} s" if setback.wait_s else "")
            + ". All answers so far are written and no row is to blame; go on with --resume when it is back. "
            "--server-patience says how long a study waits"
        )
        raise self._broken


def _pause_s(setbacks: int) -> float:
    longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(setbacks - 1, 10))
    return longest * random.uniform(0.5, 1.0)

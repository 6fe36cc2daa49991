"""What a call may ask of a server: how long it waits, how many requests and tokens it may use."""

import asyncio
import math
from dataclasses import dataclass

from mllm_shapx.errors import BudgetError

PATIENCE_S = 600.0
TEMPLATE_TOKENS = 64
"""Tokens that a chat template is assumed to add, until the server has counted a prompt."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What was asked of a server so far, as it counts tokens."""

    requests: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Limits of one call of `run`."""

    patience_s: float = PATIENCE_S
    """Seconds without any answer after which the study stops."""
    max_requests: int | None = None
    max_tokens: int | None = None
    """Tokens of prompts and answers together, as the server counts them."""
    spent: Spent = Spent()
    """What this call has used of them before the engine was made."""

    @property
    def are_counted(self) -> bool:
        """Return whether requests or tokens are limited."""
        return self.max_requests is not None or self.max_tokens is not None


class CallBudget:
    """Counts requests and tokens and refuses a request that could go beyond a limit. For one event loop.

    A request reserves the tokens that it can cost: those of its prompt and `max_new_tokens`. At first, each
    byte of a prompt counts as one token, and the template as `TEMPLATE_TOKENS`. Once the server has counted
    prompts, the largest number of tokens per byte counts, and for the template all tokens of the shortest
    prompt: no counted prompt costs more. An answer without a count costs what was reserved.
    """

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._requests = limits.spent.requests
        self._tokens = limits.spent.tokens
        self._reserved = 0
        self._in_flight = 0
        self._tokens_per_byte = 0.0
        self._fewest_tokens: int | None = None
        """Tokens of the shortest prompt that was counted."""
        self._uncounted = 0
        """Answers without a count."""
        self._reached: str | None = None
        """Why nothing more is sent; a smaller request that would fit is refused too."""
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def spent(self) -> Spent:
        """Return what was used so far."""
        return Spent(self._requests, self._tokens)

    async def enter(self, prompt_bytes: int, max_new_tokens: int) -> int:
        """Count a request that is about to be sent; return the tokens that it reserves, for `leave`.

        A request that is refused waits for those in flight first: their answers are paid for and kept.

        Raises:
            BudgetError: When the request could go beyond a limit, even once all others have ended.
        """
        while True:
            needed = self._cost(prompt_bytes) + max_new_tokens
            reason = self._reached or self._refusal(needed)
            if reason is None:
                break
            if not self._in_flight:
                self._reached = reason
                raise BudgetError(
                    f"{reason}; stopping early. All answers so far are written; go on with --resume, which "
                    "counts from 0"
                )
            self._idle.clear()
            await self._idle.wait()
        self._requests += 1
        self._in_flight += 1
        self._reserved += needed
        return needed

    def leave(self, reserved: int) -> None:
        """Count a request that has ended, with or without an answer."""
        self._in_flight -= 1
        self._reserved -= reserved
        self._idle.set()

    def count(self, prompt_bytes: int, reserved: int, tokens_in: int | None, tokens_out: int | None) -> None:
        """Count the tokens of an answer, for which `reserved` tokens were reserved."""
        if tokens_in is None or tokens_out is None:
            self._tokens += reserved
            self._uncounted += 1
        else:
            self._tokens += tokens_in + tokens_out
        if tokens_in is not None:
            fewest = self._fewest_tokens
            self._fewest_tokens = tokens_in if fewest is None else min(fewest, tokens_in)
            if prompt_bytes:
                self._tokens_per_byte = max(self._tokens_per_byte, tokens_in / prompt_bytes)

    def _cost(self, prompt_bytes: int) -> int:
        """Return the tokens that a prompt is taken to cost."""
        if self._fewest_tokens is None:
            return prompt_bytes + TEMPLATE_TOKENS
        return math.ceil(prompt_bytes * min(1.0, self._tokens_per_byte)) + self._fewest_tokens

    def _refusal(self, needed: int) -> str | None:
        most = self._limits.max_requests
        if most is not None and self._requests >= most:
            return f"--max-requests {most}: {self._requests} request(s) were sent"
        most = self._limits.max_tokens
        if most is not None and self._tokens + self._reserved + needed > most:
            counted = f"{self._tokens} tokens were used"
            if self._uncounted:
                counted += f", at most, as {self._uncounted} answer(s) came without a count"
            return f"--max-tokens {most}: {counted}, and the next request may take {needed} more"
        return None

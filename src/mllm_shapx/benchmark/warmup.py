"""Before the contest: loads and warms up all contestants, and estimates their rates."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from mllm_shap import ConversationSnapshot

from mllm_shapx.benchmark.library import LibraryError, LibraryRunner, comparable
from mllm_shapx.benchmark.options import BenchOptions
from mllm_shapx.benchmark.ours import Explainer
from mllm_shapx.benchmark.plain import PlainGenerate
from mllm_shapx.benchmark.reference import OTHER_PROMPTS
from mllm_shapx.benchmark.rounds import WORTH_ALL, Contestants
from mllm_shapx.benchmark.subject import Game, Subject
from mllm_shapx.explaining.settings import decoding
from mllm_shapx.models.base import Model
from mllm_shapx.models.hf_text import HfTextModel

ENOUGH_S = 1.0
"""Our warm-up grows until one turn takes these seconds."""
GROWING_SHARE = 0.25
"""While the batch size grows, the warm-up continues until a turn takes this share of the time."""
FIRST_COALITIONS = 64
MOST_COALITIONS = 1 << 15
MOST_ROWS = 512
MOST_LONG_ROWS = 3
"""Rows that share the time if the user gives a number of rows; more rows take longer."""
LIBRARY_COALITIONS = 16


class GameSupply:
    """The exact games of a subject's rows, read on demand."""

    def __init__(self, subject: Subject, model: Model) -> None:
        self._unread: Iterator[Game] = subject.games(model)
        self._read: list[Game] = []

    def first(self, count: int) -> list[Game]:
        """Return the first `count` games, or all if there are fewer."""
        self._read += islice(self._unread, max(0, count - len(self._read)))
        return self._read[:count]


@dataclass(frozen=True, slots=True)
class Ready:
    """The loaded and warm contestants, and their games."""

    contestants: Contestants
    games: Sequence[Game]
    rate: float
    """Our approximate coalitions per second."""
    raw: PlainGenerate | None
    notes: tuple[str, ...]


async def warm_up(
    subject: Subject, model: Model, ours: Explainer, options: BenchOptions, say: Callable[[str], None]
) -> Ready:
    """Load and warm up all contestants; choose games that fit the time.

    Raises:
        UsageError: When no row can be explained.
    """
    supply = GameSupply(subject, model)
    say("warming up")
    rate, prompts = await _warm_up_ours(ours, supply, GROWING_SHARE * options.seconds)
    notes: list[str] = []
    library, library_rate = await _warm_up_library(subject, supply, notes, say)
    raw = None
    if isinstance(model, HfTextModel):
        say("looking for the best batch size of plain generate")
        raw = PlainGenerate(model, decoding(subject.run))
        await asyncio.to_thread(raw.find_batch_size, prompts, options.seconds)
    return Ready(
        contestants=Contestants(
            ours=ours,
            library=library,
            library_rate=library_rate,
            raw=raw,
            comparable=comparable(subject.run, model.identity.dtype),
        ),
        games=_choose(supply, rate, library_rate, options),
        rate=rate,
        raw=raw,
        notes=tuple(notes),
    )


async def _warm_up_ours(
    ours: Explainer, supply: GameSupply, patience: float
) -> tuple[float, list[ConversationSnapshot]]:
    """Play ever larger games until the batch size is stable or a turn takes `patience` seconds.

    Returns:
        Coalitions per second, and the prompts of the last turn.
    """
    rows, most = 1, FIRST_COALITIONS
    await ours.play([supply.first(1)[0].smallest()])  # the first call initializes libraries
    while True:
        games = [game.limited_to(most) for game in supply.first(rows)]
        size = ours.engine.stats.batch_size
        turn = await ours.play(games)
        enough = ENOUGH_S if ours.engine.stats.batch_size == size else max(ENOUGH_S, patience)
        if turn.seconds >= enough or turn.coalitions >= MOST_COALITIONS:
            break
        if games[0].coalitions >= most:
            most *= 4
        elif len(games) == rows:
            rows *= 2
        else:
            break
    return turn.coalitions / turn.seconds, turn.prompts


async def _warm_up_library(
    subject: Subject, supply: GameSupply, notes: list[str], say: Callable[[str], None]
) -> tuple[LibraryRunner | None, float]:
    """Return the library's runner and its coalitions per second; None with a note if it cannot run."""
    if subject.run.connector != "hf_text":
        notes.append(f"mllm_shap has no backend for connector {subject.run.connector!r}: no ratio")
        return None, 0.0
    say("loading the model into mllm_shap's own backend")
    library = LibraryRunner(subject.run, subject.model_path)
    game = supply.first(1)[0].limited_to(LIBRARY_COALITIONS)
    try:
        await library.explain(game.smallest())  # loads the model
        result = await library.explain(game)
    except LibraryError as error:
        notes.append(f"no ratio: {error}")
        await library.aclose()
        return None, 0.0
    if library.makes_other_prompts:
        notes.append(OTHER_PROMPTS)
    return library, result.coalitions / result.seconds


def _choose(supply: GameSupply, rate: float, library_rate: float, options: BenchOptions) -> list[Game]:
    """Return games for the contest: the number of the options, or as many as fit the slower side's time.

    A game too long for us is cut to the time and played alone. Coalitions of one row share more than those of
    several rows, so many short games would be slower than a study's whole games. If the library cannot play
    even one, only our time counts.
    """
    alike = min(options.rows or 1, MOST_LONG_ROWS)
    most = max(FIRST_COALITIONS, int(rate * options.seconds / alike))
    if options.rows is not None:
        return [game.limited_to(most) for game in supply.first(options.rows)]
    target = rate * options.seconds / 2
    first = supply.first(1)[0].limited_to(most)
    if 0 < first.coalitions <= WORTH_ALL * library_rate * options.library_seconds:
        target = min(target, library_rate * options.library_seconds)
    games: list[Game] = [first]
    total = first.coalitions
    while total < target and len(games) < MOST_ROWS:
        more = supply.first(len(games) + 1)[len(games) :]
        if not more:
            break
        games.append(more[0].limited_to(most))
        total += games[-1].coalitions
    return games

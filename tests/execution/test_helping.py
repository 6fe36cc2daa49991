"""A heavy row on several workers: every coalition is answered once, whatever becomes of those who help."""

import asyncio
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mllm_shap import ConversationSnapshot

from mllm_shapx.config.loading import load_config
from mllm_shapx.data.conversations import Row
from mllm_shapx.execution import row_answers
from mllm_shapx.execution.coordinator import Coordinator
from mllm_shapx.execution.helping import HelpExchange, HelpOffer, HelpReply, HelpTask, chunk_size
from mllm_shapx.execution.inline import DirectDesk
from mllm_shapx.execution.loading import LoadModel, load_study_model
from mllm_shapx.execution.messages import Study
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.preparation import open_output, prepare
from mllm_shapx.execution.row_answers import OnAnswer, RowAnswerer
from mllm_shapx.execution.run import run_config
from mllm_shapx.execution.worker import Worker
from mllm_shapx.explaining.sample import open_row
from mllm_shapx.models.base import Answer, Model
from mllm_shapx.planning.sweep import expand
from mllm_shapx.reporting.progress import ProgressReporter

ROOT = Path(__file__).parents[2]
UNIT = "00007-key"
WORDS = "kindly tell our tall sailor about the old harbor museum today"


def prompts_of(players: int) -> dict[int, ConversationSnapshot]:
    """Return the prompts of an exact game of so many words."""
    run = expand(load_config(ROOT / "configs/demo.json").experiment_set).runs[0]
    text = " ".join(f"word{place}" for place in range(players))
    coalitions = open_row(Row(7, (text,), (None,), (None,), "en", "en"), run)
    return {mask: coalitions.render(mask) for mask in range(1 << players)}


PROMPTS = prompts_of(8)


def answer_to(mask: int) -> Answer:
    return Answer(f"answer {mask}")


class Desk:
    """An owner's way to the exchange; it can be restarted, which loses all that it knows."""

    def __init__(self, *helpers: str) -> None:
        self.now = HelpExchange()
        self.helpers = set(helpers)
        self.offers: list[HelpOffer] = []

    async def exchange(self, offer: HelpOffer) -> HelpReply:
        self.offers.append(offer)
        await asyncio.sleep(0)
        return self.now.exchange(offer, 7, self.helpers)

    def restart(self) -> None:
        self.now = HelpExchange()


class Owner:
    """A worker's own engine and what came back; `step` is awaited for each round."""

    def __init__(self, desk: Desk, step: Callable[[], Awaitable[None]] | None = None) -> None:
        self.desk = desk
        self.step = step or (lambda: asyncio.sleep(0.002))
        self.here: list[int] = []
        self.kept: Counter[int] = Counter()

    async def answer(self, prompts: Mapping[int, ConversationSnapshot], on_answer: OnAnswer) -> None:
        assert prompts
        self.here += prompts
        await self.step()
        for mask in prompts:
            on_answer(mask, answer_to(mask))

    def keep(self, mask: int, answer: Answer) -> None:
        assert answer == answer_to(mask)
        self.kept[mask] += 1

    def generation(self, batch_size: int = 4) -> RowAnswerer:
        return RowAnswerer(
            UNIT, "exact", self.answer, self.desk.exchange, lambda: batch_size, order=longest_first
        )

    async def run(self, prompts: Mapping[int, ConversationSnapshot] = PROMPTS) -> None:
        async with self.generation() as row:
            await row.answer(prompts, self.keep)

    def has_all_once(self, prompts: Mapping[int, ConversationSnapshot] = PROMPTS) -> bool:
        return self.kept == Counter(dict.fromkeys(prompts, 1))


def longest_first(prompt: ConversationSnapshot) -> int:
    return -sum(len(message.text) for message in prompt.messages())


Deliver = Callable[[Desk, HelpTask], Awaitable[None]]


async def all_of_it(desk: Desk, task: HelpTask) -> None:
    await asyncio.sleep(0.002)
    desk.now.deliver(task.task_id, {mask: answer_to(mask) for mask in task.masks})


async def help_out(
    desk: Desk, name: str, deliver: Deliver = all_of_it, seen: list[int] | None = None
) -> None:
    """Help until cancelled."""
    while True:
        task = desk.now.claim(name)
        if task is None:
            await asyncio.sleep(0.001)
            continue
        if seen is not None:
            seen += task.masks
        await deliver(desk, task)


async def beside(work: Awaitable[None], *helpers: Awaitable[None]) -> None:
    """Do `work` while helpers help, within a time that no healthy exchange needs."""
    tasks = [asyncio.ensure_future(each) for each in helpers]
    try:
        await asyncio.wait_for(work, 20.0)
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ended), ended


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"EXCHANGE_S": 0.003, "LAST_EXCHANGE_S": 0.001, "LOOK_S": 0.005}.items():
        monkeypatch.setattr(row_answers, name, seconds)


def test_without_helpers_the_own_engine_answers_everything_once() -> None:
    owner = Owner(Desk())
    asyncio.run(owner.run())
    assert owner.has_all_once()
    assert sorted(owner.here) == sorted(PROMPTS)
    assert not any(offer.masks for offer in owner.desk.offers)


def test_longest_prompts_go_first_in_whole_batches() -> None:
    owner = Owner(Desk())
    asyncio.run(owner.run())
    lengths = [sum(len(message.text) for message in PROMPTS[mask].messages()) for mask in owner.here]
    assert lengths == sorted(lengths, reverse=True)


def test_helpers_share_the_work_and_nothing_is_answered_twice() -> None:
    owner, seen = Owner(Desk("b", "c", "d")), list[int]()
    asyncio.run(beside(owner.run(), *(help_out(owner.desk, name, seen=seen) for name in "bcd")))
    assert owner.has_all_once()
    assert sorted([*owner.here, *seen]) == sorted(PROMPTS)
    assert len(owner.here) < len(PROMPTS) / 2
    assert owner.desk.now.claim("e") is None


def test_calls_side_by_side_share_the_helpers() -> None:
    async def slices(owner: Owner) -> None:
        items = list(PROMPTS.items())
        async with owner.generation() as row, asyncio.TaskGroup() as group:
            for start in range(0, len(items), 50):
                group.create_task(row.answer(dict(items[start : start + 50]), owner.keep))

    owner, seen = Owner(Desk("b")), list[int]()
    asyncio.run(beside(slices(owner), help_out(owner.desk, "b", seen=seen)))
    assert owner.has_all_once()
    assert seen


@pytest.mark.parametrize("part", [0.0, 0.5])
def test_a_helper_that_leaves_coalitions_unanswered_is_not_asked_again(part: float) -> None:
    chunks: list[tuple[int, ...]] = []

    async def deliver(desk: Desk, task: HelpTask) -> None:
        chunks.append(task.masks)
        answered = task.masks[: int(part * len(task.masks))]
        desk.now.deliver(task.task_id, {mask: answer_to(mask) for mask in answered})

    owner = Owner(Desk("b"))
    asyncio.run(beside(owner.run(), help_out(owner.desk, "b", deliver)))
    assert owner.has_all_once()
    assert len(chunks) == 1


def test_a_helper_that_dies_costs_its_chunk_only() -> None:
    async def die(desk: Desk, task: HelpTask) -> None:
        assert task.masks
        await asyncio.sleep(0.005)
        desk.helpers.discard("b")
        desk.now.helper_lost("b")
        await asyncio.sleep(3600)

    owner, seen = Owner(Desk("b", "c")), list[int]()
    helpers = help_out(owner.desk, "b", die), help_out(owner.desk, "c", seen=seen)
    asyncio.run(beside(owner.run(), *helpers))
    assert owner.has_all_once()
    assert sorted([*owner.here, *seen]) == sorted(PROMPTS), "what was answered before is not asked again"


def test_what_a_silent_helper_holds_is_answered_by_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_answers, "PATIENCE_S", 0.05)
    held: list[HelpTask] = []

    async def hang(_: Desk, task: HelpTask) -> None:
        held.append(task)
        await asyncio.sleep(3600)

    owner = Owner(Desk("b"))
    asyncio.run(beside(owner.run(), help_out(owner.desk, "b", hang)))
    assert owner.has_all_once()
    assert held
    assert sorted(owner.here) == sorted(PROMPTS)


def test_answers_that_come_late_or_twice_change_nothing() -> None:
    tasks: list[HelpTask] = []

    async def twice(desk: Desk, task: HelpTask) -> None:
        tasks.append(task)
        await all_of_it(desk, task)
        desk.now.deliver(task.task_id, {mask: Answer("too late") for mask in task.masks})

    owner = Owner(Desk("b"))

    async def both_runs() -> None:
        await owner.run()
        owner.desk.now.deliver(tasks[-1].task_id, {mask: Answer("later still") for mask in tasks[-1].masks})
        second = dict(list(prompts_of(9).items())[300:400])
        await owner.run(second)
        assert owner.has_all_once({**PROMPTS, **second})

    asyncio.run(beside(both_runs(), help_out(owner.desk, "b", twice)))
    assert tasks


def test_a_restarted_coordinator_loses_no_coalition() -> None:
    owner = Owner(Desk("b", "c"))

    async def restart() -> None:
        while True:
            await asyncio.sleep(0.012)
            owner.desk.restart()

    helpers = [help_out(owner.desk, name) for name in "bc"]
    asyncio.run(beside(owner.run(), restart(), *helpers))
    assert owner.has_all_once()


def test_a_coordinator_that_does_not_know_the_unit_gets_nothing_to_keep() -> None:
    """Between its restart and the owner's next sign of life it knows nobody's units."""

    class Forgetful(Desk):
        async def exchange(self, offer: HelpOffer) -> HelpReply:
            reply = await super().exchange(offer)
            if len(self.offers) % 3 == 2:
                self.restart()
                return HelpReply()
            return reply

    owner = Owner(Forgetful("b"))
    asyncio.run(beside(owner.run(), help_out(owner.desk, "b")))
    assert owner.has_all_once()


def test_an_offer_that_arrives_twice_is_taken_once() -> None:
    exchange = HelpExchange()
    offer = HelpOffer(UNIT, "exact", (1, 2, 3), least=2, most=4)
    exchange.exchange(offer, 7, {"b"})
    exchange.exchange(offer, 7, {"b"})
    task = exchange.claim("b")
    assert task is not None
    exchange.deliver(task.task_id, {mask: answer_to(mask) for mask in task.masks})
    asking = HelpOffer(UNIT, "exact", take_back=9)
    first = exchange.exchange(asking, 7, {"b"})
    assert exchange.exchange(asking, 7, {"b"}) == first
    assert sorted([*first.answers, *first.returned]) == [1, 2, 3]
    assert exchange.claim("b") is None


def test_a_row_whose_owner_is_gone_starts_afresh_and_late_helpers_do_no_harm() -> None:
    exchange = HelpExchange()
    old = exchange.exchange(HelpOffer(UNIT, "exact", (1, 2, 3, 4), least=1, most=2), 7, {"b"})
    task = exchange.claim("b")
    assert task is not None
    exchange.close(UNIT)
    assert exchange.claim("c") is None
    exchange.deliver(task.task_id, {mask: answer_to(mask) for mask in task.masks})
    assert not exchange.is_helping("b")
    new = exchange.exchange(HelpOffer(UNIT, "exact"), 7, {"b"})
    assert (new.answers, new.returned, new.pooled) == ({}, (), 0)
    assert new.session != old.session


def test_helpers_take_from_the_row_that_has_most_to_give() -> None:
    exchange = HelpExchange()
    exchange.exchange(HelpOffer("small", "exact", tuple(range(10)), least=1, most=4), 1, {"b"})
    exchange.exchange(HelpOffer("large", "exact", tuple(range(100)), least=1, most=4), 2, {"b"})
    task = exchange.claim("b")
    assert task is not None
    assert (task.unit_id, task.row_index, len(task.masks)) == ("large", 2, 4)


def test_an_error_of_the_own_engine_is_raised_as_it_is_and_leaves_nothing_in_the_pool() -> None:
    error = ZeroDivisionError("the model broke")
    rounds = iter(range(100))

    async def fail() -> None:
        await asyncio.sleep(0.004)
        if next(rounds) == 3:
            raise error

    owner = Owner(Desk("b"), fail)
    with pytest.raises(ZeroDivisionError) as caught:
        asyncio.run(owner.run())
    assert caught.value is error
    assert any(offer.masks for offer in owner.desk.offers), "something was in the pool"
    assert owner.desk.now.claim("b") is None


def test_an_error_in_taking_an_answer_is_raised_too() -> None:
    def keep(mask: int, answer: Answer) -> None:
        raise OSError(f"no room for {mask}: {answer.text}")

    async def run(owner: Owner) -> None:
        async with owner.generation() as row:
            await row.answer(PROMPTS, keep)

    with pytest.raises(OSError, match="no room"):
        asyncio.run(run(Owner(Desk())))


def test_a_cancelled_row_takes_its_coalitions_out_of_the_pool() -> None:
    async def run(owner: Owner) -> None:
        task = asyncio.create_task(owner.run())
        while not any(offer.masks for offer in owner.desk.offers):  # noqa: ASYNC110 -- the desk has no event
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    owner = Owner(Desk("b"), lambda: asyncio.sleep(0.01))
    asyncio.run(run(owner))
    assert owner.desk.now.claim("b") is None


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_every_coalition_is_kept_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Helpers come, die, hang, forget and repeat themselves, and the coordinator is restarted, at random."""
    monkeypatch.setattr(row_answers, "PATIENCE_S", 0.03)
    draw = random.Random(seed)
    owner = Owner(Desk(*"bcde"), lambda: asyncio.sleep(draw.uniform(0.0, 0.004)))

    async def moody(desk: Desk, task: HelpTask) -> None:
        await asyncio.sleep(draw.uniform(0.0, 0.02))
        answers = {mask: answer_to(mask) for mask in task.masks}
        match draw.randrange(6):
            case 0:
                desk.now.helper_lost(draw.choice("bcde"))
            case 1:
                return
            case 2 if draw.random() < 0.3:
                answers = dict(list(answers.items())[: draw.randrange(len(answers))])
            case 3:
                desk.now.deliver(task.task_id, answers)
        desk.now.deliver(task.task_id, answers)

    async def restarts() -> None:
        while True:
            await asyncio.sleep(draw.uniform(0.01, 0.05))
            if draw.random() < 0.5:
                owner.desk.restart()
            else:
                owner.desk.helpers = set(draw.sample("bcde", draw.randrange(5)))

    asyncio.run(beside(owner.run(), restarts(), *(help_out(owner.desk, name, moody) for name in "bcde")))
    assert owner.has_all_once()


@pytest.mark.parametrize("seed", range(20))
def test_chunks_cover_everything_in_whole_batches_that_shrink_to_one(seed: int) -> None:
    draw = random.Random(seed)
    left, parties = draw.randrange(1, 20_000), draw.randrange(1, 20)
    least = draw.randrange(1, 300)
    most = least * draw.randrange(1, 5)
    sizes = []
    while left:
        sizes.append(chunk_size(left, parties, least, most))
        assert sizes[-1] > 0
        left -= sizes[-1]
    assert left == 0
    assert sizes == sorted(sizes, reverse=True)
    assert all(size % least == 0 and size <= most for size in sizes[:-1])
    assert sizes[-1] <= least


# --- on the demo's model


class Quiet(ProgressReporter):
    """Says nothing."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def update(self, progress: object) -> None:
        del progress

    def message(self, text: str) -> None:
        self.messages.append(text)

    def close(self) -> None:
        pass


def write_config(folder: Path, name: str, words: int, **changes: Any) -> Path:
    """Write a config of one heavy row in the demo's words."""
    pq.write_table(pa.table({"prompt": [" ".join(WORDS.split()[:words])]}), folder / "rows.parquet")
    config = {
        "base": str(ROOT / "configs/demo.json"),
        "experiment_set_id": name,
        "output_root": str(folder / "out"),
        "connector_kwargs": {"model_id": str(ROOT / "demo/model"), "dtype": "float32", "batch_size": 16},
        "dataset": {"source": "local_parquet", "path": str(folder / "rows.parquet")},
        "experiments": [{"explainer_type": "exact"}],
        **changes,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    return path


def explained(folder: Path, name: str) -> dict[str, Any]:
    """Return the only sample of a config's only run, without its running time."""
    (path,) = (folder / "out" / name).glob("*/samples/*.json")
    sample: dict[str, Any] = json.loads(path.read_text())
    assert sample.pop("runtime_sec") > 0
    return sample


async def _in_one_process(study: Study, coordinator: Coordinator) -> list[int]:
    """Run two workers on one coordinator; return the answers that each has generated."""
    # transformers does not load two models at once in one process.
    one_at_a_time = threading.Lock()

    def load(study: Study) -> Model:
        with one_at_a_time:
            return load_study_model(study)

    workers = [Worker(name, study, DirectDesk(coordinator), load) for name in ("one", "two")]
    await asyncio.gather(*(each.run() for each in workers))
    return [sum(each._generated.values()) for each in workers]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_two_workers_give_the_values_of_one(tmp_path: Path, temperature: float) -> None:
    """Greedy and sampled answers depend on the coalition alone, not on who generates them."""
    settings = {"generation": {"max_new_tokens": 6, "text_temperature": temperature}}
    alone = load_config(write_config(tmp_path, "alone", 8, **settings))
    run_config(alone, RunOptions(), Quiet(), inline=True)
    together = load_config(write_config(tmp_path, "together", 8, **settings))
    study, _ = prepare(together, RunOptions())
    output = open_output(study)
    try:
        answers = asyncio.run(_in_one_process(study, Coordinator(study, output.inspections)))
    finally:
        output.lock.release()
    assert min(answers) > 0
    assert sum(answers) == 2**8
    assert explained(tmp_path, "together") == explained(tmp_path, "alone")


def counting_loader(folder: Path, workers: int) -> LoadModel:
    """Return what loads a model that writes down how many prompts it has answered.

    Nobody answers before everybody has something to answer, and each batch takes a while: how the prompts
    are shared then depends on the exchange, not on how fast a process starts.
    """

    def load(study: Study) -> Model:
        model = load_study_model(study)
        answer, count = model.answer, folder / f"answers-{os.getpid()}"
        answered = 0

        def answer_slowly(prompts: Sequence[Any], *rest: Any) -> list[Answer]:
            nonlocal answered
            answered += len(prompts)
            count.write_text(str(answered))
            deadline = time.monotonic() + 60.0
            while len(list(folder.glob("answers-*"))) < workers and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(0.1)
            return answer(prompts, *rest)

        model.answer = answer_slowly  # type: ignore[method-assign,assignment]
        return model

    return load


def test_a_heavy_row_uses_two_processes_and_gives_the_values_of_one(tmp_path: Path) -> None:
    run_config(load_config(write_config(tmp_path, "alone", 9)), RunOptions(), Quiet(), inline=True)
    reporter = Quiet()
    together = load_config(write_config(tmp_path, "together", 9))
    load = counting_loader(tmp_path, 2)
    outcome = run_config(together, RunOptions(num_workers=2), reporter, inline=False, load=load)
    assert outcome.exit_code == 0, reporter.messages
    answers = [int(path.read_text()) for path in tmp_path.glob("answers-*")]
    assert len(answers) == 2
    assert sum(answers) == outcome.model_calls == 2**9
    assert min(answers) > 2**9 / 5, "the row is shared about evenly"
    assert explained(tmp_path, "together") == explained(tmp_path, "alone")


def test_an_answer_to_a_task_of_the_coordinator_before_a_restart_meets_no_task_of_the_next_one() -> None:
    before, after = HelpExchange(), HelpExchange()
    before.exchange(HelpOffer("unit-a", "exact", tuple(range(64)), 0, 1, 64), 0, ["owner", "one", "two"])
    after.exchange(HelpOffer("unit-b", "exact", tuple(range(64)), 0, 1, 64), 1, ["owner", "one", "two"])
    old, new = before.claim("one"), after.claim("two")
    assert old is not None
    assert new is not None
    after.deliver(old.task_id, {mask: Answer("to another row") for mask in old.masks})
    reply = after.exchange(HelpOffer("unit-b", "exact"), 1, ["owner", "one", "two"])
    assert reply.answers == {}

"""A worker: one loaded model that takes units from the coordinator and explains their rows."""

import asyncio
import contextlib
import logging
import math
import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Concatenate, Protocol

from mllm_shap import ConversationSnapshot

from mllm_shapx.errors import RowError, StudyError, first_of
from mllm_shapx.execution.answers import HeldUnit, vector_kind
from mllm_shapx.execution.coordinator import Coordinator
from mllm_shapx.execution.helping import HelpOffer, HelpReply, HelpTask
from mllm_shapx.execution.loading import (
    DeviceLostError,
    Loaded,
    LoadModel,
    ModelShelf,
    free_memory,
    gpu_memory,
    is_device_lost,
    load_all,
    load_study_model,
)
from mllm_shapx.execution.messages import Beat, LeaseReply, Study, UnitFailure, WorkerInfo
from mllm_shapx.execution.row_answers import OnAnswer, RowAnswerer
from mllm_shapx.execution.spec_content import environment_of
from mllm_shapx.explaining.similarity import Embedder, Vector
from mllm_shapx.explaining.unit import RowExplainer
from mllm_shapx.models.base import Answer, EngineStoppedError, ModelReport
from mllm_shapx.models.flight import FEWEST_ROWS, Flight
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.planning.units import expected_answers

logger = logging.getLogger(__name__)

IDLE_S = 0.4
"""Maximum pause in seconds before an idle worker asks again."""
HELPED_ROWS = 4
"""Rows of other workers that a helper keeps in memory."""
BEAT_S = 0.5
"""Seconds between two heartbeats."""


class Desk(Protocol):
    """The worker's connection to the coordinator."""

    async def call[**P, R](
        self, method: Callable[Concatenate[Coordinator, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Call a method of the coordinator and return its result. The call may arrive twice."""


class Worker:
    """Explains units until the coordinator has none left.

    `worker` is its name, unique in the study. A `shelf` is used instead of `load`; it keeps the model for the
    next study if all went well.
    """

    def __init__(
        self,
        worker: str,
        study: Study,
        desk: Desk,
        load: LoadModel = load_study_model,
        *,
        shelf: ModelShelf | None = None,
    ) -> None:
        self._me = WorkerInfo(worker, socket.gethostname(), os.getpid(), "", "")
        self._study = study
        self._desk = desk
        self._load = load if shelf is None else shelf.take
        self._shelf = shelf
        self._held: dict[str, HeldUnit] = {}
        self._generated: dict[str, int] = {}
        self._flight = Flight(
            study.options.rows_in_flight, self._batch_size, lambda: self._loaded.engine.most_rows
        )
        self._group: asyncio.TaskGroup | None = None
        self._ask_for_more_at = 0.0
        self._asking = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._draining = False
        self._helped: dict[tuple[int, str], RowExplainer] = {}
        self._loaded: Loaded  # set by `run`
        self._environment = ""
        self._reported = ModelReport()
        self._ended_units = 0

    async def run(self) -> None:
        """Load the model and explain units until nothing is left.

        Raises:
            ModelError: When the model cannot be loaded.
            ModelChangedError: When its files differ from those at the start of the study.
            ExceptionGroup: With a `DeviceLostError`, an `EngineStoppedError` or another error that ended it.
        """
        study, limits = self._study, self._study.server_limits
        if limits.are_counted:
            limits = replace(limits, spent=await self._desk.call(Coordinator.spent))
            study = replace(study, server_limits=limits)
        self._loaded = await asyncio.to_thread(load_all, study, self._load)
        identity = self._loaded.engine.model.identity
        environment = environment_of(identity, self._study.runs[0])
        self._me = replace(self._me, device=identity.device, dtype=identity.dtype, environment=environment)
        self._environment = environment.id
        keeps_model = False
        try:
            async with asyncio.TaskGroup() as group:
                beats = group.create_task(self._send_beats())  # failing heartbeats stop the worker
                await self._work_on()
                beats.cancel()
                await self._send_beat()  # with the answers since the last one
            keeps_model = self._shelf is not None
        except ExceptionGroup as failures:
            if (found := failures.subgroup(StudyError)) is None:
                raise
            await self._send_beat()  # with what was asked of a server: the call goes on counting
            raise first_of(found) from failures
        finally:
            self._stopping.set()
            await self.flush()
            await self._loaded.engine.aclose(keep_model=keeps_model)
        if self._shelf is not None:
            self._shelf.put(self._study, self._loaded.engine.model)

    async def flush(self) -> None:
        """Send all answers that are not yet on disk."""
        for held in list(self._held.values()):
            await self._flush_unit(held)

    async def stop(self) -> None:
        """Send the answers of the running units; leave these units unfinished."""
        self._stopping.set()
        await self.flush()
        for held in self._held.values():
            if held.task is not None:
                held.task.cancel()

    def _batch_size(self) -> int:
        return self._loaded.engine.stats.batch_size

    # --- taking work

    async def _work_on(self) -> None:
        """Take units until none are left: a few rows at a time, more while batches are not full."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            for _ in range(self._flight.fixed or FEWEST_ROWS):
                group.create_task(self._work())

    def _take_more(self) -> None:
        """Ask for one more unit if the running ones do not fill the device's batches."""
        if self._group is None or self._draining or self._stopping.is_set():
            return
        if self._flight.has_room_for_more and time.monotonic() >= self._ask_for_more_at:
            self._ask_for_more_at = math.inf  # one request at a time
            work = self._work_once()
            try:
                self._group.create_task(work)
            except RuntimeError:  # a task of the group failed, and the group is ending
                work.close()

    async def _work_once(self) -> None:
        """Take and explain one more unit, if there is one."""
        reply, held = await self._ask(further=True)
        self._obey(reply)
        self._ask_for_more_at = time.monotonic() + (0.0 if held is not None else IDLE_S)
        if held is not None:
            await self._explain(held)

    async def _work(self) -> None:
        """Take units one after another."""
        pause = IDLE_S / 8
        while not self._stopping.is_set():
            reply, held = await self._ask()
            self._obey(reply)
            if reply.order == "stop" or (self._draining and held is None):
                return
            if held is not None:
                await self._explain(held)
            elif reply.help is not None:
                await self._help(reply.help)
            else:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), pause)
                pause = min(pause * 1.5, IDLE_S)
                continue
            pause = IDLE_S / 8

    async def _ask(self, *, further: bool = False) -> tuple[LeaseReply, HeldUnit | None]:
        """Ask for a unit. One request at a time, so that the list of held units is correct on arrival."""
        async with self._asking:
            if further and not self._flight.has_room_for_more:
                return LeaseReply(None), None
            reply = await self._desk.call(Coordinator.lease, self._me, tuple(self._held))
            if reply.lease is None:
                return reply, None
            held = HeldUnit(reply.lease)
            self._held[held.unit.unit_id] = held
            self._flight.begin(held.unit.unit_id, held.unit.cost)
            return reply, held

    def _obey(self, reply: LeaseReply) -> None:
        self._draining = self._draining or reply.order == "drain"
        if reply.order == "stop":
            # The coordinator takes no more results: all is done, or it cannot write.
            self._stopping.set()
        for unit_id in list(self._held) if reply.order == "stop" else reply.drop:
            held = self._held.get(unit_id)
            if held is not None and held.task is not None:
                held.task.cancel()

    # --- explaining a unit

    async def _explain(self, held: HeldUnit) -> None:
        """Explain one unit. Errors of its row are reported, not raised."""
        unit = held.unit
        held.task = asyncio.create_task(self._explain_unit(held))
        try:
            await asyncio.shield(held.task)
        except asyncio.CancelledError:
            if not held.task.cancelled():
                held.task.cancel()
                raise
            # Only this unit is cancelled: the coordinator dropped it, or the worker is stopping.
        except RowError as error:
            await self._failed(held, unit.run_names, error.reason, error, final=True)
        except (StudyError, DeviceLostError, EngineStoppedError):
            await self.flush()  # also the other rows, before they are cancelled
            raise
        except Exception as error:
            logger.warning("row %d failed", unit.row_index, exc_info=True)
            await self._failed(held, unit.run_names, type(error).__name__, error, final=False)
        finally:
            self._held.pop(unit.unit_id, None)
            self._flight.end(unit.unit_id)
            self._ended_units += 1
            free_memory(self._study.runtime, self._ended_units)
        self._take_more()

    async def _explain_unit(self, held: HeldUnit) -> None:
        unit = held.unit
        runs = [self._study.run(name) for name in unit.run_names]
        explainer = held.explainer = await asyncio.to_thread(self._loaded.open_row, unit.row_index, runs[0])
        possible = [run for run in runs if not run.is_hopeless(explainer.num_players)]
        self._flight.begin(unit.unit_id, expected_answers(possible, explainer.num_players))
        self._take_more()
        await asyncio.to_thread(held.known.give_to, explainer.coalitions)
        failed: dict[str, Exception] = {}
        for run in runs:
            try:
                await self._explain_run(held, explainer, run, runs)
            # A row error may concern this run alone (for example, too many players for `exact`).
            except RowError as error:
                await self._failed(held, (run.name,), error.reason, error, final=True)
            except (StudyError, EngineStoppedError):
                await self._flush_unit(held)
                raise  # the row is not the cause
            except Exception as error:
                logger.warning("row %d failed in run %s", unit.row_index, run.name, exc_info=True)
                failed[run.name] = error
                if is_device_lost(error):
                    break
        if failed:
            first = next(iter(failed.values()))
            await self._failed(held, tuple(failed), type(first).__name__, first, final=False)

    async def _explain_run(
        self, held: HeldUnit, explainer: RowExplainer, run: RunSpec, runs: Sequence[RunSpec]
    ) -> None:
        """Explain a row for one of its runs, here and on idle workers; send the sample."""
        answer = partial(self._answer, run, held.unit.row_index)
        forcer = self._loaded.answers.forcer(explainer, run, runs, partial(self._count, run))

        async def exchange(offer: HelpOffer) -> HelpReply:
            return await self._desk.call(Coordinator.exchange, self._me, offer)

        engine, unit_id = self._loaded.engine, held.unit.unit_id
        async with RowAnswerer(
            unit_id, run.name, answer, exchange, self._batch_size, order=engine.order
        ) as generation:
            sample = await explainer.explain(
                run,
                generation.answer,
                self._embedder(held, run),
                self._loaded.decode_audio,
                forcer,
            )
        sample = replace(sample, environment=self._environment)
        await self._desk.call(Coordinator.report, self._me, unit_id, sample, held.take_new())

    async def _answer(
        self, run: RunSpec, row_index: int, prompts: Mapping[int, ConversationSnapshot], on_answer: OnAnswer
    ) -> None:
        """Answer coalitions with this worker's model."""

        def count(mask: int, answer: Answer) -> None:
            self._count(run)
            on_answer(mask, answer)

        await self._loaded.answers.answer(run, row_index, prompts, count)

    def _count(self, run: RunSpec) -> None:
        """Count an answer or a likelihood of the model."""
        self._generated[run.cost_key] = self._generated.get(run.cost_key, 0) + 1

    def _embedder(self, held: HeldUnit, run: RunSpec) -> Embedder:
        """Return the run's embedder, which keeps its vectors for the store."""
        embed = self._loaded.answers.embedder(run)
        kind = vector_kind(run, self._study.encoder_commit(run))

        async def embed_and_keep(answers: Sequence[Answer]) -> list[Vector]:
            vectors = await embed(answers)
            of_kind = held.vectors.setdefault(kind, {})
            of_kind.update(zip((answer.content_id for answer in answers), vectors, strict=True))
            return vectors

        return embed_and_keep

    async def _failed(
        self, held: HeldUnit, run_names: tuple[str, ...], reason: str, error: Exception, *, final: bool
    ) -> None:
        trace = "".join(traceback.format_exception(error))
        await self._flush_unit(held)
        failure = UnitFailure(held.unit.unit_id, run_names, reason, str(error), trace, final)
        await self._desk.call(Coordinator.fail, self._me, failure)
        if is_device_lost(error):
            raise DeviceLostError(str(error)) from error

    async def _flush_unit(self, held: HeldUnit) -> None:
        held.flushed_at = time.monotonic()
        new = held.take_new()
        if new.by_mask or new.vectors or new.likelihoods:
            await self._desk.call(Coordinator.flush, self._me, held.unit.unit_id, new)

    # --- helping other workers

    async def _help(self, task: HelpTask) -> None:
        """Answer coalitions of another worker's row. Failed ones go back to that worker."""
        run = self._study.run(task.run_name)
        answers: dict[int, Answer] = {}
        try:
            prompts = await asyncio.to_thread(self._prompts_of, task, run)
            await self._answer(run, task.row_index, prompts, answers.__setitem__)
        except StudyError:
            await self._desk.call(Coordinator.helped, self._me, task.task_id, answers)
            raise
        except EngineStoppedError:
            raise
        except Exception:
            logger.warning("helping with row %d failed", task.row_index, exc_info=True)
        await self._desk.call(Coordinator.helped, self._me, task.task_id, answers)

    def _prompts_of(self, task: HelpTask, run: RunSpec) -> dict[int, ConversationSnapshot]:
        """Return the prompts of a help task. The rows of the last tasks are kept."""
        key = (task.row_index, run.generation_key)
        explainer = self._helped.pop(key, None) or self._loaded.open_row(task.row_index, run)
        self._helped[key] = explainer
        for old in list(self._helped)[:-HELPED_ROWS]:
            self._helped.pop(old, None)
        return {mask: explainer.coalitions.render(mask) for mask in task.masks}

    # --- heartbeats

    async def _send_beats(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            await self._send_beat()
            for held in list(self._held.values()):
                if time.monotonic() - held.flushed_at >= self._study.options.flush_s:
                    await self._flush_unit(held)

    async def _send_beat(self) -> None:
        engine, report = self._loaded.engine, self._loaded.engine.model.report
        beat = Beat(
            held=tuple(self._held),
            answers=sum(self._generated.values()),
            busy_seconds=engine.stats.busy_seconds,
            unit_answers={unit_id: held.answers for unit_id, held in self._held.items()},
            generated=dict(self._generated),
            waiting_for=engine.waiting_for,
            gpu_memory=gpu_memory(),
            spent=engine.stats.spent,
            report=report if report != self._reported else None,
        )
        self._obey(await self._desk.call(Coordinator.beat, self._me, beat))
        self._reported = report

"""A worker: one loaded model that takes units from the coordinator and explains their rows."""

import asyncio
import contextlib
import gc
import logging
import math
import os
import socket
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from mllm_shap import ConversationSnapshot

from mllm_shapx.config.models import EmbeddingConfig
from mllm_shapx.data.conversations import Row, load_row
from mllm_shapx.data.digests import row_digest
from mllm_shapx.data.table import Table
from mllm_shapx.errors import RowError, StudyError, first_of
from mllm_shapx.execution.answers import content_id, vector_kind
from mllm_shapx.execution.dataset import open_study_table
from mllm_shapx.execution.environment import environment_of
from mllm_shapx.execution.generation import OnAnswer, RowGeneration
from mllm_shapx.execution.likelihoods import LikelihoodReader
from mllm_shapx.execution.messages import Answers, Beat, LeaseReply, Study, UnitFailure, WorkerInfo
from mllm_shapx.execution.sharing import HelpTask, Offer, OfferReply
from mllm_shapx.explaining.coalitions import RowCoalitions
from mllm_shapx.explaining.forcing import Forcer, most_top_k
from mllm_shapx.explaining.sample import explain_run, open_row
from mllm_shapx.explaining.settings import answer_seed, decoding, plugins
from mllm_shapx.explaining.similarity import Embedder, Vector
from mllm_shapx.models.base import Answer, Model, ModelReport
from mllm_shapx.models.encoder import TextEncoder
from mllm_shapx.models.engine import Engine, EngineStoppedError
from mllm_shapx.models.engines import engine_for
from mllm_shapx.models.flight import FEWEST_ROWS, Flight
from mllm_shapx.models.registry import load_model, load_version
from mllm_shapx.models.server_engine import ServerEngine
from mllm_shapx.planning.costs import Generated
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.planning.units import WorkUnit, expected_answers
from mllm_shapx.records.results import SampleResult

logger = logging.getLogger(__name__)

IDLE_S = 0.4
"""Longest pause of a worker that has nothing to do before it asks again."""
HELPED_ROWS = 4
"""Other workers' rows that a helper keeps at hand."""
BEAT_S = 0.5
"""Seconds between two signs of life."""


class Desk(Protocol):
    """The coordinator as a worker sees it. Every call names its sender and may be repeated without harm."""

    async def lease(self, me: WorkerInfo, held: tuple[str, ...]) -> LeaseReply:
        """Ask for a unit, saying what is held."""

    async def report(self, me: WorkerInfo, unit_id: str, sample: SampleResult, answers: Answers) -> None:
        """Hand in a sample, and the answers that are not written out yet."""

    async def flush(self, me: WorkerInfo, unit_id: str, answers: Answers) -> None:
        """Hand in answers of a row under way."""

    async def fail(self, me: WorkerInfo, failure: UnitFailure) -> None:
        """Say that a unit, or some of its runs, failed."""

    async def beat(self, me: WorkerInfo, beat: Beat) -> LeaseReply:
        """Give a sign of life."""

    async def exchange(self, me: WorkerInfo, offer: Offer) -> OfferReply:
        """Offer coalitions to idle workers and fetch what they answered."""

    async def helped(self, me: WorkerInfo, task_id: int, answers: dict[int, Answer]) -> None:
        """Hand in answers to another worker's coalitions."""


class _Held:
    """A unit under way."""

    def __init__(self, unit: WorkUnit) -> None:
        self.unit = unit
        self.coalitions: RowCoalitions | None = None
        self.vectors: dict[str, dict[bytes, Vector]] = {}
        self.flushed_at = time.monotonic()
        self.task: asyncio.Task[None] | None = None

    @property
    def answers(self) -> int:
        row = self.coalitions
        return 0 if row is None else len(row.stored) + len(row.likelihoods.stored)


@dataclass(frozen=True)
class _Loaded:
    """What a worker has in memory: the dataset, the model, and the encoders of the runs."""

    table: Table
    engine: Engine | ServerEngine
    encoders: Mapping[EmbeddingConfig, TextEncoder]


def _load(study: Study) -> _Loaded:
    _keep_the_terminal_readable()
    plugins()  # now rather than with the first row
    table = open_study_table(study)
    model = load_study_model(study)
    # The encoders too: what is wrong with one concerns every row, and is found before the first answer.
    encoders = {config: TextEncoder.load(config, version) for config, version in study.encoders.items()}
    return _Loaded(table, engine_for(model, server_patience_s=study.server_patience_s), encoders)


def load_study_model(study: Study) -> Model:
    """Load the model of a study: the version that was found when the study began, where one is recorded.

    Raises:
        ModelError, ResourceError: When it cannot be loaded.
        ModelChangedError: When its files are others now.
    """
    run = study.runs[0]
    if study.model_version is None:
        return load_model(run, study.model_path, study.model_commit, study.config_path)
    return load_version(run, study.model_path, study.model_version, study.config_path)


class _Once(logging.Filter):
    """Lets a warning through once, whatever numbers it names: some come with every row."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        is_new = record.msg not in self._said
        self._said.add(record.msg)
        return is_new


_once = _Once()


def _keep_the_terminal_readable() -> None:
    """Silence what libraries would write between the lines of the progress."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("mllm_shap.estimation._shared").addFilter(_once)


class DeviceLostError(RuntimeError):
    """The device does not work any more in this process; another process may have more luck."""


def is_device_lost(error: BaseException) -> bool:
    """Return whether every later call to the device would fail too, as after CUDA's device-side assert."""
    import torch

    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)


class Worker:
    """Explains units until the coordinator has none left.

    Args:
        worker: Its name, unique in the study.
        study: What is studied.
        desk: The coordinator.
    """

    def __init__(self, worker: str, study: Study, desk: Desk) -> None:
        self._me = WorkerInfo(worker, socket.gethostname(), os.getpid(), "", "")
        self._study = study
        self._desk = desk
        self._held: dict[str, _Held] = {}
        self._answers = 0
        self._generated: dict[str, Generated] = {}
        self._flight = Flight(study.rows_in_flight, self._batch_size)
        self._further: asyncio.TaskGroup | None = None
        self._further_at = 0.0
        self._asking = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._draining = False
        self._helped: dict[tuple[int, str], RowCoalitions] = {}
        self._maybe_loaded: _Loaded | None = None
        self._environment = ""
        self._reported = ModelReport()
        self._tidied = 0

    async def run(self) -> None:
        """Load the model and explain units until nothing is left.

        Raises:
            ModelError: When the model cannot be loaded.
            ModelChangedError: When its files are not those that the study began with.
            ExceptionGroup: With a `DeviceLostError` when the device broke, with an `EngineStoppedError` when
                the engine did, or with what else ended the work.
        """
        loaded = self._maybe_loaded = await asyncio.to_thread(_load, self._study)
        identity = loaded.engine.model.identity
        environment = environment_of(identity, self._study.runs[0])
        self._me = replace(self._me, device=identity.device, dtype=identity.dtype, environment=environment)
        self._environment = environment.id
        try:
            async with asyncio.TaskGroup() as group:
                # In the group: a worker that gives no sign of life must not go on.
                beats = group.create_task(self._beat_on())
                await self._work_on()
                beats.cancel()
                await self._give_sign()  # of what was answered since the last one
        except ExceptionGroup as failures:
            found = failures.subgroup(StudyError)
            if found is None:
                raise
            raise first_of(found) from failures
        finally:
            self._stopping.set()
            await self.flush()
            await loaded.engine.aclose()

    async def flush(self) -> None:
        """Hand in all answers that are not written out yet."""
        for unit_id, held in list(self._held.items()):
            await self._flush_unit(unit_id, held)

    async def stop(self) -> None:
        """Leave the units under way where they are, after handing in their answers."""
        self._stopping.set()
        await self.flush()
        for held in self._held.values():
            if held.task is not None:
                held.task.cancel()

    def _batch_size(self) -> int:
        return self._loaded.engine.stats.batch_size

    @property
    def _loaded(self) -> "_Loaded":
        if self._maybe_loaded is None:
            msg = "the worker has loaded nothing yet"
            raise RuntimeError(msg)
        return self._maybe_loaded

    async def _work_on(self) -> None:
        """Take units until nothing is left: some side by side always, more while batches are not full."""
        async with asyncio.TaskGroup() as group:
            self._further = group
            for _ in range(self._flight.fixed or FEWEST_ROWS):
                group.create_task(self._work())

    def _take_more(self) -> None:
        """Ask for a further unit when those at hand do not fill the device's batches."""
        if self._further is None or self._draining or self._stopping.is_set():
            return
        if self._flight.has_room_for_more and time.monotonic() >= self._further_at:
            self._further_at = math.inf  # one question at a time
            work = self._work_further()
            try:
                self._further.create_task(work)
            except RuntimeError:  # the group is ending, because something in it failed
                work.close()

    async def _work_further(self) -> None:
        """Take a unit if there is one and still room for it."""
        reply, held = await self._ask(further=True)
        self._obey(reply)
        self._further_at = time.monotonic() + (0.0 if reply.lease is not None else IDLE_S)
        if reply.lease is not None and held is not None:
            await self._explain(held, reply.lease.known)

    async def _work(self) -> None:
        """Take one unit after the other."""
        pause = IDLE_S / 8
        while not self._stopping.is_set():
            reply, held = await self._ask()
            self._obey(reply)
            if reply.order == "stop" or (self._draining and reply.lease is None):
                return
            if reply.lease is not None and held is not None:
                await self._explain(held, reply.lease.known)
            elif reply.help is not None:
                await self._help(reply.help)
            else:
                await self._pause(pause)
                pause = min(pause * 1.5, IDLE_S)
                continue
            pause = IDLE_S / 8

    async def _ask(self, *, further: bool = False) -> tuple[LeaseReply, "_Held | None"]:
        """Ask for a unit, one question at a time: what is held must be true when the coordinator hears it."""
        async with self._asking:
            if further and not self._flight.has_room_for_more:
                return LeaseReply(None), None
            reply = await self._desk.lease(self._me, tuple(self._held))
            if reply.lease is None:
                return reply, None
            unit = reply.lease.unit
            held = self._held[unit.unit_id] = _Held(unit)
            self._flight.begin(unit.unit_id, unit.cost)
            return reply, held

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    def _obey(self, reply: LeaseReply) -> None:
        self._draining = self._draining or reply.order == "drain"
        if reply.order == "stop":
            # Nothing is left that would be taken from it: all is done, or results cannot be written any more.
            self._stopping.set()
        for unit_id in list(self._held) if reply.order == "stop" else reply.drop:
            held = self._held.get(unit_id)
            if held is not None and held.task is not None:
                held.task.cancel()

    async def _explain(self, held: _Held, known: Answers) -> None:
        """Explain one unit; what goes wrong with it is reported, not raised."""
        unit = held.unit
        held.task = asyncio.create_task(self._explain_unit(held, known))
        try:
            await asyncio.shield(held.task)
        except asyncio.CancelledError:
            if not held.task.cancelled():
                held.task.cancel()
                raise
            # Only this unit was let go: it was dropped, or the worker is stopping.
        except RowError as error:
            await self._failed(held, unit.run_names, error.reason, error, final=True)
        except StudyError:
            await self.flush()  # of the other rows too: they are about to be cancelled
            raise
        except (DeviceLostError, EngineStoppedError):
            raise  # it ends the worker
        except Exception as error:
            logger.warning("row %d failed", unit.row_index, exc_info=True)
            await self._failed(held, unit.run_names, type(error).__name__, error, final=False)
        finally:
            self._held.pop(unit.unit_id, None)
            self._flight.end(unit.unit_id)
            self._tidy()
        self._take_more()

    async def _explain_unit(self, held: _Held, known: Answers) -> None:
        unit = held.unit
        runs = [self._study.run(name) for name in unit.run_names]
        row = await asyncio.to_thread(self._read_row, unit.row_index, runs[0])
        coalitions = held.coalitions = await asyncio.to_thread(open_row, row, runs[0])
        digest = row_digest(row)
        possible = [run for run in runs if not run.is_hopeless(coalitions.players.num_players)]
        self._flight.begin(unit.unit_id, expected_answers(possible, coalitions.players.num_players))
        self._take_more()
        if known.belong_to(coalitions):
            await asyncio.to_thread(coalitions.know, known.by_mask)
            coalitions.likelihoods.know(known.likelihoods)
        failed: dict[str, Exception] = {}
        for run in runs:
            forcer = self._forcer(coalitions, run, runs)
            try:
                async with self._generation(held, run) as generation:
                    sample = await explain_run(
                        row,
                        coalitions,
                        run,
                        generation.answer,
                        self._embedder(held, run),
                        decode_audio=getattr(self._loaded.engine.model, "decode_audio", None),
                        force=None if forcer is None else forcer.force,
                        own_logprobs=None if forcer is None else forcer.with_logprobs,
                    )
            # Either concerns this run alone (say, too many players for `exact`); the others go on.
            except RowError as error:
                await self._failed(held, (run.name,), error.reason, error, final=True)
                continue
            except (StudyError, EngineStoppedError):
                await self._flush_unit(unit.unit_id, held)
                raise  # no fault of the row
            except Exception as error:
                logger.warning("row %d failed in run %s", unit.row_index, run.name, exc_info=True)
                failed[run.name] = error
                if is_device_lost(error):
                    break
                continue
            sample = replace(sample, row_digest=digest, environment=self._environment)
            await self._desk.report(self._me, unit.unit_id, sample, _fresh(held))
        if failed:
            first = next(iter(failed.values()))
            await self._failed(held, tuple(failed), type(first).__name__, first, final=False)

    def _forcer(self, row: RowCoalitions, run: RunSpec, runs: Sequence[RunSpec]) -> Forcer | None:
        """Return what gives `run` likelihoods, None where the model reads none."""
        engine = self._loaded.engine
        if not isinstance(engine, Engine) or not LikelihoodReader.serves(engine):
            return None
        reader = LikelihoodReader(engine, decoding(run), partial(self._count, run))
        return Forcer(row, run.name, reader, most_top_k(runs))

    def _read_row(self, row_index: int, run: RunSpec) -> Row:
        return load_row(self._loaded.table, row_index, run.dataset, run.modality)

    def _generation(self, held: _Held, run: RunSpec) -> RowGeneration:
        """Return what answers the coalitions that `run` asks of the row, here and on idle workers."""
        return RowGeneration(
            held.unit.unit_id,
            run.name,
            partial(self._answer, run, held.unit.row_index),
            partial(self._desk.exchange, self._me),
            self._batch_size,
        )

    async def _answer(
        self, run: RunSpec, row_index: int, prompts: Mapping[int, ConversationSnapshot], on_answer: OnAnswer
    ) -> None:
        """Answer coalitions with this worker's model."""
        masks = list(prompts)

        def count(index: int, answer: Answer) -> None:
            self._count(run, masks[index])
            on_answer(masks[index], answer)

        seeds = [0] * len(masks)
        if not run.generation.is_greedy:
            seeds = [answer_seed(run, row_index, mask) for mask in masks]
        await self._loaded.engine.answer(list(prompts.values()), decoding(run), seeds, count)

    def _count(self, run: RunSpec, mask: int) -> None:
        """Take note that the model has answered a coalition, or read a likelihood of it."""
        self._answers += 1
        self._generated[run.cost_key] = self._generated.get(run.cost_key, Generated()).plus(mask)

    async def _help(self, task: HelpTask) -> None:
        """Answer coalitions of another worker's row; what fails here goes back to it."""
        run = self._study.run(task.run_name)
        answers: dict[int, Answer] = {}
        try:
            prompts = await asyncio.to_thread(self._helped_prompts, task, run)
            await self._answer(run, task.row_index, prompts, answers.__setitem__)
        except StudyError:
            await self._desk.helped(self._me, task.task_id, answers)
            raise
        except EngineStoppedError:
            raise
        except Exception:
            logger.warning("helping with row %d failed", task.row_index, exc_info=True)
        await self._desk.helped(self._me, task.task_id, answers)

    def _helped_prompts(self, task: HelpTask, run: RunSpec) -> dict[int, ConversationSnapshot]:
        """Return the prompts of a help task; the rows of the last ones are kept."""
        key = (task.row_index, run.generation_key)
        coalitions = self._helped.pop(key, None)
        if coalitions is None:
            coalitions = open_row(self._read_row(task.row_index, run), run)
        self._helped[key] = coalitions
        for old in list(self._helped)[:-HELPED_ROWS]:
            self._helped.pop(old, None)
        return {mask: coalitions.render(mask) for mask in task.masks}

    def _embedder(self, held: _Held, run: RunSpec) -> Embedder:
        """Return what gives the run's vectors: the explained model's own states, or the config's encoder."""
        loaded = self._loaded
        kind = vector_kind(run, self._study.encoder_commit(run))

        async def embed(answers: Sequence[Answer]) -> list[Vector]:
            if run.embedding is None:
                vectors = await loaded.engine.embed(answers, run.shap.mode, run.shap.reducer)
            else:
                encoder = loaded.encoders[run.embedding]
                texts = [answer.text for answer in answers]
                vectors = await asyncio.to_thread(encoder.embed, texts, run.shap.reducer)
            of_kind = held.vectors.setdefault(kind, {})
            of_kind.update(zip(map(content_id, answers), vectors, strict=True))
            return vectors

        return embed

    async def _failed(
        self, held: _Held, run_names: tuple[str, ...], reason: str, error: Exception, *, final: bool
    ) -> None:
        trace = "".join(traceback.format_exception(error))
        await self._flush_unit(held.unit.unit_id, held)
        await self._desk.fail(
            self._me, UnitFailure(held.unit.unit_id, run_names, reason, str(error), trace, final)
        )
        if is_device_lost(error):
            raise DeviceLostError(str(error)) from error

    async def _flush_unit(self, unit_id: str, held: _Held) -> None:
        held.flushed_at = time.monotonic()
        if held.coalitions is None:
            return
        fresh = _fresh(held)
        if fresh.by_mask or fresh.likelihoods:
            await self._desk.flush(self._me, unit_id, fresh)

    async def _beat_on(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            await self._give_sign()
            for unit_id, held in list(self._held.items()):
                if time.monotonic() - held.flushed_at >= self._study.flush_s:
                    await self._flush_unit(unit_id, held)

    async def _give_sign(self) -> None:
        busy = self._loaded.engine.stats.busy_seconds
        waiting = getattr(self._loaded.engine, "waiting_for", "")
        counts = {unit_id: held.answers for unit_id, held in self._held.items()}
        report = self._loaded.engine.model.report
        news = report if report != self._reported else None
        beat = Beat(tuple(self._held), self._answers, busy, counts, dict(self._generated), waiting, news)
        self._obey(await self._desk.beat(self._me, beat))
        self._reported = report

    def _tidy(self) -> None:
        runtime = self._study.runtime
        self._tidied += 1
        interval = 1 if runtime.gc_after_each_sample else runtime.gc_interval
        if interval and self._tidied % interval == 0:
            gc.collect()
        if self._study.runtime.cuda_empty_cache:
            import torch

            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _fresh(held: _Held) -> Answers:
    """Return the answers and vectors of a unit that came since the last call."""
    coalitions = held.coalitions
    if coalitions is None:
        return Answers()
    vectors, held.vectors = held.vectors, {}
    return Answers(
        coalitions.take_fresh(),
        coalitions.snapshot.snapshot_id,
        coalitions.players.num_players,
        vectors,
        coalitions.likelihoods.take_fresh(),
    )

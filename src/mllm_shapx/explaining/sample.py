"""Explains one row by one run; the runs of a unit share answers."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mllm_shap import ConversationSnapshot, PlayerSet, PluginGroup

from mllm_shapx.config.measures import FaithfulnessConfig
from mllm_shapx.data.conversations import Row, to_snapshot
from mllm_shapx.explaining.absence import absence_policy
from mllm_shapx.explaining.audio_records import AudioRecords, DecodeAudio, answer_entry, audio_records
from mllm_shapx.explaining.coalitions import Generate, RowCoalitions
from mllm_shapx.explaining.conversation import attribution_summary, conversation_entries
from mllm_shapx.explaining.faithfulness import measure_faithfulness
from mllm_shapx.explaining.forcing import OwnLogprobs
from mllm_shapx.explaining.games import Game
from mllm_shapx.explaining.hierarchical import HierarchicalExplainer
from mllm_shapx.explaining.interactions import interactions_of
from mllm_shapx.explaining.players import text_player_set
from mllm_shapx.explaining.settings import GameSettings, flat_config, resolve
from mllm_shapx.explaining.similarity import Embedder
from mllm_shapx.explaining.values import Force, Sources, Value, build_value
from mllm_shapx.models.base import Answer
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.records.measures import Faithfulness, Interactions
from mllm_shapx.records.results import SampleResult, Stopped

NEYMAN_TYPES = frozenset({"limited_neyman", "standard_neyman"})
NEYMAN_STEPS = 2
"""Pilot and allocation."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one run on a row, before normalizing."""

    values: tuple[float, ...]
    """One per player, before normalizing."""
    base_value: float
    grand_value: float
    masks: tuple[int, ...]
    """Coalitions evaluated."""
    num_levels: int | None = None
    standard_errors: tuple[float, ...] | None = None
    """One per player, NaN if unknown; None for an explainer without standard errors."""
    faithfulness: Faithfulness | None = None
    interactions: Interactions | None = None
    stopped: Stopped | None = None


def open_row(row: Row, run: RunSpec) -> RowCoalitions:
    """Return the row's coalitions under the run's generation key.

    Raises:
        RowError: When the row has no players or its recordings cannot be used.
    """
    aligned = run.modality.has_audio_input and run.audio_segmentation.method == "sgpa"
    snapshot = to_snapshot(row, run.chat, with_transcripts=aligned)
    return RowCoalitions(
        snapshot,
        player_set(snapshot, run),
        share_prompts=run.generation.is_greedy,
        policy=absence_policy(run),
    )


def player_set(snapshot: ConversationSnapshot, run: RunSpec) -> PlayerSet:
    """Return the players of `snapshot`, in conversation order: pieces of text and audio segments.

    Raises:
        RowError: `no_players` when the prompt has none.
    """
    if run.modality.has_audio_input:
        from mllm_shapx.explaining.audio_players import audio_player_set

        return audio_player_set(snapshot, run.audio_segmentation, run.player_rule)
    return text_player_set(snapshot, run.player_rule)


async def explain_run(
    row: Row,
    coalitions: RowCoalitions,
    run: RunSpec,
    generate: Generate,
    embed: Embedder,
    *,
    decode_audio: DecodeAudio | None = None,
    force: Force | None = None,
    own_logprobs: OwnLogprobs | None = None,
) -> SampleResult:
    """Explain `row` by `run` and return the sample.

    `decode_audio` decodes a spoken answer, `force` gives the likelihood of texts, and `own_logprobs` adds
    missing log-probabilities to stored answers, if the model can.

    Runs of one generation key use the same `coalitions`, one after the other. Their order decides for which
    run a shared answer is generated, and so their `model_calls`; nothing else depends on it.

    Raises:
        RowError: When this run cannot explain the row.
    """
    started = time.perf_counter()

    async def ask(masks: Sequence[int]) -> list[Answer]:
        answers = await coalitions.answers(masks, run.name, generate)
        if run.shap.reads == "log_probabilities" and own_logprobs is not None:
            return await own_logprobs(masks, answers)
        return answers

    # In a thread: this may read all files of a model, and other rows must not wait.
    value = await asyncio.to_thread(build_value, run, Sources(ask, embed, force))
    outcome = await _explain(row, coalitions, run, value)
    if run.faithfulness is not None:
        outcome = await _with_faithfulness(outcome, run.faithfulness, value, run.seed_for(row.row_index))
    seconds = time.perf_counter() - started
    return _sample(row, coalitions, run, outcome, seconds=seconds, decode_audio=decode_audio)


async def _explain(row: Row, coalitions: RowCoalitions, run: RunSpec, value: Value) -> Outcome:
    seed = run.seed_for(row.row_index)
    if run.hierarchical is not None:
        explainer = HierarchicalExplainer(run, run.hierarchical, coalitions.players, value)
        tree = await explainer.explain(seed)
        return Outcome(tree.values, tree.top.base_value, tree.top.grand_value, tree.masks, tree.num_levels)
    singles = [1 << index for index in range(coalitions.players.num_players)]
    stop_at = None if run.stop_when is None else run.stop_when.standard_error
    settings = GameSettings(run.explainer_type, run.budget, seed, stop_at)
    game = await Game(run, singles, 0, value).play(settings)
    outcome = Outcome(
        game.values,
        game.base_value,
        game.grand_value,
        game.masks,
        standard_errors=game.standard_errors,
        stopped=game.stopped,
    )
    if run.interactions is None:
        return outcome
    # In a thread: this takes seconds with many players, and other rows must not wait.
    found = await asyncio.to_thread(interactions_of, run.interactions, game.masks, game.payoffs, len(singles))
    return replace(outcome, interactions=found)


async def _with_faithfulness(
    outcome: Outcome, settings: FaithfulnessConfig, value: Value, seed: int
) -> Outcome:
    """Return the outcome with its curves; their coalitions count as evaluated."""
    curves, masks = await measure_faithfulness(settings, outcome.values, value, seed)
    return replace(outcome, masks=tuple(dict.fromkeys((*outcome.masks, *masks))), faithfulness=curves)


def _sample(
    row: Row,
    coalitions: RowCoalitions,
    run: RunSpec,
    outcome: Outcome,
    *,
    seconds: float,
    decode_audio: DecodeAudio | None,
) -> SampleResult:
    players = coalitions.players
    seed = run.seed_for(row.row_index)
    config = flat_config(run)
    normalizer = resolve(config, PluginGroup.NORMALIZERS, config.explanation.normalizer)
    values = normalizer.normalize(outcome.values)
    everyone = (1 << players.num_players) - 1
    answered = [mask for mask in outcome.masks if mask in coalitions.stored]
    response = coalitions.stored[everyone]
    conversation = conversation_entries(coalitions.snapshot, players, values, response.text)
    sound = AudioRecords({}, None)
    if run.modality.has_audio_input or run.modality.output_modality == "audio":
        sound = audio_records(row.row_index, coalitions.snapshot, response, decode_audio)
        spoken = answer_entry(sound.artifacts)
        if spoken is not None:
            conversation = (*conversation[:-1], (*conversation[-1], spoken))
    tokens_in, tokens_out = coalitions.tokens(outcome.masks, run.name)
    return SampleResult(
        run_name=run.name,
        row_index=row.row_index,
        language=row.language,
        original_language=row.original_language,
        runtime_sec=seconds,
        n_calls=len(set(outcome.masks)),
        model_calls=coalitions.model_calls(answered, run.name)
        + coalitions.likelihoods.read_for(run.name, outcome.masks),
        prompt_texts=row.texts,
        input_modality=run.modality.input_modality,
        output_modality=run.modality.output_modality,
        attr_summary=attribution_summary(players, values),
        conversation=conversation,
        base_value=outcome.base_value,
        grand_value=outcome.grand_value,
        response=response.text,
        seed=seed,
        num_players=players.num_players,
        values_sum=sum(outcome.values),
        efficiency_residual=sum(outcome.values) - (outcome.grand_value - outcome.base_value),
        raw_values=outcome.values,
        standard_errors=outcome.standard_errors,
        neyman_steps=NEYMAN_STEPS if run.explainer_type in NEYMAN_TYPES else None,
        distinct_answers=None if run.shap.reads == "likelihoods" else coalitions.distinct_answers(answered),
        num_levels=outcome.num_levels,
        faithfulness=outcome.faithfulness,
        interactions=outcome.interactions,
        stopped=outcome.stopped,
        audio_artifacts=sound.artifacts,
        audio_files=sound.files,
        tokens_in=tokens_in,
        tokens_out=tokens_out,
    )

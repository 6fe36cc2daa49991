"""Explains one row by one run; the runs of a unit share answers."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from mllm_shap import ConversationSnapshot, PlayerSet, PluginGroup

from mllm_shapx.data.conversations import Row, to_snapshot
from mllm_shapx.explaining.absence import absence_policy
from mllm_shapx.explaining.audio_records import AudioRecords, DecodeAudio, answer_entry, audio_records
from mllm_shapx.explaining.coalitions import Generate, RowCoalitions
from mllm_shapx.explaining.conversation import attribution_summary, conversation_entries
from mllm_shapx.explaining.forcing import OwnLogprobs
from mllm_shapx.explaining.games import Game, GameResult
from mllm_shapx.explaining.hierarchical import HierarchicalExplainer
from mllm_shapx.explaining.measures import interactions_of, measure_faithfulness
from mllm_shapx.explaining.players import text_player_set
from mllm_shapx.explaining.settings import GameSettings, flat_config, resolve
from mllm_shapx.explaining.similarity import Embedder
from mllm_shapx.explaining.values import Force, Sources, Value, build_value
from mllm_shapx.models.base import Answer
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.records.results import SampleResult

NEYMAN_TYPES = frozenset({"limited_neyman", "standard_neyman"})
NEYMAN_STEPS = 2
"""Pilot and allocation."""


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
    seed = run.seed_for(row.row_index)
    game = await _play(coalitions.players, run, value, seed)
    masks, faithfulness, interactions = game.masks, None, None
    if run.interactions is not None:
        # In a thread: this takes seconds with many players, and other rows must not wait.
        interactions = await asyncio.to_thread(
            interactions_of, run.interactions, masks, game.payoffs, coalitions.players.num_players
        )
    if run.faithfulness is not None:
        faithfulness, further = await measure_faithfulness(run.faithfulness, game.values, value, seed)
        masks = (*masks, *further)
    seconds = time.perf_counter() - started
    game = replace(game, masks=masks)
    sample = _sample(row, coalitions, run, game, seconds=seconds, decode_audio=decode_audio)
    return replace(sample, faithfulness=faithfulness, interactions=interactions)


async def _play(players: PlayerSet, run: RunSpec, value: Value, seed: int) -> GameResult:
    if run.hierarchical is not None:
        return await HierarchicalExplainer(run, run.hierarchical, players, value).explain(seed)
    stop_at = None if run.stop_when is None else run.stop_when.standard_error
    settings = GameSettings(run.explainer_type, run.budget, seed, stop_at)
    singles = [1 << index for index in range(players.num_players)]
    return await Game(run, singles, 0, value).play(settings)


def _sample(
    row: Row,
    coalitions: RowCoalitions,
    run: RunSpec,
    game: GameResult,
    *,
    seconds: float,
    decode_audio: DecodeAudio | None,
) -> SampleResult:
    players = coalitions.players
    config = flat_config(run)
    normalizer = resolve(config, PluginGroup.NORMALIZERS, config.explanation.normalizer)
    values = normalizer.normalize(game.values)
    everyone = (1 << players.num_players) - 1
    answered = [mask for mask in game.masks if mask in coalitions.stored]
    response = coalitions.stored[everyone]
    conversation = conversation_entries(coalitions.snapshot, players, values, response.text)
    sound = AudioRecords({}, None)
    if run.modality.has_audio_input or run.modality.output_modality == "audio":
        sound = audio_records(row.row_index, coalitions.snapshot, response, decode_audio)
        spoken = answer_entry(sound.artifacts)
        if spoken is not None:
            conversation = (*conversation[:-1], (*conversation[-1], spoken))
    tokens_in, tokens_out = coalitions.tokens(game.masks, run.name)
    return SampleResult(
        run_name=run.name,
        row_index=row.row_index,
        language=row.language,
        original_language=row.original_language,
        runtime_sec=seconds,
        n_calls=len(set(game.masks)),
        model_calls=coalitions.model_calls(answered, run.name)
        + coalitions.likelihoods.read_for(run.name, game.masks),
        prompt_texts=row.texts,
        input_modality=run.modality.input_modality,
        output_modality=run.modality.output_modality,
        attr_summary=attribution_summary(players, values),
        conversation=conversation,
        base_value=game.base_value,
        grand_value=game.grand_value,
        response=response.text,
        seed=run.seed_for(row.row_index),
        num_players=players.num_players,
        values_sum=sum(game.values),
        efficiency_residual=sum(game.values) - (game.grand_value - game.base_value),
        raw_values=game.values,
        standard_errors=game.standard_errors,
        neyman_steps=NEYMAN_STEPS if run.explainer_type in NEYMAN_TYPES else None,
        distinct_answers=None if run.shap.reads == "likelihoods" else coalitions.distinct_answers(answered),
        num_levels=game.num_levels,
        stopped=game.stopped,
        audio_artifacts=sound.artifacts,
        audio_files=sound.files,
        tokens_in=tokens_in,
        tokens_out=tokens_out,
    )

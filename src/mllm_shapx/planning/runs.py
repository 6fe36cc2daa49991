"""A run: one concrete entry of the sweep, with everything that decides its results."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

from mllm_shapx.config.blocks import Block
from mllm_shapx.config.measures import FaithfulnessConfig, InteractionsConfig, StopWhenConfig
from mllm_shapx.config.model_settings import ModelSettings
from mllm_shapx.config.models import (
    AudioSegmentation,
    ChatConfig,
    ConnectorKwargs,
    DatasetConfig,
    EmbeddingConfig,
    ModalityConfig,
)
from mllm_shapx.config.scoring import GenerationBlock, ShapConfig
from mllm_shapx.config.sources import TokenizerSource, ValueModel
from mllm_shapx.config.vocabulary import EXPLAINERS, ExplainerType, ShapleyType
from mllm_shapx.planning.coverage import has_complements
from mllm_shapx.planning.players import PlayerRule

MAX_LOG2_COALITIONS = 24
"""A game of more than 2^24 coalitions is refused, as in mllm_shap."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How many coalitions a game may evaluate, the empty and the grand one included."""

    kind: Literal["all", "num_samples", "fraction", "linear"]
    value: float = 1.0
    """Coalitions (-1: the estimator's floor), share of 2^n, or factor f of f n^2; unused for `all`."""

    def evaluations(self, num_players: int) -> int | None:
        """Return the absolute coalition count for `num_players`, None for a share of the table.

        An estimator's floor and the ceiling 2^n are applied by the estimator.
        """
        if self.kind == "num_samples":
            return max(1, int(self.value))
        if self.kind == "linear":
            count = int(self.value * num_players**2)
            return max(1, count + count % 2)
        return None

    @property
    def fraction(self) -> float:
        """Return the share of the 2^n coalitions; 1.0 for `all`."""
        return self.value if self.kind == "fraction" else 1.0


@dataclass(frozen=True, slots=True)
class HierarchicalSpec:
    """Settings of one hierarchical run (docs/formats.md, `hierarchical`)."""

    k: int
    """Most neighbouring players in a group, at least 2."""
    inner_type: ShapleyType
    inner_budget: Budget
    first_layer_type: ShapleyType
    first_layer_budget: Budget
    use_importance_sampling: bool
    importance_min_fraction: float
    """Lower games keep at least this share of their budget."""


@dataclass(frozen=True)
class RunSpec:
    """One concrete run. Frozen; two runs of equal `result_settings` give equal values."""

    name: str
    explainer_type: ExplainerType
    budget: Budget
    hierarchical: HierarchicalSpec | None
    connector: str
    model_id: str
    model_revision: str | None
    connector_kwargs: ConnectorKwargs
    device: str | None
    dataset: DatasetConfig
    modality: ModalityConfig
    generation: GenerationBlock
    chat: ChatConfig
    audio_segmentation: AudioSegmentation
    shap: ShapConfig
    embedding: EmbeddingConfig | None
    tokenizer: TokenizerSource | None = field(default=None, compare=False)
    """Source of token players; None when the model's tokenizer cannot be read here."""
    value_model: ValueModel | None = field(default=None, compare=False)
    """The model of the value function, found when a study is prepared; None without one."""
    faithfulness: FaithfulnessConfig | None = None
    interactions: InteractionsConfig | None = None
    stop_when: StopWhenConfig | None = None
    """When a row's sampling stops early; None spends the whole budget."""
    seed: int | None = None
    """Seed of this repetition, at the end of the name; None when the config has no seeds."""
    variant: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The run as an entry of `experiments`, in the config's own words (formats.md, `spec.json`)."""

    @property
    def model_settings(self) -> ModelSettings:
        """Return the settings for loading the run's model."""
        names = (self.connector, self.model_id, self.model_revision)
        return ModelSettings(*names, self.connector_kwargs, self.device, self.generation, self.chat)

    @cached_property
    def generation_settings(self) -> dict[str, Any]:
        """Everything that decides the answer to one coalition of one row.

        Runs with equal generation settings share answers. Estimator, budget, similarity, normalizer, reducer
        and seed are not included.
        """
        settings: dict[str, Any] = {
            "connector": self.connector,
            "model_id": self.model_id,
            "model_revision": self.model_revision,
            "dtype": self.connector_kwargs.dtype,
            **self.connector_kwargs.loading_settings,
            "generation": self.generation.model_dump(mode="json", exclude={"reuse_sampled_answers"}),
            "chat": self.chat.model_dump(mode="json"),
            "modality": self.modality.model_dump(mode="json"),
            "token_filter": self.shap.token_filter,
            "absence_policy": self.shap.absence,
        }
        if self.modality.has_audio_input:
            settings["audio_segmentation"] = self.audio_segmentation.model_dump(
                mode="json", exclude={"aligner_device"}
            )
        # Absent unless set, so that answers stored by earlier versions keep their key.
        settings |= self.connector_kwargs.chat_settings
        settings |= self.shap.prompt_settings
        if not self.shares_answers:
            settings["run"] = self.name
        return settings

    @cached_property
    def player_rule(self) -> PlayerRule:
        """Return the rule that selects the players of written messages."""
        return PlayerRule.of(self.shap, self.chat, self.tokenizer)

    @cached_property
    def generation_key(self) -> str:
        """Hash of `generation_settings` and of the model's commit if known, 16 hex digits."""
        return settings_digest(self.generation_settings)

    @cached_property
    def cost_key(self) -> str:
        """Hash of the settings that decide an answer's cost; runs that draw answers of their own share it."""
        shared = {key: value for key, value in self.generation_settings.items() if key != "run"}
        return settings_digest(shared)

    @property
    def shares_answers(self) -> bool:
        """Whether other runs may use this run's answers: with greedy decoding, or on request."""
        return self.generation.is_greedy or self.generation.reuse_sampled_answers

    @cached_property
    def forced_texts(self) -> tuple[str, ...]:
        """Names of the texts whose likelihood every coalition needs; empty if coalitions are answered.

        Runs of one generation key share the likelihoods of texts with equal names.
        """
        if self.shap.reads != "likelihoods":
            return ()
        if self.shap.value_function != "contrastive":
            return ("the answer",)
        options = self.shap.value_options or {}
        return tuple(dict.fromkeys(f"{options.get(key)!r}" for key in ("target", "foil")))

    @cached_property
    def result_settings(self) -> dict[str, Any]:
        """Everything that decides the values of a row, as JSON data; recorded in `spec.json`."""
        # Absent unless set, so that specs of earlier versions stay equal.
        seed = {} if self.seed is None else {"seed": self.seed}
        return {
            **seed,
            **blocks_in_words(
                faithfulness=self.faithfulness, interactions=self.interactions, stop_when=self.stop_when
            ),
            "explainer_type": self.explainer_type,
            "budget": asdict(self.budget),
            "hierarchical": None if self.hierarchical is None else asdict(self.hierarchical),
            "connector": self.connector,
            "connector_kwargs": {
                "model_id": self.model_id,
                "revision": self.model_revision,
                "dtype": self.connector_kwargs.dtype,
                **self.connector_kwargs.chat_settings,
                **self.connector_kwargs.loading_settings,
            },
            "dataset": self.dataset.model_dump(mode="json", exclude={"trust_remote_code"}),
            "modality": self.modality.model_dump(mode="json"),
            "generation": self.generation.model_dump(mode="json"),
            "chat": self.chat.model_dump(mode="json"),
            "audio_segmentation": self.audio_segmentation.model_dump(mode="json", exclude={"aligner_device"}),
            "shap": self.shap.model_dump(mode="json"),
            "embedding": None
            if self.embedding is None
            else self.embedding.model_dump(mode="json", exclude={"batch_size", "local_files_only", "device"}),
        }

    @property
    def former_name(self) -> str | None:
        """Return the name of a hierarchical run in earlier versions, None if unchanged.

        The old name has the canonical type of the lower games; the new one has the type as written.
        """
        if self.hierarchical is None:
            return None
        written = str(self.variant["hierarchical"]["shap_type"]).lower()
        former = self.name.replace(f"hier_{written}_k", f"hier_{self.hierarchical.inner_type}_k", 1)
        return None if former == self.name else former

    def seed_for(self, row_index: int) -> int:
        """Return the sampling seed of one row, in [0, 2^31); depends on the run's name and the row only."""
        digest = hashlib.sha256(f"{self.name}\0{row_index}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1

    def coalitions(self, num_players: int) -> int:
        """Return how many coalitions the run evaluates on `num_players`.

        An upper bound for hierarchical runs, with `stop_when`, and with faithfulness curves: curves reuse
        stored coalitions.
        """
        games = self.game_coalitions(num_players)
        curves = 0 if self.faithfulness is None else self.faithfulness.coalitions(num_players)
        return min(games + curves, 1 << num_players) if curves else games

    def game_coalitions(self, num_players: int) -> int:
        """Return the coalitions of the run's games alone; an upper bound as `coalitions` is."""
        if (spec := self.hierarchical) is None:
            return flat_coalitions(self.explainer_type, self.budget, num_players)
        return _hierarchical_coalitions(spec, spec.first_layer_type, spec.first_layer_budget, num_players)

    def is_hopeless(self, num_players: int) -> bool:
        """Whether a game of the run plans more coalitions than the limit."""
        size = num_players if self.hierarchical is None else min(num_players, self.hierarchical.k)
        return any(
            flat_coalitions(kind, budget, size) > 1 << MAX_LOG2_COALITIONS for kind, budget in self.games
        )

    @property
    def games(self) -> tuple[tuple[str, Budget], ...]:
        """Return (explainer, budget) of the run's game; of the first and the lower layers if hierarchical."""
        spec = self.hierarchical
        if spec is None:
            return ((self.explainer_type, self.budget),)
        return (spec.first_layer_type, spec.first_layer_budget), (spec.inner_type, spec.inner_budget)


def flat_coalitions(explainer_type: str, budget: Budget, num_players: int) -> int:
    """Return the coalitions that a flat game evaluates: the budget between the estimator's floor and 2^n.

    The floors are mllm_shap's (`config.vocabulary`). Estimators of complementary pairs round a budget down to
    whole pairs.
    """
    facts, table = EXPLAINERS[explainer_type], 1 << num_players
    if not facts.takes_budget:
        return facts.least(num_players)
    if budget.kind == "all":
        return table
    target = asked_coalitions(budget, num_players)
    return min(max(facts.least(num_players), target - target % 2 if facts.in_pairs else target), table)


def rounds(explainer_type: str, budget: Budget, num_players: int) -> Iterator[Budget]:
    """Yield the budgets after which a game with `stop_when` may stop, each half as large again.

    The first one, 4n coalitions or the estimator's floor, leaves few values whose draws are all alike by
    chance. The last one is `budget` itself.
    """
    most = flat_coalitions(explainer_type, budget, num_players)
    count = max(4 * num_players, EXPLAINERS[explainer_type].least(num_players))
    while count < most:
        yield Budget("num_samples", count)
        count += (count + 3) // 4 * 2
    yield budget


def asked_coalitions(budget: Budget, num_players: int) -> int:
    """Return the coalitions that a budget asks for, at most 2^n, before any floor."""
    asked, table = budget.evaluations(num_players), 1 << num_players
    # Fraction is exact for any number of players; so is the library's float product until it overflows.
    return int(table * Fraction(budget.fraction)) if asked is None else min(asked, table)


def _hierarchical_coalitions(
    spec: HierarchicalSpec, kind: ShapleyType, budget: Budget, num_players: int
) -> int:
    """Return the coalitions of a game and of those below it, of one message: every group is opened.

    The groups are those of the hierarchical explainer: a game has at most k players, each a group of the
    smallest power of k that allows it. Each coalition counts once; the games share their grand coalitions,
    and the empty one of a lower game is the game above without the group.
    """
    if num_players == 0:
        return 1
    size = 1
    while -(-num_players // size) > spec.k:
        size *= spec.k
    full, rest = divmod(num_players, size)
    groups = full + bool(rest)
    total = flat_coalitions(kind, budget, groups)
    # A lower game knows its grand coalition; also its empty one, if the game above evaluated all but its
    # group.
    known = 1 + has_complements(kind, total, groups)
    for members, count in ((size, full), (rest, 1)):
        if members > 1:
            below = _hierarchical_coalitions(spec, spec.inner_type, spec.inner_budget, members)
            total += count * (below - known)
    return total


def blocks_in_words(**blocks: Block | None) -> dict[str, Any]:
    """Return the set blocks of a variant as JSON data; unset ones are absent, so old specs stay equal."""
    return {key: block.model_dump(mode="json") for key, block in blocks.items() if block is not None}


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Return the hash of JSON data, 16 hex digits."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

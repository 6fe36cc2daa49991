"""Entries of `experiments`: an explainer, its budgets, and its changes to the config's blocks."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator

from mllm_shapx.config.blocks import AliasedBlock, Block
from mllm_shapx.config.measures import FaithfulnessConfig, InteractionsConfig, StopWhenConfig
from mllm_shapx.config.scoring import ShapOverride
from mllm_shapx.config.values import (
    BatchSize,
    Device,
    Explainer,
    FlatExplainer,
    FractionList,
    GroupSizeList,
    LinearList,
    MaxLength,
    MinFractionList,
    Name,
    NewTokens,
    NumSamplesList,
    PathSegment,
    SeedList,
    Temperature,
    TopK,
    WrittenPath,
    _upper,
)


class HierarchicalConfig(AliasedBlock):
    """A variant's hierarchical grid."""

    ks: GroupSizeList = (10,)
    """Maximum number of neighbouring players in a group."""
    shap_type: FlatExplainer = "limited_mc"
    """Explainer of the lower games. Kept as written: the run's name has it."""
    shap_num_samples: NumSamplesList = ()
    shap_fractions: FractionList = ()
    first_layer_type: FlatExplainer | None = None
    """Explainer of the top game; null for `shap_type`. Kept as written: the run's name has it."""
    first_layer_num_samples: NumSamplesList = ()
    first_layer_fractions: FractionList = ()
    use_importance_sampling: bool = True
    """Whether a lower game's budget shrinks with its group's share."""
    importance_min_fractions: MinFractionList = (0.1,)
    mode: Annotated[
        Literal["MULTI_MODAL_MULTI_USER"],
        BeforeValidator(_upper, json_schema_input_type=Literal["MULTI_MODAL_MULTI_USER"]),
    ] = "MULTI_MODAL_MULTI_USER"

    aliases: ClassVar[dict[str, str]] = {
        "shap_fraction": "shap_fractions",
        "first_layer_fraction": "first_layer_fractions",
    }
    also_accepted: ClassVar[tuple[str, ...]] = tuple(aliases)


class GenerationOverride(Block):
    """A variant's changes to the `generation` block; absent keys keep the config's."""

    max_new_tokens: NewTokens | None = None
    text_temperature: Temperature | None = None
    text_top_k: TopK | None = None
    audio_temperature: Temperature | None = None
    audio_top_k: TopK | None = None
    reuse_sampled_answers: bool | None = None


class EmbeddingOverride(Block):
    """A variant's changes to the `embedding` block; absent keys keep the config's."""

    model_id: WrittenPath | None = None
    revision: Name | None = None
    max_length: MaxLength | None = None
    batch_size: BatchSize | None = None
    l2_normalize: bool | None = None
    local_files_only: bool | None = None
    device: Device = None


class Variant(AliasedBlock):
    """One entry of `experiments`: an explainer and the budgets to run it with."""

    explainer_type: Explainer = "limited_mc"
    name: PathSegment | None = None
    num_samples: NumSamplesList = ()
    """Evaluated coalitions, the empty and the grand one included."""
    fractions: FractionList = ()
    """Shares of the 2^n coalitions."""
    linear: LinearList = ()
    """Factors f of a budget of int(f n^2) coalitions, rounded up to an even number."""
    seeds: SeedList = ()
    """Repetitions: one run per seed, with a name that ends in `_seedN`."""
    stop_when: StopWhenConfig | None = None
    """A row's sampling stops when its values are this sure; null spends the whole budget."""
    hierarchical: HierarchicalConfig | None = None
    faithfulness: FaithfulnessConfig | None = None
    """Replaces the config's block; null for no measurement of this variant."""
    interactions: InteractionsConfig | None = None
    """Interactions of the players, from the answers of an exact run."""
    shap_override: ShapOverride | None = None
    generation_override: GenerationOverride | None = None
    embedding_override: EmbeddingOverride | None = None

    aliases: ClassVar[dict[str, str]] = {"fraction": "fractions"}
    also_accepted: ClassVar[tuple[str, ...]] = tuple(aliases)

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """Return the seeds of its repetitions; empty if it is run once."""
        override = self.shap_override
        return self.seeds or (() if override is None or override.seed is None else (override.seed,))

"""Entries of `experiments`: an explainer, its budgets, and its changes to the config's blocks."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator

from mllm_shapx.config import values
from mllm_shapx.config.blocks import Block
from mllm_shapx.config.measures import FaithfulnessConfig, InteractionsConfig, StopWhenConfig
from mllm_shapx.config.scoring import EmbeddingOverride, GenerationOverride, ShapOverride
from mllm_shapx.config.values import FlatExplainer, OneOrMore, OneOrMoreNotEmpty


class HierarchicalConfig(Block):
    """A variant's hierarchical grid."""

    ks: OneOrMoreNotEmpty[values.GroupSize] = (10,)
    """Maximum number of neighbouring players in a group."""
    shap_type: FlatExplainer = "limited_mc"
    """Explainer of the lower games. Kept as written: the run's name has it."""
    shap_num_samples: OneOrMore[values.NumSamples] = ()
    shap_fractions: OneOrMore[values.Fraction] = ()
    first_layer_type: FlatExplainer | None = None
    """Explainer of the top game; null for `shap_type`. Kept as written: the run's name has it."""
    first_layer_num_samples: OneOrMore[values.NumSamples] = ()
    first_layer_fractions: OneOrMore[values.Fraction] = ()
    use_importance_sampling: bool = True
    """Whether a lower game's budget shrinks with its group's share."""
    importance_min_fractions: OneOrMoreNotEmpty[values.MinFraction] = (0.1,)
    mode: Annotated[
        Literal["MULTI_MODAL_MULTI_USER"],
        BeforeValidator(values.upper, json_schema_input_type=Literal["MULTI_MODAL_MULTI_USER"]),
    ] = "MULTI_MODAL_MULTI_USER"

    aliases: ClassVar[dict[str, str]] = {
        "shap_fraction": "shap_fractions",
        "first_layer_fraction": "first_layer_fractions",
    }


class Variant(Block):
    """One entry of `experiments`: an explainer and the budgets to run it with."""

    explainer_type: values.Explainer = "limited_mc"
    name: values.PathSegment | None = None
    num_samples: OneOrMore[values.NumSamples] = ()
    """Evaluated coalitions, the empty and the grand one included."""
    fractions: OneOrMore[values.Fraction] = ()
    """Shares of the 2^n coalitions."""
    linear: OneOrMore[values.LinearFactor] = ()
    """Factors f of a budget of int(f n^2) coalitions, rounded up to an even number."""
    seeds: OneOrMore[values.Seed] = ()
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

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """Return the seeds of its repetitions; empty if it is run once."""
        override = self.shap_override
        return self.seeds or (() if override is None or override.seed is None else (override.seed,))

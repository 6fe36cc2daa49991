"""The config file's shape: one `ExperimentSet` and its blocks, as frozen pydantic models."""

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

ConnectorName = Literal["liquid_audio", "hf_text"]
ExplainerType = Literal[
    "exact",
    "limited_mc",
    "standard_mc",
    "limited_cc",
    "standard_cc",
    "limited_neyman",
    "standard_neyman",
    "hierarchical",
]
FlatExplainerType = Literal[
    "exact",
    "limited_mc",
    "standard_mc",
    "limited_cc",
    "standard_cc",
    "limited_neyman",
    "standard_neyman",
]
SimilarityName = Literal["CosineSimilarity", "TfIdfCosineSimilarity", "EuclideanSimilarity"]
ReducerName = Literal["MeanReducer", "MaxReducer", "MinReducer", "SumReducer", "FirstReducer", "ZeroReducer"]
NormalizerName = Literal["AbsSumNormalizer", "IdentityNormalizer", "MinMaxNormalizer", "PowerShiftNormalizer"]
EmbeddingMode = Literal["CONTEXTUAL", "STATIC"]
TokenFilter = Literal["exclude_punctuation", "none"]
InputModality = Literal[
    "text",
    "audio__original",
    "audio__male",
    "audio__female",
    "interleaved__text_first__male",
    "interleaved__text_first__female",
    "interleaved__audio_first__male",
    "interleaved__audio_first__female",
]
OutputModality = Literal["text", "audio"]
FilterOp = Literal["in", "not_in", "==", "!=", "<", "<=", ">", ">=", "between"]

EXPLAINER_ALIASES = {
    "mc": "limited_mc",
    "cc": "limited_cc",
    "complementary": "limited_cc",
    "neyman": "limited_neyman",
}
"""Short explainer names that users' configs hold, and the types they mean."""

DEFAULT_MODELS: dict[str, tuple[str, str]] = {
    "liquid_audio": ("LiquidAI/LFM2-Audio-1.5B", "3f9322d8cfdcf3df281227af9ca80d948f5ba878"),
    "hf_text": ("microsoft/phi-2", "ef382358ec9e382308935a992d908de099b64c23"),
}
"""Connector -> (model id, pinned commit) used when `connector_kwargs` names no model."""

KNOWN_SUBSETS = frozenset(
    {
        "single_sentence",
        "multi_lingual",
        "multi_sentence",
        "single_sentence__voice_bench",
        "single_sentence__librispeech_asr",
        "multi_lingual__infinity_instruct",
        "multi_sentence__voice_bench",
        "multi_turn",
    }
)
"""Subsets of the default dataset; other names are allowed with a warning."""

_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")


def _path_segment(value: str) -> str:
    if not _SEGMENT.fullmatch(value) or value in {".", ".."}:
        msg = "must be one path segment: letters, digits and . _ - only"
        raise ValueError(msg)
    return value


def _canonical_type(value: Any) -> Any:
    return EXPLAINER_ALIASES.get(value, value) if isinstance(value, str) else value


def _as_list(value: Any) -> Any:
    """Let a single number stand for a list of one: `"ks": 10` is `"ks": [10]`."""
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


PathSegment = Annotated[str, AfterValidator(_path_segment)]
Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
LinearFactor = Annotated[float, Field(gt=0.0, le=10.0)]
Explainer = Annotated[ExplainerType, BeforeValidator(_canonical_type)]


def _check_num_samples(value: int) -> int:
    if value != -1 and value < 1:
        msg = "must be at least 1, or -1 for the estimator's floor"
        raise ValueError(msg)
    return value


NumSamples = Annotated[int, AfterValidator(_check_num_samples)]


class Block(BaseModel):
    """Base of all config blocks: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ConnectorKwargs(Block):
    """Which model is loaded and how."""

    model_id: str | None = None
    """Hub id or local directory; the connector's default model when null."""
    revision: str | None = None
    """Hub commit; ignored for a local directory."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Prompts answered in one forward pass."""
    attn_implementation: str | None = None


class ColumnMapping(Block):
    """Names of the dataset's columns where they differ from the usual ones."""

    text: str | None = None
    """Prompt text, or a list of sentences; `sentences`, else `prompt`, when null."""
    audio: str | None = None
    """Recording; `audio` with the modality's voice when null."""
    language: str | None = None
    original_language: str | None = None
    token_count: str | None = None


class DatasetConfig(Block):
    """Where the rows come from."""

    source: Literal["hf_parquet", "hf_datasets", "local_parquet", "local_csv"] = "hf_parquet"
    repo_id: str = "Pawlo77/mllm-shap"
    subset: str = "single_sentence"
    split: str = "test"
    revision: str | None = None
    path: str | None = None
    """File, directory or glob of a local source, relative to the config file that names it."""
    trust_remote_code: bool = False
    """Accepted for old configs; today's `datasets` runs no remote code."""
    column_mapping: ColumnMapping = ColumnMapping()

    @model_validator(mode="before")
    @classmethod
    def _legacy_use_parquet(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "use_parquet" not in data:
            return data
        rest = {key: value for key, value in data.items() if key != "use_parquet"}
        use_parquet = data["use_parquet"]
        if not isinstance(use_parquet, bool):
            msg = "use_parquet must be true or false"
            raise ValueError(msg)  # noqa: TRY004 -- pydantic reports ValueError only
        rest.setdefault("source", "hf_parquet" if use_parquet else "hf_datasets")
        return rest

    @property
    def is_local(self) -> bool:
        """Whether the rows are files on this machine."""
        return self.source in {"local_parquet", "local_csv"}


class RowFilter(Block):
    """Keep the rows whose `column` satisfies `op value`."""

    column: str
    op: FilterOp
    value: Any

    @model_validator(mode="after")
    def _value_fits_op(self) -> Self:
        if self.op in {"in", "not_in"} and not isinstance(self.value, list):
            msg = f"op {self.op!r} needs a list as value"
            raise ValueError(msg)
        if self.op == "between" and not (isinstance(self.value, list) and len(self.value) == 2):  # noqa: PLR2004
            msg = "op 'between' needs [low, high] as value, both ends included"
            raise ValueError(msg)
        return self


class SelectionConfig(Block):
    """Which rows are explained, and in which order."""

    start_index: Annotated[int, Field(ge=0)] = 0
    max_samples: Annotated[int, Field(ge=1)] | None = None
    shuffle_seed: Annotated[int, Field(ge=0, lt=2**32)] | None = 0
    """Seed of the row order; null keeps file order."""
    min_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    max_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    """Bounds on the players of a row; text input only."""
    filters: tuple[RowFilter, ...] = ()
    balanced_token_counts: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    samples_per_token_count: Annotated[int, Field(ge=1)] | None = None
    allow_partial_token_count_buckets: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        low, high = self.min_prompt_tokens, self.max_prompt_tokens
        if low is not None and high is not None and low > high:
            msg = f"min_prompt_tokens {low} is larger than max_prompt_tokens {high}"
            raise ValueError(msg)
        if (self.balanced_token_counts is None) != (self.samples_per_token_count is None):
            msg = "balanced_token_counts and samples_per_token_count go together"
            raise ValueError(msg)
        return self


class ModalityConfig(Block):
    """What the model hears or reads, and what it answers with."""

    input_modality: InputModality = "text"
    output_modality: OutputModality = "text"

    @property
    def has_audio_input(self) -> bool:
        """Whether any piece of the prompt is a recording."""
        return self.input_modality != "text"


class GenerationBlock(Block):
    """How answers are decoded."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 32
    text_temperature: Annotated[float, Field(ge=0.0)] = 0.2
    """0 decodes greedily."""
    text_top_k: Annotated[int, Field(ge=1)] | None = None
    audio_temperature: Annotated[float, Field(ge=0.0)] | None = None
    audio_top_k: Annotated[int, Field(ge=1)] | None = None
    reuse_sampled_answers: bool = False
    """With a temperature above 0, let runs share answers; this correlates their errors."""

    @property
    def is_greedy(self) -> bool:
        """Whether the same prompt always gets the same answer."""
        return self.text_temperature == 0.0 and not self.audio_temperature


class ChatConfig(Block):
    """The conversation around the prompt."""

    system_prompt: str = "You are a helpful assistant."
    """Empty for no system turn."""
    system_roles_setup: Literal["SYSTEM", "ASSISTANT", "SYSTEM_ASSISTANT"] = "SYSTEM_ASSISTANT"
    """Roles that are fixed context rather than players."""
    assistant_prefill: str | None = None
    """Beginning of the assistant's answer, written before the model goes on."""


class AudioSegmentation(Block):
    """How a recording is cut into players."""

    method: Literal["raw", "sgpa"] = "raw"
    window_ms: Annotated[float, Field(gt=0.0)] = 80.0
    """Length of a `raw` window; 80 ms is one LFM2-Audio input frame."""
    aligner_device: str | None = None


class ShapConfig(Block):
    """How answers become numbers."""

    mode: EmbeddingMode = "CONTEXTUAL"
    similarity: SimilarityName = "TfIdfCosineSimilarity"
    reducer: ReducerName = "MeanReducer"
    normalizer: NormalizerName = "AbsSumNormalizer"
    allow_mask_duplicates: bool = False
    token_filter: TokenFilter = "exclude_punctuation"  # noqa: S105 -- no password

    @property
    def needs_embeddings(self) -> bool:
        """Whether the similarity compares vectors rather than words."""
        return self.similarity != "TfIdfCosineSimilarity"


class EmbeddingConfig(Block):
    """External encoder for the embedding similarities; the explained model's own states when absent."""

    model_id: str
    revision: str | None = None
    max_length: Annotated[int, Field(ge=1)] = 64
    batch_size: Annotated[int, Field(ge=1)] = 64
    l2_normalize: bool = False
    local_files_only: bool = False
    device: str | None = None


class WandbConfig(Block):
    """Weights & Biases."""

    enabled: bool = True
    project: str = "mllm-shap"
    entity: str | None = None
    group: str | None = None
    mode: Literal["online", "offline", "disabled"] = "online"
    tags: tuple[str, ...] = ()


class RuntimeConfig(Block):
    """How the work is done; never what comes out."""

    verbose: bool = False
    progress_bar: bool = True
    gc_after_each_sample: bool = False
    cuda_empty_cache: bool = False


class HierarchicalConfig(Block):
    """A variant's hierarchical grid."""

    ks: Annotated[tuple[Annotated[int, Field(ge=2)], ...], BeforeValidator(_as_list), Field(min_length=1)] = (
        10,
    )
    """Largest number of neighbouring players in a group."""
    shap_type: Annotated[FlatExplainerType, BeforeValidator(_canonical_type)] = "limited_mc"
    """Explainer of the lower games."""
    shap_num_samples: Annotated[tuple[NumSamples, ...], BeforeValidator(_as_list)] = ()
    shap_fractions: Annotated[tuple[Fraction, ...], BeforeValidator(_as_list)] = ()
    first_layer_type: str | None = None
    """Explainer of the top game; as `shap_type` when null. Kept as written: it is part of the run's name."""
    first_layer_num_samples: Annotated[tuple[NumSamples, ...], BeforeValidator(_as_list)] = ()
    first_layer_fractions: Annotated[tuple[Fraction, ...], BeforeValidator(_as_list)] = ()
    use_importance_sampling: bool = True
    """Whether the budgets of lower games shrink with their group's share."""
    importance_min_fractions: Annotated[
        tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...], BeforeValidator(_as_list), Field(min_length=1)
    ] = (0.1,)
    mode: Literal["MULTI_MODAL_MULTI_USER"] = "MULTI_MODAL_MULTI_USER"

    _ALIASES: ClassVar[dict[str, str]] = {
        "shap_fraction": "shap_fractions",
        "first_layer_fraction": "first_layer_fractions",
    }

    @model_validator(mode="before")
    @classmethod
    def _aliases(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        renamed: dict[str, Any] = {}
        for key, value in data.items():
            target = str(cls._ALIASES.get(key, key))
            if target in renamed or (target != key and target in data):
                msg = f"{key!r} and {target!r} are the same setting; keep one"
                raise ValueError(msg)
            renamed[target] = value
        return {key: value for key, value in renamed.items() if value is not None}

    @model_validator(mode="after")
    def _known_first_layer(self) -> Self:
        known = set(FlatExplainerType.__args__)  # type: ignore[attr-defined]
        if self.first_layer_type is not None and _canonical_type(self.first_layer_type) not in known:
            names = ", ".join(sorted(known | set(EXPLAINER_ALIASES)))
            msg = f"first_layer_type {self.first_layer_type!r} is unknown; use one of {names}"
            raise ValueError(msg)
        return self


class ShapOverride(Block):
    """A variant's changes to the `shap` block; absent keys keep the config's."""

    mode: EmbeddingMode | None = None
    similarity: SimilarityName | None = None
    reducer: ReducerName | None = None
    normalizer: NormalizerName | None = None
    allow_mask_duplicates: bool | None = None
    token_filter: TokenFilter | None = None


class GenerationOverride(Block):
    """A variant's changes to the `generation` block; absent keys keep the config's."""

    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    text_temperature: Annotated[float, Field(ge=0.0)] | None = None
    text_top_k: Annotated[int, Field(ge=1)] | None = None
    audio_temperature: Annotated[float, Field(ge=0.0)] | None = None
    audio_top_k: Annotated[int, Field(ge=1)] | None = None
    reuse_sampled_answers: bool | None = None


class EmbeddingOverride(Block):
    """A variant's changes to the `embedding` block; absent keys keep the config's."""

    model_id: str | None = None
    revision: str | None = None
    max_length: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = None
    l2_normalize: bool | None = None
    local_files_only: bool | None = None
    device: str | None = None


class Variant(Block):
    """One entry of `experiments`: an explainer and the budgets to run it with."""

    explainer_type: Explainer = "limited_mc"
    name: PathSegment | None = None
    num_samples: Annotated[tuple[NumSamples, ...], BeforeValidator(_as_list)] = ()
    """Coalitions evaluated, the empty and the grand one included."""
    fractions: Annotated[tuple[Fraction, ...], BeforeValidator(_as_list)] = ()
    """Shares of the 2^n coalitions."""
    linear: Annotated[tuple[LinearFactor, ...], BeforeValidator(_as_list)] = ()
    """Factors f of a budget of int(f n^2) coalitions, rounded up to even."""
    hierarchical: HierarchicalConfig | None = None
    shap_override: ShapOverride | None = None
    generation_override: GenerationOverride | None = None
    embedding_override: EmbeddingOverride | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_lists(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        lists = ("num_samples", "fractions", "linear")
        return {key: value for key, value in data.items() if not (key in lists and value is None)}

    @model_validator(mode="after")
    def _budgets_fit_type(self) -> Self:
        budgets = [key for key in ("num_samples", "fractions", "linear") if getattr(self, key)]
        if self.explainer_type == "exact" and budgets:
            msg = f"explainer 'exact' evaluates every coalition; remove {', '.join(budgets)}"
            raise ValueError(msg)
        if self.explainer_type == "hierarchical":
            if self.hierarchical is None:
                msg = "explainer 'hierarchical' needs a 'hierarchical' block"
                raise ValueError(msg)
            if budgets:
                msg = f"a hierarchical variant's budgets stand in its 'hierarchical' block; remove {', '.join(budgets)}"
                raise ValueError(msg)
        elif self.hierarchical is not None:
            msg = f"'hierarchical' belongs to explainer_type 'hierarchical', not {self.explainer_type!r}"
            raise ValueError(msg)
        elif self.explainer_type != "exact" and not budgets:
            msg = f"explainer {self.explainer_type!r} needs a budget: num_samples, fractions or linear"
            raise ValueError(msg)
        return self


class ExperimentSet(Block):
    """One config file: a model, rows, and the explainers to run on them."""

    experiment_set_id: PathSegment
    output_root: str = "experiments_output"
    """Directory or any fsspec URI; a relative directory starts where the command is run."""
    connector: ConnectorName = "liquid_audio"
    connector_kwargs: ConnectorKwargs = ConnectorKwargs()
    device: Annotated[str, Field(pattern=r"^(cuda(:\d+)?|cpu|mps)$")] | None = None
    dataset: DatasetConfig = DatasetConfig()
    selection: SelectionConfig = SelectionConfig()
    modality: ModalityConfig = ModalityConfig()
    generation: GenerationBlock = GenerationBlock()
    chat: ChatConfig = ChatConfig()
    audio_segmentation: AudioSegmentation = AudioSegmentation()
    shap: ShapConfig = ShapConfig()
    embedding: EmbeddingConfig | None = None
    wandb: WandbConfig = WandbConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    experiments: Annotated[tuple[Variant, ...], Field(min_length=1)]

    @property
    def model_id(self) -> str:
        """Hub id or directory of the explained model."""
        return self.connector_kwargs.model_id or DEFAULT_MODELS[self.connector][0]

    @property
    def model_revision(self) -> str | None:
        """Hub revision of the explained model; the pinned default for the default model."""
        default_id, default_revision = DEFAULT_MODELS[self.connector]
        if self.connector_kwargs.revision is None and self.model_id == default_id:
            return default_revision
        return self.connector_kwargs.revision

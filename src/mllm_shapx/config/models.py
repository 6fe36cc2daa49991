"""The config file's shape: one `ExperimentSet` and its blocks, as frozen pydantic models.

The models hold the shape of each key; what several keys must agree on stands in `config.checks`.
"""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    JsonValue,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from mllm_shapx.config import servers
from mllm_shapx.config.paths import location, name_fault
from mllm_shapx.config.vocabulary import (
    VALUE_FUNCTIONS,
    Reads,
    ValueFunctionName,
    canonical_value_function,
)

ConnectorName = Literal["liquid_audio", "hf_text", "openai"]
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
    "precise": "exact",
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
_LONGEST_SEGMENT = 150
_LONGEST_NUMBER = 30
_DEVICE = re.compile(r"cuda(:\d+)?|cpu|mps")


def wrong_key(key: str, message: str) -> PydanticCustomError:
    """Return an error of a whole block that points at one of its keys."""
    return PydanticCustomError("wrong_key", "{message}", {"key": key, "message": message})


def _path_segment(value: str) -> str:
    if not _SEGMENT.fullmatch(value) or value in {".", ".."}:
        msg = f'"{value}" must be one path segment: letters, digits and . _ - only'
        raise ValueError(msg)
    if len(value) > _LONGEST_SEGMENT:
        msg = f"is a directory's name and takes at most {_LONGEST_SEGMENT} characters, not {len(value)}"
        raise ValueError(msg)
    return value


def canonical_type(value: Any) -> Any:
    """Return the explainer type that a name or alias means, in any case; anything unknown as it is."""
    if not isinstance(value, str):
        return value
    return EXPLAINER_ALIASES.get(value.lower(), value.lower())


def _connector(value: Any) -> Any:
    return servers.CONNECTOR_ALIASES.get(value, value) if isinstance(value, str) else value


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


def _as_list(value: Any) -> Any:
    """Let a single number stand for a list of one: `"ks": 10` is `"ks": [10]`."""
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


@dataclass(frozen=True)
class _AtMost:
    """An upper bound with its reason, in messages and in the JSON Schema."""

    most: float
    why: str
    """What a larger value would mean."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "maximum": self.most}

    def _check[Value: float](self, value: Value) -> Value:
        if value > self.most:
            text = str(value)
            found = text if len(text) <= _LONGEST_NUMBER else f"{text[:_LONGEST_NUMBER]}…"
            msg = f"{found} is too large: at most {self.most:,}, {self.why}"
            raise ValueError(msg)
        return value


def _num_samples(value: int) -> int:
    if value != -1 and value < 1:
        msg = f"{str(value)[:_LONGEST_NUMBER]} must be at least 1, or -1 for the estimator's floor"
        raise ValueError(msg)
    return value


def _name(value: str) -> str:
    """Refuse what no name, path or URI can be; the value itself stays as written."""
    fault = name_fault(value)
    if fault is not None:
        raise ValueError(fault)
    return value


def _path(value: str) -> str:
    """Refuse what cannot be a path; the value stays as written, since `~` is another one elsewhere."""
    location(value)
    return value


def _flat_type_as_written(value: Any) -> Any:
    allowed = get_args(FlatExplainerType)
    if canonical_type(value) not in allowed:
        expected = ", ".join(f"'{name}'" for name in allowed)
        raise PydanticCustomError("unknown_name", "must be one of {expected}", {"expected": expected})
    return value


def _not_empty(value: str) -> str:
    if not value.strip():
        msg = "must not be empty"
        raise ValueError(msg)
    return value


def _gguf_file(value: str) -> str:
    path = PurePosixPath(value)
    if path.suffix != ".gguf" or path.is_absolute() or ".." in path.parts:
        msg = f'"{value}" must be the name of a *.gguf file inside the model\'s directory or repository'
        raise ValueError(msg)
    return value


def _device(value: Any) -> Any:
    return None if value == "auto" else value


def _known_device(value: str | None) -> str | None:
    if value is not None and not _DEVICE.fullmatch(value):
        expected = "'cuda', 'cpu', 'mps', 'auto'"
        raise PydanticCustomError("unknown_name", "must be one of {expected}", {"expected": expected})
    return value


Name = Annotated[str, AfterValidator(_name)]
"""Text that names something; not empty, no control characters, no login."""
WrittenPath = Annotated[str, AfterValidator(_path)]
"""A path, hub id or URI; expanded where it is used."""
GgufFile = Annotated[str, AfterValidator(_gguf_file)]
PathSegment = Annotated[str, AfterValidator(_path_segment)]
Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
MinFraction = Annotated[float, Field(ge=0.0, le=1.0)]
LinearFactor = Annotated[float, Field(gt=0.0, le=10.0)]
NumSamples = Annotated[
    int,
    AfterValidator(_num_samples),
    _AtMost(1 << 24, "for a game of more than 2^24 coalitions is refused"),
]
_MOST_PLAYERS = _AtMost(1_000_000, "and no row has as many players")
_MOST_ROWS = _AtMost(1_000_000_000, "and no dataset that is taken has as many rows")
GroupSize = Annotated[int, Field(ge=2), _MOST_PLAYERS]
Players = Annotated[int, Field(ge=1), _MOST_PLAYERS]
Rows = Annotated[int, Field(ge=1), _MOST_ROWS]
BatchSize = Annotated[
    int, Field(ge=1), _AtMost(65_536, "for one forward pass holds the whole batch in memory")
]
NewTokens = Annotated[int, Field(ge=1), _AtMost(131_072, "for no model here answers at such length")]
TopK = Annotated[int, Field(ge=1), _AtMost(10_000_000, "and no vocabulary is larger")]
MaxLength = Annotated[int, Field(ge=1), _AtMost(131_072, "and no encoder reads longer texts")]
Temperature = Annotated[float, Field(ge=0.0), _AtMost(100.0, "from where on answers are noise")]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
WindowMs = Annotated[float, Field(ge=1.0), _AtMost(600_000.0, "which is the longest recording that is taken")]
_TypeAlias = Literal["precise", "mc", "cc", "complementary", "neyman"]
_TypeAsWritten = ExplainerType | _TypeAlias
_FlatTypeAsWritten = FlatExplainerType | _TypeAlias
Concurrency = Annotated[int, Field(ge=1), _AtMost(4096, "for each request in flight holds a connection")]
Timeout = Annotated[float, Field(ge=0.1), _AtMost(86_400.0, "which is a day")]
Connector = Annotated[
    ConnectorName,
    BeforeValidator(
        _connector,
        json_schema_input_type=ConnectorName | Literal["openai_compat_text", "lm_studio_text"],
    ),
]
Explainer = Annotated[ExplainerType, BeforeValidator(canonical_type, json_schema_input_type=_TypeAsWritten)]
FlatExplainer = Annotated[
    str, BeforeValidator(_flat_type_as_written, json_schema_input_type=_FlatTypeAsWritten)
]
"""A flat explainer's type or alias as written: it is part of the run's name."""
ValueFunction = Annotated[
    ValueFunctionName,
    BeforeValidator(
        canonical_value_function, json_schema_input_type=ValueFunctionName | Literal["wer", "logprob"]
    ),
]
ValueOptions = dict[str, JsonValue]
EmbeddingModeName = Annotated[EmbeddingMode, BeforeValidator(_upper, json_schema_input_type=EmbeddingMode)]
Device = Annotated[
    str | None,
    BeforeValidator(_device, json_schema_input_type=str | None),
    AfterValidator(_known_device),
]

# A list in JSON, a tuple here: frozen and hashable. A single number may stand for a list of one.
NumSamplesList = Annotated[
    tuple[NumSamples, ...],
    Field(strict=False),
    BeforeValidator(_as_list, json_schema_input_type=tuple[NumSamples, ...] | NumSamples | None),
]
FractionList = Annotated[
    tuple[Fraction, ...],
    Field(strict=False),
    BeforeValidator(_as_list, json_schema_input_type=tuple[Fraction, ...] | Fraction | None),
]
LinearList = Annotated[
    tuple[LinearFactor, ...],
    Field(strict=False),
    BeforeValidator(_as_list, json_schema_input_type=tuple[LinearFactor, ...] | LinearFactor | None),
]
SeedList = Annotated[
    tuple[Seed, ...],
    Field(strict=False),
    BeforeValidator(_as_list, json_schema_input_type=tuple[Seed, ...] | Seed | None),
]
GroupSizeList = Annotated[
    tuple[GroupSize, ...],
    Field(strict=False, min_length=1),
    BeforeValidator(_as_list, json_schema_input_type=tuple[GroupSize, ...] | GroupSize | None),
]
MinFractionList = Annotated[
    tuple[MinFraction, ...],
    Field(strict=False, min_length=1),
    BeforeValidator(_as_list, json_schema_input_type=tuple[MinFraction, ...] | MinFraction | None),
]


class Block(BaseModel):
    """Base of all config blocks: frozen, no unknown keys, no silent conversions.

    Null for a block or a list that cannot be null means that it is left out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    also_accepted: ClassVar[tuple[str, ...]] = ()
    """Keys that the block takes besides its fields, for old configs."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or not cls._defaults(key)}

    @classmethod
    def _defaults(cls, key: str) -> bool:
        field = cls.model_fields.get(key)
        return field is not None and isinstance(field.default, Block | tuple)

    def changed_by(self, override: "Block | None") -> Self:
        """Return the block with what `override` sets; null resets a key that may be null, else keeps it."""
        return self if override is None else self.model_copy(update=self.changes_of(override))

    @classmethod
    def changes_of(cls, override: "Block") -> dict[str, Any]:
        """Return the keys of this block that `override` sets."""
        fields = cls.model_fields
        values = {key: getattr(override, key) for key in override.model_fields_set if key in fields}
        return {
            key: value for key, value in values.items() if value is not None or fields[key].default is None
        }


class AliasedBlock(Block):
    """A block some of whose keys have a second name."""

    aliases: ClassVar[dict[str, str]] = {}
    """Second name -> the field's name."""

    @model_validator(mode="before")
    @classmethod
    def _rename_aliases(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for alias, name in cls.aliases.items():
            if data.get(alias) is not None and data.get(name) is not None:
                raise wrong_key(alias, f'is the same setting as "{name}"; keep one')
        renamed: dict[Any, Any] = {}
        for key, value in data.items():
            target = cls.aliases.get(key, key)
            if value is not None or target not in cls.aliases.values():
                renamed[target] = value
        return renamed


class ConnectorKwargs(Block):
    """Which model is loaded and how."""

    model_id: WrittenPath | None = None
    """Hub id or local directory; the connector's default model when null."""
    revision: Name | None = None
    """Hub commit; ignored for a local directory."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: BatchSize | Literal["auto"] = "auto"
    """Prompts answered in one forward pass."""
    attn_implementation: Name | None = None
    chat_template: str | None = None
    """Chat template in place of the tokenizer's own: a file, or the jinja text itself; `hf_text` only."""
    chat_template_kwargs: dict[str, JsonValue] | None = None
    """Variables for the chat template, such as {"enable_thinking": false}; `hf_text` only."""
    strip_reasoning: bool = False
    """Cut the text between a model's think tags from each answer before it is scored."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Load the weights in so many bits with bitsandbytes; needs CUDA."""
    adapter: WrittenPath | None = None
    """PEFT adapter on the model: hub id or local directory."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""
    gguf_file: GgufFile | None = None
    """Name of the GGUF file to load, inside the model's directory or repository."""
    base_url: Annotated[Name, AfterValidator(servers.base_url)] | None = None
    """Address of an OpenAI-compatible server, such as http://localhost:8000/v1; `openai` only."""
    api_key_env: Annotated[str, AfterValidator(servers.variable_name)] | None = None
    """NAME of the environment variable that holds the server's key."""
    headers_env: Annotated[dict[str, str], AfterValidator(servers.header_variables)] | None = None
    """HTTP header -> NAME of the environment variable that holds its value."""
    max_concurrency: Concurrency | None = None
    """Most requests in flight; 256 when null."""
    timeout_s: Timeout | None = None
    """Seconds that the server may take for one answer; 300 when null."""
    extra_body: Annotated[dict[str, JsonValue], AfterValidator(servers.extra_body)] | None = None
    """Further keys of each request."""

    also_accepted: ClassVar[tuple[str, ...]] = servers.OLD_KEYS

    @model_validator(mode="before")
    @classmethod
    def _keys_of_servers(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if (key := servers.secret_key(data)) is not None:
            message = (
                "is not taken: configs are copied into the results; put the secret into a variable of the "
                "environment and its name into api_key_env, or into headers_env for a header"
            )
            raise wrong_key(key, message)
        try:
            return servers.without_old_keys(data)
        except servers.KeyFault as fault:
            raise wrong_key(fault.key, fault.message) from None

    @property
    def loading_settings(self) -> dict[str, Any]:
        """What changes the loaded model beside its id, revision and dtype; only what is set."""
        keys = ("quantization", "adapter", "trust_remote_code", "gguf_file")
        return {key: value for key in keys if (value := getattr(self, key)) not in (None, False)}

    @property
    def chat_settings(self) -> dict[str, Any]:
        """Return the keys that decide prompts and the answers' texts, those that are set alone."""
        settings: dict[str, Any] = {}
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        if self.chat_template_kwargs:
            settings["chat_template_kwargs"] = self.chat_template_kwargs
        if self.strip_reasoning:
            settings["strip_reasoning"] = True
        if self.extra_body:
            settings["extra_body"] = self.extra_body
        return settings


class ColumnMapping(Block):
    """Names of the dataset's columns where they differ from the usual ones."""

    text: Name | None = None
    """Prompt text, or a list of sentences; `sentences`, else `prompt`, when null."""
    audio: Name | None = None
    """Recording; `audio` with the modality's voice when null."""
    language: Name | None = None
    original_language: Name | None = None
    token_count: Name | None = None


class DatasetConfig(Block):
    """Where the rows come from."""

    source: Literal["hf_parquet", "hf_datasets", "local_parquet", "local_csv"] = "hf_parquet"
    repo_id: Name = "Pawlo77/mllm-shap"
    subset: Name = "single_sentence"
    split: Name = "test"
    revision: Name | None = None
    path: WrittenPath | None = None
    """File, directory or glob of a local source, relative to the config file that names it."""
    trust_remote_code: bool = False
    """Accepted for old configs; today's `datasets` runs no remote code."""
    column_mapping: ColumnMapping = ColumnMapping()

    also_accepted: ClassVar[tuple[str, ...]] = ("use_parquet",)

    @model_validator(mode="before")
    @classmethod
    def _legacy_use_parquet(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "use_parquet" not in data:
            return data
        rest = {key: value for key, value in data.items() if key != "use_parquet"}
        use_parquet = data["use_parquet"]
        if not isinstance(use_parquet, bool):
            raise wrong_key("use_parquet", "must be true or false")
        rest.setdefault("source", "hf_parquet" if use_parquet else "hf_datasets")
        return rest

    @property
    def is_local(self) -> bool:
        """Whether the rows are files on this machine."""
        return self.source in {"local_parquet", "local_csv"}


class RowFilter(Block):
    """Keep the rows whose `column` satisfies `op value`."""

    column: Name
    op: FilterOp
    value: Any


class SelectionConfig(Block):
    """Which rows are explained, and in which order."""

    start_index: Annotated[int, Field(ge=0), _MOST_ROWS] = 0
    max_samples: Rows | None = None
    shuffle_seed: Annotated[int, Field(ge=0, lt=2**32)] | None = 0
    """Seed of the row order; null keeps file order."""
    min_prompt_tokens: Players | None = None
    max_prompt_tokens: Players | None = None
    """Bounds on the players of a row; text input only."""
    filters: Annotated[tuple[RowFilter, ...], Field(strict=False)] = ()
    balanced_token_counts: Annotated[tuple[Players, ...], Field(strict=False, min_length=1)] | None = None
    samples_per_token_count: Rows | None = None
    allow_partial_token_count_buckets: bool = False


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

    max_new_tokens: NewTokens = 32
    text_temperature: Temperature = 0.2
    """0 decodes greedily."""
    text_top_k: TopK | None = None
    audio_temperature: Temperature | None = None
    audio_top_k: TopK | None = None
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
    window_ms: WindowMs = 80.0
    """Length of a `raw` window; 80 ms is one LFM2-Audio input frame."""
    aligner_device: Name | None = None


class ShapConfig(Block):
    """How answers become numbers."""

    mode: EmbeddingModeName = "CONTEXTUAL"
    similarity: SimilarityName = "TfIdfCosineSimilarity"
    reducer: ReducerName = "MeanReducer"
    normalizer: NormalizerName = "AbsSumNormalizer"
    allow_mask_duplicates: bool = False
    token_filter: TokenFilter = "exclude_punctuation"  # noqa: S105 -- no password
    value_function: ValueFunction | None = None
    """A value function of mllm_shap in place of the similarity."""
    value_options: ValueOptions | None = None
    """Options of `value_function`, as the library names them."""

    @classmethod
    def _defaults(cls, key: str) -> bool:
        # A config that inherits a similarity takes it back with null, to name a value function.
        return key == "similarity" or super()._defaults(key)

    def changed_by(self, override: Block | None) -> Self:
        """Return the block with a variant's changes; what the variant names last decides the scoring."""
        if not isinstance(override, ShapOverride):
            return self
        block = self
        if override.similarity is not None and override.value_function is None:
            block = self.model_copy(update={"value_function": None, "value_options": None})
        elif override.value_function not in {None, self.value_function}:
            block = self.model_copy(update={"value_options": None})
        return block.model_copy(update=self.changes_of(override))

    @model_serializer(mode="wrap")
    def _without_what_is_not_set(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out later keys that are not set: settings that were written before stay equal."""
        found: dict[str, Any] = handler(self)
        if self.value_function is not None:
            found.pop("similarity", None)
        later = ("value_function", "value_options")
        return {key: value for key, value in found.items() if key not in later or value is not None}

    @property
    def needs_embeddings(self) -> bool:
        """Whether the similarity compares vectors rather than words."""
        return self.value_function is None and self.similarity != "TfIdfCosineSimilarity"

    @property
    def reads(self) -> Reads:
        """What the value function reads of a coalition."""
        return "answers" if self.value_function is None else VALUE_FUNCTIONS[self.value_function].reads


class EmbeddingSettings(Block):
    """How an external encoder is run."""

    revision: Name | None = None
    max_length: MaxLength = 64
    """Tokens of an answer that the encoder reads."""
    batch_size: BatchSize = 64
    l2_normalize: bool = True
    local_files_only: bool = False
    device: Device = None


class EmbeddingBlock(EmbeddingSettings):
    """External encoder for the embedding similarities, as written."""

    model_id: WrittenPath | None = None
    """Hub id or local directory; the explained model's own states when null."""


class EmbeddingConfig(EmbeddingSettings):
    """External encoder of one run, with the variant's overrides."""

    model_id: str


class WandbConfig(Block):
    """Weights & Biases."""

    enabled: bool = True
    project: Name = "mllm-shap"
    entity: Name | None = None
    group: Name | None = None
    mode: Literal["online", "offline", "disabled"] = "online"
    tags: Annotated[tuple[str, ...], Field(strict=False)] = ()


class MlflowConfig(Block):
    """MLflow tracking; on when the block is there and `enabled` is not false."""

    enabled: bool = True
    tracking_uri: Name | None = None
    experiment_name: Name = "mllm_shapx"
    nested_per_variant: bool = False
    system_metrics_enabled: bool = False
    tags: dict[str, str | int | float | bool] | Annotated[tuple[str, ...], Field(strict=False)] = ()


class RuntimeConfig(Block):
    """How the work is done; never what comes out."""

    verbose: bool = False
    progress_bar: bool = True
    gc_after_each_sample: bool = False
    cuda_empty_cache: bool = False
    gc_interval: Annotated[int, Field(ge=0), _MOST_ROWS] | None = None
    """Rows that a worker finishes between two garbage collections; 0 or null leaves it to Python."""
    n_generator_jobs: (
        Annotated[int, Field(ge=-1), _AtMost(65_536, "and no machine has as many cores")] | None
    ) = None
    """Accepted for configs that have it; the command line says how many workers there are."""


class HierarchicalConfig(AliasedBlock):
    """A variant's hierarchical grid."""

    ks: GroupSizeList = (10,)
    """Largest number of neighbouring players in a group."""
    shap_type: FlatExplainer = "limited_mc"
    """Explainer of the lower games. Kept as written: it is part of the run's name."""
    shap_num_samples: NumSamplesList = ()
    shap_fractions: FractionList = ()
    first_layer_type: FlatExplainer | None = None
    """Explainer of the top game; as `shap_type` when null. Kept as written: it is part of the run's name."""
    first_layer_num_samples: NumSamplesList = ()
    first_layer_fractions: FractionList = ()
    use_importance_sampling: bool = True
    """Whether the budgets of lower games shrink with their group's share."""
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


class ShapOverride(Block):
    """A variant's changes to the `shap` block; absent keys keep the config's."""

    mode: EmbeddingModeName | None = None
    similarity: SimilarityName | None = None
    reducer: ReducerName | None = None
    normalizer: NormalizerName | None = None
    allow_mask_duplicates: bool | None = None
    token_filter: TokenFilter | None = None
    value_function: ValueFunction | None = None
    value_options: ValueOptions | None = None
    seed: Seed | None = None
    """The same as the variant's `seeds` with one seed."""


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
    """Coalitions evaluated, the empty and the grand one included."""
    fractions: FractionList = ()
    """Shares of the 2^n coalitions."""
    linear: LinearList = ()
    """Factors f of a budget of int(f n^2) coalitions, rounded up to even."""
    seeds: SeedList = ()
    """Repetitions: one run for each seed, whose name ends in `_seedN`."""
    hierarchical: HierarchicalConfig | None = None
    shap_override: ShapOverride | None = None
    generation_override: GenerationOverride | None = None
    embedding_override: EmbeddingOverride | None = None

    aliases: ClassVar[dict[str, str]] = {"fraction": "fractions"}
    also_accepted: ClassVar[tuple[str, ...]] = tuple(aliases)

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of its repetitions; none where it is run once."""
        override = self.shap_override
        return self.seeds or (() if override is None or override.seed is None else (override.seed,))


class ExperimentSet(Block):
    """One config file: a model, rows, and the explainers to run on them."""

    experiment_set_id: PathSegment
    output_root: Annotated[str, AfterValidator(location)] = "experiments_output"
    """Directory or any fsspec URI, `~` expanded; a relative directory starts where the command is run."""
    connector: Connector = "liquid_audio"
    connector_kwargs: ConnectorKwargs = ConnectorKwargs()
    device: Device = None
    """The best one that the machine has when null."""
    dataset: DatasetConfig = DatasetConfig()
    selection: SelectionConfig = SelectionConfig()
    modality: ModalityConfig = ModalityConfig()
    generation: GenerationBlock = GenerationBlock()
    chat: ChatConfig = ChatConfig()
    audio_segmentation: AudioSegmentation = AudioSegmentation()
    shap: ShapConfig = ShapConfig()
    embedding: EmbeddingBlock | None = None
    wandb: WandbConfig = WandbConfig()
    mlflow: MlflowConfig | None = None
    runtime: RuntimeConfig = RuntimeConfig()
    experiments: Annotated[tuple[Variant, ...], Field(strict=False, min_length=1)]

    also_accepted: ClassVar[tuple[str, ...]] = ("base", "$schema")

    @property
    def model_id(self) -> str:
        """Hub id or directory of the explained model."""
        return self.connector_kwargs.model_id or DEFAULT_MODELS.get(self.connector, ("", None))[0]

    @property
    def model_revision(self) -> str | None:
        """Hub revision of the explained model; the pinned default for the default model."""
        default_id, default_revision = DEFAULT_MODELS.get(self.connector, ("", None))
        if self.connector_kwargs.revision is None and self.model_id == default_id:
            return default_revision
        return self.connector_kwargs.revision

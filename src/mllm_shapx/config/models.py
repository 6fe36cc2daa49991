"""The config file's shape: one `ExperimentSet` and its blocks, as frozen pydantic models.

`config.values` has the types of values, `config.vocabulary` the allowed names, `config.variants` the entries
of `experiments`, `config.checks` the checks across keys.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, JsonValue

from mllm_shapx.config import servers, values
from mllm_shapx.config.blocks import Block, wrong_key
from mllm_shapx.config.measures import FaithfulnessConfig
from mllm_shapx.config.paths import location
from mllm_shapx.config.scoring import EmbeddingBlock, GenerationBlock, ShapConfig
from mllm_shapx.config.values import ListOf, Name, Players, Rows, WrittenPath
from mllm_shapx.config.variants import Variant
from mllm_shapx.config.vocabulary import DEFAULT_MODELS, FilterOp, InputModality, OutputModality


class OwnServerConfig(Block):
    """A server that each worker starts for itself."""

    command: Annotated[ListOf[str], AfterValidator(servers.command)]
    """Program and arguments; `{port}`, `{host}` and `{model_id}` are filled in."""
    gpus: values.ServerGpus = 0.0
    """GPUs of one worker and its server."""
    start_s: values.Timeout | None = None
    """Seconds that it may take to become healthy; 600 when null."""


class ConnectorKwargs(Block):
    """The model and how to load it."""

    model_id: WrittenPath | None = None
    """Hub id or local directory; null for the connector's default model."""
    revision: Name | None = None
    """Hub commit; ignored for a local directory."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: values.BatchSize | Literal["auto"] = "auto"
    """Prompts answered in one forward pass."""
    attn_implementation: Name | None = None
    chat_template: str | None = None
    """Chat template that replaces the tokenizer's: a file or the jinja text itself; `hf_text` only."""
    chat_template_kwargs: dict[str, JsonValue] | None = None
    """Variables for the chat template, for example {"enable_thinking": false}; `hf_text` only."""
    strip_reasoning: bool = False
    """Remove the text between a model's think tags from each answer before scoring."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Load the weights with so many bits by bitsandbytes; needs CUDA."""
    adapter: WrittenPath | None = None
    """PEFT adapter on the model: hub id or local directory."""
    trust_remote_code: bool = False
    """Whether to run code from the model's repository."""
    gguf_file: values.GgufFile | None = None
    """Name of the GGUF file to load, inside the model's directory or repository."""
    base_url: Annotated[Name, AfterValidator(servers.base_url)] | None = None
    """Address of an OpenAI-compatible server, for example http://localhost:8000/v1; `openai` only."""
    api_key_env: Annotated[str, AfterValidator(servers.variable_name)] | None = None
    """NAME of the environment variable that holds the server's key."""
    headers_env: Annotated[dict[str, str], AfterValidator(servers.header_variables)] | None = None
    """HTTP header -> NAME of the environment variable that holds its value."""
    max_concurrency: values.Concurrency | None = None
    """Maximum number of requests in flight; 256 when null."""
    timeout_s: values.Timeout | None = None
    """Seconds that the server may take for one answer; 300 when null."""
    extra_body: Annotated[dict[str, JsonValue], AfterValidator(servers.extra_body)] | None = None
    """Further keys of each request."""
    server: OwnServerConfig | None = None
    """A server that each worker starts for itself, instead of `base_url`."""

    also_accepted: ClassVar[tuple[str, ...]] = servers.OLD_KEYS

    @classmethod
    def _without_old_keys(cls, data: dict[str, Any]) -> dict[str, Any]:
        return servers.without_old_keys(data)

    @property
    def loading_settings(self) -> dict[str, Any]:
        """Return the keys besides id, revision and dtype that change the loaded model; only those set."""
        keys = ("quantization", "adapter", "trust_remote_code", "gguf_file")
        own = {} if self.server is None else {"server": {"command": list(self.server.command)}}
        return {key: value for key in keys if (value := getattr(self, key)) not in (None, False)} | own

    @property
    def chat_settings(self) -> dict[str, Any]:
        """Return the keys that decide prompts and the answers' texts; only those set."""
        keys = ("chat_template", "chat_template_kwargs", "strip_reasoning", "extra_body")
        return {key: value for key in keys if (value := getattr(self, key)) not in (None, False, {})}


class ColumnMapping(Block):
    """Names of the dataset's columns, if they differ from the defaults."""

    text: Name | None = None
    """Prompt text, or a list of sentences; `sentences`, else `prompt`, when null."""
    audio: Name | None = None
    """Recording; `audio` with the modality's voice when null."""
    language: Name | None = None
    original_language: Name | None = None
    token_count: Name | None = None


class DatasetConfig(Block):
    """The source of the rows."""

    source: Literal["hf_parquet", "hf_datasets", "local_parquet", "local_csv"] = "hf_parquet"
    repo_id: Name = "Pawlo77/mllm-shap"
    subset: Name = "single_sentence"
    split: Name = "test"
    revision: Name | None = None
    path: WrittenPath | None = None
    """File, directory or glob of a local source, relative to its config file."""
    trust_remote_code: bool = False
    """Accepted for old configs; current `datasets` runs no remote code."""
    column_mapping: ColumnMapping = ColumnMapping()

    also_accepted: ClassVar[tuple[str, ...]] = ("use_parquet",)

    @classmethod
    def _without_old_keys(cls, data: dict[str, Any]) -> dict[str, Any]:
        if "use_parquet" not in data:
            return data
        rest = dict(data)
        use_parquet = rest.pop("use_parquet")
        if not isinstance(use_parquet, bool):
            raise wrong_key("use_parquet", "must be true or false")
        return {"source": "hf_parquet" if use_parquet else "hf_datasets", **rest}

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
    """The rows to explain, and their order."""

    start_index: Annotated[int, Field(ge=0), values.MOST_ROWS] = 0
    max_samples: Rows | None = None
    shuffle_seed: values.Seed | None = 0
    """Seed of the row order; null keeps file order."""
    min_prompt_tokens: Players | None = None
    max_prompt_tokens: Players | None = None
    """Bounds on the players of a row; text input only."""
    filters: ListOf[RowFilter] = ()
    balanced_token_counts: Annotated[ListOf[Players], Field(min_length=1)] | None = None
    samples_per_token_count: Rows | None = None
    allow_partial_token_count_buckets: bool = False


class ModalityConfig(Block):
    """The modalities of the prompt and of the answer."""

    input_modality: InputModality = "text"
    output_modality: OutputModality = "text"

    @property
    def has_audio_input(self) -> bool:
        """Whether any piece of the prompt is a recording."""
        return self.input_modality != "text"


class ChatConfig(Block):
    """The conversation around the prompt."""

    system_prompt: str = "You are a helpful assistant."
    """Empty for no system turn."""
    system_roles_setup: Literal["SYSTEM", "ASSISTANT", "SYSTEM_ASSISTANT"] = "SYSTEM_ASSISTANT"
    """Roles that are fixed context, not players."""
    assistant_prefill: str | None = None
    """Beginning of the assistant's answer, which the model continues."""


class AudioSegmentation(Block):
    """The cutting of a recording into players."""

    method: Literal["raw", "sgpa"] = "raw"
    window_ms: values.WindowMs = 80.0
    """Length of a `raw` window; 80 ms is one LFM2-Audio input frame."""
    aligner_device: Name | None = None


class EmbeddingConfig(EmbeddingBlock):
    """External encoder of one run, with the variant's overrides."""

    model_id: str


class TrackingBlock(Block):
    """The common settings of all trackers."""

    enabled: bool = True
    upload_samples: bool = False
    """Whether to upload the files of `samples/` at the end of a run."""
    table_rows: values.TableRows = 100
    """Samples in the table of prompts, with their recordings; 0 for no table."""


class WandbConfig(TrackingBlock):
    """Weights & Biases."""

    project: Name = "mllm-shap"
    entity: Name | None = None
    group: Name | None = None
    mode: Literal["online", "offline", "disabled"] = "online"
    tags: ListOf[str] = ()


class MlflowConfig(TrackingBlock):
    """MLflow tracking; on if the block exists and `enabled` is not false."""

    tracking_uri: Name | None = None
    """Server, database or folder; null for MLFLOW_TRACKING_URI, else `mlflow/mlflow.db` next to the runs."""
    experiment_name: Name = "mllm_shapx"
    nested_per_variant: bool = False
    """Whether the runs get one parent run, named after the experiment set."""
    system_metrics_enabled: bool = False
    """Whether MLflow records the load of the driver's machine."""
    tags: dict[str, str | int | float | bool] | ListOf[str] = ()


class RuntimeConfig(Block):
    """Settings of the work that never change the results."""

    verbose: bool = False
    progress_bar: bool = True
    gc_after_each_sample: bool = False
    cuda_empty_cache: bool = False
    gc_interval: Annotated[int, Field(ge=0), values.MOST_ROWS] | None = None
    """Rows that a worker finishes between two garbage collections; 0 or null for Python's own."""
    n_generator_jobs: (
        Annotated[int, Field(ge=-1), values.AtMost(65_536, "and no machine has as many cores")] | None
    ) = None
    """Accepted for old configs; the command line decides the number of workers."""


class ExperimentSet(Block):
    """One config file: a model, rows, and the explainers to run on them."""

    experiment_set_id: values.PathSegment
    output_root: Annotated[str, AfterValidator(location)] = "experiments_output"
    """Directory or any fsspec URI, `~` expanded; relative to the working directory."""
    connector: values.Connector = "liquid_audio"
    connector_kwargs: ConnectorKwargs = ConnectorKwargs()
    device: values.Device = None
    """Null for the best device of the machine."""
    dataset: DatasetConfig = DatasetConfig()
    selection: SelectionConfig = SelectionConfig()
    modality: ModalityConfig = ModalityConfig()
    generation: GenerationBlock = GenerationBlock()
    chat: ChatConfig = ChatConfig()
    audio_segmentation: AudioSegmentation = AudioSegmentation()
    shap: ShapConfig = ShapConfig()
    embedding: EmbeddingBlock | None = None
    faithfulness: FaithfulnessConfig | None = None
    """Measured for every run; null for no measurement."""
    wandb: WandbConfig = WandbConfig()
    mlflow: MlflowConfig | None = None
    runtime: RuntimeConfig = RuntimeConfig()
    experiments: Annotated[ListOf[Variant], Field(min_length=1)]

    also_accepted: ClassVar[tuple[str, ...]] = ("base", "$schema")

    @property
    def trackers(self) -> dict[str, TrackingBlock]:
        """The blocks of the trackers that the config has, by key, which is the module of `tracking` too."""
        blocks = {key: getattr(self, key) for key in type(self).model_fields}
        return {key: block for key, block in blocks.items() if isinstance(block, TrackingBlock)}

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

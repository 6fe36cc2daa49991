"""The blocks that a variant may change: how answers are generated, embedded and scored."""

from typing import Any, Self

from pydantic import JsonValue, SerializerFunctionWrapHandler, model_serializer

from mllm_shapx.config import values
from mllm_shapx.config.blocks import Block, Override
from mllm_shapx.config.values import ListOf
from mllm_shapx.config.vocabulary import (
    SIMILARITIES,
    VALUE_FUNCTIONS,
    Absence,
    AudioAbsence,
    NormalizerName,
    PlayerKind,
    Reads,
    ReducerName,
    RoleName,
    SimilarityName,
    TokenFilter,
)


class GenerationBlock(Block):
    """The decoding of answers."""

    max_new_tokens: values.NewTokens = 32
    text_temperature: values.Temperature = 0.2
    """0 decodes greedily."""
    text_top_k: values.TopK | None = None
    audio_temperature: values.Temperature | None = None
    audio_top_k: values.TopK | None = None
    reuse_sampled_answers: bool = False
    """With a temperature above 0, let runs share answers; this correlates their errors."""

    @property
    def is_greedy(self) -> bool:
        """Whether the same prompt always gets the same answer."""
        return self.text_temperature == 0.0 and not self.audio_temperature


class GenerationOverride(Override, GenerationBlock):
    """A variant's changes to the `generation` block; absent keys keep the config's."""


class EmbeddingBlock(Block):
    """External encoder for the embedding similarities, as written."""

    revision: values.Name | None = None
    max_length: values.MaxLength = 64
    """Maximum tokens of an answer that the encoder reads."""
    batch_size: values.BatchSize = 64
    l2_normalize: bool = True
    local_files_only: bool = False
    device: values.Device = None
    model_id: values.WrittenPath | None = None
    """Hub id or local directory; null for the explained model's own states."""


class EmbeddingOverride(Override, EmbeddingBlock):
    """A variant's changes to the `embedding` block; absent keys keep the config's."""

    @classmethod
    def _null_is_absent(cls, key: str) -> bool:
        return key == "model_id" or super()._null_is_absent(key)


class KeepConfig(Block):
    """Pieces that are always present and so are not players."""

    words: ListOf[str] = ()
    """Pieces to keep, compared without case and surrounding punctuation."""
    roles: ListOf[RoleName] = ()
    """Roles whose messages are kept, besides those of chat.system_roles_setup."""


_LATER_KEYS = frozenset(
    {"value_function", "value_options", "players", "keep", "absence", "absence_text", "audio_absence"}
)
"""Keys of `shap` that older settings lack."""


class ShapConfig(Block):
    """The players and the scoring of answers."""

    mode: values.EmbeddingModeName = "CONTEXTUAL"
    similarity: SimilarityName = "TfIdfCosineSimilarity"
    reducer: ReducerName = "MeanReducer"
    normalizer: NormalizerName = "AbsSumNormalizer"
    allow_mask_duplicates: bool = False
    token_filter: TokenFilter = "exclude_punctuation"  # noqa: S105 -- not a password
    value_function: values.ValueFunction | None = None
    """A value function of mllm_shap instead of the similarity."""
    value_options: dict[str, JsonValue] | None = None
    """Options of `value_function`, under the library's names."""
    players: PlayerKind = "words"
    """Kind of player in a written message."""
    keep: KeepConfig | None = None
    absence: Absence = "delete"
    """Substitute of an absent piece of text."""
    absence_text: str | None = None
    """The placeholder of `pad` ([MASK] when null), or the character of `neutral` (_ when null)."""
    audio_absence: AudioAbsence | None = None
    """Substitute of an absent part of a recording; null: cut with `delete`, else silence."""

    @classmethod
    def _null_is_absent(cls, key: str) -> bool:
        # A config removes an inherited similarity with null, to set a value function.
        return key == "similarity" or super()._null_is_absent(key)

    def changed_by(self, override: Block | None) -> Self:
        """Return the block with a variant's changes; the variant's similarity or value function wins."""
        if not isinstance(override, ShapOverride):
            return self
        lost: dict[str, None] = {}
        if "similarity" in override.model_fields_set and override.value_function is None:
            lost = {"value_function": None, "value_options": None}
        elif override.value_function not in {None, self.value_function}:
            lost = {"value_options": None}
        return Block.changed_by(self.model_copy(update=lost), override)

    @model_serializer(mode="wrap")
    def _without_what_is_not_set(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out later keys that are not set: older settings stay equal."""
        found: dict[str, Any] = handler(self)
        if self.value_function is not None:
            found.pop("similarity", None)
        return {
            key: value
            for key, value in found.items()
            if key not in _LATER_KEYS or getattr(self, key) != type(self).model_fields[key].default
        }

    @property
    def needs_embeddings(self) -> bool:
        """Whether the similarity compares vectors, not words."""
        return self.value_function is None and SIMILARITIES[self.similarity].compares == "vectors"

    @property
    def prompt_settings(self) -> dict[str, Any]:
        """Return the later keys that decide the coalitions' prompts; only those set."""
        keys = ("players", "keep", "absence_text", "audio_absence")
        return {key: value for key, value in self.model_dump(mode="json").items() if key in keys}

    @property
    def reads(self) -> Reads:
        """Return the part of a coalition that the value function reads."""
        return "answers" if self.value_function is None else VALUE_FUNCTIONS[self.value_function].reads


class ShapOverride(Override, ShapConfig):
    """A variant's changes to the `shap` block; absent keys keep the config's."""

    seed: values.Seed | None = None
    """The same as the variant's `seeds` with one seed."""

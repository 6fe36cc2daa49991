"""The `shap` block: the players, the substitutes of absent ones, and the scoring of answers."""

from typing import Annotated, Any, Self

from pydantic import Field, JsonValue, SerializerFunctionWrapHandler, model_serializer

from mllm_shapx.config.blocks import Block
from mllm_shapx.config.values import EmbeddingModeName, Seed, ValueFunction
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


class KeepConfig(Block):
    """Pieces that are always present and so are not players."""

    words: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Pieces to keep, compared without case and surrounding punctuation."""
    roles: Annotated[tuple[RoleName, ...], Field(strict=False)] = ()
    """Roles whose messages are kept, besides those of chat.system_roles_setup."""


_LATER_KEYS = frozenset(
    {"value_function", "value_options", "players", "keep", "absence", "absence_text", "audio_absence"}
)
"""Keys of `shap` that older settings lack."""


class ShapConfig(Block):
    """The players and the scoring of answers."""

    mode: EmbeddingModeName = "CONTEXTUAL"
    similarity: SimilarityName = "TfIdfCosineSimilarity"
    reducer: ReducerName = "MeanReducer"
    normalizer: NormalizerName = "AbsSumNormalizer"
    allow_mask_duplicates: bool = False
    token_filter: TokenFilter = "exclude_punctuation"  # noqa: S105 -- not a password
    value_function: ValueFunction | None = None
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
    def _defaults(cls, key: str) -> bool:
        # A config removes an inherited similarity with null, to set a value function.
        return key == "similarity" or super()._defaults(key)

    def changed_by(self, override: Block | None) -> Self:
        """Return the block with a variant's changes; the variant's similarity or value function wins."""
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


class ShapOverride(Block):
    """A variant's changes to the `shap` block; absent keys keep the config's."""

    mode: EmbeddingModeName | None = None
    similarity: SimilarityName | None = None
    reducer: ReducerName | None = None
    normalizer: NormalizerName | None = None
    allow_mask_duplicates: bool | None = None
    token_filter: TokenFilter | None = None
    value_function: ValueFunction | None = None
    value_options: dict[str, JsonValue] | None = None
    players: PlayerKind | None = None
    keep: KeepConfig | None = None
    absence: Absence | None = None
    absence_text: str | None = None
    audio_absence: AudioAbsence | None = None
    seed: Seed | None = None
    """The same as the variant's `seeds` with one seed."""

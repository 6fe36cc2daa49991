"""Base classes of a config's blocks."""

from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


def wrong_key(key: str, message: str) -> PydanticCustomError:
    """Return an error of a whole block that points to one of its keys."""
    return PydanticCustomError("wrong_key", "{message}", {"key": key, "message": message})


class Block(BaseModel):
    """Base of all config blocks: frozen, no unknown keys, no silent conversions.

    Null for a block or a list that cannot be null counts as absent.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    also_accepted: ClassVar[tuple[str, ...]] = ()
    """Keys that the block accepts besides its fields, for old configs."""

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
        """Return the block with the keys of `override`; null resets a key that may be null, else keeps it."""
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
    """A block with second names for some keys."""

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

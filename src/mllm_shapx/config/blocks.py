"""Base classes of a config's blocks."""

from collections.abc import Mapping
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

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        json_schema_extra=lambda schema, block: block.complete(schema["properties"]),
    )

    aliases: ClassVar[Mapping[str, str]] = {}
    """Second name of a key -> the field's name."""
    also_accepted: ClassVar[tuple[str, ...]] = ()
    """Further keys that the block accepts, for old configs."""

    @model_validator(mode="before")
    @classmethod
    def _clean(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for alias, name in cls.aliases.items():
            if data.get(alias) is not None and data.get(name) is not None:
                raise wrong_key(alias, f'is the same setting as "{name}"; keep one')
        renamed = ((cls.aliases.get(key, key), value) for key, value in cls._without_old_keys(data).items())
        return {key: value for key, value in renamed if value is not None or not cls._null_is_absent(key)}

    @classmethod
    def _without_old_keys(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Return the block's content with the keys of older configs replaced by the current ones."""
        return data

    @classmethod
    def _null_is_absent(cls, key: str) -> bool:
        field = cls.model_fields.get(key)
        return field is not None and isinstance(field.default, Block | tuple)

    @classmethod
    def complete(cls, properties: dict[str, Any]) -> None:
        """Add to the block's JSON Schema what pydantic does not know."""
        properties |= {alias: properties[name] for alias, name in cls.aliases.items()}

    def changed_by(self, override: "Block | None") -> Self:
        """Return the block with the values of the keys that `override` sets."""
        if override is None:
            return self
        keys = override.model_fields_set & type(self).model_fields.keys()
        return self.model_copy(update={key: getattr(override, key) for key in keys})


class Override(Block):
    """A variant's changes to one of the config's blocks; what it does not set keeps the config's value.

    Null resets a key that may be null in the block; for other keys it counts as absent.
    """

    @classmethod
    def _null_is_absent(cls, key: str) -> bool:
        field = cls.model_fields.get(key)
        return field is not None and field.default is not None

    @classmethod
    def complete(cls, properties: dict[str, Any]) -> None:
        """Let all keys take null."""
        for written in properties.values():
            rest = {key: written.pop(key) for key in list(written) if key not in {"default", "title"}}
            options = rest.get("anyOf", [rest])
            if {"type": "null"} not in options:
                options.append({"type": "null"})
            written |= {"anyOf": options, "default": None}

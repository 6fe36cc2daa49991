"""Types of the config's values: their limits, and the messages for wrong values."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BeforeValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from mllm_shapx.config import servers
from mllm_shapx.config.paths import location, name_fault
from mllm_shapx.config.vocabulary import (
    EXPLAINER_ALIASES,
    VALUE_FUNCTION_ALIASES,
    ConnectorName,
    EmbeddingMode,
    ExplainerType,
    OtherFlatType,
    ShapleyType,
    ValueFunctionName,
    canonical_value_function,
)

_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")
_LONGEST_SEGMENT = 150
_LONGEST_NUMBER = 30
_DEVICE = re.compile(r"cuda(:\d+)?|cpu|mps")


def _path_segment(value: str) -> str:
    if not _SEGMENT.fullmatch(value) or value in {".", ".."}:
        raise ValueError(f'"{value}" must be one path segment: letters, digits and . _ - only')
    if len(value) > _LONGEST_SEGMENT:
        raise ValueError(
            f"is a directory's name and takes at most {_LONGEST_SEGMENT} characters, not {len(value)}"
        )
    return value


def canonical_type(value: Any) -> Any:
    """Return the explainer type of a name or alias, ignoring case; an unknown value unchanged."""
    if not isinstance(value, str):
        return value
    return EXPLAINER_ALIASES.get(value.lower(), value.lower())


def _connector(value: Any) -> Any:
    return servers.CONNECTOR_ALIASES.get(value, value) if isinstance(value, str) else value


def upper(value: Any) -> Any:
    """Return a text in capitals; another value unchanged."""
    return value.upper() if isinstance(value, str) else value


def _shown(number: float) -> str:
    text = str(number)
    return text if len(text) <= _LONGEST_NUMBER else f"{text[:_LONGEST_NUMBER]}…"


@dataclass(frozen=True)
class AtMost:
    """An upper bound with its reason, for messages and the JSON Schema."""

    most: float
    why: str
    """The effect of a larger value."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "maximum": self.most}

    def _check[Value: float](self, value: Value) -> Value:
        if value > self.most:
            raise ValueError(f"{_shown(value)} is too large: at most {self.most:,}, {self.why}")
        return value


def _as_list(value: Any) -> Any:
    """Turn a single number into a list of one: `"ks": 10` is `"ks": [10]`."""
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


def _or_one(schema: dict[str, Any]) -> None:
    as_list = {key: schema.pop(key) for key in list(schema) if key != "default"}
    schema["anyOf"] = [as_list, as_list["items"], {"type": "null"}]


def _num_samples(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError(f"{_shown(value)} must be at least 1, or -1 for the estimator's floor")
    return value


def _name(value: str) -> str:
    """Refuse a value that can be no name, path or URI; keep others as written."""
    fault = name_fault(value)
    if fault is not None:
        raise ValueError(fault)
    return value


def _path(value: str) -> str:
    """Refuse a value that cannot be a path; keep others as written: `~` differs on other nodes."""
    location(value)
    return value


def _none_of(*names: str) -> PydanticCustomError:
    expected = ", ".join(f"'{name}'" for name in names)
    return PydanticCustomError("unknown_name", "must be one of {expected}", {"expected": expected})


def _flat_type_as_written(value: Any) -> Any:
    if canonical_type(value) in get_args(OtherFlatType):
        raise ValueError(
            f'"{value}" gives no shares of a whole, which "hierarchical" divides; take a Shapley type'
        )
    if canonical_type(value) not in get_args(ShapleyType):
        raise _none_of(*get_args(ShapleyType))
    return value


def _gguf_file(value: str) -> str:
    path = PurePosixPath(value)
    if path.suffix != ".gguf" or path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f'"{value}" must be the name of a *.gguf file inside the model\'s directory or repository'
        )
    return value


def _device(value: str | None) -> str | None:
    if value is None or value == "auto":
        return None
    if not _DEVICE.fullmatch(value):
        raise _none_of("cuda", "cpu", "mps", "auto")
    return value


def _before(change: Callable[[Any], Any], names: Any, aliases: Iterable[str] = ()) -> BeforeValidator:
    """Return the validator of a name that `change` makes of what is written: a name or an alias."""
    written = names | Literal[*aliases] if aliases else names
    return BeforeValidator(change, json_schema_input_type=written)


Name = Annotated[str, AfterValidator(_name)]
"""A name: not empty, no control characters, no login."""
WrittenPath = Annotated[str, AfterValidator(_path)]
"""A path, hub id or URI; expanded at its use."""
GgufFile = Annotated[str, AfterValidator(_gguf_file)]
PathSegment = Annotated[str, AfterValidator(_path_segment)]
Device = Annotated[str | None, AfterValidator(_device)]

MOST_PLAYERS = AtMost(1_000_000, "and no row has as many players")
MOST_ROWS = AtMost(1_000_000_000, "and no dataset that is taken has as many rows")
Players = Annotated[int, Field(ge=1), MOST_PLAYERS]
GroupSize = Annotated[int, Field(ge=2), MOST_PLAYERS]
Rows = Annotated[int, Field(ge=1), MOST_ROWS]
BatchSize = Annotated[
    int, Field(ge=1), AtMost(65_536, "for one forward pass holds the whole batch in memory")
]
NewTokens = Annotated[int, Field(ge=1), AtMost(131_072, "for no model here answers at such length")]
TopK = Annotated[int, Field(ge=1), AtMost(10_000_000, "and no vocabulary is larger")]
MaxLength = Annotated[int, Field(ge=1), AtMost(131_072, "and no encoder reads longer texts")]
TableRows = Annotated[int, Field(ge=0), AtMost(10_000, "for a table of more rows is slow to open")]
Temperature = Annotated[float, Field(ge=0.0), AtMost(100.0, "from where on answers are noise")]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
WindowMs = Annotated[float, Field(ge=1.0), AtMost(600_000.0, "which is the longest recording that is taken")]
Concurrency = Annotated[int, Field(ge=1), AtMost(4096, "for each request in flight holds a connection")]
ServerGpus = Annotated[float, Field(ge=0.0), AtMost(1024, "and no machine has more")]
Timeout = Annotated[float, Field(ge=0.1), AtMost(86_400.0, "which is a day")]
Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
MinFraction = Annotated[float, Field(ge=0.0, le=1.0)]
LinearFactor = Annotated[float, Field(gt=0.0, le=10.0)]
NumSamples = Annotated[
    int,
    AfterValidator(_num_samples),
    AtMost(1 << 24, "for a game of more than 2^24 coalitions is refused"),
]

Connector = Annotated[ConnectorName, _before(_connector, ConnectorName, servers.CONNECTOR_ALIASES)]
Explainer = Annotated[ExplainerType, _before(canonical_type, ExplainerType, EXPLAINER_ALIASES)]
FlatExplainer = Annotated[str, _before(_flat_type_as_written, ShapleyType, EXPLAINER_ALIASES)]
"""A flat explainer's type or alias as written: the run's name has it."""
ValueFunction = Annotated[
    ValueFunctionName, _before(canonical_value_function, ValueFunctionName, VALUE_FUNCTION_ALIASES)
]
EmbeddingModeName = Annotated[EmbeddingMode, _before(upper, EmbeddingMode)]

_Item = TypeVar("_Item")
ListOf = Annotated[tuple[_Item, ...], Field(strict=False)]
"""A list in JSON, a tuple here: frozen and hashable."""
_FROM_ONE = (BeforeValidator(_as_list), Field(json_schema_extra=_or_one))
OneOrMore = Annotated[tuple[_Item, ...], Field(strict=False), *_FROM_ONE]
"""The same, and a single number may stand for a list of one."""
OneOrMoreNotEmpty = Annotated[tuple[_Item, ...], Field(strict=False, min_length=1), *_FROM_ONE]

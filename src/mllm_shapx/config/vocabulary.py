"""The allowed names of a config, and the needs of each explainer and value function.

An explainer is one of mllm_shap's estimators with an estimand. The value functions are the library's, under
its names. The library's own models check their options, so a new option needs no change here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ConnectorName = Literal["liquid_audio", "hf_text", "openai"]
SimilarityName = Literal["CosineSimilarity", "TfIdfCosineSimilarity", "EuclideanSimilarity"]
ReducerName = Literal["MeanReducer", "MaxReducer", "MinReducer", "SumReducer", "FirstReducer", "ZeroReducer"]
NormalizerName = Literal["AbsSumNormalizer", "IdentityNormalizer", "MinMaxNormalizer", "PowerShiftNormalizer"]
EmbeddingMode = Literal["CONTEXTUAL", "STATIC"]
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

ShapleyType = Literal[
    "exact",
    "limited_mc",
    "standard_mc",
    "limited_cc",
    "standard_cc",
    "limited_neyman",
    "standard_neyman",
    "leverage",
    "proxy",
]
"""Explainers of Shapley values. The games of `hierarchical` need them, because their values add up."""
OtherFlatType = Literal[
    "loo",
    "kernel_banzhaf",
    "exact_banzhaf",
    "limited_mc_banzhaf",
    "standard_mc_banzhaf",
    "proxy_banzhaf",
]
AnyFlatType = ShapleyType | OtherFlatType
ExplainerType = AnyFlatType | Literal["hierarchical"]
EXPLAINER_ALIASES: dict[str, AnyFlatType] = {
    "precise": "exact",
    "mc": "limited_mc",
    "cc": "limited_cc",
    "complementary": "limited_cc",
    "neyman": "limited_neyman",
    "leave_one_out": "loo",
    "leverage_shap": "leverage",
    "proxy_shap": "proxy",
    "mc_banzhaf": "limited_mc_banzhaf",
}
"""Other explainer name in users' configs -> its type."""

Floor = Literal["2^n", "n + 2", "2n + 2", "2"]


@dataclass(frozen=True, slots=True)
class ExplainerFacts:
    """An explainer type in mllm_shap's terms."""

    estimator: str
    floor: Floor
    """Minimum number of coalitions for n players; the maximum is always 2^n. Without a budget: the number."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the library's `explanation` block."""
    estimand: Literal["shapley", "banzhaf"] = "shapley"
    takes_budget: bool = True
    in_pairs: bool = False
    """Whether coalitions come in pairs with their complements; a budget is then rounded down to even."""
    package: str | None = None
    """Optional package that it imports."""
    grows: bool = False
    """Whether the coalitions of a larger budget begin with those of a smaller one, with the same seed."""

    def least(self, num_players: int) -> int:
        """Return the floor for a number of players."""
        floors = {"2^n": 1 << num_players, "n + 2": num_players + 2, "2n + 2": 2 * num_players + 2, "2": 2}
        return min(floors[self.floor], 1 << num_players)


_MINIMAL = {"include_minimal_masks": True}

EXPLAINERS: Mapping[str, ExplainerFacts] = {
    "exact": ExplainerFacts("exact", "2^n", takes_budget=False),
    "limited_mc": ExplainerFacts("mc", "n + 2", _MINIMAL, grows=True),
    "standard_mc": ExplainerFacts("mc", "2", grows=True),
    "limited_cc": ExplainerFacts("complementary", "2n + 2", _MINIMAL, in_pairs=True, grows=True),
    "standard_cc": ExplainerFacts("complementary", "2n + 2", in_pairs=True, grows=True),
    "limited_neyman": ExplainerFacts(
        "neyman_cc", "2n + 2", {"neyman": {"use_standard_method": False}}, in_pairs=True
    ),
    "standard_neyman": ExplainerFacts(
        "neyman_cc", "2n + 2", {"neyman": {"use_standard_method": True}}, in_pairs=True
    ),
    "leverage": ExplainerFacts("leverage", "2n + 2", in_pairs=True),
    "proxy": ExplainerFacts("proxy", "2n + 2", in_pairs=True, package="sklearn"),
    # n coalitions without one player, the grand coalition, and the empty one for the base value.
    "loo": ExplainerFacts("loo", "n + 2", takes_budget=False),
    "kernel_banzhaf": ExplainerFacts(
        "kernel_banzhaf", "2n + 2", estimand="banzhaf", in_pairs=True, grows=True
    ),
    "exact_banzhaf": ExplainerFacts("exact", "2^n", estimand="banzhaf", takes_budget=False),
    "limited_mc_banzhaf": ExplainerFacts("mc", "n + 2", _MINIMAL, estimand="banzhaf", grows=True),
    "standard_mc_banzhaf": ExplainerFacts("mc", "2", estimand="banzhaf", grows=True),
    "proxy_banzhaf": ExplainerFacts("proxy", "2n + 2", estimand="banzhaf", in_pairs=True, package="sklearn"),
}
"""Every explainer type except `hierarchical` (docs/formats.md, "Variants")."""

ValueFunctionName = Literal[
    "self_logprob",
    "tf_logprob",
    "tf_jsd",
    "contrastive",
    "bertscore",
    "nli_logodds",
    "semascore",
    "reference_wer",
    "judge_grade",
]
Reads = Literal["answers", "log_probabilities", "likelihoods"]

VALUE_FUNCTION_ALIASES = {"wer": "reference_wer", "logprob": "self_logprob"}
"""Other names of value functions; `logprob` is the library's former name."""


@dataclass(frozen=True, slots=True)
class ValueFunctionFacts:
    """The input of a value function, and its model."""

    reads: Reads = "answers"
    """`answers`: the coalitions' texts. `log_probabilities`: those of the tokens of each coalition's answer.
    `likelihoods`: those of given texts after each coalition's prompt; the coalitions are not answered.
    """
    model_option: str | None = None
    """The option that names its model, None without a model."""


VALUE_FUNCTIONS: dict[ValueFunctionName, ValueFunctionFacts] = {
    "self_logprob": ValueFunctionFacts(reads="log_probabilities"),
    "tf_logprob": ValueFunctionFacts(reads="likelihoods"),
    "tf_jsd": ValueFunctionFacts(reads="likelihoods"),
    "contrastive": ValueFunctionFacts(reads="likelihoods"),
    "bertscore": ValueFunctionFacts(model_option="encoder"),
    "nli_logodds": ValueFunctionFacts(model_option="model"),
    "semascore": ValueFunctionFacts(model_option="encoder"),
    "reference_wer": ValueFunctionFacts(),
    "judge_grade": ValueFunctionFacts(),
}
"""Value functions besides the similarities."""


@dataclass(frozen=True, slots=True)
class SimilarityFacts:
    """A similarity of answers."""

    compares: Literal["words", "vectors"]
    library_name: str | None = None
    """The library's value function with the same formula; None when it has none."""


SIMILARITIES: Mapping[SimilarityName, SimilarityFacts] = {
    "CosineSimilarity": SimilarityFacts("vectors", "embedding_cosine"),
    "TfIdfCosineSimilarity": SimilarityFacts("words", "tfidf_cosine"),
    "EuclideanSimilarity": SimilarityFacts("vectors"),
}
SIMILARITY_OF = {facts.library_name: name for name, facts in SIMILARITIES.items() if facts.library_name}
"""Library's name -> `shap.similarity`: these are named there alone."""

SPEECH_VALUE_FUNCTIONS = frozenset({"speech_bertscore", "transcribed"})
"""Value functions of the library that read a waveform file of each answer; not available here."""


PlayerKind = Literal["words", "tokens", "sentences", "messages"]
TokenFilter = Literal["exclude_punctuation", "none"]
RoleName = Literal["system", "user", "assistant"]
Absence = Literal["delete", "pad", "neutral"]
AudioAbsence = Literal["cut", "silence", "noise"]

ABSENCE_OPTIONS: dict[Absence, str | None] = {"delete": None, "pad": "placeholder", "neutral": "fill_char"}
"""Absence -> its option, the substitute text or character; None without one."""

DEFAULT_MODELS: dict[str, tuple[str, str]] = {
    "liquid_audio": ("LiquidAI/LFM2-Audio-1.5B", "3f9322d8cfdcf3df281227af9ca80d948f5ba878"),
    "hf_text": ("microsoft/phi-2", "ef382358ec9e382308935a992d908de099b64c23"),
}
"""Connector -> (model id, pinned commit), used if `connector_kwargs` names no model."""


@dataclass(frozen=True, slots=True)
class ConnectorFacts:
    """The abilities of a connector's models that a config is checked against."""

    has_audio: bool = False
    """Whether inputs and answers may be audio."""
    has_tokenizer: bool = False
    """Whether its tokenizer is read here: for players of tokens and for special tokens in rows."""
    has_likelihoods: bool = True
    """Whether it gives the probabilities of given tokens."""
    own_keys: frozenset[str] = frozenset()
    """Keys of `connector_kwargs` on prompts and servers that it reads, and other connectors do not."""


CONNECTORS: Mapping[str, ConnectorFacts] = {
    "liquid_audio": ConnectorFacts(has_audio=True),
    "hf_text": ConnectorFacts(
        has_tokenizer=True,
        own_keys=frozenset({"chat_template", "chat_template_kwargs", "strip_reasoning"}),
    ),
    "openai": ConnectorFacts(
        has_likelihoods=False,
        own_keys=frozenset(
            {"base_url", "api_key_env", "headers_env", "max_concurrency", "timeout_s", "server"}
            | {"extra_body", "strip_reasoning"}
        ),
    ),
}

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


def context_roles(system_roles_setup: str) -> frozenset[str]:
    """Return the roles with fixed context: present in every coalition, never players."""
    return frozenset(system_roles_setup.lower().split("_"))


def canonical_value_function(value: Any) -> Any:
    """Return the value function of a name or alias; an unknown value unchanged.

    Raises:
        ValueError: For a library name that a config does not accept, with the fix.
    """
    if not isinstance(value, str):
        return value
    if value in SIMILARITY_OF:
        raise ValueError(
            f'"{value}" is named by shap.similarity: write "similarity": "{SIMILARITY_OF[value]}"'
        )
    if value in SPEECH_VALUE_FUNCTIONS:
        raise ValueError(
            f'"{value}" reads the sound of each answer, which is not kept per coalition; use a text function'
        )
    return VALUE_FUNCTION_ALIASES.get(value, value)

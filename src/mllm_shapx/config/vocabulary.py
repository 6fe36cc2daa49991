"""The names that a config may use beyond its original ones, and what each of them needs.

The value functions here are mllm_shap's, under its names. Their options are checked by the library's own
models, so a new option of the library needs no change here.
"""

from dataclasses import dataclass
from typing import Any, Literal

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
    """What a value function reads, and the model that it loads."""

    reads: Reads = "answers"
    """`answers`: the coalitions' texts. `log_probabilities`: those of the tokens of each coalition's answer.
    `likelihoods`: how likely given texts are after each coalition's prompt; the coalitions are not answered.
    """
    model_option: str | None = None
    """The option that names its model, None where it loads none."""


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
"""Value functions beside the three similarities."""

SIMILARITY_OF = {"tfidf_cosine": "TfIdfCosineSimilarity", "embedding_cosine": "CosineSimilarity"}
"""Library's name -> `shap.similarity`: these two are named there alone."""

SPEECH_VALUE_FUNCTIONS = frozenset({"speech_bertscore", "transcribed"})
"""Value functions of the library that read a waveform file of each answer; not available here."""


def canonical_value_function(value: Any) -> Any:
    """Return the value function that a name or alias means; anything unknown as it is.

    Raises:
        ValueError: For a name of the library that a config does not take, with what to write.
    """
    if not isinstance(value, str):
        return value
    if value in SIMILARITY_OF:
        msg = f'"{value}" is named by shap.similarity: write "similarity": "{SIMILARITY_OF[value]}"'
        raise ValueError(msg)
    if value in SPEECH_VALUE_FUNCTIONS:
        msg = (
            f'"{value}" reads the sound of each answer, which is not kept per coalition; use a text function'
        )
        raise ValueError(msg)
    return VALUE_FUNCTION_ALIASES.get(value, value)

"""The names that a config chooses from: connectors, explainers, similarities, modalities and the rest."""

from typing import Literal

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

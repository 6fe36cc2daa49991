"""Runs whole Shapley-value studies of language and speech models with mllm_shap."""

__version__ = "0.1.0"

"""How fast this machine explains a config's rows, beside mllm_shap's own runner and the bare model."""

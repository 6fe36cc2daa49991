"""Speed of explaining a config's rows here, compared with mllm_shap's own runner and the bare model."""

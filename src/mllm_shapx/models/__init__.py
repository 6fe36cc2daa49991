"""Loaded models that answer prompts, and the engine that batches them."""

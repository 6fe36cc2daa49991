"""Rows of a dataset and the conversations that they become."""

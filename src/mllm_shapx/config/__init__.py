"""The user's config: its shape, its files and their checks."""

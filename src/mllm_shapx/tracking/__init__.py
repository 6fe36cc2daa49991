"""Experiment trackers, whose failure never stops a run."""

"""One row explained by the runs of one unit."""

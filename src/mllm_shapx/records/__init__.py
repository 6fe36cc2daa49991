"""Files on disk: paths, atomic writes, samples, checkpoints, summaries."""

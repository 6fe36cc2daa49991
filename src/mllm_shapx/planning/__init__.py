"""Pure planning: which runs, which units, in which order. No I/O, no ray, no torch."""

"""Who does what, when: the only place that imports ray."""

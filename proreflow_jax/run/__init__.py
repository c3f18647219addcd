"""A config opened once: command line, checks, base model, dataset, stages, lineage, training state."""

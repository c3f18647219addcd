"""A config opened once: command line, checks, base model, dataset, recipes, lineage, training state."""

"""One file per experiment: `get_config()` returns every number of it, each with its meaning."""

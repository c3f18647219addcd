"""Numbers about a checkpoint: how close to its teacher, how close to the data; and the page of a run."""

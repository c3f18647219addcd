"""Blocks that several configs share. Configs import nothing of the package."""

from ml_collections import ConfigDict

# Weight decay by parameter name: the first regex found in a name decides. Norms, biases and embeddings do not decay.
DECAY_RULES = (
    (r"bias$", False),
    (r"norm", False),
    (r"_embedding\.weight$", False),
    (r".*", True),
)


def optimizer(learning_rate: float, warmup_steps: int, schedule: str = "cosine") -> ConfigDict:
    """AdamW; the paper states none of these numbers."""
    return ConfigDict(
        dict(
            learning_rate=learning_rate,  # peak
            schedule=schedule,  # after warm-up: "constant", "cosine" or "linear" down to 0
            warmup_steps=warmup_steps,  # linear rise to the peak, in steps
            beta1=0.9,  # decay of the first moment
            beta2=0.99,  # decay of the second moment
            epsilon=1e-8,  # added to the root of the second moment
            weight_decay=0.01,  # decoupled, where decay_rules say True
            decay_rules=DECAY_RULES,  # ordered (regex, bool) over parameter names
            clip_norm=1.0,  # global gradient norm is cut to this; 0: off
        )
    )

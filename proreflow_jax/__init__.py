"""Progressive reflow in JAX: Stable Diffusion models that draw in 4 or 2 steps (ProReflow, CVPR 2025)."""

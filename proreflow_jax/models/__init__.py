"""Networks of the Stable Diffusion family as pure functions over {torch name: array}: the only room that imports flax."""

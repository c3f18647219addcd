"""The mathematics of the flow, in jax and numpy: nothing in here sees a parameter, only functions predict(x, t)."""

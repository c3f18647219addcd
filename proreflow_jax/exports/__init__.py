"""A student for other tools: forms, card, the scheduler for any number of steps, replay in diffusers."""

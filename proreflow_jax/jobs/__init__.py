"""What a verb does: pairs, training, caching latents, pretraining, scores, the study of flows."""

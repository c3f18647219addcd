"""Bytes on disk -> dicts of numpy arrays. Floor 0: no jax here, and nothing of ours from outside this folder."""

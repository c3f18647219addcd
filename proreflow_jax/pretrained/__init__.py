"""Stable Diffusion on disk: diffusers folders, single files, the hub, tokenizers, LoRA files, weights onto a mesh."""

"""The machine: mesh, optimizer, checkpoints, metrics, files. Imports nothing of ours outside this folder."""

"""The machine: mesh, optimizer, checkpoints, metrics, files, object stores. Imports nothing of ours outside this folder."""

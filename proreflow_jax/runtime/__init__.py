"""The machine: mesh, processes, checkpoints, metrics, files, object stores. Imports nothing of ours outside this folder."""

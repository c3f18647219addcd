"""plan and bench: jobs as compiled functions, the TPU compiler, FLOPs, timing."""

"""Keeping a run: what it loads and checks, its directory, checkpoints, evaluations, metrics, signals and processes."""

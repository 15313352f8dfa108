"""The algorithm: group relative policy optimisation. Start at `loss.py`."""

"""Reading a finished run: votes, statistics, plots, the HTML page and the model card. Nothing here imports jax."""

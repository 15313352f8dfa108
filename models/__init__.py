"""The network: Gemma's forward pass, sampling, and sharding over a mesh. It knows nothing of rewards or text."""


class ModelError(ValueError):
    """A model folder, mesh or shape that cannot be used. The message is one line for the user."""

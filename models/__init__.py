"""The network: Gemma's forward pass, its sampler, its layout over a mesh. Knows nothing of rewards or text."""


class ModelError(ValueError):
    """A model folder, mesh or shape that cannot be used; the message is one line for the user."""

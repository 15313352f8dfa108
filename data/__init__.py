"""Text: the problems, their prompts as token ids, and which of them belong to a step. No jax here."""


class DataError(ValueError):
    """A dataset, tokenizer or prompt that cannot be used; the message is one line for the user."""

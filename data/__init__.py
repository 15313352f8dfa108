"""Text and token ids: problems, prompts, which problems belong to a step, how completions are packed. No jax."""


class DataError(ValueError):
    """A dataset, tokenizer or prompt that cannot be used. The message is one line for the user."""

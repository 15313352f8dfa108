"""Errors that a user can act on. Each message is one line; `grpo.runs.cli` maps the class to an exit code."""


class ConfigError(ValueError):
    """A setting that cannot be used. Exit code 2."""


class RunError(RuntimeError):
    """A run that cannot continue although its settings are valid. Exit code 1."""

"""Prompts: questions in the model's chat template, as token ids.

Where the template has no system role (Gemma 1, 2 and 3), the system prompt opens the user's turn. A prompt that is too long is
dropped and reported, never truncated, because a question without its end has another answer. Not supported: several turns.
"""

from collections.abc import Sequence

from data import DataError
from data.problems import Problem
from data.tokenizer import Tokenizer


def render_prompt(question: str, system: str) -> str:
    """The text of the user's turn: system prompt, empty line, question; only the question when `system` is empty."""
    return f"{system.strip()}\n\n{question.strip()}".strip()


def encode_prompt(tokenizer: Tokenizer, text: str, system: str = "") -> list[int]:
    """The token ids of the whole prompt with the user's `text`; it and `system` are stripped as in Gemma's own template.

    Raises DataError unless it has exactly one BOS: with two, or none, Gemma's accuracy collapses.
    """
    if tokenizer.has_system_role:
        ids = tokenizer.encode_turn(text.strip(), system.strip())
    else:
        ids = tokenizer.encode_turn(render_prompt(text, system))
    if ids.count(tokenizer.bos_id) != 1:
        raise DataError(f"prompt has {ids.count(tokenizer.bos_id)} BOS tokens, must have one: {text[:60]!r}")
    return ids


def drop_long(
    problems: Sequence[Problem], tokenizer: Tokenizer, system: str, width: int
) -> tuple[list[Problem], list[list[int]], list[Problem]]:
    """(problems whose prompt has at most `width` tokens, the ids of their prompts, the other problems).

    Raises DataError when all are too long.
    """
    prompts = [encode_prompt(tokenizer, p.question, system) for p in problems]
    pairs = list(zip(problems, prompts, strict=True))
    kept = [(problem, ids) for problem, ids in pairs if len(ids) <= width]
    if not kept:
        shortest = min((len(ids) for ids in prompts), default=0)
        raise DataError(f"none of {len(problems)} prompts fits in {width} tokens: the shortest has {shortest}")
    return [problem for problem, _ in kept], [ids for _, ids in kept], [p for p, ids in pairs if len(ids) > width]

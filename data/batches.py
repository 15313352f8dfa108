"""Which problems belong to a step: a pure function of (step, seed), so a resumed run needs no stored position.

Epoch e is a permutation of all problems drawn from (seed, e). Steps read the epochs end to end without gaps, so a
step may hold the end of one and the start of the next; only such a step can hold a problem twice.
Left out: reading the problems, and the windows and reviews of relay sessions.
"""

import numpy as np

from data import DataError


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation int64 [count] of the problems in `epoch`; DataError for a negative seed or epoch."""
    if seed < 0 or epoch < 0:
        raise DataError(f"seed {seed} and epoch {epoch} must be at least 0")
    return np.random.default_rng([seed, epoch]).permutation(count)


def step_indices(step: int, prompts_per_step: int, count: int, seed: int) -> np.ndarray:
    """Problem indices int64 [Q] of `step`, counted from 0, where Q = `prompts_per_step` and `count` is all problems.

    Raises DataError when Q is not in 1..count, or for a negative step or seed.
    """
    if not 1 <= prompts_per_step <= count:
        raise DataError(f"prompts_per_step {prompts_per_step} must be 1 to {count}, the number of problems")
    if step < 0:
        raise DataError(f"step {step} must be at least 0")
    epoch, start = divmod(step * prompts_per_step, count)
    order = epoch_order(count, seed, epoch)
    if start + prompts_per_step > count:
        order = np.concatenate([order, epoch_order(count, seed, epoch + 1)])
    return order[start : start + prompts_per_step]

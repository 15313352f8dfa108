"""The arrays of a step: which problems belong to it, its padded prompts, and its packed completions.

The problems of a step are a function of (step, seed, session), so a resumed run needs no stored position. Epoch e of a session
is a permutation of its problems drawn from (seed, session, e). Steps read the epochs one after another without gaps, so a step
may contain the end of one epoch and the start of the next; only then can it contain a problem twice. grpo/session.py decides
which problems a session has.

Packing puts the completions of one or two groups one after another in shared rows, so that training computes few padding slots.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from data import DataError


def epoch_order(count: int, seed: int, session: int, epoch: int) -> np.ndarray:
    """A permutation of a session's problems in `epoch`, int64 [count]. Raises DataError for a negative number."""
    if min(seed, session, epoch) < 0:
        raise DataError(f"seed {seed}, session {session} and epoch {epoch} must be at least 0")
    return np.random.default_rng([seed, session, epoch]).permutation(count)


def step_indices(step: int, prompts_per_step: int, count: int, seed: int, session: int) -> np.ndarray:
    """The problems of a step, int64 [Q]: Q = `prompts_per_step` indices into the `count` problems of the session.

    `step` counts from 0 in each session. Raises DataError when Q is not in 1..count, and for a negative step or seed.
    """
    if not 1 <= prompts_per_step <= count:
        raise DataError(f"prompts_per_step {prompts_per_step} must be 1 to {count}, the number of problems")
    if step < 0:
        raise DataError(f"step {step} must be at least 0")
    epoch, start = divmod(step * prompts_per_step, count)
    order = epoch_order(count, seed, session, epoch)
    if start + prompts_per_step > count:
        order = np.concatenate([order, epoch_order(count, seed, session, epoch + 1)])
    return order[start : start + prompts_per_step]


def pad_prompts(prompts: Sequence[Sequence[int]], width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 [Q, width], padded on the right with `pad_id`, and the prompts' lengths, int32 [Q].

    Raises DataError for a prompt that is empty or longer than `width` tokens.
    """
    tokens = np.full((len(prompts), width), pad_id, np.int32)
    for row, ids in enumerate(prompts):
        if not 0 < len(ids) <= width:
            raise DataError(f"prompt {row} has {len(ids)} tokens, must have 1 to {width}")
        tokens[row, : len(ids)] = ids
    return tokens, np.array([len(ids) for ids in prompts], np.int32)


PADDING_POSITION = 2**30  # in the future of every token, so no token attends to padding


class Packed(NamedTuple):
    """The completions of Q groups of G, of one question or of two each, in r rows of C' slots. int32, on host or devices."""

    tokens: Any  # [Q*r, C']
    positions: Any  # [Q*r, C'], counted from the start of the prompt; PADDING_POSITION at padding
    segments: Any  # [Q*r, C'], 1 to G: which completion of the group; 0 at padding
    slots: Any  # [Q*G, C], for each token of a completion its slot among the r*C' slots of its group; 0 at padding


def first_fit(lengths: np.ndarray, rows: int, width: int) -> list[tuple[int, int]] | None:
    """(row, offset) of each text by first-fit decreasing into `rows` of `width` slots; None when a text finds no room.

    The longest text is placed first, each in the first row with room for it.
    """
    used = [0] * rows
    places = [(0, 0)] * len(lengths)
    for i in np.argsort(-lengths, kind="stable"):
        row = next((row for row in range(rows) if used[row] + lengths[i] <= width), None)
        if row is None:
            return None
        places[i] = (row, used[row])
        used[row] += int(lengths[i])
    return places


def pair(totals: np.ndarray) -> np.ndarray:
    """An order of Q questions, int64 [Q], whose pairs have about equal sums of `totals` [Q]: the highest with the lowest, the
    second highest with the second lowest, and so on. Q is even."""
    ranked = np.argsort(-totals, kind="stable")
    return np.stack([ranked, ranked[::-1]], axis=1)[: len(ranked) // 2].reshape(-1)


def ladder(width: int, group_size: int, finer: int) -> Iterator[int]:
    """The slots that a group may get, below those of the padded form: multiples of `width` / `finer`, each about a fifth larger
    than the one before."""
    steps = 1
    while steps < finer * group_size:
        yield -(-width * steps // finer)
        steps = max(steps + 1, steps * 6 // 5)


def pack(tokens: np.ndarray, lengths: np.ndarray, prompt_lengths: np.ndarray, finer: int, together: int = 1) -> Packed:
    """Pack completions [Q*G, C] with `lengths` [Q*G] in the smallest shape that holds every group; `prompt_lengths` is [Q].
    The groups of `together` questions, one after another, count as one group.

    A run compiles its programs for each shape that occurs, so there are few: sizes of `ladder`, one row up to 2C slots, then a
    row for each C. With `finer` 0 every completion has its own row. The result depends on the arguments alone, so a resumed
    run packs as the first one did. Raises DataError for a length that is not in 0..C.
    """
    (B, C), Q = tokens.shape, len(prompt_lengths) // together
    G = B // Q
    starts = np.repeat(prompt_lengths, G // together)
    if lengths.min() < 0 or lengths.max() > C:
        raise DataError(f"completion lengths {lengths.min()} to {lengths.max()} must lie in 0 to {C}")
    groups = lengths.reshape(Q, G)
    rows, width, places = G, C, [[(row, 0) for row in range(G)]] * Q
    for slots in ladder(C, G, finer):
        r = max(1, slots // C)
        found = [place for group in groups if (place := first_fit(group, r, slots // r))]
        if len(found) == Q:
            rows, width, places = r, slots // r, found
            break
    packed = Packed(
        np.zeros((Q, rows * width), np.int32), np.full((Q, rows * width), PADDING_POSITION, np.int32),
        np.zeros((Q, rows * width), np.int32), np.zeros((B, C), np.int32),
    )  # fmt: skip
    for b in range(B):
        q, g = divmod(b, G)
        row, offset = places[q][g]
        here = row * width + offset + np.arange(lengths[b])
        packed.tokens[q, here] = tokens[b, : lengths[b]]
        packed.positions[q, here] = starts[b] + np.arange(lengths[b])
        packed.segments[q, here] = g + 1
        packed.slots[b, : lengths[b]] = here
    tokens, positions, segments = (x.reshape(Q * rows, width) for x in packed[:3])
    return Packed(tokens, positions, segments, packed.slots)


def natural_lengths(step: int, rows: int, mean: int, longest: int) -> np.ndarray:
    """Completion lengths, int64 [rows], spread like a trained model's: lognormal (sigma 0.6) around `mean`, at most `longest`.

    For planning and benchmarks. There are sixteen fixed sets, which steps use in turn.
    """
    sets = np.random.default_rng(123).lognormal(np.log(mean) - 0.18, 0.6, (16, rows))
    return np.clip(np.round(sets[step % 16]), 1, longest).astype(int)

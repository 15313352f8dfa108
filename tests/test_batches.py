"""Laws of data/batches.py: steps read permutation after permutation without gaps, from (step, seed) alone."""

import numpy as np
import pytest

from data import DataError
from data.batches import epoch_order, step_indices


def test_an_epoch_is_a_permutation_fixed_by_seed_and_epoch():
    order = epoch_order(50, seed=3, epoch=2)
    assert sorted(order) == list(range(50))
    assert order.dtype == np.int64
    assert (order == epoch_order(50, seed=3, epoch=2)).all()
    assert (order != epoch_order(50, seed=3, epoch=1)).any()
    for other_seed, other_epoch in ((2, 2), (2, 3)):  # (2, 3): epoch 1 of a seed is not epoch 0 of the next
        assert (order != epoch_order(50, other_seed, other_epoch)).any()


@pytest.mark.parametrize(("count", "prompts_per_step"), [(12, 4), (10, 4), (7, 7), (5, 3), (1, 1)])
def test_steps_read_the_epochs_end_to_end(count, prompts_per_step):
    steps = 3 * count
    read = np.concatenate([step_indices(step, prompts_per_step, count, seed=1) for step in range(steps)])
    epochs = np.concatenate([epoch_order(count, seed=1, epoch=e) for e in range(steps * prompts_per_step // count)])
    assert read.dtype == np.int64
    assert read.tolist() == epochs.tolist()


def test_a_step_is_the_same_whatever_came_before():
    before = step_indices(6, 4, 10, seed=5)
    for step in range(6):
        step_indices(step, 4, 10, seed=5)
    np.random.seed(0)  # numpy's global state must not matter
    assert (step_indices(6, 4, 10, seed=5) == before).all()


@pytest.mark.parametrize(
    ("step", "prompts_per_step", "seed", "reason"),
    [
        (0, 11, 0, "prompts_per_step 11 must be 1 to 10"),
        (0, 0, 0, "prompts_per_step 0 must be 1 to 10"),
        (-1, 4, 0, "step -1"),
        (0, 4, -1, "seed -1"),
    ],
)
def test_an_impossible_request_is_an_error(step, prompts_per_step, seed, reason):
    with pytest.raises(DataError, match=reason):
        step_indices(step, prompts_per_step, count=10, seed=seed)

"""Laws of data/batches.py: steps read permutation after permutation, from (step, seed) alone; packing loses no token."""

import itertools
import math

import numpy as np
import pytest

from data import DataError
from data.batches import PADDING_POSITION, epoch_order, first_fit, ladder, pack, pad_prompts, pair, step_indices


def test_an_epoch_is_a_permutation_fixed_by_seed_and_epoch():
    order = epoch_order(50, seed=3, session=1, epoch=2)
    assert sorted(order) == list(range(50))
    assert order.dtype == np.int64
    assert (order == epoch_order(50, seed=3, session=1, epoch=2)).all()
    assert (order != epoch_order(50, seed=3, session=1, epoch=1)).any()
    assert (order != epoch_order(50, seed=3, session=2, epoch=2)).any()
    for other_seed, other_epoch in ((2, 2), (2, 3)):  # (2, 3): epoch 1 of a seed is not epoch 0 of the next
        assert (order != epoch_order(50, other_seed, 1, other_epoch)).any()


@pytest.mark.parametrize(("count", "prompts_per_step"), [(12, 4), (10, 4), (7, 7), (5, 3), (1, 1)])
def test_steps_read_the_epochs_end_to_end(count, prompts_per_step):
    steps = 3 * count
    read = np.concatenate([step_indices(step, prompts_per_step, count, seed=1, session=2) for step in range(steps)])
    epochs = np.concatenate([epoch_order(count, seed=1, session=2, epoch=e) for e in range(steps * prompts_per_step // count)])
    assert read.dtype == np.int64
    assert read.tolist() == epochs.tolist()


def test_a_step_is_the_same_whatever_came_before():
    before = step_indices(6, 4, 10, seed=5, session=1)
    for step in range(6):
        step_indices(step, 4, 10, seed=5, session=1)
    np.random.seed(0)  # numpy's global state must not matter
    assert (step_indices(6, 4, 10, seed=5, session=1) == before).all()


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
        step_indices(step, prompts_per_step, count=10, seed=seed, session=1)


# Prompts.


def test_prompts_are_padded_on_the_right():
    tokens, lengths = pad_prompts([[2, 5, 6], [2], [2, 7, 8, 9]], width=4, pad_id=0)
    assert tokens.tolist() == [[2, 5, 6, 0], [2, 0, 0, 0], [2, 7, 8, 9]]
    assert lengths.tolist() == [3, 1, 4]
    assert tokens.dtype == lengths.dtype == np.int32


@pytest.mark.parametrize(("prompts", "reason"), [([[2], [2, 5, 6]], "prompt 1 has 3 tokens"), ([[]], "prompt 0 has 0")])
def test_a_prompt_that_does_not_fit_is_never_truncated(prompts, reason):
    with pytest.raises(DataError, match=reason):
        pad_prompts(prompts, width=2, pad_id=0)


# Packing.


def groups(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Completions of 1 to 5 groups, their lengths and their prompts', and how finely to pack: uneven sizes of all kinds."""
    numbers = np.random.default_rng(seed)
    Q, G, C, finer = (int(numbers.integers(low, high)) for low, high in ((1, 6), (1, 9), (1, 25), (0, 7)))
    lengths = numbers.integers(1 if seed % 2 else 0, numbers.integers(1, C + 1) + 1, Q * G)
    tokens = np.where(np.arange(C) < lengths[:, None], numbers.integers(1, 1000, (Q * G, C)), 0)
    return tokens, lengths, numbers.integers(1, 50, Q), finer


SEEDS = range(150)


def test_first_fit_places_every_text_in_the_first_row_with_room_the_longest_first():
    numbers = np.random.default_rng(1)
    for _ in range(100):
        rows, width = (int(n) for n in numbers.integers(1, 9, 2))
        lengths = numbers.integers(0, width + 1, numbers.integers(1, 12))
        used, expected = np.zeros(rows, int), {}
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # sorted keeps the order of equals
            room = np.flatnonzero(used + lengths[i] <= width)
            if len(room):
                expected[i] = (room[0], used[room[0]])
                used[room[0]] += lengths[i]
        places = [expected.get(i) for i in range(len(lengths))]
        assert first_fit(lengths, rows, width) == (None if None in places else places)


def test_first_fit_finds_no_place_where_there_is_none():
    assert first_fit(np.array([3, 3, 3]), rows=2, width=4) is None  # 9 tokens in 8 slots
    assert first_fit(np.array([5]), rows=3, width=4) is None
    assert first_fit(np.array([3, 1, 4]), rows=2, width=4) == [(1, 0), (1, 3), (0, 0)]


def test_packing_gives_every_token_one_slot_of_its_own_group():
    for seed in SEEDS:
        tokens, lengths, prompt_lengths, finer = groups(seed)
        packed, Q, B = pack(tokens, lengths, prompt_lengths, finer), len(prompt_lengths), len(tokens)
        flat = [np.asarray(x).reshape(Q, -1) for x in packed[:3]]
        taken = np.zeros(flat[0].shape, int)
        for b in range(B):
            q, here = b // (B // Q), packed.slots[b, : lengths[b]]
            taken[q, here] += 1
            got = [x[q, here].tolist() for x in flat]
            assert got[0] == tokens[b, : lengths[b]].tolist()
            assert got[1] == list(range(prompt_lengths[q], prompt_lengths[q] + lengths[b]))
            assert set(got[2]) <= {b % (B // Q) + 1}
            row = here // packed.tokens.shape[1]
            assert (np.diff(here) == 1).all() and (row == row[:1]).all()  # in one piece: attention does not see another row
            assert (packed.slots[b, lengths[b] :] == 0).all()
        assert taken.max(initial=0) <= 1
        padding = taken == 0
        assert [set(x[padding].tolist()) - {pad} for x, pad in zip(flat, (0, PADDING_POSITION, 0), strict=True)] == [set()] * 3
        assert {x.dtype for x in packed} == {np.dtype(np.int32)}


def test_a_packed_shape_is_the_smallest_of_its_ladder_that_first_fit_fills():
    """And so never larger than the padded form, which is the last of at most finer * G; finer 0 takes that at once."""
    for seed in SEEDS:
        tokens, lengths, prompt_lengths, finer = groups(seed)
        (B, C), Q = tokens.shape, len(prompt_lengths)
        shape = pack(tokens, lengths, prompt_lengths, finer).tokens.shape
        tried = rungs(C, B // Q, finer)
        assert all(r * width <= B // Q * C for r, width in tried) and len(tried) <= max(finer * B // Q, 1)
        fits = (step for step in tried if all(first_fit(group, *step) is not None for group in lengths.reshape(Q, -1)))
        assert shape == (Q * (found := next(fits))[0], found[1])
        again = pack(tokens.copy(), lengths.copy(), prompt_lengths.copy(), finer)
        for x, y in zip(pack(tokens, lengths, prompt_lengths, finer), again, strict=True):
            np.testing.assert_array_equal(x, y)


def rungs(C: int, G: int, finer: int) -> list[tuple[int, int]]:
    """Rows of a group and their width; the last is the padded form."""
    return [(max(1, n // C), n // max(1, n // C)) for n in ladder(C, G, finer)] + [(G, C)]


@pytest.mark.parametrize(("C", "G", "finer"), [(768, 16, 4), (768, 8, 4), (32, 8, 4), (7, 5, 3), (768, 16, 8), (768, 16, 1)])
def test_each_size_is_a_fifth_larger_than_the_one_before(C, G, finer):
    """Or one step of C / finer; so there are few, and little is padding."""
    sizes = [*ladder(C, G, finer), G * C]
    assert sizes[0] == math.ceil(C / finer) and all(
        size in {math.ceil(C * k / finer) for k in range(G * finer + 1)} for size in sizes
    )
    for small, large in itertools.pairwise(sizes[:-1]):
        assert 0 < large - small <= max(C / finer + 1, small / 5 + 1)
        assert large - small >= min(C / finer - 1, small / 5 - C / finer - 1)
    assert len(sizes) <= 5 + math.log(G * finer / 5, 1.1)


def test_few_shapes_serve_a_run_of_natural_lengths():
    """16 x 8 completions of at most 768 tokens, whose mean falls from 250 to 100 in 300 steps. For each shape two programs
    compile, of 2B for a minute; 300 updates and reference passes take three."""
    rng, shapes, slots, tokens = np.random.default_rng(0), set(), 0, 0
    for step in range(300):
        lengths = np.clip(np.round(rng.lognormal(np.log(250 - step / 2) - 0.18, 0.6, (16, 8))), 1, 768).astype(int)
        lengths = lengths[pair(lengths.sum(axis=1))].reshape(-1)
        packed = pack(np.zeros((128, 768), np.int32), lengths, np.full(16, 100), 4, together=2).tokens
        shapes.add(packed.shape)
        slots, tokens = slots + packed.size, tokens + lengths.sum()
    assert len(shapes) <= 12 and slots / tokens < 1.25


def test_few_shapes_serve_all_lengths():
    """Every multiset of lengths of one group: as many shapes as the ladder has steps, not one for each."""
    C, G, finer = 6, 3, 2
    shapes = {
        pack(np.ones((G, C), int), np.array(lengths), np.ones(1, int), finer).tokens.shape
        for lengths in itertools.combinations_with_replacement(range(1, C + 1), G)
    }
    assert shapes <= set(rungs(C, G, finer))
    assert shapes == {(1, 3), (1, 6), (1, 9), (2, 6), (2, 7), (3, 6)}  # 3, 6, 9, 12, 15 and 18 slots, 15 as two rows of 7


def test_short_completions_share_a_row_and_long_ones_get_their_own():
    """By hand: lengths 3, 1, 4, 2 fill ten slots in steps of 2: longest first, one behind the other."""
    tokens = np.arange(1, 33).reshape(4, 8) * (np.arange(8) < np.array([[3], [1], [4], [2]]))
    packed = pack(tokens, np.array([3, 1, 4, 2]), np.array([5]), finer=4)
    assert packed.tokens.tolist() == [[17, 18, 19, 20, 1, 2, 3, 25, 26, 9]]
    assert packed.positions.tolist() == [[5, 6, 7, 8, 5, 6, 7, 5, 6, 5]]
    assert packed.segments.tolist() == [[3, 3, 3, 3, 1, 1, 1, 4, 4, 2]]
    assert packed.slots[:, 0].tolist() == [4, 9, 0, 7]
    full = pack(tokens, np.full(4, 8), np.array([5]), finer=4)
    assert (full.tokens == tokens).all() and full.tokens.shape == (4, 8)


def test_groups_packed_together_share_rows_and_keep_their_own_positions():
    """By hand: groups of two after prompts of 5 and 9 tokens, as one group of four."""
    tokens, lengths = np.arange(1, 33).reshape(4, 8), np.array([3, 1, 4, 2])
    packed = pack(tokens, lengths, np.array([5, 9]), finer=4, together=2)
    assert packed.positions.tolist() == [[9, 10, 11, 12, 5, 6, 7, 9, 10, 5]]
    assert packed.segments.tolist() == [[3, 3, 3, 3, 1, 1, 1, 4, 4, 2]]


def test_the_longest_group_is_paired_with_the_shortest():
    assert pair(np.array([5, 9, 1, 7, 7, 3])).tolist() == [1, 2, 3, 5, 4, 0]


@pytest.mark.parametrize(
    ("lengths", "reason"), [([1, -1], "lengths -1 to 1 must lie in 0 to 4"), ([2, 5], "lengths 2 to 5 must")]
)
def test_a_length_beyond_the_width_is_an_error(lengths, reason):
    with pytest.raises(DataError, match=reason):
        pack(np.zeros((2, 4), int), np.array(lengths), np.array([3]), finer=4)

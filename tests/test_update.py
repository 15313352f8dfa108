"""Laws of grpo/update.py: one update, on any devices, in any number of parts."""

import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import (
    Bench,
    G,
    Q,
    assert_same_update,
    completions,
    cut_short,
    lines,
    run,
)  # fmt: skip

import grpo.rollout
import grpo.runs.evaluate
import grpo.runs.model_source
import grpo.runs.setup
import grpo.runs.trainer
import grpo.session
import grpo.step
import grpo.update
from grpo.errors import RunError

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture(scope="module")
def one_update(bench):
    return bench.updates([bench.batch])


@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.long)])
def test_microbatches_change_the_update_by_rounding_only(bench, one_update, parts):
    states, stats = bench.updates([bench.batch], microbatches=parts)
    assert stats[0] == pytest.approx(one_update[1][0], rel=1e-5, abs=1e-5)
    assert_same_update(states, one_update[0])


def test_eight_devices_change_the_update_by_rounding_only(bench, one_update):
    states, stats = bench.updates([bench.batch], count=8)
    assert stats[0] == pytest.approx(one_update[1][0], rel=1e-5, abs=1e-5)
    assert_same_update(states, one_update[0])


@pytest.fixture(scope="module")
def padded_update(bench):
    return bench.updates([cut_short(bench.batch, 0)])


@pytest.mark.parametrize(
    ("count", "pairs", "changes"),
    [
        pytest.param(1, 0, {}, id="1"),
        pytest.param(1, 1, {}, id="1, paired"),
        pytest.param(1, 2, {"microbatches": 2, "unroll": True}, id="paired, parts, unrolled", marks=pytest.mark.long),
        pytest.param(4, 4, {}, id="4, paired", marks=pytest.mark.long),
        pytest.param(8, 0, {}, id="8", marks=pytest.mark.long),
    ],
)
def test_packing_changes_the_update_by_rounding_only(bench, padded_update, count, pairs, changes):
    padded, packed = cut_short(bench.batch, 0), cut_short(bench.batch, 4, pairs)
    assert (packed.order is not None) == bool(pairs)
    assert packed.packed.tokens.size < padded.packed.tokens.size
    assert (completions(packed) == completions(padded)).all()
    states, stats = bench.updates([packed], count=count, **changes)
    assert stats[0] == pytest.approx(padded_update[1][0], rel=1e-5, abs=1e-5)
    assert_same_update(states, padded_update[0])


def test_every_completion_is_a_sample_of_its_own(bench):
    """Four tokens out of 360 pieces do not repeat by chance: not within a group, not across groups, not in another step."""
    rows = [tuple(row) for row in completions(bench.batch)[np.asarray(bench.batch.mask).sum(axis=1) >= 4].tolist()]
    assert len(rows) > Q and len(set(rows)) == len(rows)


def test_logprobs_do_not_depend_on_microbatches_and_equal_the_samplers(bench):
    """Rows come back in their own order: parts are cut across the batch, and put together again."""
    whole = bench.logprobs()
    for parts in (2, 4):
        np.testing.assert_allclose(bench.logprobs(microbatches=parts), whole, rtol=0, atol=1e-5)
    counts = bench.batch.mask > 0
    np.testing.assert_allclose(whole[counts], np.asarray(bench.batch.sampler_logprobs)[counts], rtol=0, atol=1e-4)


def test_the_gradient_is_clipped_to_its_norm(config, bench, one_update):
    """Adam's first moment after one update is (1 - b1) times the clipped gradient."""
    (_, state), (stats,) = one_update
    assert stats["grad_norm"] > config.max_grad_norm  # what is logged is the norm before
    moments = jax.tree.leaves(state.opt_state[1].mu)
    norm = math.sqrt(sum(float((np.asarray(leaf, float) ** 2).sum()) for leaf in moments))
    assert norm == pytest.approx((1 - config.adam_b1) * config.max_grad_norm, rel=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_update_is_skipped_and_counted(bench, bad):
    """Parameters and moments stay bit-equal; the next good update ends the row but not the count."""
    poisoned = replace(bench.batch, advantages=np.where(np.arange(Q * G) == 3, bad, bench.batch.advantages).astype(np.float32))
    states, stats = bench.updates([bench.batch, poisoned, poisoned, bench.batch, poisoned])
    assert [int(state.bad_updates) for state in states] == [0, 0, 1, 2, 2, 3]
    assert [int(state.bad_in_a_row) for state in states] == [0, 0, 1, 2, 0, 1]
    assert [figures["bad_updates"] for figures in stats] == [0, 1, 2, 2, 3]
    assert [math.isfinite(figures["grad_norm"]) for figures in stats] == [True, False, False, True, False]
    for before, after, same in zip(states[:-1], states[1:], [False, True, True, False, True], strict=True):
        kept = (before.params, before.opt_state), (after.params, after.opt_state)
        equal = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, kept), strict=True)]
        assert all(equal) if same else not any(equal)


@pytest.mark.usefixtures("free_run_dir")
def test_bad_updates_in_a_row_end_the_run(config, monkeypatch):
    """Bad in steps 1, 3 and 4: with max_bad_updates 2 the run goes on after 1 and 3, and ends at 4."""
    real_weigh, calls = grpo.rollout.weigh, []

    def poisoned(*args):
        mask, batch = real_weigh(*args)
        calls.append(mask)
        return mask, replace(batch, advantages=batch.advantages * (1 if len(calls) == 2 else jnp.nan))

    monkeypatch.setattr(grpo.rollout, "weigh", poisoned)
    with pytest.raises(RunError, match=r"^step 4: 2 non-finite updates in a row"):
        run(config)
    metrics = lines(Path(config.run_dir) / "metrics.jsonl")
    assert [record["bad_updates"] for record in metrics] == [1, 1, 2, 3]


@pytest.mark.long
def test_a_second_update_on_a_rollout_compares_with_the_old_policy(config, tmp_path, monkeypatch):
    seen, real_step = [], grpo.step.train_step

    def spy(*args):
        out = real_step(*args)
        seen.append(jax.device_get(out[1]))
        return out

    monkeypatch.setattr(grpo.step, "train_step", spy)
    run(replace(config, run_dir=str(tmp_path / "run"), updates_per_rollout=2, max_steps=1, eval_problems=0, warmup_steps=0))
    first, second = seen
    for ratio in ("ratio/min", "ratio/mean", "ratio/max"):
        assert first[ratio] == pytest.approx(1, abs=1e-4)  # the old policy is computed by another program: rounding
    assert second["ratio/min"] < 1 - 1e-3 and second["ratio/max"] > 1 + 1e-3
    (logged,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert logged["ratio/max"] == second["ratio/max"]


@pytest.mark.long
def test_with_tis_cap_0_the_samplers_logprobs_do_not_matter(bench, bare, one_update):
    shifted = replace(bench.batch, sampler_logprobs=bench.batch.sampler_logprobs + np.float32(0.5))
    _, with_cap = bench.updates([shifted])
    assert with_cap[0]["grad_norm"] != pytest.approx(one_update[1][0]["grad_norm"], rel=0.01)
    plain = Bench(bare, replace(bench.batch, ref_logprobs=None))
    states, _ = plain.updates([plain.batch])
    others, _ = plain.updates([replace(shifted, ref_logprobs=None)])
    for leaf, other in zip(jax.tree.leaves(states[-1]), jax.tree.leaves(others[-1]), strict=True):
        np.testing.assert_array_equal(leaf, other)

"""Laws of models/continuous_batching.py: the samples of models/sampler.py, each once, from a batch that stays full."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

import models.continuous_batching
from grpo.runs.metrics import CompileCounter
from models.continuous_batching import sample_continuously
from models.gemma import ExecutionConfig, GemmaConfig, Params, axes, init_params
from models.sampler import Samples, Sampling, row_keys, sample
from models.sharding import ROLLOUT, STORE, make_mesh, to_devices

CONFIG = GemmaConfig(
    num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32, vocab_size=64, query_scale=0.5,
    local_layers=(True, False), sliding_window=5, attn_softcap=5.0, final_softcap=5.0, post_norms=True, qk_norms=True,
)  # fmt: skip
# 21 prompts, two and a half banks, each with three samples: four times as many as there are rows, and a few more.
N, P, C, BANK, ROWS = 21, 9, 11, 8, 16
SAMPLING = Sampling(C, stop_ids=tuple(range(10)))  # one token in six
HEAT = np.array([0, 0.8, 1.3], np.float32)
LENGTHS = np.random.default_rng(6).integers(1, P + 1, N).astype(np.int32)
PROMPTS = (np.random.default_rng(7).integers(10, 64, (N, P)) * (np.arange(P) < LENGTHS[:, None])).astype(np.int32)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@dataclass(frozen=True)
class Machine:
    """A model on some devices, and what runs on them."""

    devices: int = 1
    tp: int = 1
    unroll: bool = False

    def mesh(self):
        return jax.set_mesh(make_mesh(self.tp, jax.devices()[: self.devices]))

    @property
    def execution(self) -> ExecutionConfig:
        return ExecutionConfig(ROLLOUT, unroll=self.unroll)

    def queue(
        self, prompts=PROMPTS, lengths=LENGTHS, temperatures=HEAT, seed=5, step=9, bank=BANK, rows=ROWS, wanted=None
    ) -> Samples:
        """All samples in their order, as `sampler.sample` gives them. Each wanted one must come exactly once, no other."""
        count = len(prompts) * len(temperatures)
        times = np.zeros(count, int)
        tokens, ends, truncated = np.zeros((count, C), int), np.zeros(count, int), np.zeros(count, bool)
        with self.mesh():
            for done in sample_continuously(
                weights(self), prompts, lengths, temperatures, bank, rows, seed, step, CONFIG, self.execution, SAMPLING, wanted
            ):
                assert 1 <= len(done.index) <= rows
                times[done.index] += 1
                tokens[done.index], ends[done.index], truncated[done.index] = done.tokens, done.lengths, done.truncated
        assert (times == (1 if wanted is None else np.isin(np.arange(count), wanted))).all()
        return Samples(tokens, None, ends, truncated)  # type: ignore[arg-type]

    def sample(self, temperatures=HEAT, seed=5, step=9) -> Samples:
        with self.mesh():
            keys = row_keys(seed, step, to_devices(np.arange(N * len(temperatures)), "B"))
            temperatures = to_devices(np.tile(temperatures, N), "B")
            return jax.device_get(
                sample(
                    weights(self),
                    to_devices(PROMPTS, "QP"),
                    to_devices(LENGTHS, "Q"),
                    keys,
                    temperatures,
                    CONFIG,
                    self.execution,
                    SAMPLING,
                )
            )


@cache
def weights(machine: Machine) -> Params:
    return machine.execution.use(init_params(jax.random.key(2), CONFIG, STORE), axes(CONFIG))


ONE = Machine()


@pytest.fixture(scope="module")
def expected() -> Samples:
    samples = ONE.sample()
    assert samples.truncated.any() and not samples.truncated.all() and len(set(samples.lengths.tolist())) > 5
    return samples


def expect_equal(ours: Samples, theirs: Samples) -> None:
    for name in ("tokens", "lengths", "truncated"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize(
    "machine",
    [
        pytest.param(ONE, id="1"),
        pytest.param(Machine(unroll=True), id="1 unrolled", marks=pytest.mark.long),
        pytest.param(Machine(8, 1), id="8x1", marks=pytest.mark.long),
        pytest.param(Machine(8, 4, unroll=True), id="2x4 unrolled"),
    ],
)
def test_a_queue_gives_each_sample_once_and_as_the_sampler_does(expected, machine):
    expect_equal(machine.queue(), expected)


@pytest.mark.parametrize(("bank", "rows"), [(1, 1), (3, 2), (32, 80)])
def test_bank_and_rows_may_have_any_size(expected, bank, rows):
    """One row and one prompt at a time; rows that divide nothing; room for all at once."""
    expect_equal(ONE.queue(bank=bank, rows=rows), expected)


@pytest.mark.parametrize("machine", [ONE, pytest.param(Machine(8, 1), marks=pytest.mark.long)], ids=["1", "8x1"])
def test_what_is_left_of_a_queue_gives_the_same_samples(expected, machine, monkeypatch):
    """As after an interruption: whatever is missing, in whatever order it is named; no prompt is prefilled for nothing."""
    prefilled, real = [], models.continuous_batching.prefill
    monkeypatch.setattr(
        models.continuous_batching, "prefill", lambda params, tokens, *rest: prefilled.append(1) or real(params, tokens, *rest)
    )
    count = N * len(HEAT)
    for wanted, banks in ((np.random.default_rng(1).permutation(count)[:40], 3), (np.array([62, 5, 4]), 1), (np.array([]), 0)):
        prefilled.clear()
        found = machine.queue(wanted=wanted.astype(int))
        assert len(prefilled) == banks
        for ours, theirs in zip(*(jax.tree.leaves(x) for x in (found, replace(expected, logprobs=None))), strict=True):
            np.testing.assert_array_equal(ours[wanted.astype(int)], theirs[wanted.astype(int)])


def test_other_work_compiles_nothing(expected):
    """Also fewer samples than rows; each sample still is that of its own number, whatever else there is."""
    ONE.queue()
    compiled = CompileCounter()
    few = ONE.queue(PROMPTS[:2], LENGTHS[:2])
    ONE.queue(PROMPTS[::-1].copy(), LENGTHS[::-1].copy(), np.array([1.0], np.float32), seed=1, step=2)
    assert compiled.count == 0
    expect_equal(few, jax.tree.map(lambda x: x[: 2 * len(HEAT)], replace(expected, logprobs=None)))


def test_another_seed_or_step_draws_others(expected):
    warm = np.arange(N * len(HEAT)) % len(HEAT) > 0
    for other in (ONE.queue(seed=6), ONE.queue(step=8)):
        assert (other.tokens != expected.tokens).any(axis=1)[warm].mean() > 0.8
        assert (other.tokens == expected.tokens)[~warm].all()


def test_rows_are_filled_again_before_a_quarter_of_them_is_idle(expected, monkeypatch):
    """Until nothing waits, more than 3/4 of the rows are alive in every step; then come at most C steps more."""
    started, steps, real = [], [], models.continuous_batching.decode_chunk

    def watched(params, rows, count, *rest):
        started.append(int(rows.alive.sum()))
        rows, after = real(params, rows, count, *rest)
        steps.append(int(after) - int(count))
        return rows, after

    monkeypatch.setattr(models.continuous_batching, "decode_chunk", watched)
    ONE.queue()
    assert max(started) == ROWS and min(steps) > 0
    assert sum(steps) <= expected.lengths.sum() / (ROWS * 3 / 4 + 1) + C


@pytest.mark.parametrize("machine", [ONE, Machine(unroll=True)], ids=["loop", "unrolled"])
def test_a_queue_compiles_each_program_once(machine):
    """The first state and every later one have the same types: a weak type of the first one compiled everything twice."""
    with machine.mesh():
        programs: Any = models.continuous_batching.refill, models.continuous_batching.decode_chunk.chosen()
    for program in programs:
        program.clear_cache()
    machine.queue(bank=3, rows=5)
    assert [program._cache_size() for program in programs] == [1, 1]

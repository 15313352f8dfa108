"""Laws of models/sampler.py: decoding is the full forward pass, draws follow the softmax, a row is its own."""

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_references import REFERENCES, pad

import models.kv_cache
import models.sampler
from grpo.runs.metrics import CompileCounter
from models.formats.convert import load_params, read_config
from models.gemma import (
    FAR,
    ExecutionConfig,
    GemmaConfig,
    Params,
    axes,
    forward,
    forward_group,
    init_params,
    token_logprobs,
    vocab_logits,
)
from models.kv_cache import empty_kv, read_widths
from models.sampler import Samples, Sampling, decode, draw, keep_heaviest, prefill, row_keys, sample
from models.sharding import ROLLOUT, STORE, MeshJit, make_mesh, to_devices

COMPUTE = ExecutionConfig(ROLLOUT)
# Three prompts, three completions each. A window of 8 starts inside the prompt at first, inside the completion at last.
Q, G, P, C = 3, 3, 13, 12
B = Q * G
LENGTHS = np.array([13, 3, 10])
PROMPTS = np.random.default_rng(5).integers(3, 64, (Q, P)) * (np.arange(P) < LENGTHS[:, None])
TEMPERATURES = np.array([0, 0.5, 1, 2, 0, 0.5, 1, 2, 1], np.float32)
ALMOST_ONE = np.nextafter(np.float32(1), np.float32(0))


@dataclass(frozen=True)
class Model:
    config: GemmaConfig
    params: Params


pytestmark = pytest.mark.usefixtures("mesh")


def read(folder, mesh, **changes) -> Model:
    config = read_config(folder)
    return Model(replace(config, **changes), load_params(folder, config, mesh, ROLLOUT))


@pytest.fixture(scope="module")
def model(mesh) -> Model:
    """Every feature of Gemma 2 and 3 at once."""
    return read(REFERENCES / "gemma3-gqa", mesh, attn_softcap=1.0, final_softcap=3.0, rope_factor=8.0)


@pytest.fixture(scope="module", params=["gemma1", "every feature"])
def any_model(request, mesh, model) -> Model:
    return model if request.param == "every feature" else read(REFERENCES / "gemma1-mqa", mesh)


def run(
    model: Model, prompts: Any = PROMPTS, lengths: Any = LENGTHS, rows=range(B), temperature: np.ndarray = TEMPERATURES, seed=0,
    step=0, limits=None, execution=COMPUTE, **more
) -> Samples:  # fmt: skip
    """Samples as numpy arrays."""
    keys = row_keys(seed, step, jnp.array(rows))
    prompts, lengths, temperatures = (jnp.asarray(x) for x in (prompts, lengths, temperature.astype(np.float32)))
    sampling = Sampling(**{"width": C, "stop_ids": (), **more})
    if limits is None:
        samples = sample(model.params, prompts, lengths, keys, temperatures, model.config, execution, sampling)
    else:
        prefix = prefill(model.params, prompts, lengths, model.config, execution)
        samples = decode(model.params, prefix, keys, temperatures, jnp.asarray(limits), model.config, execution, sampling)
    return jax.tree.map(np.asarray, samples)


@partial(jax.jit, static_argnames="config")
def plain_logits(params, tokens, positions, config):  # BT, BT -> BTV
    hidden, _ = forward(params, tokens, positions, config, COMPUTE)
    return vocab_logits(hidden, params, config, COMPUTE)


def logits_written_out(model: Model, samples: Samples) -> np.ndarray:
    """What the plain model, reading prompt + completion of each row, says of each completion token.  -> BCV, float64"""
    rows = [np.append(PROMPTS[b // G][: LENGTHS[b // G]], samples.tokens[b]) for b in range(B)]
    tokens, mask = pad(rows, "right")
    tokens, mask = (np.pad(x, ((0, 0), (0, P + C - x.shape[1]))) for x in (tokens, mask))
    logits = plain_logits(model.params, tokens, np.where(mask, np.arange(P + C), FAR), model.config)
    predicting = np.repeat(LENGTHS, G)[:, None] - 1 + np.arange(C)
    return np.asarray(logits, np.float64)[np.arange(B)[:, None], predicting]


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def logprobs_of(logits, tokens, temperature) -> np.ndarray:  # BCV, BC, B -> BC
    temperatures = np.where(temperature > 0, temperature, 1).astype(np.float64)
    return np.log(np.take_along_axis(softmax(logits / temperatures[:, None, None]), tokens[..., None], axis=-1)[..., 0])


# Decoding against the plain model.


def test_decoding_through_the_cache_equals_the_full_forward_pass(any_model):
    samples = run(any_model)
    logits = logits_written_out(any_model, samples)
    expected = logprobs_of(logits, samples.tokens, TEMPERATURES)
    np.testing.assert_allclose(samples.logprobs, expected, rtol=0, atol=1e-5)


def test_greedy_rows_take_the_argmax_of_the_full_forward_pass(any_model):
    samples = run(any_model)
    greedy = TEMPERATURES == 0
    assert (samples.tokens[greedy] == logits_written_out(any_model, samples)[greedy].argmax(axis=-1)).all()
    others = run(any_model, seed=1)
    assert (others.tokens[greedy] == samples.tokens[greedy]).all()
    assert (others.tokens[~greedy] != samples.tokens[~greedy]).any(axis=1).all()


def test_the_sampler_gives_the_trainers_logprobs(any_model):
    samples = run(any_model)
    config, params = any_model.config, any_model.params
    hidden = MeshJit(forward_group, static_argnums=(4, 5))(params, PROMPTS, LENGTHS, samples.tokens, config, ExecutionConfig())
    trainer = MeshJit(token_logprobs, static_argnums=(4, 5, 6))
    for temperature in (0.5, 1.0, 2.0):
        rows = np.equal(TEMPERATURES, temperature)
        logprobs = np.asarray(trainer(params, hidden, samples.tokens, temperature, config, ExecutionConfig(), 5))
        assert rows.sum() >= 2
        np.testing.assert_allclose(samples.logprobs[rows], logprobs[rows], rtol=0, atol=1e-5)


def test_logprobs_are_of_the_full_softmax_whatever_is_left_out(model):
    samples = run(model, top_k=4, top_p=0.8)
    logits = logits_written_out(model, samples)
    np.testing.assert_allclose(samples.logprobs, logprobs_of(logits, samples.tokens, TEMPERATURES), rtol=0, atol=1e-5)
    rank = (logits > np.take_along_axis(logits, np.asarray(samples.tokens)[..., None], axis=-1)).sum(axis=-1)
    assert rank.max() == 3  # the four heaviest and no others
    assert (run(model).tokens != samples.tokens).any()


def expect_equal(samples: Samples, others: Samples) -> None:
    assert (samples.tokens == others.tokens).all()
    assert (samples.lengths == others.lengths).all() and (samples.truncated == others.truncated).all()
    np.testing.assert_allclose(samples.logprobs, others.logprobs, rtol=0, atol=1e-5)


def test_unrolled_layers_give_the_same_samples(any_model):
    expect_equal(run(any_model, execution=replace(COMPUTE, unroll=True)), run(any_model))


# Stopping.


@pytest.fixture(scope="module")
def endless(model) -> Samples:
    return run(model)


def expect_stopped(samples: Samples, endless: Samples, stop_ids: tuple[int, ...], limits=(C,) * B) -> None:
    """`samples` are `endless` cut behind the first stop token of each row, or at its limit."""
    for b in range(B):
        stops = np.flatnonzero(np.isin(endless.tokens[b][: limits[b]], stop_ids))
        length = stops[0] + 1 if len(stops) else limits[b]
        assert samples.lengths[b] == length
        assert samples.truncated[b] == (len(stops) == 0)
        assert (samples.tokens[b][:length] == endless.tokens[b][:length]).all()
        np.testing.assert_allclose(samples.logprobs[b][:length], endless.logprobs[b][:length], rtol=0, atol=1e-6)
        assert (samples.tokens[b][length:] == 0).all() and (samples.logprobs[b][length:] == 0).all()


def test_without_a_stop_token_every_row_is_truncated(endless):
    assert endless.truncated.all()
    assert (endless.lengths == C).all()


def test_a_row_ends_with_its_stop_token_and_zeros(model, endless):
    stop_ids = (int(endless.tokens[2, 5]), int(endless.tokens[7, 8]))
    samples = run(model, stop_ids=stop_ids)
    expect_stopped(samples, endless, stop_ids)
    assert samples.truncated.any() and (samples.lengths < C).any()  # both kinds are among the rows


def test_a_row_ends_at_its_own_limit_and_is_truncated_unless_it_stopped(model, endless):
    """Limits before, at and behind the stop token of a row, and of rows without one."""
    stop_ids = (int(endless.tokens[2, 5]), int(endless.tokens[7, 8]))
    for shift in range(3):
        limits = np.array([1, C, 5, 2, 7, C - 1, 3, 8, 4]) + shift * (np.arange(B) % 3 == 2 - shift % 2)
        limits = np.minimum(limits, C)
        samples = run(model, stop_ids=stop_ids, limits=limits)
        expect_stopped(samples, endless, stop_ids, limits)
        assert (samples.lengths < limits).any() and samples.truncated.any()


def watch_steps(monkeypatch, slots=False) -> list[tuple[int, int]]:
    """Each step that any decoding compiled from now on takes: its slot, and the rows it computes or the slots it reads."""
    steps = []
    forward_cached = models.sampler.forward_cached

    def counted(params, tokens, positions, count, prefix, cache, *rest):
        size = cache.positions.shape[1] if slots else len(tokens)
        jax.debug.callback(lambda slot: steps.append((int(slot), size)), count % cache.positions.shape[1])
        return forward_cached(params, tokens, positions, count, prefix, cache, *rest)

    monkeypatch.setattr(models.sampler, "forward_cached", counted)
    return steps


def test_the_loop_ends_as_soon_as_all_rows_have_stopped(model, endless, monkeypatch):
    steps = watch_steps(monkeypatch)
    stop_ids = tuple(sorted({*endless.tokens[:, 3].tolist()}))
    samples = run(model, stop_ids=stop_ids)
    jax.effects_barrier()
    expect_stopped(samples, endless, stop_ids)
    assert not samples.truncated.any() and samples.lengths.max() < C
    assert sorted(steps) == [(step, B) for step in range(samples.lengths.max())]


@pytest.mark.long
def test_a_step_of_unrolled_layers_reads_half_of_the_slots_while_they_hold_all_tokens(model, monkeypatch):
    steps = watch_steps(monkeypatch, slots=True)
    for unroll in (False, True):
        for width, stages in ((1, [1]), (2, [1, 2]), (7, [4, 7]), (16, [8, 16])):
            run(model, width=width, execution=replace(COMPUTE, unroll=unroll))
            jax.effects_barrier()
            read = [min(size for size in stages if step < size) if unroll else width for step in range(width)]
            assert sorted(steps) == list(enumerate(read))
            steps.clear()


@pytest.mark.parametrize(
    ("slots", "most", "widths"),
    [
        (1, 1, [1]), (128, 128, [128]), (129, 129, [128, 129]), (768, 768, [128, 256, 384, 512, 640, 768]),
        (1024, 1024, [*range(128, 1025, 128)]), (1100, 1100, [256, 512, 768, 1024, 1100]), (512, 1100, [256, 512]),
        (100, 1100, [100]), (768, None, [768]),
    ],
)  # fmt: skip
def test_attention_reads_multiples_of_128_slots(slots, most, widths):
    assert read_widths(slots, most) == widths and len(widths) <= 8


def test_a_step_of_stacked_layers_reads_the_slots_that_are_written(model, monkeypatch):
    """The cache beyond them may hold anything, even NaN; and the samples are those of unrolled layers, which read all slots."""
    width, read = 260, []
    read_slots = models.kv_cache.read_slots

    def watched(k, v, positions, local, index, width):
        jax.debug.callback(lambda layer: read.append((int(layer), width)), index)
        return read_slots(k, v, positions, local, index, width)

    def spoilt(rows, width, config, execution):
        kv = empty_kv(rows, width, config, execution)
        beyond = jnp.arange(width)[:, None] >= 256
        return replace(kv, k=jnp.where(beyond, jnp.nan, kv.k), v=jnp.where(beyond, jnp.nan, kv.v))

    unrolled = run(model, width=width, execution=replace(COMPUTE, unroll=True))
    expect_equal(run(model, width=width), unrolled)
    monkeypatch.setattr(models.kv_cache, "read_slots", watched)
    monkeypatch.setattr(models.sampler, "empty_kv", spoilt)
    jax.clear_caches()
    samples = run(model, width=width, limits=np.full(B, 256))
    jax.effects_barrier()
    own = Counter(slots for layer, slots in read if layer == 0 and slots != P)
    assert own == {128: 128, 256: 128}
    np.testing.assert_array_equal(samples.tokens[:, :256], unrolled.tokens[:, :256])
    jax.clear_caches()


# The batch halves as rows stop.

NATURAL = np.random.default_rng(8).permutation([*range(1, C + 1)] * 3 + [1, 2, 3, 3, 4, 4, 5, 6, 7, 8, 9, 12, 12] + [2] * 15)


def small_model() -> Model:
    config = GemmaConfig(
        num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32, vocab_size=64, query_scale=0.5,
        local_layers=(True, False), sliding_window=5,
    )  # fmt: skip
    return Model(config, init_params(jax.random.key(1), config, STORE))


def run_natural(devices: int, tp: int, halvings: int) -> Samples:
    """64 rows of 8 prompts, each with its own limit."""
    lengths = np.arange(1, 9)
    prompts = np.random.default_rng(9).integers(3, 64, (8, 8)) * (np.arange(8) < lengths[:, None])
    with jax.set_mesh(make_mesh(tp, jax.devices()[:devices])):
        model = small_model()
        view = replace(model, params=COMPUTE.use(model.params, axes(model.config)))
        temperatures = np.tile([0, 0.7, 1, 1.5], 16)
        return run(
            view,
            to_devices(prompts, "QP"),
            to_devices(lengths, "Q"),
            range(64),
            temperatures,
            limits=NATURAL,
            halvings=halvings,
            stop_ids=(1, 40),
        )


@pytest.fixture(scope="module")
def whole() -> Samples:
    samples = run_natural(1, 1, halvings=0)
    assert samples.truncated.any() and (samples.lengths < NATURAL).any()
    return samples


@pytest.mark.parametrize(
    ("devices", "tp", "halvings"),
    [(8, 4, 2), *(pytest.param(*case, marks=pytest.mark.long) for case in ((1, 1, 1), (8, 1, 9)))],
)
def test_halving_the_batch_changes_no_sample(whole, devices, tp, halvings):
    """Eight devices have eight rows each: after three halvings one row is left, and nine are no more than three."""
    expect_equal(run_natural(devices, tp, halvings), whole)


def test_a_step_computes_no_more_rows_than_the_halvings_leave(whole, monkeypatch):
    """64, then 32, 16 and 8, each from the step on before which no more than so many rows are alive."""
    steps = watch_steps(monkeypatch)
    samples = run_natural(1, 1, halvings=3)
    jax.effects_barrier()
    expect_equal(samples, whole)
    expected = []
    for step in range(samples.lengths.max()):
        alive = (samples.lengths > step).sum()
        expected.append((step, min(size for size in (64, 32, 16, 8) if alive <= size or size == 64)))
    assert sorted(steps) == expected
    assert {size for _, size in steps} == {64, 32, 16, 8}


# A row's random numbers are its own.


def test_a_step_is_repeatable_and_another_step_or_seed_differs(model, endless):
    again = run(model)
    assert (again.tokens == endless.tokens).all() and (again.logprobs == endless.logprobs).all()
    warm = TEMPERATURES >= 1
    for other in (run(model, step=1), run(model, seed=1)):
        assert (other.tokens != endless.tokens).any(axis=1)[warm].all()
    assert (run(model, step=1).tokens != run(model, seed=1).tokens).any()


def test_samples_of_a_group_differ(model):
    tokens = run(model, temperature=np.ones(B)).tokens
    assert len({tuple(row) for row in tokens}) == B


def test_a_row_depends_neither_on_its_neighbours_nor_on_their_number(model, endless):
    prompts, temperatures = PROMPTS[::-1].copy(), TEMPERATURES[::-1].copy()
    prompts[1], temperatures[G : 2 * G] = PROMPTS[1], TEMPERATURES[G : 2 * G]
    beside_others = run(model, prompts, np.array([2, LENGTHS[1], 13]), temperature=temperatures)
    alone = run(model, PROMPTS[1:2], LENGTHS[1:2], range(G, 2 * G), TEMPERATURES[G : 2 * G])
    same = jax.tree.map(lambda x: x[G : 2 * G], beside_others)
    for samples in (same, alone):
        assert (samples.tokens == endless.tokens[G : 2 * G]).all()
        np.testing.assert_allclose(samples.logprobs, endless.logprobs[G : 2 * G], rtol=0, atol=1e-5)
    assert (beside_others.tokens[:G] != endless.tokens[:G]).any()


def test_nothing_compiles_anew_for_other_values(model):
    compiled = CompileCounter()
    run(model, width=C + 1)
    assert compiled.count > 0
    before = compiled.count
    run(model, PROMPTS[::-1].copy(), np.array([1, 2, 3]), range(70, 70 + B), np.linspace(0, 3, B), seed=8, step=9, width=C + 1)
    assert compiled.count == before


# Draws follow the softmax.


def chi_square_p(counts: np.ndarray, expected: np.ndarray) -> float:
    """P-value of `counts` under `expected`; entries expected less than 10 times are taken together.

    With an even number n of degrees of freedom it is exp(-x/2) * sum of (x/2)**i / i! for i < n/2.
    """
    order = np.argsort(expected)
    rare = int((np.cumsum(expected[order]) < 10).sum()) + 1
    rare = max(rare, int((expected < 10).sum()))
    rare += (len(counts) - rare) % 2  # bins: the rest and one more; an odd number of them
    observed, wanted = (np.append(x[order[rare:]], x[order[:rare]].sum()) for x in (counts, expected))
    half = ((observed - wanted) ** 2 / wanted).sum() / 2
    assert len(observed) % 2 == 1
    return sum(math.exp(i * math.log(half) - half - math.lgamma(i + 1)) for i in range(len(observed) // 2))


def test_the_p_value_is_that_of_chi_square():
    """The median of chi-square with 4 degrees of freedom is 3.3567, its upper 5% point 9.4877 (any table)."""
    expected = np.full(5, 20.0)
    for statistic, p in ((3.3567, 0.5), (9.4877, 0.05)):
        shift = math.sqrt(statistic * 20 / 2)
        assert abs(chi_square_p(expected + shift * np.array([1, -1, 0, 0, 0]), expected) - p) < 1e-4


@partial(jax.jit, static_argnums=(3, 4))
def draw_both(logits, uniform, temperature, top_k=0, top_p=1.0):
    return draw(logits, uniform, temperature, Sampling(C, (), top_k, top_p), COMPUTE)


def drawn(*arguments) -> jax.Array:
    return draw_both(*arguments)[0]


def draw_many(logits: np.ndarray, uniform: np.ndarray, temperature: float, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """How often each entry of one distribution comes out.  V, n -> V"""
    n = len(uniform)
    rows = np.broadcast_to(logits.astype(np.float32), (n, len(logits)))
    tokens = drawn(rows, uniform.astype(np.float32), np.full(n, temperature, np.float32), top_k, top_p)
    return np.bincount(np.asarray(tokens), minlength=len(logits))


SIZES = [9, 17, 64, 65]  # blocks of 3, 1, 8 and 5


@pytest.mark.parametrize("size", SIZES)
def test_frequencies_follow_the_softmax_at_every_temperature(size):
    n = 20_000
    logits = 2 * np.random.default_rng(size).normal(size=size)
    even = (np.arange(n) + 0.5) / n
    for i, temperature in enumerate((0.3, 1.0, 2.5)):
        expected = n * softmax(logits / temperature)
        assert np.abs(draw_many(logits, even, temperature) - expected).max() < 2  # one at each border of its share
        random = np.asarray(jax.random.uniform(jax.random.key(i), (n,)))
        counts = draw_many(logits, random, temperature)
        assert chi_square_p(counts, expected) > 1e-3
        assert chi_square_p(counts, n * softmax(logits / (1.1 * temperature))) < 1e-3  # it can tell


def test_first_tokens_of_a_large_group_follow_the_softmax(model):
    n = 4096
    temperature = np.repeat([0.7, 1.5], n // 2)
    tokens = run(model, PROMPTS[:1], LENGTHS[:1], range(n), temperature, width=1).tokens[:, 0]
    logits = np.asarray(plain_logits(model.params, PROMPTS[:1], np.arange(P)[None], model.config), np.float64)[0, -1]
    for temperatures, drawn_tokens in zip((0.7, 1.5), np.split(tokens, 2), strict=True):
        counts = np.bincount(drawn_tokens, minlength=len(logits))
        assert chi_square_p(counts, n // 2 * softmax(logits / temperatures)) > 1e-3


def test_every_row_slot_step_and_seed_has_its_own_random_number(model):
    """All logits are 0 when the embedding is 0: each token shows its random number."""
    blank = replace(model, params=model.params.replace(embedding=jnp.zeros_like(model.params.embedding)))
    tokens = [[run(blank, temperature=np.ones(B), seed=seed, step=step).tokens for step in range(3)] for seed in range(3)]
    tokens = np.array(tokens)  # seed, step, row, slot
    V = model.config.vocab_size
    assert chi_square_p(np.bincount(tokens.reshape(-1), minlength=V), np.full(V, tokens.size / V)) > 1e-3
    for axis in range(tokens.ndim):
        one, next_one = np.delete(tokens, 0, axis), np.delete(tokens, -1, axis)
        broadcast_from_main = (one == next_one).mean()
        assert broadcast_from_main < 1 / V + 4 * math.sqrt(1 / V / one.size)  # chance, and four standard deviations


# Top-k and top-p.


def kept(weights: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """The same cut by sorting: the k heaviest and their ties, then of these the smallest set that reaches p.  V -> V, bool"""
    keep = np.ones(len(weights), bool)
    if top_k:
        keep = weights >= np.sort(weights)[::-1][min(top_k, len(weights)) - 1]
    if top_p < 1:
        heaviest = np.sort(np.where(keep, weights, 0))[::-1]
        enough = np.searchsorted(np.cumsum(heaviest), top_p * heaviest.sum() - 1e-12)
        keep &= weights >= heaviest[enough]
    return keep


@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [(1, 1.0), (5, 1.0), (64, 1.0), (1000, 1.0), (0, 1e-45), (0, 1e-6), (0, 0.35), (0, 0.9), (7, 0.8), (3, 0.999)],
)
def test_top_k_and_top_p_keep_what_sorting_keeps(top_k, top_p):
    n = 20_000
    numbers = np.random.default_rng(1)
    plain, tied = 1.2 * numbers.normal(size=64), np.round(numbers.normal(size=64) * 2) / 2
    powers = np.log([8, 4, 2, 2, *[1e-30] * 60])  # shares of exactly 1/2, 1/4, 1/8, 1/8
    even = (np.arange(n) + 0.5) / n
    for logits in (plain, tied, powers):
        weights = softmax(logits / 1.5) if logits is not powers else softmax(logits)
        counts = draw_many(logits, even, 1.5 if logits is not powers else 1.0, top_k, top_p)
        keep = kept(weights, top_k, top_p)
        expected = n * np.where(keep, weights, 0) / weights[keep].sum()
        assert (counts[~keep] == 0).all()
        assert np.abs(counts - expected).max() < 2
        assert (counts[expected > 2] > 0).all()


@pytest.mark.parametrize("top_p, shares", [(0.5, 1), (0.75, 2), (0.76, 4), (0.875, 4)])
def test_top_p_stops_at_the_entry_that_reaches_it_and_keeps_its_ties(top_p, shares):
    counts = draw_many(np.log([8.0, 4, 2, 2]), np.linspace(0, 1, 1000, endpoint=False), 1.0, 0, top_p)
    assert (counts > 0).sum() == shares


def test_the_threshold_is_exact_to_the_last_bit():
    half, smallest = np.float32(0.5), np.finfo(np.float32).tiny
    weights = np.array([smallest, np.nextafter(half, 0), 1, half, 0, np.nextafter(half, 1)], np.float32)
    heaviest = np.argsort(-weights)
    for k in range(1, 6):
        cut = keep_heaviest(jnp.asarray(weights[None]), lambda kept: (kept > 0).sum(axis=-1), jnp.full(1, k))
        assert sorted(np.flatnonzero(np.asarray(cut)[0])) == sorted(heaviest[:k])


def test_the_search_for_a_threshold_ends_when_the_count_is_met_and_ties_take_all_31_passes():
    for weights, least, most in (([1.0, 0.5, 0.25, 0.125], 2, 12), ([1.0, 0.5, 0.5, 0.125], 31, 31)):
        passes = []

        def count(kept, passes=passes):
            jax.debug.callback(lambda: passes.append(1))
            return (kept > 0).sum(axis=-1)

        cut = keep_heaviest(jnp.array([weights]), count, jnp.full(1, 2))
        jax.effects_barrier()
        assert np.asarray(cut)[0].tolist() == [w if w >= 0.5 else 0 for w in weights]
        assert least <= len(passes) <= most


def primitives(jaxpr) -> set[str]:
    """Names of all primitives, those of inner programs too."""
    names = {equation.primitive.name for equation in jaxpr.eqns}
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            names |= primitives(inner) if hasattr(inner, "eqns") else set()
    return names


def test_nothing_sorts(model):
    prefix = prefill(model.params, PROMPTS, LENGTHS, model.config, COMPUTE)
    keys, temperatures = row_keys(0, 0, jnp.arange(B)), jnp.asarray(TEMPERATURES)
    sampling = Sampling(C, (1,), top_k=5, top_p=0.9)
    trace = decode.trace(model.params, prefix, keys, temperatures, jnp.full(B, C), model.config, COMPUTE, sampling)
    names = primitives(trace.jaxpr.jaxpr)
    assert {"while", "dot_general", "cumsum", "exp"} <= names
    sorters = jax.make_jaxpr(lambda x: (jnp.sort(x), jax.lax.top_k(x, 2), jax.lax.approx_max_k(x, 2)))(jnp.ones(4))
    assert {"sort", "top_k", "approx_top_k"} <= primitives(sorters.jaxpr)
    assert not names & {"sort", "top_k", "approx_top_k"}


# Edges of a draw.


@pytest.mark.parametrize("size", SIZES)
def test_an_entry_of_weight_zero_is_never_drawn(size):
    numbers = np.random.default_rng(size)
    n = 3000
    possible = numbers.random((n, size)) < numbers.random((n, 1)) ** 2
    possible[np.arange(n), numbers.integers(size, size=n)] = True  # at least one
    possible[:size] = np.eye(size, dtype=bool)  # one alone, everywhere
    logits = np.where(possible, 5 * numbers.normal(size=(n, size)), -np.inf)
    for uniform in (0.0, 2.0**-24, 0.5, ALMOST_ONE):
        tokens = np.asarray(drawn(logits.astype(np.float32), np.full(n, uniform, np.float32), np.ones(n, np.float32)))
        assert possible[np.arange(n), tokens].all()
        if uniform == 0:
            assert (tokens == possible.argmax(axis=1)).all()  # the first of all
        if uniform == ALMOST_ONE:
            assert (tokens[:size] == np.arange(size)).all()


def test_a_tail_of_tiny_weights_is_reached_and_what_underflows_is_not():
    logits = np.array([[0.0] * 8 + [-10.0] * 48 + [-200.0] * 8] * 2, np.float32)
    last, first = np.asarray(drawn(logits, np.array([ALMOST_ONE, 0], np.float32), np.ones(2, np.float32)))
    assert (last, first) == (55, 0)


def test_each_row_has_its_own_temperature_and_zero_takes_the_first_of_the_best():
    n, size = 600, 17
    numbers = np.random.default_rng(2)
    logits = np.round(numbers.normal(size=(n, size)), 1).astype(np.float32)
    temperatures = numbers.choice([0, 0.5, 3], n).astype(np.float32)
    uniform = numbers.random(n).astype(np.float32)
    tokens = np.asarray(drawn(logits, uniform, temperatures))
    assert (tokens == np.asarray(drawn(logits, uniform, temperatures, 3, 0.7)))[temperatures == 0].all()
    assert (tokens[temperatures == 0] == logits[temperatures == 0].argmax(axis=1)).all()
    for temperature in (0.5, 3.0):
        rows = temperatures == temperature
        running = np.cumsum(softmax(logits[rows].astype(np.float64) / temperature), axis=1)
        near = np.abs(running - uniform[rows, None]).min(axis=1) < 1e-6  # where float32 may round either way
        assert near.mean() < 0.01
        assert (tokens[rows] == (running <= uniform[rows, None]).sum(axis=1))[~near].all()

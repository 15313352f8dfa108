"""Laws of bfloat16, on a CPU: what a rounding may cost, derived from the dtype, and what none may lose.

A bfloat16 number has 8 significant bits: a rounding costs 2**-8 of a value at most, and less than 2**-9 root mean square.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_references import REFERENCES
from test_gemma import rounding_noise
from tiny_run import CONFIG as RUN

from data.tokenizer import load_tokenizer
from grpo.batch import Batch, make_batch
from grpo.update import UpdateConfig, completion_logprobs, kept_by_rounding, policy, sampling_params
from models.formats.convert import load_params, read_config
from models.gemma import (
    FAR,
    KV,
    Adapted,
    ExecutionConfig,
    GemmaConfig,
    attend_piece,
    embed,
    forward,
    init_params,
    linear,
    pick_logprobs,
    rope_table,
    rotate,
    token_logprobs,
    vocab_logits,
)
from models.lora import PROJECTIONS, Adapter, Adapters, init_adapters
from models.sampler import Sampling, row_keys, sample
from models.sharding import ROLLOUT, STORE

FLOAT32, BFLOAT16 = ExecutionConfig(), ExecutionConfig(dtype="bfloat16")
RATE, SIZES = 1e-5, (1, 3, 10, 100)  # of gemma2-2b-lora; an adapter's entries after so many of Adam's steps
RANK = 64
TEXTS = (
    "Question: Tom has 3 boxes with 12 apples each. He eats 5 apples. How many are left? Answer:",
    "The history of the steam engine begins with",
    "Question: A train travels 60 miles in 1.5 hours. What is its speed? Let us think step by step.",
    "def fibonacci(n):",
)
ONE_LAYER = GemmaConfig(
    num_layers=1, embed_dim=64, num_heads=2, num_kv_heads=1, head_dim=32, mlp_dim=128, vocab_size=64, query_scale=32**-0.5,
    local_layers=(False,),
)  # fmt: skip
UPDATE = replace(
    UpdateConfig.of(RUN), lora_rank=RANK, lora_alpha=float(RANK), lora_targets=",".join(PROJECTIONS), temperature=1.0,
    logprob_chunk=2048,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("mesh")


def slope(change, exact) -> float:
    """The share of the exact change that a change keeps: 1 when rounding adds noise but no bias."""
    change, exact = (np.asarray(x, np.float64) for x in (change, exact))
    return float((change * exact).sum() / (exact * exact).sum())


def signs(shape: tuple[int, ...], aligned: bool, seed: int = 1) -> np.ndarray:
    """Of B: random, or alike in all columns, as gradients of one kind of token make them."""
    numbers = np.random.default_rng(seed).choice([-1.0, 1.0], (*shape[:-1], 1) if aligned else shape)
    return np.broadcast_to(numbers, shape).astype(np.float32)


# ----------------------------------------------------------------------------------------- the first updates of adapters


@pytest.mark.parametrize("aligned", [False, True])
def test_a_sum_of_base_and_adapter_keeps_the_smallest_adapter(aligned):
    """Of one update as of a hundred. 2**20 entries tell the slope within 0.01; each product rounded by itself kept 0.04."""
    numbers = np.random.default_rng(0)
    x, base = (jnp.asarray(numbers.normal(0, s, shape), "bfloat16") for s, shape in ((1, (1, 4096, 64)), (0.03, (64, 256))))
    a, b = jnp.asarray(numbers.uniform(-1 / 8, 1 / 8, (64, RANK)), "float32"), signs((RANK, 256), aligned)

    def change(b):  # not compiled: XLA on a CPU may leave out a rounding between two operations
        return linear(x, Adapted(base, a, b, 1.0), "DF", BFLOAT16).astype("float32") - linear(x, base, "DF", BFLOAT16)

    for k in SIZES:
        exact = np.asarray(x, np.float64) @ np.asarray(a, np.float64) @ (RATE * k * b)
        assert abs(slope(change(RATE * k * b), exact) - 1) < 0.05, k


@pytest.fixture(scope="module")
def one_layer(mesh):
    """Base weights that are bfloat16 numbers, a batch of 2,048 tokens, and adapters by k: B after k of Adam's first steps."""
    base = jax.tree.map(lambda w: w.astype("bfloat16"), init_params(jax.random.key(0), ONE_LAYER, STORE))
    numbers = np.random.default_rng(2)
    prompts, tokens = numbers.integers(3, 64, (4, 8)), numbers.integers(3, 64, (16, 128))
    zeros, ones = np.zeros(tokens.shape, np.float32), np.ones(tokens.shape, bool)
    batch = make_batch(prompts, np.full(4, 8), tokens, np.full(16, 128), zeros, ones, zeros[:, 0], 0)
    fresh = init_adapters(jax.random.key(1), ONE_LAYER, PROJECTIONS, RANK, STORE)
    wanted = np.where(tokens < 20, 1.0, -0.3)
    gradient = jax.grad(lambda adapters: (trainer_logprobs(base, adapters, batch, FLOAT32) * wanted).sum())(fresh)

    def after(k: float) -> Adapters:
        return {name: Adapter(fresh[name].a, RATE * k * jnp.sign(gradient[name].b)) for name in fresh}

    return base, batch, after


def trainer_logprobs(base, adapters: Adapters, batch: Batch, execution: ExecutionConfig):
    return completion_logprobs(policy(adapters, base, UPDATE), batch, ONE_LAYER, execution, UPDATE)


@partial(jax.jit, static_argnames="execution")
def plain_logprobs(params, rows, execution):
    hidden, _ = forward(params, rows, jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape), ONE_LAYER, execution)
    logits = vocab_logits(hidden[:, 7:-1], params, ONE_LAYER, execution)
    return pick_logprobs(logits, rows[:, 8:], jnp.asarray(1.0))


def sampler_logprobs(base, adapters: Adapters, batch: Batch, execution: ExecutionConfig):
    """Under the sampler's own parameters, through its forward pass."""
    execution = replace(execution, rules=ROLLOUT)
    rows = np.concatenate([np.repeat(np.asarray(batch.prompts), 4, axis=0), np.asarray(batch.packed.tokens)], axis=1)
    return plain_logprobs(sampling_params(policy(adapters, base, UPDATE), ONE_LAYER, execution), rows, execution)


@pytest.mark.parametrize("logprobs", [trainer_logprobs, sampler_logprobs])
def test_log_probabilities_change_as_much_as_in_float32(one_layer, logprobs):
    """In both forms. 2,048 tokens tell the slope within 0.02; each product rounded by itself kept 0.48 after ten steps."""
    base, batch, after = one_layer
    for k in (10, 100):
        rounded, exact = (logprobs(base, after(k), batch, e) - logprobs(base, after(0), batch, e) for e in (BFLOAT16, FLOAT32))
        assert abs(slope(rounded, exact) - 1) < 0.05, k


def test_the_metric_of_what_rounding_keeps_is_the_slope_of_either_form(one_layer):
    base, batch, after = one_layer
    old, drawn = (np.asarray(f(base, after(10), batch, BFLOAT16)) for f in (trainer_logprobs, sampler_logprobs))
    start, before, now = (
        np.asarray(trainer_logprobs(base, after(k), batch, execution))
        for k, execution in ((0, BFLOAT16), (0, FLOAT32), (10, FLOAT32))
    )
    mask, half = (np.arange(128) < 100) * np.ones((16, 1), np.float32), (start + drawn) / 2
    batch = replace(batch, mask=jnp.asarray(mask), sampler_logprobs=jnp.asarray(np.where(mask > 0, half, np.nan)))

    def kept(adapters, old):
        return jax.device_get(kept_by_rounding(adapters, base, batch, jnp.asarray(old), ONE_LAYER, BFLOAT16, UPDATE))

    found = kept(after(10), np.where(mask > 0, old, np.nan))
    mask[4:] = 0  # on one device, one group of four is looked at
    trainer, sampler = (slope((x - start) * mask, (now - before) * mask) for x in (old, half))
    assert found == pytest.approx({"lora/kept/trainer": trainer, "lora/kept/sampler": sampler}, rel=1e-3)
    assert 0.9 < trainer < 1.1 and 0.4 < sampler < 0.6
    assert np.isnan(list(kept(after(0), start).values())).all()


# ------------------------------------------------------------------------------------------- sampler, trainer, packed rows


@pytest.fixture(scope="module", params=[pytest.param("gemma1-mqa", marks=pytest.mark.long), "gemma3-gqa"])
def reference(request, mesh):
    config = read_config(REFERENCES / request.param)
    return config, load_params(REFERENCES / request.param, config, mesh, STORE, "bfloat16")


def apart(ours, theirs) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)))))


def gap_allowed(config: GemmaConfig, params, rows) -> float:
    """Between two orders of computing the same log-probability: each of the two has the logits' rounding noise, which is
    relative to their size and enters twice, in the chosen logit and in the normalizer.
    """
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
    hidden, _ = jax.jit(forward, static_argnums=(3, 4))(params, rows, positions, config, FLOAT32)
    size = float(jnp.sqrt(jnp.mean(jnp.square(vocab_logits(hidden, params, config, FLOAT32)))))
    return 2 * rounding_noise(config) * size


def test_sampler_and_trainer_differ_by_rounding_alone_and_so_do_packed_and_padded_rows(reference):
    config, params = reference
    numbers = np.random.default_rng(5)
    lengths, prompts = np.array([9, 3, 6, 9]), numbers.integers(3, 64, (4, 9))
    samples = sample(
        params, jnp.asarray(prompts), jnp.asarray(lengths), row_keys(0, 0, jnp.arange(16)), jnp.ones(16), config,
        replace(BFLOAT16, rules=ROLLOUT), Sampling(12, ()),
    )  # fmt: skip
    drawn, limits = np.asarray(samples.logprobs), np.arange(16) * 5 % 6 + 1
    mask, tokens = np.arange(12) < limits[:, None], np.asarray(samples.tokens)
    bound = gap_allowed(config, params, jnp.asarray(tokens))
    settings = replace(UPDATE, lora_rank=0, logprob_chunk=64)
    found = {}
    for packing in (0, 4):
        batch = make_batch(prompts, lengths, tokens * mask, limits, drawn, mask, np.zeros(16, np.float32), packing)
        found[packing] = np.asarray(completion_logprobs(params, batch, config, BFLOAT16, settings))
        assert 0 < apart(found[packing][mask], drawn[mask]) < bound
    assert batch.packed.tokens.shape != tokens.shape
    assert apart(found[0][mask], found[4][mask]) < bound
    exact = np.asarray(completion_logprobs(params, batch, config, FLOAT32, settings))
    assert 2**-9 * np.abs(drawn[mask]).min() < apart(found[4][mask], exact[mask]) < bound


# ----------------------------------------------------------------------------------------------- where sums are float32


def test_logits_are_float32_sums_of_rounded_operands():
    """Not rounded after: 2**-20 of their size, where bfloat16 would be off by 2**-10 on average."""
    numbers = np.random.default_rng(0)
    params = init_params(jax.random.key(0), ONE_LAYER, STORE, "bfloat16")
    hidden = jnp.asarray(numbers.normal(size=(2, 5, 64)), "bfloat16")
    logits = vocab_logits(hidden, params, ONE_LAYER, BFLOAT16)
    exact = np.asarray(hidden, np.float64) @ np.asarray(params.embedding, np.float64).T
    assert logits.dtype == jnp.float32 and apart(logits, exact) < 2**-20 * apart(exact, 0)


def test_scores_and_their_softmax_are_float32():
    """Sums of weights and highest scores of exact products; the mixed values have one rounding of the weights."""
    numbers = np.random.default_rng(1)
    q, k, v = (jnp.asarray(numbers.normal(size=shape), "bfloat16") for shape in ((1, 6, 2, 32), (1, 1, 32, 6), (1, 1, 6, 32)))
    positions = jnp.arange(6)[None]
    values, totals, tops = attend_piece(q, KV(k, v, positions), positions, jnp.asarray(FAR), ONE_LAYER, BFLOAT16.at)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("btnh,bkhs->btns", q, k) * ONE_LAYER.query_scale
    scores = np.where(np.tri(6, dtype=bool)[None, :, None], scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - top)
    np.testing.assert_allclose(tops, top, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(totals, weights.sum(axis=-1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(
        values, np.einsum("btns,bksh->btnh", weights, v), rtol=0, atol=2**-8 * np.abs(v).sum(axis=2).max()
    )


def test_queries_and_keys_are_rotated_in_float32_and_rounded_once():
    """To half a unit in the last place of each entry, 2**-8 at most, at any position; and never before RoPE."""
    numbers = np.random.default_rng(2)
    x, positions = numbers.normal(size=(1, 4, 2, 32)), np.array([[1, 257, 1000, 4001]])
    angles = positions[..., None, None] * 10_000.0 ** -(np.arange(0, 32, 2) / 32)
    table = rope_table(jnp.asarray(positions), ONE_LAYER)[0]
    for dtype, tolerance in (("float32", 2**-10), ("bfloat16", 2**-8)):  # an angle of 4,001 has 2**-12 after float32
        given = jnp.asarray(x, dtype)
        left, right = np.split(np.asarray(given, np.float64), 2, axis=-1)
        turned = left * np.cos(angles) - right * np.sin(angles), right * np.cos(angles) + left * np.sin(angles)
        ours = rotate(given, table)
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.asarray(ours, np.float64), np.concatenate(turned, -1), rtol=tolerance, atol=2**-10)


def test_a_thousand_equal_gradients_of_one_token_add_up():
    """In bfloat16 a sum of ones ends at 256: the table's gradient, and that of the head over chunks, are added in float32."""
    params = init_params(jax.random.key(0), ONE_LAYER, STORE)
    tokens, hidden = jnp.full((1, 1000), 5), jnp.ones((1, 1000, 64), "bfloat16")

    def of_table(params):
        return embed(params, tokens, ONE_LAYER, BFLOAT16).astype("float32").sum()

    def of_head(params, chunk):
        return token_logprobs(params, hidden, tokens, 1.0, ONE_LAYER, BFLOAT16, chunk).sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(of_table))(params).embedding[5], 1000 * 8.0)  # 8: the root of the width
    gradient = jax.jit(jax.grad(of_head), static_argnums=1)
    chunks, whole = (np.asarray(gradient(params, chunk).embedding) for chunk in (2, 1000))
    np.testing.assert_allclose(chunks, whole, rtol=2**-7)  # the product of each chunk is rounded once


# ----------------------------------------------------------------------------------------------------------- the real 270M


def test_the_real_270m_changes_as_much_as_in_float32(gemma270m, mesh):
    """B is k of Adam's first steps along the gradient. The change is the half difference between B and -B, so that the noise of
    the base cancels; 640 tokens tell the slope at k = 1 within about 0.03, which is allowed twice.
    """
    config, tokenizer = read_config(gemma270m), load_tokenizer(gemma270m)
    exact = load_params(gemma270m, config, mesh, STORE)
    base = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), exact)
    ids = [[2, *tokenizer.encode(text)] for text in TEXTS]
    lengths = np.array([len(row) for row in ids])
    prompts = np.array([row + [0] * (lengths.max() - len(row)) for row in ids])
    drawn = sample(
        exact, jnp.asarray(prompts), jnp.asarray(lengths), row_keys(0, 0, jnp.arange(16)), jnp.ones(16), config,
        replace(FLOAT32, rules=ROLLOUT), Sampling(40, ()),
    )  # fmt: skip
    tokens, mask = np.asarray(drawn.tokens), np.ones((16, 40), bool)
    batch = make_batch(
        prompts, lengths, tokens, np.full(16, 40), np.asarray(drawn.logprobs), mask, np.zeros(16, np.float32), 0
    )  # fmt: skip
    settings = replace(UPDATE, logprob_chunk=1024)
    fresh = init_adapters(jax.random.key(0), config, PROJECTIONS, RANK, STORE)
    wanted = np.where(np.arange(16) % 2, 1.0, -1.0)[:, None]

    def trainer(base, adapters, execution):
        return completion_logprobs(policy(adapters, base, settings), batch, config, execution, settings)

    @partial(jax.jit, static_argnames="execution")
    def plain(params, rows, execution):
        hidden, _ = forward(params, rows, jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape), config, execution)
        return hidden

    def sampler(base, adapters, execution):
        """Through the sampler's parameters and forward pass, prompt by prompt, because `forward` does not pad in the middle."""
        execution = replace(execution, rules=ROLLOUT)
        params, found = sampling_params(policy(adapters, base, settings), config, execution), []
        for i, row in enumerate(ids):
            rows = np.concatenate([np.tile(row, (4, 1)), tokens[4 * i : 4 * i + 4]], axis=1)
            hidden = plain(params, rows, execution)[:, len(row) - 1 : -1]
            logits = vocab_logits(hidden, params, config, execution)
            found.append(pick_logprobs(logits, jnp.asarray(rows[:, len(row) :]), jnp.asarray(1.0)))
        return np.concatenate(found)

    gradient = jax.grad(lambda adapters: (trainer(exact, adapters, FLOAT32) * wanted).sum())(fresh)

    def change(logprobs, base, execution, k):
        sides = [{n: Adapter(fresh[n].a, s * RATE * k * jnp.sign(gradient[n].b)) for n in fresh} for s in (1, -1)]
        there, back = (np.asarray(logprobs(base, adapters, execution), np.float64) for adapters in sides)
        return (there - back) / 2

    for k in SIZES:
        true = change(trainer, exact, FLOAT32, k)
        for logprobs in (trainer, sampler):
            rounded = change(logprobs, base, BFLOAT16, k)
            kept = slope(rounded, true)
            error = np.sqrt(((rounded - kept * true) ** 2 * true**2).sum()) / (true**2).sum()
            print(f"k {k}, {logprobs.__name__}: slope {kept:.3f}, standard error {error:.3f}, true {np.abs(true).mean():.4f}")
            assert error < 0.05 and abs(kept - 1) < 0.05 + 2 * error

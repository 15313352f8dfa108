"""Laws of bfloat16, on a CPU: what a rounding may cost, derived from the dtype, and what none may lose.

A bfloat16 number has 8 significant bits. A rounding costs 2**-8 of a value at most, and less than 2**-9 in the root mean square.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_references import REFERENCES
from test_gemma import rounding_noise

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
    rotate,
    rope_table,
    token_logprobs,
    vocab_logits,
)
from models.lora import PROJECTIONS, Adapter, Adapters, init_adapters
from models.sampler import Sampling, row_keys, sample
from models.sharding import ROLLOUT, STORE
from tiny_run import CONFIG as RUN

FLOAT32, BFLOAT16 = ExecutionConfig(), ExecutionConfig(dtype="bfloat16")
RATE, SIZES = 1e-5, (1, 3, 10, 100)  # of gemma2-2b-lora; an adapter's entries after so many of Adam's steps
RANK = 64
ONE_LAYER = GemmaConfig(
    num_layers=1, embed_dim=64, num_heads=2, num_kv_heads=1, head_dim=32, mlp_dim=128, vocab_size=64, query_scale=32**-0.5,
    local_layers=(False,),
)  # fmt: skip
UPDATE = replace(UpdateConfig.of(RUN), lora_rank=RANK, lora_alpha=float(RANK), lora_targets=",".join(PROJECTIONS), temperature=1.0)

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

    @jax.jit
    def change(b):
        return linear(x, Adapted(base, a, b, 1.0), "DF", BFLOAT16).astype("float32") - linear(x, base, "DF", BFLOAT16)

    for k in SIZES:
        exact = np.asarray(x, np.float64) @ np.asarray(a, np.float64) @ (RATE * k * b)
        assert abs(slope(change(RATE * k * b), exact) - 1) < 0.05, k


@pytest.fixture(scope="module")
def one_layer(mesh):
    """Base weights that are bfloat16 numbers, a batch of 2,048 tokens, adapters with B = 0."""
    base = jax.tree.map(lambda w: w.astype("bfloat16"), init_params(jax.random.key(0), ONE_LAYER, STORE))
    numbers = np.random.default_rng(2)
    prompts, tokens = numbers.integers(3, 64, (4, 8)), numbers.integers(3, 64, (16, 128))
    zeros, ones = np.zeros(tokens.shape, np.float32), np.ones(tokens.shape, bool)
    batch = make_batch(prompts, np.full(4, 8), tokens, np.full(16, 128), zeros, ones, zeros[:, 0], 0)
    return base, batch, init_adapters(jax.random.key(1), ONE_LAYER, PROJECTIONS, RANK, STORE)


def grown(adapters: Adapters, k: float, aligned: bool) -> Adapters:
    """The adapters with a B of `k` steps at the rate."""
    return {name: Adapter(x.a, jnp.asarray(RATE * k * signs(x.b.shape, aligned))) for name, x in adapters.items()}


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
@pytest.mark.parametrize("aligned", [False, True])
def test_log_probabilities_change_as_much_as_in_float32(one_layer, logprobs, aligned):
    base, batch, zero = one_layer
    for k in SIZES:
        rounded, exact = (
            logprobs(base, grown(zero, k, aligned), batch, e) - logprobs(base, zero, batch, e) for e in (BFLOAT16, FLOAT32)
        )
        print(k, aligned, logprobs.__name__, slope(rounded, exact), float(jnp.abs(exact).mean()))

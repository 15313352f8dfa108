"""Laws of models/kernels.py, its kernel interpreted: the plain attention's values and gradients, the mask, padding."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.batches import pack
from models.gemma import FAR, Compute, GemmaConfig, axes, forward_group, init_params
from models.kernels import splash_attention
from models.sharding import STORE, TRAIN, make_mesh, put, reshard, spec, specs

pytestmark = pytest.mark.usefixtures("mesh")

# Packed rows of 3 to 4 blocks' sides: a completion may be empty, or longer than the window, or cross from block to block.
Q, G, P, C = 8, 4, 24, 90


def model(**features) -> GemmaConfig:
    return GemmaConfig(
        num_layers=2, embed_dim=32, num_heads=4, head_dim=16, mlp_dim=48, vocab_size=64, query_scale=0.25, **features
    )  # fmt: skip


FAMILIES = {
    "gemma1": model(num_kv_heads=1, local_layers=(False, False)),
    "gemma2": model(num_kv_heads=2, local_layers=(True, False), sliding_window=256, attn_softcap=0.5, post_norms=True),
    "gemma3": model(
        num_kv_heads=1, local_layers=(True, False), sliding_window=30, rope_factor=8.0, post_norms=True, qk_norms=True
    ),
}


def batch(packed: bool) -> tuple:
    """Prompts, their lengths, rows, positions, segments, and random weights of a scalar of the hidden states."""
    numbers = np.random.default_rng(3)
    prompts, tokens = numbers.integers(0, 64, (Q, P)), numbers.integers(0, 64, (Q * G, C))
    prompt_lengths, lengths = numbers.integers(1, P + 1, Q), numbers.integers(0, C + 1, Q * G)
    lengths[:2] = 0, C
    if not packed:
        return prompts, prompt_lengths, tokens, None, None, numbers.normal(size=(Q * G, C, 32)).astype(np.float32)
    tokens, positions, segments, _ = pack(tokens, lengths, prompt_lengths, 8)
    weights = numbers.normal(size=(*tokens.shape, 32)) * (positions < FAR)[..., None]
    return prompts, prompt_lengths, tokens, positions, segments, weights.astype(np.float32)


@partial(jax.jit, static_argnames=("config", "compute"))
def hidden_and_gradients(params, prompts, lengths, tokens, positions, segments, weights, config, compute):
    def scalar(params):
        hidden = forward_group(params, prompts, lengths, tokens, config, compute, positions, segments)
        return (hidden * weights).sum(), hidden

    gradients, hidden = jax.grad(scalar, has_aux=True)(params)
    return jnp.where(weights == 0, 0, hidden), gradients


@cache
def weights_of(name: str):
    return jax.tree.map(np.asarray, init_params(jax.random.key(0), FAMILIES[name], STORE))


def placed(name: str, rows: list, weights: np.ndarray) -> list:
    """What `hidden_and_gradients` takes, on the devices."""
    params = jax.tree.map(jax.device_put, weights_of(name), specs(axes(FAMILIES[name]), STORE))
    return [params, *(None if x is None else put(x, "Q" if x.ndim == 1 else "QC") for x in rows), put(weights, "BCD")]


@cache
def result(name: str, devices: int, attention: str, packed: bool = True) -> list[np.ndarray]:
    """Hidden states, zero at padding, and gradients."""
    *rows, weights = batch(packed)
    compute = Compute(remat="full" if packed else "none", attention=attention)
    weights_of(name)  # made on one device
    with jax.set_mesh(make_mesh(min(devices, 2), jax.devices()[:devices])):
        found = hidden_and_gradients(*placed(name, rows, weights), FAMILIES[name], compute)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found)]


def expect_equal(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        largest = np.abs(other).max()
        assert largest > 0
        np.testing.assert_allclose(mine / largest, other / largest, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, devices", [("gemma1", 1), ("gemma2", 1), ("gemma3", 1), ("gemma3", 8)])
def test_splash_equals_plain_in_values_and_gradients(name, devices):
    expect_equal(result(name, devices, "splash"), result(name, 1, "plain"))


def test_splash_equals_plain_on_rows_of_one_completion():
    expect_equal(result("gemma2", 8, "splash", packed=False), result("gemma2", 1, "plain", packed=False))


@pytest.mark.parametrize("attention, expected", [("plain", False), ("splash", True)])
def test_compute_chooses_the_kernel(attention, expected):
    *rows, weights = batch(packed=True)
    compute = Compute(attention=attention)
    traced = hidden_and_gradients.trace(*placed("gemma2", rows, weights), FAMILIES["gemma2"], compute)
    assert ("pallas_call" in str(traced.jaxpr)) == expected


def random_row(T: int):
    """One row: a prompt of 9 of 12 slots, completions of 140 and 100, and padding."""
    numbers = np.random.default_rng(5)
    q, k, v = (numbers.normal(size=(1, T, heads, 16)).astype(np.float32) for heads in (4, 2, 2))
    positions, segments = np.full((1, T), FAR, np.int32), np.full((1, T), -1, np.int32)
    for start, first, length, segment in ((0, 0, 9, 0), (12, 9, 140, 1), (152, 9, 100, 2)):
        positions[0, start : start + length] = first + np.arange(length)
        segments[0, start : start + length] = segment
    return q, k, v, positions, segments


@partial(jax.jit, static_argnames=("scale", "cap"))
def kernel(q, k, v, positions, segments, window, scale, cap):
    q, k, v, positions, segments = reshard((q, k, v, positions, segments), ("QTNH", "QTKH", "QTKH", "QT", "QT"), TRAIN)
    return splash_attention(q, k, v, positions, segments, window, scale, cap, lambda letters: spec(letters, TRAIN))


@pytest.mark.parametrize("T", [256, 300])
@pytest.mark.parametrize("window, cap", [(FAR, None), (20, 0.7), (1, None)])
def test_splash_is_the_softmax_over_prompt_and_own_completion(window, cap, T):
    q, k, v, positions, segments = random_row(T)
    ours = np.asarray(kernel(q, k, v, positions, segments, window, 0.3, cap)).reshape(T, 4, 16)
    places, texts = positions[0].astype(np.int64), segments[0]
    for slot in np.flatnonzero(texts >= 0):
        age = places[slot] - places
        keys = np.flatnonzero((age >= 0) & (age < window) & ((texts == 0) | (texts == texts[slot])))
        assert slot in keys
        for head in range(4):
            scores = 0.3 * k[0, keys, head // 2].astype(np.float64) @ q[0, slot, head]
            weights = np.exp(scores if cap is None else cap * np.tanh(scores / cap))
            expected = weights @ v[0, keys, head // 2] / weights.sum()
            np.testing.assert_allclose(ours[slot, head], expected, rtol=0, atol=1e-5)


def test_padding_is_finite_and_neither_seen_nor_seeing():
    q, k, v, positions, segments = random_row(300)
    padding = segments[0] < 0

    def scalar(q, k, v):
        return (kernel(q, k, v, positions, segments, FAR, 0.3, None) * jnp.where(padding, 1e3, 0)[:, None]).sum()

    out = np.asarray(kernel(q, k, v, positions, segments, FAR, 0.3, None))
    others = (np.where(padding[:, None, None], 7, x) for x in (q, k, v))
    other = np.asarray(kernel(*others, positions, segments, FAR, 0.3, None))
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(out[0, ~padding], other[0, ~padding])
    for gradient in jax.grad(scalar, argnums=(0, 1, 2))(q, k, v):
        assert np.isfinite(gradient).all()
        assert (np.asarray(gradient)[0, ~padding] == 0).all()

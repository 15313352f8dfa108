"""Laws of models/gemma.py: transformers' logits on every family, one meaning of a group, of a log-probability, of a dtype."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_references import REFERENCES, VARIANTS, load, make, pad, real_logits

from data.tokenizer import load_tokenizer
from models.formats.convert import load_params, read_config
from models.gemma import (
    FAR,
    KV,
    ExecutionConfig,
    GemmaConfig,
    Params,
    attend,
    chunk_size,
    embed,
    forward,
    forward_group,
    gated,
    linear,
    pick_logprobs,
    shapes,
    token_logprobs,
    vocab_logits,
)
from models.sampler import Sampling, row_keys, sample
from models.sharding import STORE, to_devices

FLOAT32, BFLOAT16 = ExecutionConfig(), ExecutionConfig(dtype="bfloat16")


pytestmark = pytest.mark.usefixtures("mesh")


@pytest.fixture(scope="module")
def model(mesh):
    """A folder's config, weights and reference, by name."""

    def read(folder):
        config = read_config(folder)
        return config, load_params(folder, config, mesh, STORE), np.load(folder / "reference.npz")

    return read


@partial(jax.jit, static_argnames=("config", "execution"))
def logits_of(params, tokens, positions, config, execution):  # BT, BT -> BTV
    hidden, _ = forward(params, tokens, positions, config, execution)
    return vocab_logits(hidden, params, config, execution)


def rows_of(reference) -> list[np.ndarray]:
    return [row[:length] for row, length in zip(reference["tokens"], reference["lengths"], strict=True)]


def our_logits(params, config, rows, side, execution=FLOAT32, shift=0) -> np.ndarray:
    """Logits of every real token, row after row; padding sits at position FAR."""
    tokens, mask = pad(rows, side)
    positions = np.where(mask, mask.cumsum(axis=1) - 1 + shift, FAR)
    return np.asarray(logits_of(params, tokens, positions, config, execution))[mask]


def close(ours, theirs, tolerance) -> None:
    np.testing.assert_allclose(np.asarray(ours, np.float64), np.asarray(theirs, np.float64), rtol=0, atol=tolerance)


def expect_references(model, folder) -> None:
    config, params, reference = model(folder)
    rows = rows_of(reference)
    assert config.sliding_window == FAR or len(rows[0]) >= 3 * config.sliding_window
    for side in ("left", "right"):
        close(our_logits(params, config, rows, side), reference[side], 1e-4)
    alone = our_logits(params, config, [rows[0]] * len(rows), "right")  # nothing to pad
    close(alone, np.tile(reference["alone"], (len(rows), 1)), 1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers_with_padding_left_right_and_none(model, name):
    expect_references(model, REFERENCES / name)


@pytest.mark.long
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers_on_weights_made_now(model, name, tmp_path):
    pytest.importorskip("torch")
    make(name, tmp_path, seed=1000 + len(name))
    expect_references(model, tmp_path)


@pytest.mark.parametrize("name", VARIANTS)
def test_both_dialects_of_config_json_mean_the_same(name, tmp_path):
    (tmp_path / "config.json").write_bytes((REFERENCES / name / "config_v4.json").read_bytes())
    assert read_config(tmp_path) == read_config(REFERENCES / name)


@pytest.mark.long
@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_reads_our_older_dialect_alike(name, tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "config.json").write_bytes((REFERENCES / name / "config_v4.json").read_bytes())
    (tmp_path / "model.safetensors").symlink_to(REFERENCES / name / "model.safetensors")
    reference = np.load(REFERENCES / name / "reference.npz")
    close(real_logits(load(tmp_path), *pad(rows_of(reference)[:1], "right")), reference["alone"], 1e-4)


# The matrix product whose backward pass is written out.


@partial(jax.jit, static_argnames=("execution", "dtype"))
def linear_and_gradients(x, weight, dy, execution, dtype=None):
    y, backward = jax.vjp(lambda x, weight: linear(x, weight, "DF", execution, dtype=dtype), x, weight)
    return y, *backward(dy.astype(y.dtype))


jax_12 = pytest.mark.xfail(
    jax.__version_info__ >= (0, 12),
    reason="XLA sums a bfloat16 product in bfloat16 on a CPU if a transpose follows",
    strict=True,
)


@pytest.mark.parametrize(("D", "F"), [(6, 16), pytest.param(16, 6, marks=jax_12), (8, 8)])
def test_linear_and_its_gradients_equal_the_plain_product(D, F):
    """In bfloat16 to one rounding, 2**-8 of the result; a gradient has the dtype of what it belongs to."""
    numbers = np.random.default_rng(D)
    x, weight, dy = (round_to_bfloat16(numbers.normal(size=shape)) for shape in ((2, 3, D), (D, F), (2, 3, F)))
    expected = x @ weight, dy @ weight.T, x.reshape(-1, D).T @ dy.reshape(-1, F)
    x32, weight32, dy32 = (jnp.asarray(a, jnp.float32) for a in (x, weight, dy))
    for ours, exact in zip(linear_and_gradients(x32, weight32, dy32, FLOAT32), expected, strict=True):
        assert ours.dtype == jnp.float32
        close(ours, exact, 1e-5)
    x16 = x32.astype("bfloat16")
    for dtype in (None, "float32"):
        y, dx, dw = linear_and_gradients(x16, weight32, dy32, BFLOAT16, dtype)
        assert (y.dtype, dx.dtype, dw.dtype) == (dtype or "bfloat16", "bfloat16", "float32")
        for ours, exact in zip((y, dx, dw), expected, strict=True):
            close(ours, exact, np.abs(exact).max() * (1e-6 if ours is y and dtype else 2**-8))


def test_linear_gives_the_backward_pass_nothing_to_gather_and_lets_it_keep_the_product():
    """What waits for it is its two operands as they came; `remat="dots"` finds a product that it can keep."""
    x, weight = jnp.ones((2, 3, 4), "bfloat16"), jnp.ones((4, 6))

    def residuals(policy):
        function = jax.checkpoint(lambda x, w: jnp.sin(linear(x, w, "DF", BFLOAT16)), policy=policy)
        return sorted((leaf.dtype.name, leaf.shape) for leaf in jax.tree.leaves(jax.vjp(function, x, weight)[1]))

    operands = [("bfloat16", (2, 3, 4)), ("float32", (4, 6))]
    policies = jax.checkpoint_policies
    assert residuals(policies.nothing_saveable) == operands
    assert residuals(policies.dots_with_no_batch_dims_saveable) == sorted([*operands, ("bfloat16", (2, 3, 6))])


# Groups: three prompts of 3 to 13 tokens, two completions of 9 each. A window of 8 starts inside the prompt for most tokens
# and inside the completion for the last ones.
Q, G, P, C = 3, 2, 13, 9
PROMPT_LENGTHS = np.array([13, 3, 10])


def group(config: GemmaConfig) -> SimpleNamespace:
    """Random prompts and completions, the same written out row by row, and random weights of a scalar of the hidden states."""
    numbers = np.random.default_rng(7)
    B, V, D = Q * G, config.vocab_size, config.embed_dim
    prompts = numbers.integers(3, V, (Q, P)) * (np.arange(P) < PROMPT_LENGTHS[:, None])
    completions = numbers.integers(3, V, (B, C))
    lengths = np.repeat(PROMPT_LENGTHS, G)
    rows = [np.append(prompts[b // G][: lengths[b]], completions[b]) for b in range(B)]
    tokens, mask = pad(rows, "right")
    predicting = lengths[:, None] + np.arange(C) - 1  # the slot before each completion token
    weights = numbers.normal(size=(B, C, D)).astype(np.float32)
    spread = np.zeros((B, P + C, D), np.float32)
    spread[np.arange(B)[:, None], predicting] = weights
    return SimpleNamespace(
        prompts=prompts, completions=completions, tokens=tokens, positions=np.where(mask, np.arange(P + C), FAR),
        predicting=predicting, weights=weights, spread=spread,
    )  # fmt: skip


@partial(jax.jit, static_argnames=("config", "execution"))
def grouped(params, prompts, completions, weights, config, execution):
    """Hidden states that predict the completions, and the gradients of their weighted sum."""

    def scalar(params):
        hidden = forward_group(params, prompts, jnp.asarray(PROMPT_LENGTHS), completions, config, execution)
        return (hidden * weights).sum(), hidden

    gradients, hidden = jax.grad(scalar, has_aux=True)(params)
    return hidden, gradients


@partial(jax.jit, static_argnames="config")
def written_out(params, tokens, positions, spread, config):
    def scalar(params):
        hidden, _ = forward(params, tokens, positions, config, FLOAT32)
        return (jnp.where(spread != 0, hidden, 0) * spread).sum(), hidden

    gradients, hidden = jax.grad(scalar, has_aux=True)(params)
    return hidden, gradients


def expect_equal_gradients(ours: Params, theirs: Params, tolerance: float) -> None:
    """Each leaf within `tolerance` of its own largest entry."""
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.abs(other).max() > 0
        close(one / np.abs(other).max(), other / np.abs(other).max(), tolerance)


def run_group(config: GemmaConfig, params: Params, execution: ExecutionConfig):
    """Hidden states, gradients, and the bytes that the program needs besides."""
    g = group(config)
    arguments = params, g.prompts, g.completions, g.weights
    compiled = grouped.lower(*arguments, config, execution).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return *compiled(*arguments), memory.temp_size_in_bytes


def plain_attention(q, keys, values, visible, scale, cap):
    """One softmax over all keys of a row, in float64.  BTNH, BSNH, BSNH, BTS -> BTA"""
    scores = cap * np.tanh(np.einsum("btnh,bsnh->bnts", q, keys) * scale / cap)
    weights = np.where(visible[:, None], np.exp(scores), 0)
    mixed = np.einsum("bnts,bsnh->btnh", weights / weights.sum(axis=-1, keepdims=True), values)
    return mixed.reshape(*mixed.shape[:2], -1)


@pytest.mark.parametrize("cap", [2.0, 60.0, 300.0])  # up to 60 no maximum is subtracted
def test_attention_and_its_gradients_equal_those_of_one_softmax(cap):
    """Two rows of two packed texts behind a shared prompt. Slopes of float64 differences along each input and one direction."""
    numbers = np.random.default_rng(0)
    B, P, T, N, K, H, window = 2, 3, 6, 4, 2, 8, 4
    config = GemmaConfig(1, 32, N, K, H, 32, 32, H**-0.5, (True,), attn_softcap=cap)
    shapes = {"q": (B, T, N, H), "k0": (1, K, H, P), "v0": (1, K, P, H), "k1": (B, K, H, T), "v1": (B, K, T, H)}
    x = {name: numbers.normal(size=shape) for name, shape in shapes.items()}
    x["q"] *= cap / 2  # scores at a part of the cap, of both signs
    prompt, own = np.arange(P)[None], np.tile([3, 4, 5, 3, 4, FAR], (B, 1))
    segments, toward = np.tile([1, 1, 1, 2, 2, 0], (B, 1)), numbers.normal(size=(B, T, N * H)) * (own < FAR)[..., None]

    def ours(x):
        at, texts = jnp.asarray(own), jnp.asarray(segments)
        pieces = [KV(x["k0"], x["v0"], jnp.asarray(prompt)), KV(x["k1"], x["v1"], at, texts, (texts,))]
        return (attend(x["q"], pieces, at, jnp.asarray(window), config, FLOAT32.at) * toward).sum()

    def plain(x):
        def heads(prompt, own):  # 1KPH, BKTH -> BSNH
            return np.repeat(np.moveaxis(np.concatenate([np.repeat(prompt, B, 0), own], axis=2), 1, 2), N // K, axis=2)

        keys = heads(np.swapaxes(x["k0"], 2, 3), np.swapaxes(x["k1"], 2, 3))
        age = own[:, :, None] - np.concatenate([np.repeat(prompt, B, 0), own], axis=1)[:, None]
        together = np.concatenate([np.ones((B, T, P), bool), segments[:, :, None] == segments[:, None]], axis=2)
        visible = (age >= 0) & (age < window) & together
        visible[own == FAR] = True
        return (plain_attention(x["q"], keys, heads(x["v0"], x["v1"]), visible, H**-0.5, cap) * toward).sum()

    letters = {"q": "BTNH", "k0": "QKHS", "v0": "QKSH", "k1": "BKHS", "v1": "BKSH"}
    given = {name: to_devices(jnp.asarray(value, jnp.float32), letters[name]) for name, value in x.items()}
    value, gradients = jax.jit(jax.value_and_grad(ours))(given)
    np.testing.assert_allclose(value, plain(x), rtol=1e-5)
    for name in x:
        direction = numbers.normal(size=x[name].shape)
        ends = [plain(x | {name: x[name] + step * direction}) for step in (1e-5, -1e-5)]
        np.testing.assert_allclose((gradients[name] * direction).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_log_probability_is_the_token_less_the_softmax():
    """In closed form; temperature 0 counts as 1."""
    numbers = np.random.default_rng(0)
    logits, tokens, temperature = numbers.normal(size=(3, 50)) * 5, np.array([0, 7, 49]), np.array([0.5, 0.0, 1.3])
    divisor = np.where(temperature > 0, temperature, 1.0)[:, None]
    weights = np.exp(logits / divisor)
    shares = weights / weights.sum(axis=-1, keepdims=True)
    toward, chosen = np.array([1.0, -2.0, 0.5]), np.eye(50)[tokens]

    def total(logits):
        return (pick_logprobs(logits, jnp.asarray(tokens), jnp.asarray(temperature)) * toward).sum()

    value, gradient = jax.value_and_grad(total)(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(value, (np.log(shares)[chosen == 1] * toward).sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, toward[:, None] * (chosen - shares) / divisor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("everything", [False, True], ids=["gemma1", "every feature"])
def test_a_group_equals_its_rows_written_out(model, everything):
    config, params, _ = model(REFERENCES / ("gemma3-gqa" if everything else "gemma1-mqa"))
    if everything:
        config = replace(config, attn_softcap=1.0, final_softcap=3.0, rope_factor=8.0)
    g = group(config)
    hidden, gradients, _ = run_group(config, params, FLOAT32)
    all_hidden, all_gradients = written_out(params, g.tokens, g.positions, g.spread, config)
    close(hidden, np.asarray(all_hidden)[np.arange(Q * G)[:, None], g.predicting], 1e-5)
    expect_equal_gradients(gradients, all_gradients, 1e-5)


def test_remat_and_unroll_change_memory_and_no_gradient(model):
    config, params, _ = model(REFERENCES / "gemma2-mqa")
    hidden, gradients, most = run_group(config, params, FLOAT32)
    memory = {}
    for execution in (ExecutionConfig(remat="dots"), ExecutionConfig(remat="full"), ExecutionConfig(unroll=True)):
        other_hidden, other_gradients, memory[execution] = run_group(config, params, execution)
        close(other_hidden, hidden, 1e-5)
        expect_equal_gradients(other_gradients, gradients, 1e-5)
    assert most > memory[ExecutionConfig(remat="dots")] > memory[ExecutionConfig(remat="full")]


def relative_error(ours, exact) -> float:
    return float(np.sqrt(np.mean((ours - exact) ** 2) / np.mean(exact**2)))


def rounding_noise(config: GemmaConfig) -> float:
    """What bfloat16 may cost the logits, relative to their size, root mean square.

    A rounding costs 2**-8 at most, and less than 2**-9 in the root mean square. On the way from token to logit a layer rounds
    about 16 times (weights, norms, projections, RoPE, softmax, products, sums), head and embedding together no more often.
    Independent errors add up as their squares.
    """
    return 2**-9 * math.sqrt(16 * (config.num_layers + 1))


@pytest.mark.parametrize("name", ["gemma1-mqa", "gemma2-gqa", "gemma3-gqa"])
def test_bfloat16_costs_no_more_than_its_roundings(model, name):
    config, params, reference = model(REFERENCES / name)
    exact, rounded = (our_logits(params, config, rows_of(reference), "right", execution) for execution in (FLOAT32, BFLOAT16))
    assert 2**-9 < relative_error(rounded, exact) < rounding_noise(config)  # the first: it does compute in bfloat16


def equations(jaxpr):
    """All equations of a program, those of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_powers_roots_and_angles_are_taken_in_float32(model):
    """Softmax, norms and RoPE, whatever the weights are computed in; products of weights are not."""
    config, params, reference = model(REFERENCES / "gemma3-gqa")
    tokens = reference["tokens"]
    program = logits_of.trace(params, tokens, np.arange(tokens.shape[1])[None], config, BFLOAT16).jaxpr
    dtypes = {name: set() for name in ("exp", "rsqrt", "cos", "sin", "dot_general")}
    for equation in equations(program.jaxpr):
        if equation.primitive.name in dtypes:
            operands = equation.invars if equation.primitive.name == "dot_general" else equation.outvars
            dtypes[equation.primitive.name] |= {str(variable.aval.dtype) for variable in operands}
    assert dtypes.pop("dot_general") == {"bfloat16"}
    assert all(found == {"float32"} for found in dtypes.values())


@pytest.mark.parametrize("execution", [FLOAT32, BFLOAT16], ids=lambda execution: execution.dtype)
def test_only_differences_of_positions_matter(model, execution):
    """Positions 0... and 1000... give the same logits: no angle loses its digits, in bfloat16 either."""
    config, params, reference = model(REFERENCES / "gemma3-gqa")
    near, far = (our_logits(params, config, rows_of(reference), "right", execution, shift) for shift in (0, 1000))
    angle_error = 1000 * 2**-23  # of the fastest rotation, one radian a position
    assert relative_error(far, near) < (10 * angle_error if execution is FLOAT32 else math.sqrt(2) * rounding_noise(config))


def hidden_and_tokens(config: GemmaConfig, B: int, C: int):
    numbers = np.random.default_rng(3)
    hidden = numbers.normal(size=(B, C, config.embed_dim)).astype(np.float32)
    return hidden, numbers.integers(0, config.vocab_size, (B, C))


@pytest.mark.parametrize("name", ["gemma2-gqa", "gemma3-gqa"])  # with a soft-cap on the logits, and without
def test_token_logprobs_equal_log_softmax(model, name):
    config, params, _ = model(REFERENCES / name)
    hidden, tokens = hidden_and_tokens(config, B=2, C=7)
    logits = hidden.astype(np.float64) @ np.asarray(params.embedding, np.float64).T
    if config.final_softcap:
        assert np.abs(logits).max() > 2 * config.final_softcap  # it bites
        logits = config.final_softcap * np.tanh(logits / config.final_softcap)
    compiled = jax.jit(token_logprobs, static_argnums=(3, 4, 5, 6))
    for temperature, chunk in ((0.6, 1), (1.0, 3), (1.0, 7), (1.7, 5), (0.1, 100)):
        expected = np.take_along_axis(log_softmax(logits / temperature), tokens[..., None], axis=-1)[..., 0]
        close(compiled(params, hidden, tokens, temperature, config, FLOAT32, chunk), expected, 1e-5)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_all_logits_of_a_batch_never_exist_at_once(model):
    config, params, _ = model(REFERENCES / "gemma2-gqa")
    B, C = 4, 16
    hidden, tokens = hidden_and_tokens(config, B, C)

    def loss(chunk, embedding, hidden):
        logprobs = token_logprobs(params.replace(embedding=embedding), hidden, jnp.asarray(tokens), 1.0, config, FLOAT32, chunk)
        return logprobs.sum()

    def largest(chunk, transform):
        program = jax.make_jaxpr(transform(partial(loss, chunk)))(params.embedding, hidden)
        return max(made.aval.size for equation in equations(program.jaxpr) for made in equation.outvars)

    all_logits, weight = B * C * config.vocab_size, config.vocab_size * config.embed_dim
    for transform in (lambda f: f, lambda f: jax.grad(f, argnums=(0, 1))):
        assert largest(C, transform) == all_logits  # what is looked for can be seen
        for chunk in (1, 3, 5, 8):
            pieces = -(-C // chunk)
            rest = max(weight, pieces * -(-C // pieces) * B * config.embed_dim)  # the embedding, padded hidden states
            assert largest(chunk, transform) <= max(rest, B * chunk * config.vocab_size) < all_logits


def test_chunks_of_the_vocabulary_are_aligned_and_pad_little():
    assert chunk_size(896, 85) == 64  # 14 chunks without padding; 80 would pad 64 slots, and 82 is not aligned
    assert chunk_size(900, 1000) == chunk_size(900, 900) == 900  # all at once
    assert [chunk_size(16, most) for most in (1, 3, 5, 7)] == [1, 3, 4, 6]
    for slots in range(1, 400, 7):
        for most in range(8, slots, 5):
            size = chunk_size(slots, most)
            assert most // 2 < size <= most and size % 8 == 0


def test_the_gradients_of_gate_and_up_are_those_of_their_product():
    gate, up, dy = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)
    both = jax.vjp(gated, gate, up)[1](dy)
    step = 1e-6  # slopes in float64, by the formula of the tanh approximation

    def exact(gate, up):
        return up * gate / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))

    gate, up = gate.astype(np.float64), up.astype(np.float64)
    slopes = [
        (exact(gate + step, up) - exact(gate - step, up)) / (2 * step),
        (exact(gate, up + step) - exact(gate, up - step)) / (2 * step),
    ]
    for found, slope in zip(both, slopes, strict=True):
        np.testing.assert_allclose(found, dy * slope, rtol=1e-5, atol=1e-6)


def round_to_bfloat16(x):
    mantissa, exponent = np.frexp(np.float64(x))
    return np.ldexp(np.round(mantissa * 2**8), exponent - 8)  # to even, as the hardware does


@pytest.mark.parametrize("width", [2304, 2048, 1152, 640])  # Gemma 2 2B, Gemma 1 2B, Gemma 3 1B and 270M
def test_the_embedding_scale_is_rounded_as_transformers_does(width):
    assert (round_to_bfloat16(math.sqrt(2304)), round_to_bfloat16(math.sqrt(2048))) == (48.0, 45.25)
    config = GemmaConfig(
        num_layers=1, embed_dim=width, num_heads=1, num_kv_heads=1, head_dim=2, mlp_dim=8, vocab_size=8, query_scale=1.0,
        local_layers=(False,),
    )  # fmt: skip
    table = round_to_bfloat16(np.random.default_rng(width).normal(size=(8, width))).astype(np.float32)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes(config)).replace(embedding=jnp.asarray(table))
    expected = {
        FLOAT32: table * np.float32(math.sqrt(width)),
        BFLOAT16: round_to_bfloat16(table * round_to_bfloat16(math.sqrt(width))),
    }
    for execution, rows in expected.items():
        embedded = embed(params, jnp.array([[0, 7]]), config, execution)
        assert embedded.dtype == execution.dtype
        assert (np.asarray(embedded[0], np.float32) == rows[[0, 7]]).all()


# The real Gemma 3 270M.


@pytest.fixture(scope="module")
def real(gemma270m, mesh):
    pytest.importorskip("torch")
    config = read_config(gemma270m)
    return config, load_params(gemma270m, config, mesh, STORE), load(gemma270m), load_tokenizer(gemma270m)


def test_real_logits_equal_transformers_beyond_the_window(real):
    import torch

    config, params, theirs, tokenizer = real
    text = " ".join(f"The square of {n} is {n * n}." for n in range(1, 200))
    tokens = np.array([[tokenizer.bos_id, *tokenizer.encode(text)][:600]])
    assert tokens.shape[1] == 600 > config.sliding_window
    with torch.no_grad():
        states = theirs.model(input_ids=torch.tensor(tokens)).last_hidden_state
        hidden, _ = jax.jit(forward, static_argnums=(3, 4))(params, tokens, np.arange(600)[None], config, FLOAT32)
        for part in np.split(np.arange(600), 6):  # all logits at once take 0.6 GB on each side
            ours = vocab_logits(hidden[:, part], params, config, FLOAT32)
            close(ours, theirs.lm_head(states[:, part]).numpy(), 1e-3)


def test_real_greedy_tokens_equal_transformers(real):
    import torch

    config, params, theirs, tokenizer = real
    prompts = ["Tom had 3 apples and bought 4 more. Then", "The first ten prime numbers are 2,"]
    rows = [np.array([tokenizer.bos_id, *tokenizer.encode(prompt)]) for prompt in prompts]
    assert len(rows[0]) != len(rows[1])
    tokens, mask = pad(rows, "left")
    generated = theirs.generate(
        input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask).long(), max_new_tokens=64, do_sample=False,
        eos_token_id=-1,
    )[:, tokens.shape[1] :]  # fmt: skip
    prompts, mask = (jnp.asarray(x) for x in pad(rows, "right"))
    keys, greedy = row_keys(0, 0, jnp.arange(2)), jnp.zeros(2)
    ours = sample(params, prompts, mask.sum(axis=1), keys, greedy, config, FLOAT32, Sampling(64, ()))
    assert generated.shape == (2, 64)
    assert (np.asarray(ours.tokens) == generated.numpy()).all()

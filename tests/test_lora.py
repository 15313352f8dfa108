"""Laws of models/lora.py: peft's numbers, the same merged or not, on one device or eight, and no gradient of the base."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_references import REFERENCES, load
from test_gemma import close, logits_of

from models.formats.convert import load_params, read_config
from models.gemma import Adapted, ExecutionConfig, axes, forward, forward_group, linear, token_logprobs
from models.lora import PROJECTIONS, Adapters, adapter_axes, attach, count_adapters, init_adapters
from models.sharding import STORE, TRAIN, make_mesh, reshard, spec

pytestmark = pytest.mark.usefixtures("quick_to_compile")

LONG = pytest.mark.long
RANK, ALPHA = 3, 6.0
SCALE = ALPHA / RANK
TOKENS = np.random.default_rng(5).integers(3, 64, (2, 20))
POSITIONS = np.tile(np.arange(20), (2, 1))


@pytest.fixture(scope="module")
def one_device():
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


def random_adapters(config, seed: int = 0) -> Adapters:
    """Of every projection, B not 0."""
    adapters = init_adapters(jax.random.key(seed), config, PROJECTIONS, RANK, STORE)
    numbers = np.random.default_rng(seed)
    made = jax.tree.map(lambda leaf: jnp.asarray(0.2 * numbers.normal(size=leaf.shape), jnp.float32), adapters)
    return reshard(made, adapter_axes(config, PROJECTIONS), STORE)


def merge(params, adapters: Adapters, scale: float):
    """`params` with the adapters added to the weights, summed in float32."""
    names = {name: getattr(params.layers, name) for name in adapters}
    deltas = {name: scale * jnp.einsum("LDJ,LJF->LDF", adapter.a, adapter.b) for name, adapter in adapters.items()}
    sums = {name: (names[name].astype("float32") + deltas[name]).astype(names[name].dtype) for name in adapters}
    return replace(params, layers=replace(params.layers, **sums))


def relative(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


# ----------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.long
@pytest.mark.parametrize("name", ["gemma1-mqa", "gemma2-gqa", "gemma3-gqa"])
def test_outputs_and_gradients_equal_pefts(name, one_device):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    config = read_config(REFERENCES / name)
    params, adapters = load_params(REFERENCES / name, config, one_device, STORE), random_adapters(config)
    modules = {p: f"{'mlp' if p in ('gate', 'up', 'down') else 'self_attn'}.{p}_proj" for p in PROJECTIONS}
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[m.split(".")[1] for m in modules.values()])
    theirs = peft.get_peft_model(load(REFERENCES / name), settings)
    weights = {key: weight for key, weight in theirs.named_parameters() if weight.requires_grad}
    assert len(weights) == 2 * len(PROJECTIONS) * config.num_layers

    def place(projection: str, layer: int, matrix: str):
        return weights[f"base_model.model.model.layers.{layer}.{modules[projection]}.lora_{matrix.upper()}.default.weight"]

    for projection, adapter in adapters.items():
        for layer in range(config.num_layers):
            for matrix in "ab":
                place(projection, layer, matrix).data = torch.tensor(np.asarray(getattr(adapter, matrix)[layer]).T.copy())
    numbers = np.random.default_rng(1).normal(size=(2, 20, config.vocab_size)).astype(np.float32)
    logits = theirs(input_ids=torch.tensor(TOKENS)).logits
    (logits * torch.tensor(numbers)).sum().backward()

    def loss(adapters):
        logits = logits_of(attach(params, adapters, SCALE), TOKENS, POSITIONS, config, ExecutionConfig(remat="dots"))
        return (logits * numbers).sum(), logits

    (_, ours), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapters)
    close(ours, logits.detach().numpy(), 1e-4)
    for projection, gradient in gradients.items():
        for layer in range(config.num_layers):
            for matrix in "ab":
                expected = place(projection, layer, matrix).grad.numpy().T
                assert np.abs(expected).max() > 1e-3
                assert relative(getattr(gradient, matrix)[layer], expected) < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_and_its_gradients_equal_float64(dtype, one_device):
    numbers = np.random.default_rng(3)
    execution, tolerance = ExecutionConfig(dtype=dtype), 1e-5 if dtype == "float32" else 2**-6
    shapes = {"x": (2, 5, 12), "base": (12, 20), "a": (12, 4), "b": (4, 20), "dy": (2, 5, 20)}
    x, base, a, b, dy = (numbers.normal(size=shape).astype(jnp.dtype(dtype)) for shape in shapes.values())

    def product(x, a, b):
        return linear(x, Adapted(jnp.asarray(base), a, b, 0.5), "DF", execution)

    y, backward = jax.vjp(product, jnp.asarray(x), jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    dx, da, db = backward(jnp.asarray(dy))
    assert (y.dtype, dx.dtype, da.dtype, db.dtype) == (dtype, dtype, "float32", "float32")
    x, base, a, b, dy = (matrix.astype(np.float64) for matrix in (x, base, a, b, dy))
    whole, flat, flat_dy = base + 0.5 * a @ b, x.reshape(-1, 12), dy.reshape(-1, 20)
    expected = x @ whole, dy @ whole.T, 0.5 * flat.T @ flat_dy @ b.T, 0.5 * (flat @ a).T @ flat_dy
    for ours, theirs in zip((y, dx, da, db), expected, strict=True):
        assert relative(ours, theirs) < tolerance


@pytest.mark.parametrize(("remat", "unroll"), [pytest.param("none", True, marks=LONG), ("dots", False)])
def test_merged_is_unmerged_in_outputs_and_gradients(remat, unroll, one_device):
    """Automatic differentiation of base + scale * a @ b says the same as the two thin products."""
    config = read_config(REFERENCES / "gemma3-gqa")
    params, adapters = load_params(REFERENCES / "gemma3-gqa", config, one_device, STORE), random_adapters(config)
    numbers = np.random.default_rng(2).normal(size=(2, 20, config.embed_dim)).astype(np.float32)

    def loss(combine, adapters):
        hidden, _ = forward(
            combine(params, adapters, SCALE),
            jnp.asarray(TOKENS),
            jnp.asarray(POSITIONS),
            config,
            ExecutionConfig(remat=remat, unroll=unroll),
        )
        return (hidden * numbers).sum(), hidden

    (apart, together) = (
        jax.jit(jax.value_and_grad(partial(loss, combine), has_aux=True))(adapters) for combine in (attach, merge)
    )
    close(apart[0][1], together[0][1], 2e-5)
    for ours, theirs in zip(jax.tree.leaves(apart[1]), jax.tree.leaves(together[1]), strict=True):
        assert relative(ours, theirs) < 1e-5


def test_fresh_adapters_change_nothing_and_depend_on_the_seed_alone():
    config, made = read_config(REFERENCES / "gemma3-gqa"), {}
    for count, seed, targets in ((1, 0, PROJECTIONS), (8, 0, ("up", "q")), (1, 1, PROJECTIONS)):
        mesh = make_mesh(2 if count == 8 else 1, jax.devices()[:count])
        with jax.set_mesh(mesh):
            made[count, seed] = jax.device_get(init_adapters(jax.random.key(seed), config, targets, RANK, STORE))
    first, eight, other = made.values()
    assert set(first) == set(PROJECTIONS) and set(eight) == {"up", "q"}
    assert sum(leaf.size for leaf in jax.tree.leaves(first)) == count_adapters(config, PROJECTIONS, RANK)
    for name, adapter in first.items():
        bound = adapter.a.shape[1] ** -0.5
        assert not adapter.b.any() and 0.9 * bound < np.abs(adapter.a).max() <= bound and adapter.a.dtype == np.float32
        assert abs(adapter.a.std() * 3**0.5 / bound - 1) < 0.1 and abs(adapter.a.mean()) < 0.1 * bound
        assert (adapter.a != other[name].a).mean() > 0.99
    assert all((adapter.a == first[name].a).all() for name, adapter in eight.items())
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        params = load_params(REFERENCES / "gemma3-gqa", config, mesh, STORE)
        base, adapted = (
            logits_of(weights, TOKENS, POSITIONS, config, ExecutionConfig())
            for weights in (params, attach(params, first, SCALE))
        )
    np.testing.assert_array_equal(np.asarray(base), np.asarray(adapted))


# ------------------------------------------------------------------------------------------------------------ on a mesh


@partial(jax.jit, static_argnames=("config", "execution"))
def gradients_of(adapters, params, prompts, lengths, completions, config, execution):
    """Of a weighted sum of log-probabilities."""

    def total(adapters):
        weights = attach(params, adapters, SCALE)
        hidden = forward_group(weights, prompts, lengths, completions, config, execution)
        logprobs = token_logprobs(weights, hidden, completions, 0.7, config, execution, chunk=3)
        return (logprobs * jnp.sin(jnp.arange(completions.shape[1]))).sum()

    return jax.value_and_grad(total)(adapters)


@pytest.mark.parametrize("remat", ["none", pytest.param("dots", marks=LONG)])
def test_eight_devices_give_the_gradients_of_one(remat):
    config = read_config(REFERENCES / "gemma3-gqa")
    numbers, found = np.random.default_rng(6), []
    rows = numbers.integers(3, 64, (8, 6)), numbers.integers(1, 7, 8), numbers.integers(3, 64, (16, 5))
    for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(2)):
        with jax.set_mesh(mesh):
            params, adapters = load_params(REFERENCES / "gemma3-gqa", config, mesh, STORE), random_adapters(config)
            batch = [jax.device_put(x, spec(letters, TRAIN)) for x, letters in zip(rows, ("QP", "Q", "BC"), strict=True)]
            total, gradients = gradients_of(adapters, params, *batch, config, ExecutionConfig(remat=remat))
            for leaf, other in zip(jax.tree.leaves(adapters), jax.tree.leaves(gradients), strict=True):
                assert leaf.sharding == other.sharding  # nothing has moved
            found.append(jax.device_get((total, gradients)))
    for ours, theirs in zip(jax.tree.leaves(found[1]), jax.tree.leaves(found[0]), strict=True):
        assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("remat", [pytest.param("none", marks=LONG), "dots", pytest.param("full", marks=LONG)])
def test_no_gradient_of_a_frozen_weight_is_computed(remat, one_device):
    """The compiled program has no product whose result is as large as a projection, or as the vocabulary's table."""
    config = read_config(REFERENCES / "gemma3-gqa")
    sizes = {
        tuple(sorted(config.sizes[c] for c in leaf[-2:]))
        for leaf in jax.tree.leaves(axes(config))
        if leaf not in ("Ld", "LH", "d")
    }
    params, adapters = load_params(REFERENCES / "gemma3-gqa", config, one_device, STORE), random_adapters(config)
    rows = [jnp.asarray(x) for x in (np.full((1, 7), 5), np.array([7]), np.full((2, 11), 9))]

    def products(trained) -> set[tuple[int, ...]]:
        program = trained.lower(adapters, params, *rows, config, ExecutionConfig(remat=remat)).compile().as_text()
        shapes = re.findall(r"= \w+\[([\d,]+)\]\S* dot\(", program)
        return {tuple(sorted(map(int, shape.split(",")))) for shape in shapes}

    assert not products(gradients_of) & sizes

    @partial(jax.jit, static_argnums=(5, 6))
    def of_all(adapters, *rest):
        return jax.grad(lambda params: gradients_of(adapters, params, *rest[1:])[0])(rest[0])

    assert len(products(of_all) & sizes) > 2

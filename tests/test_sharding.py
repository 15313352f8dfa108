"""Laws of models/sharding.py: a mesh changes where numbers lie and never which; no weight moves while decoding."""

import re
from dataclasses import dataclass, replace
from functools import cache, partial
from math import prod
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from make_references import REFERENCES

import models.sharding
from grpo.loss import grpo_loss
from models import ModelError
from models.formats.convert import load_params, read_config
from models.gemma import ExecutionConfig, GemmaConfig, Params, axes, forward_group, init_params, linear, token_logprobs
from models.sampler import Samples, Sampling, decode, prefill, row_keys
from models.sharding import (
    CPU_OPTIONS,
    ROLLOUT,
    SMALL,
    SMALL_OPTIONS,
    STORE,
    TPU_OPTIONS,
    TRAIN,
    MeshJit,
    Rules,
    check_divides,
    knows_option,
    make_mesh,
    reshard,
    spec,
    specs,
)

NORMS = ("Ld", "LH", "d")
Q, G, P, C = 8, 2, 10, 8
B = Q * G
LENGTHS = np.array([10, 3, 7, 5, 1, 9, 4, 6])
NUMBERS = np.random.default_rng(4)
PROMPTS = NUMBERS.integers(3, 64, (Q, P)) * (np.arange(P) < LENGTHS[:, None])
COMPLETIONS = NUMBERS.integers(3, 64, (B, C))
OLD, REF = (NUMBERS.normal(-3, 0.3, (B, C)).astype(np.float32) for _ in range(2))
ADVANTAGES = NUMBERS.normal(size=B).astype(np.float32)
WEIGHTS = (np.arange(C) < NUMBERS.integers(1, C + 1, B)[:, None]).astype(np.float32) / (B * C)
TEMPERATURES = np.tile(np.array([0, 0.7, 1, 2], np.float32), B // 4)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)  # compiles in half the time
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def config() -> GemmaConfig:
    """Every feature of Gemma 2 and 3 at once."""
    return replace(read_config(REFERENCES / "gemma3-gqa"), attn_softcap=1.0, final_softcap=3.0, rope_factor=8.0)


# Rules.


@pytest.mark.parametrize(
    "letters, rules, expected",
    [
        ("BTD", TRAIN, PartitionSpec(("fsdp", "tp"), None, None)),
        ("LDA", STORE, PartitionSpec(None, ("tp", "fsdp"), None)),
        ("LdF", STORE, PartitionSpec(None, None, ("tp", "fsdp"))),
        ("MTF", ROLLOUT, PartitionSpec("fsdp", None, "tp")),
        ("WV", ROLLOUT, PartitionSpec("fsdp", "tp")),
        ("LQPKH", ROLLOUT, PartitionSpec(None, ("fsdp", "tp"), None, None, None)),
        ("LDF", STORE, PartitionSpec(None, ("tp", "fsdp"), None)),  # each mesh axis is claimed once, left to right
        ("BF", ROLLOUT, PartitionSpec(("fsdp", "tp"), None)),
        ("FB", ROLLOUT, PartitionSpec("tp", None)),
        ("WTV", Rules(), PartitionSpec(None, None, None)),
        ("", TRAIN, PartitionSpec()),
    ],
)
def test_a_letter_is_cut_by_its_rule_and_an_axis_is_claimed_once(letters, rules, expected):
    assert spec(letters, rules) == expected


def test_specs_are_a_tree_of_spec(config):
    tree = specs(axes(config), STORE)
    assert jax.tree.structure(tree, is_leaf=lambda x: isinstance(x, PartitionSpec)) == jax.tree.structure(axes(config))
    assert (tree.embedding, tree.layers.o) == (spec("Vd", STORE), spec("LAD", STORE))


@pytest.mark.parametrize(("count", "tp"), [(8, 8), (7, 1), (6, 2), (4, 4), (1, 1)])
def test_tp_0_takes_the_largest_power_of_two_that_divides(count, tp):
    assert dict(make_mesh(0, jax.devices()[:count]).shape) == {"fsdp": count // tp, "tp": tp}


@pytest.mark.parametrize("tp", [-1, 3, 5, 16])
def test_a_mesh_takes_a_divisor_of_the_devices(tp):
    with pytest.raises(ModelError, match=rf"^rollout_tp {tp} does not divide 8 devices; use one of \[1, 2, 4, 8\]$"):
        make_mesh(tp)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_a_mesh_holds_all_devices(tp):
    assert dict(make_mesh(tp).shape) == {"fsdp": 8 // tp, "tp": tp}
    assert make_mesh(tp).devices.flatten().tolist() == jax.devices()
    assert make_mesh(1, jax.devices()[:2]).size == 2


def test_sizes_must_divide_over_the_devices():
    mesh = make_mesh(4)
    for size in (0, 8, 64):
        check_divides("vocab_size", size, mesh)
    for size in (1, 12, 63):
        with pytest.raises(ModelError, match=rf"^vocab_size {size} must divide over 8 devices; use a multiple of 8$"):
            check_divides("vocab_size", size, mesh)
    check_divides("vocab_size", 63, make_mesh(devices=jax.devices()[:1]))


# The same numbers on every mesh.


@dataclass(frozen=True)
class Result:
    samples: Samples  # numpy
    view: Params  # laid out by ROLLOUT
    loss: float
    logprobs: np.ndarray  # BC
    params: Params  # laid out by STORE
    gradients: Params  # as they came out
    program: str  # the compiled decoding


def to_devices(x, letters: str):
    return jax.device_put(x, spec(letters, TRAIN))


@partial(jax.jit, static_argnames="config")
def sampling_params(params: Params, config: GemmaConfig) -> Params:
    return ExecutionConfig(ROLLOUT).use(params, axes(config))


def compile_decode(params: Params, config: GemmaConfig) -> tuple[Samples, str]:
    """Samples, and the program that made them."""
    execution = ExecutionConfig(ROLLOUT)
    prefix = prefill(params, to_devices(PROMPTS, "QP"), to_devices(LENGTHS, "Q"), config, execution)
    keys, temperatures = row_keys(0, 0, to_devices(np.arange(B), "B")), to_devices(TEMPERATURES, "B")
    limits, sampling = to_devices(np.full(B, C), "B"), Sampling(C, (1, 20), top_p=0.95)
    compiled = decode.lower(params, prefix, keys, temperatures, limits, config, execution, sampling).compile()
    return compiled(params, prefix, keys, temperatures, limits), compiled.as_text() or ""


@partial(jax.jit, static_argnames="config")
def loss_and_gradients(params, prompts, lengths, completions, old, ref, advantages, weights, config):
    def loss_of(params):
        execution = ExecutionConfig(TRAIN, remat="full")
        hidden = forward_group(params, prompts, lengths, completions, config, execution)
        logprobs = token_logprobs(params, hidden, completions, 0.7, config, execution, chunk=3)
        loss, _ = grpo_loss(logprobs, old, ref, advantages, weights)
        return loss, logprobs

    return jax.value_and_grad(loss_of, has_aux=True)(params)


@cache
def result(devices: int, tp: int, config: GemmaConfig, name: str = "gemma3-gqa") -> Result:
    mesh = make_mesh(tp, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        params = load_params(REFERENCES / name, config, mesh, STORE)
        view = sampling_params(params, config)
        samples, program = compile_decode(view, config)
        rows = [to_devices(x, "B" if x.ndim == 1 else "BC") for x in (COMPLETIONS, OLD, REF, ADVANTAGES, WEIGHTS)]
        (loss, logprobs), gradients = loss_and_gradients(
            params, to_devices(PROMPTS, "QP"), to_devices(LENGTHS, "Q"), *rows, config
        )
    return Result(jax.tree.map(np.asarray, samples), view, float(loss), np.asarray(logprobs), params, gradients, program)


MESHES = pytest.mark.parametrize(
    "tp",
    [
        pytest.param(1, id="8x1", marks=pytest.mark.long),
        pytest.param(2, id="4x2", marks=pytest.mark.long),
        pytest.param(4, id="2x4"),
        pytest.param(8, id="1x8", marks=pytest.mark.long),
    ],
)


@MESHES
def test_samples_are_the_same_on_every_mesh(config, tp):
    ours, one = result(8, tp, config).samples, result(1, 1, config).samples
    assert (ours.tokens == one.tokens).all()
    assert (ours.lengths == one.lengths).all() and (ours.truncated == one.truncated).all()
    np.testing.assert_allclose(ours.logprobs, one.logprobs, rtol=0, atol=1e-5)
    assert one.truncated.any() and not one.truncated.all()


@MESHES
def test_loss_and_gradients_are_the_same_on_every_mesh(config, tp):
    ours, one = result(8, tp, config), result(1, 1, config)
    np.testing.assert_allclose(ours.logprobs, one.logprobs, rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours.loss, one.loss, rtol=0, atol=1e-6)
    for mine, theirs in zip(jax.tree.leaves(ours.gradients), jax.tree.leaves(one.gradients), strict=True):
        largest = np.abs(theirs).max()
        assert largest > 0
        np.testing.assert_allclose(np.asarray(mine) / largest, np.asarray(theirs) / largest, rtol=0, atol=1e-5)


# Where they lie.


def expect_cut(tree: Params, config: GemmaConfig) -> None:
    """Each device holds an eighth of every matrix, together all of it; norm scales are whole everywhere."""
    for leaf, letters in zip(jax.tree.leaves(tree), jax.tree.leaves(axes(config)), strict=True):
        assert leaf.shape == tuple(config.sizes[letter] for letter in letters)
        assert len(leaf.addressable_shards) == 8
        held = np.zeros(leaf.shape, int)
        for shard in leaf.addressable_shards:
            held[shard.index] += 1
            assert shard.data.size == (leaf.size if letters in NORMS else leaf.size // 8)
        assert (held == (8 if letters in NORMS else 1)).all()


@MESHES
def test_stored_weights_and_their_gradients_are_cut_over_all_devices(config, tp):
    expect_cut(result(8, tp, config).params, config)
    expect_cut(result(8, tp, config).gradients, config)


@MESHES
def test_for_sampling_attention_is_whole_and_mlp_and_vocabulary_are_cut_over_tp(config, tp):
    stored, view = result(8, tp, config).params, result(8, tp, config).view
    for whole, leaf, letters in zip(*(jax.tree.leaves(tree) for tree in (stored, view, axes(config))), strict=True):
        assert (np.asarray(leaf) == np.asarray(whole)).all()
        pieces = tp if set(letters) & {"F", "V"} else 1
        assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // pieces}


def test_fresh_weights_are_cut_and_the_same_on_every_mesh(config):
    whole = []
    for tp in (1, 4):
        with jax.set_mesh(make_mesh(tp)):
            params = init_params(jax.random.key(3), config, STORE)
            expect_cut(params, config)
            whole.append(jax.tree.map(np.asarray, params))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), *whole))
    matrix = whole[0].layers.gate
    assert abs(matrix.std() * config.embed_dim**0.5 - 1) < 0.05  # variance 1 / input width
    assert (whole[0].layers.q_norm == 0).all()


def test_reshard_moves_numbers_and_changes_none(config):
    with jax.set_mesh(make_mesh(2)):
        grid = to_devices(np.arange(64.0).reshape(16, 4), "BC")
        moved = reshard({"grid": grid}, {"grid": "MC"}, ROLLOUT)["grid"]
        assert (np.asarray(moved) == np.asarray(grid)).all()
        assert [s.data.shape for s in grid.addressable_shards] == [(2, 4)] * 8
        assert [s.data.shape for s in moved.addressable_shards] == [(4, 4)] * 8
        again = reshard(moved, "MC", ROLLOUT)
        assert again.sharding == moved.sharding


@MESHES
@pytest.mark.parametrize("letters", ["DA", "AD", "dF", "Fd"])  # each branch, with the cut on either side
def test_the_gradient_of_a_stored_weight_is_summed_where_the_weight_lies(tp, letters):
    sizes = {"D": 16, "d": 16, "A": 32, "F": 48}
    numbers = np.random.default_rng(tp)
    weight, x = (numbers.normal(size=shape) for shape in ([sizes[letter] for letter in letters], (8, 3, sizes[letters[0]])))

    @jax.jit
    def gradients(x, weight):
        return jax.grad(lambda x, w: (linear(x, w, letters, ExecutionConfig()) ** 2).sum(), argnums=(0, 1))(x, weight)

    with jax.set_mesh(make_mesh(tp)):
        stored = jax.device_put(weight.astype(np.float32), spec(letters, STORE))
        rows = to_devices(x.astype(np.float32), "BTD")
        dx, dw = gradients(rows, stored)
    assert (dw.sharding, dx.sharding) == (stored.sharding, rows.sharding)
    assert {shard.data.size for shard in dw.addressable_shards} == {weight.size // 8}
    dy = 2 * x @ weight
    np.testing.assert_allclose(dw, x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1]), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(dx, dy @ weight.T, rtol=1e-4, atol=1e-3)


# What moves while decoding.


COLLECTIVES = "all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute|collective-broadcast"


def loop_traffic(program: str) -> list[tuple[str, int]]:
    """Every collective inside a while loop of a compiled program: its name, and the elements it leaves on each device."""
    blocks = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) \(.*?\) -> .*?\{\n(.*?)^\}", program, re.M | re.S))
    inside, todo = set(), re.findall(r"(?:body|condition)=%?([\w.-]+)", program)
    while todo:
        name = todo.pop()
        if name not in inside:
            inside.add(name)
            called = re.findall(r"(?:body|condition|to_apply|calls|\w+_computation)=%?([\w.-]+)", blocks[name])
            todo += [*called, *re.findall(r"%?([\w.-]+)", " ".join(re.findall(r"branch_computations=\{(.*?)\}", blocks[name])))]
    moved = []
    for name in inside:
        for shape, kind in re.findall(rf" = (.*?) ({COLLECTIVES})[\w-]*\(", blocks[name]):
            sizes = [prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\w\[([\d,]*)\]", shape)]
            moved += [(kind, size) for size in sizes]
    return moved


@pytest.mark.parametrize("tp", [pytest.param(1, id="8x1", marks=pytest.mark.long), pytest.param(4, id="2x4")])
def test_no_weight_moves_while_decoding(config, tp):
    """What moves in the loop is at most the hidden states of the rows that share a copy: less than any piece of a matrix."""
    sizes = config.sizes
    hidden_states = B // (8 // tp) * config.embed_dim
    pieces = {  # of the matrices as sampling holds them, one layer's on one device
        "q, o": sizes["D"] * sizes["A"], "k, v": sizes["D"] * sizes["E"], "gate, up, down": sizes["D"] * sizes["F"] // tp,
        "embedding": sizes["V"] * sizes["D"] // tp,
    }  # fmt: skip
    assert hidden_states < min(pieces.values())
    moved = loop_traffic(result(8, tp, config).program)
    assert ("all-reduce", 1) in moved  # whether all rows have stopped: the loop is seen
    assert max(size for _, size in moved) <= hidden_states
    if tp == 1:  # every device has its own rows and its own copy: nothing else moves
        assert {size for _, size in moved} == {1}

    # The same program on weights that lie as they are stored gathers each layer's in the loop, and that is seen.
    mesh = make_mesh(tp)
    with jax.set_mesh(mesh):
        stored = load_params(REFERENCES / "gemma3-gqa", config, mesh, STORE)
        samples, program = compile_decode(stored, config)
    assert (np.asarray(samples.tokens) == result(1, 1, config).samples.tokens).all()
    gathered = {size for kind, size in loop_traffic(program) if kind == "all-gather"}
    assert {pieces["q, o"], pieces["k, v"], pieces["gate, up, down"]} <= gathered


def test_the_options_of_a_tpu_are_for_a_mesh_of_tpus(monkeypatch):
    """And not for the CPU, whose compiler refuses them and has others, nor inside another program, whose options hold."""
    double = MeshJit(lambda x: x + x, more={"xla_large": 1})
    assert double(jnp.ones(3)).tolist() == [2, 2, 2] and double.chosen() is double.plain  # no mesh
    with jax.set_mesh(make_mesh(1, jax.devices()[:1])):
        small, large = jnp.ones(SMALL // 4), jax.ShapeDtypeStruct((SMALL // 4 + 1, 2), "float32")
        rest = {"b": 2 * [small], "a": jax.ShapeDtypeStruct((SMALL // 2,), "float32")}  # all arguments count
        assert double.chosen(((small, "x", None, 3), {})) is double.with_options[tuple((CPU_OPTIONS | SMALL_OPTIONS).items())]
        for arguments in ((large, large), rest):
            assert double.chosen(arguments) is double.with_options[tuple(CPU_OPTIONS.items())]
        double.with_options.clear()
        for used in (double, double.lower, double.trace):
            used(small)
        assert [len(options) for options in double.with_options] == [2]
        double.lower(jax.ShapeDtypeStruct((SMALL,), "float32"))
        assert [len(options) for options in double.with_options] == [2, 1]
    with jax.set_mesh(make_mesh()):
        assert double.chosen() is double.with_options[()]  # several devices: none
        assert jax.jit(lambda x: double(x) + 1)(jnp.ones(3)).tolist() == [3, 3, 3]
        assert double.lower(jnp.ones(3)).compile() and double.trace(jnp.ones(3)).jaxpr
        chip, known = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite"), {*TPU_OPTIONS, "xla_large"}
        monkeypatch.setattr(jax.sharding, "get_mesh", lambda: SimpleNamespace(empty=False, size=1, devices=np.array([chip])))
        monkeypatch.setattr(models.sharding, "knows_option", lambda mesh, name, value: name in known)
        large = double.chosen()  # with options for chips that have 128 MiB of VMEM, of which the update has some
        assert double.with_options[tuple((TPU_OPTIONS | {"xla_large": 1}).items())] is large and double.chosen() is large
        chip.device_kind = "TPU v3"
        assert double.chosen() is double.with_options[tuple(TPU_OPTIONS.items())] is not large
        with pytest.raises(jax.errors.JaxRuntimeError, match="xla_jf_spmd_threshold_for_windowed_einsum_mib"):
            double(jnp.ones(3))
        known.clear()
        assert double(jnp.ones(3)).tolist() == [2, 2, 2]
        chip.platform = "gpu"
        assert double.chosen() is double.with_options[()]


def test_an_option_that_the_compiler_does_not_know_is_left_out_with_a_warning():
    """Programs would not compile at all with a later compiler that has dropped one. A wrong value is an error."""
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        with pytest.warns(UserWarning, match="the compiler does not know xla_no_such: programs are compiled without it"):
            assert not knows_option(mesh, "xla_no_such", True)
        assert knows_option(mesh, "xla_cpu_enable_fast_math", False)
        with pytest.raises(jax.errors.JaxRuntimeError, match="xla_cpu_enable_fast_math"):
            knows_option(mesh, "xla_cpu_enable_fast_math", "perhaps")

"""Laws of models/bounds/roofline.py: counts against brute force and a compiled forward pass, bounds against closed forms."""

import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from models.bounds import hlo, roofline
from models.bounds.roofline import CHIPS, Bound, Chip, find_chip
from models.gemma import FAR, ExecutionConfig, GemmaConfig, forward, leaf_name, shapes, vocab_logits
from models.presets import MODELS
from models.sharding import make_mesh

GLOBAL = GemmaConfig(3, 16, 4, 2, 8, 32, 64, 8**-0.5, (False,) * 3)
MIXED = replace(GLOBAL, local_layers=(True, False, True), sliding_window=5, post_norms=True, qk_norms=True)
GEMMA4 = replace(  # two layers of each kind, all sizes different
    MIXED, num_layers=8, local_layers=(True, False) * 4, norm_offset=0.0, global_head_dim=16, global_kv_heads=1,
    shared_layers=4, shared_mlp_dim=48, per_layer_dim=12,
)  # fmt: skip
CHIP = Chip("even", flops=1e6, memory=1e9, bandwidth=1e5, link=1e4, links=2, hop=1e-3)


def windows(model: GemmaConfig) -> list[int]:
    return [model.sliding_window if local else FAR for local in model.local_layers]


@pytest.mark.parametrize("model", [GLOBAL, GEMMA4, *MODELS.values()])
def test_weights_are_those_of_the_model(model):
    """All but the norms, which are under a thousandth, and the table of per-layer embeddings, of which a token reads a row."""
    tree, count = shapes(model), Counter()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        count[leaf_name(path).rpartition(".")[2]] += leaf.size
    per_layer = count["layer_gate"] + count["layer_out"] + count["projection"]
    assert roofline.attention_weights(model) == sum(count[name] for name in "qkvo") + per_layer
    assert roofline.mlp_weights(model) == count["gate"] + count["up"] + count["down"]
    assert roofline.head_weights(model) == math.prod(tree.embedding.shape)


@pytest.mark.parametrize("model", [GLOBAL, MIXED])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 4), (0, 9), (3, 5), (4, 12), (7, 8), (9, 9)])
def test_attention_products_count_every_visible_key(model, start, stop):
    seen = sum(0 <= q - k < window for window in windows(model) for q in range(start, stop) for k in range(q + 1))
    assert roofline.attention_products(model, start, stop) == seen * model.num_heads * model.head_dim


@pytest.mark.parametrize("model", [GLOBAL, MIXED])
@pytest.mark.parametrize("prompt", [1, 3, 8])
@pytest.mark.parametrize("own", [0, 2, 4, 9])
def test_keys_that_decoding_reads_are_those_the_next_token_sees(model, prompt, own):
    position = prompt + own
    visible = [k for window in windows(model) for k in range(position) if position - k < window]
    width = model.num_kv_heads * model.head_dim
    assert roofline.shared_keys(model, prompt, own) == width * sum(k < prompt for k in visible)
    assert roofline.own_keys(model, own) == width * sum(k >= prompt for k in visible)


def test_group_products_count_each_prompt_once():
    pairs = roofline.group_products(MIXED, [4, 7], [2, 6, 3, 1])
    sequences = [(0, 4), (0, 7), (4, 6), (4, 10), (7, 10), (7, 8)]
    assert pairs == sum(roofline.attention_products(MIXED, *sequence) for sequence in sequences)


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("model", [MIXED, GEMMA4, replace(GEMMA4, values_are_keys=True, per_layer_dim=0)])
def test_model_flops_are_the_products_of_the_compiled_forward_pass(model, unroll):
    """The program multiplies masked (query, key) pairs too, so that each row has T * T of them in each layer."""
    B, T = 2, 6

    def logits(params, tokens, positions):
        execution = ExecutionConfig(unroll=unroll)
        hidden, _ = forward(params, tokens, positions, model, execution)
        return vocab_logits(hidden, params, model, execution)

    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
        module = hlo.parse(jax.jit(logits).lower(shapes(model), tokens, tokens).compile().as_text())
    products = 0
    for operation, where, times in hlo.operations(module, module.entry):
        if operation.kind == "dot":
            left = module.computations[where][operation.operands[0]].shapes[0].dims
            summed = operation.attributes.partition("lhs_contracting_dims={")[2].partition("}")[0]
            summed = math.prod(left[int(axis)] for axis in summed.split(","))
            products += 2 * summed * math.prod(operation.shapes[0].dims) * times
    heads = sum(kind.num_layers * kind.num_heads * kind.head_dim for kind in model.kinds.values())
    assert products == roofline.forward_flops(model, B * T, B * T, heads * B * T * T)


def test_an_update_on_one_chip_in_closed_form():
    """2 weights * tokens, three times; weights read forward and backward; 28 bytes a weight for AdamW; no network."""
    D, A, E, F, V, L = 16, 32, 16, 32, 64, 3
    body, head = L * (2 * D * A + 2 * D * E + 3 * D * F), V * D
    bound = roofline.update_bound(GLOBAL, CHIP, 1, 100, 40, 500, width=2)
    flops = 3 * (2 * body * 100 + 2 * head * 40 + 4 * 500)
    read, state = 2 * 2 * (body + head), 28 * (body + head)
    assert (bound.flops, bound.memory_bytes, bound.network_bytes) == (flops, read + state, 0)
    assert bound.seconds == pytest.approx(max(flops / 1e6, read / 1e5) + state / 1e5)


def test_an_update_on_eight_chips_gathers_twice_and_scatters_once():
    one, eight = (roofline.update_bound(GLOBAL, CHIP, n, 100, 40, 500, width=2) for n in (1, 8))
    body = roofline.attention_weights(GLOBAL) + roofline.mlp_weights(GLOBAL)
    assert eight.flops == one.flops / 8
    assert eight.network_bytes == pytest.approx(7 / 8 * 2 * (3 * body + 2 * 40 * 16))
    slow = roofline.update_bound(GLOBAL, replace(CHIP, link=1.0), 8, 100, 40, 500, width=2)
    state = 28 * (body + roofline.head_weights(GLOBAL)) / 8 / 1e5
    assert slow.seconds == pytest.approx(eight.network_bytes / 2 + state)  # two links of a byte a second


def test_an_update_of_adapters_leaves_out_gradients_and_optimizer_of_the_weights():
    body = roofline.attention_weights(GLOBAL) + roofline.mlp_weights(GLOBAL)
    head, J = roofline.head_weights(GLOBAL), 100
    whole, lora = (roofline.update_bound(GLOBAL, CHIP, 8, 100, 40, 500, width=2, adapters=count) for count in (0, J))
    assert whole.flops - lora.flops == pytest.approx((2 * body * 100 + 2 * head * 40 - 6 * J * 100) / 8)
    assert whole.network_bytes - lora.network_bytes == pytest.approx(7 / 8 * 2 * (body - J))
    assert whole.memory_bytes - lora.memory_bytes == pytest.approx(28 * (body + head - J) / 8)


@pytest.mark.parametrize(("devices", "tp"), [(1, 1), (8, 8), (8, 2), (8, 1)])
def test_a_decode_step_in_closed_form(devices, tp):
    """Attention weights whole, MLP and head cut over tp, keys cut over all; 2 L + 1 gathers of the group's rows."""
    D, A, E, F, V, L, Q, G, P, own = 16, 32, 16, 32, 64, 3, 8, 2, 5, 3
    attention, cut = L * (2 * D * A + 2 * D * E), L * 3 * D * F + V * D
    bound = roofline.decode_step_bound(GLOBAL, CHIP, devices, tp, Q * G, [P] * Q, own, width=2)
    flops = Q * G * (2 * (attention + cut) + 4 * A * L * (P + own + 1)) / devices
    memory = 2 * (attention + cut / tp + 2 * E * L * (Q * P + Q * G * own) / devices)
    rows = Q * G / (devices // tp)
    network = 2 * (2 * L + 1) * (tp - 1) / tp * rows * D
    links = 1 if tp == 2 else 2
    wait = network / (links * 1e4) + (2 * L + 2) * (tp // 2) * 1e-3
    assert bound.flops == pytest.approx(flops) and bound.memory_bytes == pytest.approx(memory)
    assert bound.network_bytes == pytest.approx(network)
    assert bound.seconds == pytest.approx(max(flops / 1e6, memory / 1e5) + wait)


def test_decode_is_the_sum_of_its_steps_and_asks_nothing_for_rows_that_have_stopped():
    def step(rows, prompts, own):
        return roofline.decode_step_bound(MIXED, CHIP, 1, 1, rows, prompts, own)

    total = roofline.decode_bound(MIXED, CHIP, 1, 1, [4, 6], [1, 1, 1, 3])
    steps = step(4, [4, 6], 0) + step(1, [6], 1) + step(1, [6], 2)
    assert total == steps
    assert total.seconds < roofline.decode_bound(MIXED, CHIP, 1, 1, [4, 6], [3] * 4).seconds


def test_prefill_and_view_in_closed_form():
    D, A, E, F, V, L = 16, 32, 16, 32, 64, 3
    attention, mlp, head = L * (2 * D * A + 2 * D * E), L * 3 * D * F, V * D
    bound = roofline.prefill_bound(GLOBAL, CHIP, 8, 4, [3, 5], width=2)
    assert bound.flops == (2 * 8 * (attention + mlp) + 4 * A * L * (6 + 15)) / 8
    assert bound.memory_bytes == 2 * (attention + mlp / 4 + 2 * E * L * 8 / 8)
    assert bound.network_bytes == 2 * 2 * L * 3 / 4 * (8 / 2) * D
    view = roofline.sampling_params_bound(GLOBAL, CHIP, 8, 4, width=2)
    assert view.memory_bytes == 4 * (attention + mlp + head) / 8 + 2 * (attention + (mlp + head) / 4)
    assert view.network_bytes == 2 * (attention * 7 / 8 + (mlp + head) * (1 / 4 - 1 / 8))
    assert roofline.sampling_params_bound(GLOBAL, CHIP, 1, 1).network_bytes == 0
    lora = roofline.sampling_params_bound(GLOBAL, CHIP, 8, 4, width=2, adapters=100)
    assert view.memory_bytes - lora.memory_bytes == ((4 - 2) * (attention + mlp + head) - 4 * 100) / 8
    assert roofline.sampling_params_bound(GLOBAL, CHIP, 1, 1, width=2, adapters=100).memory_bytes == 6 * 100


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_more_work_never_takes_less_time(chip):
    model = MODELS["gemma2-2b"]
    steps = [roofline.decode_step_bound(model, chip, 8, 8, rows, [256] * 16, 100).seconds for rows in (16, 64, 128, 512)]
    contexts = [roofline.decode_step_bound(model, chip, 8, 8, 128, [256] * 16, own).seconds for own in (0, 100, 5000)]
    lengths = [roofline.decode_bound(model, chip, 8, 8, [256] * 2, [n] * 4).seconds for n in (1, 8, 16)]
    updates = [roofline.update_bound(model, chip, 8, n, n // 2, 26 * n * n // 2).seconds for n in (1000, 10_000, 100_000)]
    prompts = [roofline.prefill_bound(model, chip, 8, 8, [n] * 16).seconds for n in (16, 256, 2048)]
    for seconds in (steps, contexts, lengths, updates, prompts):
        assert seconds[0] > 0 and seconds == sorted(seconds)
    assert len({*steps}) > 1 and len({*updates}) > 1


def test_bounds_of_consecutive_parts_add_up():
    assert Bound(1, 2, 3, 4) + Bound(10, 20, 30, 40) == Bound(11, 22, 33, 44)


def test_chips_are_found_by_the_name_jax_has_for_them():
    kinds = {
        "TPU v5 lite": "v5e",
        "TPU v5e": "v5e",
        "TPU v6 lite": "v6e",
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H200": "H200",
        "NVIDIA A100-SXM4-80GB": "A100",
        "NVIDIA GeForce RTX 4090": "RTX 4090",
        "NVIDIA L4": "L4",
        "Tesla T4": "T4",
    }
    assert {kind: chip.name for kind in kinds if (chip := find_chip(kind))} == kinds
    assert not any(map(find_chip, ("cpu", "TPU v4", "NVIDIA L40S", "NVIDIA GeForce RTX 4090D")))


def test_bounds_need_no_jax():
    code = "import sys, models.bounds.roofline; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)

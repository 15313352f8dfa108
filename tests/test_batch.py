"""Laws of grpo/batch.py and grpo/memory.py: which tokens count, microbatches, what a step needs."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import CONFIG, MODEL

from data.batches import PADDING_POSITION as FAR
from data.batches import Packed
from grpo.batch import Batch, loss_mask, make_batch, split, unsplit
from grpo.memory import choose_remat, count, device_memory, resident_bytes, unroll_decoding
from grpo.update import UpdateConfig
from models.gemma import ExecutionConfig, GemmaConfig, shapes
from models.lora import count_adapters

pytestmark = pytest.mark.usefixtures("mesh")

UPDATE = UpdateConfig.of(CONFIG)
LENGTHS, TRUNCATED = np.array([0, 1, 3, 3]), np.array([False, False, False, True])
NAN = float("nan")


def test_the_tokens_up_to_the_length_count_where_there_is_a_reward():
    rewards = np.array([[1.0, 2.0], [3.0, 4.0]])
    mask = loss_mask(LENGTHS, TRUNCATED, rewards, 3, False)
    assert mask.dtype == bool
    assert mask.astype(int).tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]]
    missing = loss_mask(LENGTHS, TRUNCATED, np.array([[1.0, NAN], [3.0, NAN]]), 3, False)
    assert missing.astype(int).tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 1], [0, 0, 0]]


def test_mask_truncated_leaves_out_the_truncated_completions_alone():
    mask = loss_mask(LENGTHS, TRUNCATED, np.array([[1.0, 2.0], [3.0, 4.0]]), 3, True)
    assert mask.astype(int).tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]]


def test_a_batch_holds_each_array_in_its_place():
    """Two groups of two, unpacked: positions go on from the prompt's length, segments number the group's completions."""
    tokens = np.array([[5, 6, 0], [7, 0, 0], [8, 9, 4], [3, 2, 0]], np.int32)
    lengths, prompts = np.array([2, 1, 3, 2]), np.array([[1, 2], [3, 0]], np.int32)
    logprobs = -np.arange(12, dtype=np.float32).reshape(4, 3)
    mask, advantages = np.arange(3) < lengths[:, None], np.array([1, -1, 2, -2], np.float32)
    batch = make_batch(prompts, np.array([2, 1], np.int32), tokens, lengths, logprobs, mask, advantages, 0)
    assert np.asarray(batch.packed.tokens).tolist() == tokens.tolist()
    assert np.asarray(batch.packed.positions).tolist() == [[2, 3, FAR], [2, FAR, FAR], [1, 2, 3], [1, 2, FAR]]
    assert np.asarray(batch.packed.segments).tolist() == [[1, 1, 0], [2, 0, 0], [1, 1, 1], [2, 2, 0]]
    assert np.asarray(batch.packed.slots).tolist() == [[0, 1, 0], [3, 0, 0], [0, 1, 2], [3, 4, 0]]
    for mine, given in ((batch.prompts, prompts), (batch.lengths, [2, 1]), (batch.sampler_logprobs, logprobs)):
        np.testing.assert_array_equal(mine, given)
    assert batch.mask.dtype == jnp.float32 and np.asarray(batch.mask).tolist() == mask.astype(float).tolist()
    assert np.asarray(batch.advantages).tolist() == advantages.tolist()
    assert batch.old_logprobs is None and batch.ref_logprobs is None


def uneven(Q: int, parts: int, shortest: int = 1) -> Batch:
    """Q questions with two completions each: of 8 tokens both in the first half of the questions, of `shortest` in the rest."""
    lengths = np.repeat([8] * (Q // 2) + [shortest] * (Q - Q // 2), 2)
    rows, prompts = np.arange(2 * Q, dtype=np.float32), np.arange(Q)[:, None].repeat(3, axis=1)
    grid = rows[:, None].repeat(8, axis=1)
    return make_batch(prompts, np.arange(Q) % 3 + 1, grid.astype(int), lengths, grid, grid, rows, 4, parts)


def test_questions_are_paired_where_that_saves_slots_and_the_pairs_divide():
    batch = uneven(4, parts=1)  # 4 x 16 slots apart, 2 x 18 in pairs of a long and a short one
    assert np.asarray(batch.order).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert np.asarray(batch.prompts).tolist() == [[0, 0, 0, 3, 3, 3], [1, 1, 1, 2, 2, 2]]
    assert np.asarray(batch.lengths).tolist() == [1, 1, 2, 3] and batch.packed.tokens.size == 36
    for x in (batch.advantages, batch.mask[:, 0], batch.sampler_logprobs[:, 0]):
        assert np.asarray(x).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
        assert batch.restore(np.asarray(x)).tolist() == list(range(8))
    assert uneven(4, parts=2).order is not None
    for apart in (uneven(4, parts=0), uneven(4, parts=4), uneven(6, parts=2), uneven(3, parts=1), uneven(4, 1, shortest=8)):
        assert apart.order is None and len(apart.prompts) == len(apart.lengths)
        assert np.asarray(apart.advantages).tolist() == list(range(2 * len(apart.lengths)))


def test_rows_are_ordered_before_they_are_on_the_devices(monkeypatch):
    """With several processes, fetching an array is a collective, and of a host array it would be one copy a process."""
    monkeypatch.setattr("grpo.batch.to_host", None)
    assert uneven(4, parts=1).order is not None


def test_every_microbatch_takes_every_nth_group_whole():
    """Four groups of two in two parts: groups 0 and 2, then 1 and 3."""
    at = ExecutionConfig().at
    rows = jnp.arange(8 * 3).reshape(8, 3)
    parts = split({"rows": rows, "groups": jnp.arange(4), "flat": jnp.arange(8)}, 4, 2, at)
    assert np.asarray(parts["groups"]).tolist() == [[0, 2], [1, 3]]
    assert np.asarray(parts["flat"]).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    np.testing.assert_array_equal(parts["rows"], np.asarray(rows)[np.asarray(parts["flat"])])


@pytest.mark.parametrize(("questions", "parts", "group"), [(4, 2, 3), (6, 3, 2), (4, 4, 1), (3, 1, 2)])
def test_unsplit_is_the_inverse_of_split(questions, parts, group):
    at = ExecutionConfig().at
    rows = jnp.arange(questions * group * 5).reshape(questions * group, 5)
    divided = split(rows, questions, parts, at)
    assert divided.shape == (parts, questions // parts * group, 5)
    np.testing.assert_array_equal(unsplit(divided, questions, at), rows)


# --------------------------------------------------------------------------------------------------------------- memory

# Counted by hand. Vocabulary 32 x 8; a layer: q and o 8 x 8 each, k and v 8 x 4 each, gate, up and down 8 x 16 each, two norms
# of 8; the last norm of 8.
WEIGHTS = 32 * 8 + (2 * 64 + 2 * 32 + 3 * 128 + 2 * 8) + 8


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_weights_moments_and_gradients_take_16_bytes_and_a_reference_its_own(dtype, width):
    assert resident_bytes(MODEL, dtype, replace(UPDATE, beta=0.0)) == 16 * WEIGHTS
    assert resident_bytes(MODEL, dtype, replace(UPDATE, beta=0.1)) == (16 + width) * WEIGHTS


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_with_lora_the_base_is_its_own_reference_and_16_bytes_are_of_adapters(beta):
    """Rank 2 on q [8, 8] and down [16, 8]: 2 * (8 + 8) + 2 * (16 + 8) numbers."""
    config = replace(UPDATE, lora_rank=2, lora_targets="q,down", beta=beta)
    assert resident_bytes(MODEL, "bfloat16", config) == 2 * WEIGHTS + 16 * (32 + 48)


def batch_of(prompt_slots: int, packed_slots: int) -> Batch:
    """Only the sizes of prompts and packed tokens are read."""
    packed = Packed(np.zeros((packed_slots, 1)), None, None, None)
    nothing = np.zeros(0)
    return Batch(np.zeros((prompt_slots, 1)), nothing, packed, nothing, nothing, nothing)  # type: ignore[arg-type]


def mesh_of(size: int, **device: Any) -> Any:
    """Only its size and its first device are read."""
    return SimpleNamespace(size=size, devices=np.array([SimpleNamespace(**device)]))


@pytest.mark.parametrize(
    ("microbatches", "devices", "width", "device"),
    [
        (1, 1, 4, {}), (2, 1, 4, {}), (1, 8, 2, {}), (4, 8, 4, {}),
        (1, 1, 2, {"compute_capability": "8.9"}), (1, 2, 2, {"compute_capability": "7.5"}),
    ],
)  # fmt: skip
def test_auto_keeps_products_where_four_fifths_of_the_memory_hold_them(microbatches, devices, width, device):
    """A slot keeps, a layer: q 8, k 4, v 4, mixed values 8, the outputs of attention and MLP 8 each, gate and up 16 each.

    A T4 (compute capability 7.5) has no units for bfloat16, and keeps float32.
    """
    model, config = replace(MODEL, num_layers=3, local_layers=(False,) * 3), replace(UPDATE, microbatches=microbatches)
    execution = ExecutionConfig(remat="auto", dtype={4: "float32", 2: "bfloat16"}[width])
    computed = 4 if device.get("compute_capability") == "7.5" else width
    kept = (24 + 40) / microbatches * 3 * (8 + 4 + 4 + 8 + 2 * 8 + 2 * 16) * computed
    needed = (resident_bytes(model, execution.dtype, config) + kept) / devices
    arguments = execution, model, batch_of(24, 40), config, mesh_of(devices, **device)
    assert choose_remat(*arguments, needed / 0.8 * 1.001) == replace(execution, remat="dots")
    assert choose_remat(*arguments, needed / 0.8 * 0.999) == replace(execution, remat="full")
    assert choose_remat(*arguments, 0) == replace(execution, remat="full")


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_rematerialisation_that_is_asked_for_stays(remat):
    execution = ExecutionConfig(remat=remat)
    assert choose_remat(execution, MODEL, batch_of(1, 1), UPDATE, mesh_of(1), 0) == execution
    assert choose_remat(execution, MODEL, batch_of(1, 1), UPDATE, mesh_of(1), 1e12) == execution


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize(("rank", "tp", "devices", "copies"), [(0, 1, 1, 2), (0, 2, 8, 2), (2, 1, 1, 1), (2, 2, 8, 2)])
def test_a_rollout_unrolls_where_nine_tenths_of_the_memory_hold_another_copy_of_the_weights(
    platform, rank, tp, devices, copies
):
    """On one device LoRA samples from the frozen base, which is resident anyway. No gradient lives while decoding.

    While sampling a device holds its share of the MLP and of the vocabulary, one of `tp`, and all of attention and the norms.
    """
    config, width = replace(CONFIG, lora_rank=rank), 2
    weights, adapters = count(shapes(MODEL)), count_adapters(MODEL, UPDATE.lora_names, rank)
    resident = width * weights + 12 * adapters if rank else (12 + width) * weights
    cache = config.prompts_per_step * config.group_size * (config.max_prompt_tokens + config.max_new_tokens)
    keys_and_values = 2 * MODEL.num_layers * MODEL.num_kv_heads * MODEL.head_dim
    split = 3 * MODEL.embed_dim * MODEL.mlp_dim * MODEL.num_layers + MODEL.vocab_size * MODEL.embed_dim
    copy = weights - split + split // tp
    needed = (resident + width * cache * keys_and_values) / devices + copies * width * copy
    execution = ExecutionConfig(dtype="bfloat16")

    def chosen(platform: str, memory: float, model: GemmaConfig = MODEL) -> bool:
        mesh = mesh_of(devices, platform=platform)
        mesh.shape = {"fsdp": devices // tp, "tp": tp}
        return unroll_decoding(execution, model, config, mesh, memory).unroll

    assert chosen(platform, needed / 0.9 * 1.001) and not chosen(platform, needed / 0.9 * 0.999)
    assert not chosen("cpu", 1e12)
    gemma4 = replace(MODEL, norm_offset=0.0)
    assert gemma4.family == 4 and not chosen("tpu", 1e12, gemma4)
    assert unroll_decoding(replace(execution, unroll=True), MODEL, config, mesh_of(devices, platform=platform), 0).unroll


def test_a_cpu_names_no_memory(mesh):
    assert device_memory(mesh) == 0

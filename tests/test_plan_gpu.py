"""Laws of plans for GPUs that are not there. They need jax's plugin for CUDA and NVIDIA's assembler, but no GPU."""

import importlib.util
from dataclasses import replace

import jax
import pytest

from grpo.errors import ConfigError
from models.bounds.gpu import GPUS, described_gpus
from models.bounds.roofline import find_chip
from scripts import plan

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not importlib.util.find_spec("jax_cuda13_plugin"), reason='needs pip install -e ".[cuda]"'),
]
SMALL = [
    "gemma3-270m", "--prompts_per_step=2", "--group_size=2", "--max_prompt_tokens=64", "--max_new_tokens=64", "--halvings=0",
]  # fmt: skip


def decode_on(topology: str) -> tuple[plan.Plan, plan.Program]:
    made = plan.make_plan(plan.parse(plan.PlanConfig, [*SMALL, f"--topology={topology}"], "", plan.STARTS))
    with jax.set_mesh(made.mesh):
        return made, plan.programs(made)["decode"]


@pytest.mark.parametrize("name", GPUS)
def test_a_described_gpu_is_the_card_of_that_name(name):
    one, two = described_gpus(name, 1), described_gpus(name, 2)
    chip = find_chip(one[0].device_kind)
    assert chip and chip.name == GPUS[name].chip and (len(one), len(two)) == (1, 2)
    assert plan.usable_memory(one[0]) == 0.92 * chip.memory


def test_decoding_on_a_gpu_copies_no_weight_and_no_cache_at_any_step():
    """Its layers are unrolled, for that reason: in a loop over layers each step copies some weights of every layer."""
    made, program = decode_on("gpu:h100")
    with jax.set_mesh(made.mesh):
        assert plan.examine(program, made)["copied_bytes_per_step"] == 0
        *arrays, execution, sampling = program.arguments
        program = plan.Program(program.function, (*arrays, replace(execution, unroll=False), sampling), [])
        down = 2 * made.model.num_layers * made.model.mlp_dim * made.model.embed_dim
        assert plan.examine(program, made)["copied_bytes_per_step"] >= down


def test_two_cards_share_the_weights():
    made, program = decode_on("gpu:t4x2")
    with jax.set_mesh(made.mesh):
        figures = plan.examine(program, made)
    assert made.mesh.size == 2 and figures["peak_gib"] > 0


def test_a_card_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match=r"gpu:v100.* is unknown; .* gpu: and one of t4, l4, rtx4090, a100, h100"):
        plan.find_devices("gpu:v100")

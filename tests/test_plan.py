"""Laws of scripts/plan.py. Those of the 2B model compile for a TPU slice and need libtpu, but no TPU."""

import importlib.util
import json
import math

import jax
import pytest

from grpo.runs.cli import run_script
from models.bounds.roofline import GIB
from scripts import plan

SMALL = [
    "--prompts_per_step=8", "--group_size=2", "--max_prompt_tokens=8", "--max_new_tokens=4", "--logprob_chunk=4",
    "--rollout_tp=8", "--remat=full",
]  # fmt: skip
PROGRAMS = ["sampling_params", "prefill", "decode", "reference", "update"]


@pytest.fixture(scope="module")
def small():
    jax.config.update("jax_disable_most_optimizations", True)
    yield plan.main(["tiny", *SMALL])
    jax.config.update("jax_disable_most_optimizations", False)


def test_the_plan_of_this_machine_names_every_program(small):
    assert (small["topology"], small["devices"], small["fits"]) == ("local", 8, True)
    assert list(small["programs"]) == PROGRAMS
    for figures in small["programs"].values():
        assert figures["peak_gib"] > 0 and figures["beside_gib"] > 0
    totals = [figures["peak_gib"] + figures["beside_gib"] for figures in small["programs"].values()]
    assert small["needed_gib_per_chip"] == max(totals) <= small["hbm_gib_per_chip"]
    assert small["bound_ms"] is None and "bound_ms" not in small["programs"]["update"]  # a CPU has no nominal peak
    json.dumps(small)


def test_weights_move_in_training_and_never_while_decoding(small):
    view, prefill, decode, reference, update = (small["programs"][name] for name in PROGRAMS)
    assert decode["weight_bytes_gathered_per_step"] == prefill["weight_bytes_gathered_per_step"] == 0
    assert decode["collective_bytes_per_step"] > 0
    assert view["weight_bytes_gathered_per_step"] == view["collective_bytes_per_step"] > 0
    assert update["weight_bytes_gathered_per_step"] == 2 * reference["weight_bytes_gathered_per_step"] > 0  # remat full
    assert update["gradient_bytes_reduced_per_step"] > 0 == reference["gradient_bytes_reduced_per_step"]


def test_what_rests_beside_a_program_is_counted_by_hand(small):
    """The float32 state is three times the weights and the reference once; each device holds an eighth of a matrix."""
    config = plan.parse(plan.PlanConfig, ["tiny", *SMALL], "", plan.STARTS)
    model = plan.choose_model(config)
    leaves = jax.tree.leaves(plan.axes(model))
    sizes = {leaf: math.prod(model.sizes[letter] for letter in leaf) for leaf in leaves}
    weights = sum(4 * sizes[leaf] / (8 if any(letter in "DFV" for letter in leaf) else 1) for leaf in leaves)
    scalars = 3 * 4  # AdamW's count, the bad updates and those in a row
    beside = {name: small["programs"][name]["beside_gib"] * GIB for name in PROGRAMS}
    assert beside["update"] == weights
    assert beside["reference"] == 3 * weights + scalars
    assert beside["decode"] == beside["prefill"] == 4 * weights + scalars


def test_with_lora_the_gradients_that_move_and_the_state_that_rests_are_the_adapters(small):
    rank = 2
    config = plan.parse(plan.PlanConfig, ["tiny", *SMALL, f"--lora_rank={rank}"], "", plan.STARTS)
    made = plan.make_plan(config)
    with jax.set_mesh(made.mesh):
        parts = plan.programs(made)
        update = plan.examine(parts["update"], made)
    assert list(parts) == PROGRAMS
    adapters = 4 * plan.count_adapters(made.model, made.update.lora_names, rank)
    whole = small["programs"]["update"]
    assert 0 < update["gradient_bytes_reduced_per_step"] < 2 * adapters < whole["gradient_bytes_reduced_per_step"] / 5
    assert update["weight_bytes_gathered_per_step"] >= whole["weight_bytes_gathered_per_step"]  # remat full: the base, twice
    base, scalars = small["programs"]["update"]["beside_gib"] * GIB, 3 * 4
    beside = {name: sum(plan.device_bytes(tree) for tree in program.beside) for name, program in parts.items()}
    state = beside["reference"] - scalars
    assert 3 * adapters / 8 < state <= 3 * adapters  # some are cut over the eight devices
    assert beside == {
        "sampling_params": state * 2 / 3 + 4, "prefill": state + scalars + base, "decode": state + scalars + base,
        "reference": state + scalars, "update": 0,
    }  # fmt: skip


def test_without_a_reference_and_with_two_updates_the_programs_are_others():
    config = plan.parse(plan.PlanConfig, ["tiny", *SMALL, "--beta=0", "--updates_per_rollout=2"], "", plan.STARTS)
    made = plan.make_plan(config)
    with jax.set_mesh(made.mesh):
        assert list(plan.programs(made)) == ["sampling_params", "prefill", "decode", "old", "update"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tiny", "--topology", "v9:2x4"], "error: topology 'v9:2x4' is unknown; use local or a TPU slice such as v5e:2x4"),
        (["--model", "gemma9-2b"], "error: model 'gemma9-2b' is unknown; one of gemma-2b, "),
        ([], "error: which model? give a preset, --model (one of gemma-2b, "),
        (["tinny"], "error: preset 'tinny' is unknown: one of custom, tiny, "),
        (["tiny", "--prompts_per_step=12"], "error: prompts_per_step 12 / microbatches 1 = 12 must divide over 8 devices"),
        (["tiny", "--rollout_tp=3"], "error: rollout_tp 3 does not divide 8 devices"),
        (["tiny", "--lora_rank=100"], "error: lora_rank 100 is above that of k, 128 x 32; give a smaller one"),
    ],
)
def test_the_users_mistake_is_one_line_and_exit_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(plan.main, argv)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    assert printed.err.startswith(message) and printed.err.count("\n") == 1


def test_a_missing_compiler_is_one_line_and_exit_code_2(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    with pytest.raises(SystemExit):
        run_script(plan.main, ["tiny", "--topology", "v5e:2x4"])
    assert capsys.readouterr().err == 'error: topology v5e:2x4 needs the TPU compiler: pip install -e ".[tpu]"\n'


@pytest.mark.parametrize("size", [8, 16, 800])
@pytest.mark.parametrize(
    "needs",
    [
        lambda n: 2 + 0.1 * n,
        lambda n: 2 + 0.02 * n,
        lambda n: math.inf if n > 40 else 2 + 0.01 * n,  # the compiler gives up long before the line says so
        lambda n: 2 + n**1.2 / 16,
        lambda n: 11 + n,
        lambda n: math.inf,
    ],
    ids=["line", "flat line", "cliff", "curve", "too large", "impossible"],
)
def test_the_search_finds_the_largest_size_that_fits_in_few_steps(needs, size):
    tried = []

    def need(n: int) -> float:
        tried.append(n)
        return needs(n)

    largest = max((n for n in range(8, 1000, 8) if needs(n) <= 9.9), default=0)
    assert plan.find_largest(need, 8, size, needs(size), 2.0, 9.9) == largest
    assert len(tried) <= 8 and all(n > 0 and n % 8 == 0 for n in tried)


@pytest.fixture(scope="module")
def tpu() -> dict:
    """Gemma 2 2B on a v5e-8: decode and update, compiled once for all laws."""
    pytest.importorskip("libtpu")
    flags = "--max_new_tokens=768 --rollout_tp=8 --topology=v5e:2x4"
    made = plan.make_plan(plan.parse(plan.PlanConfig, ["gemma2-2b", *flags.split()], "", plan.STARTS))
    with jax.set_mesh(made.mesh):
        parts = plan.programs(made)
        figures = {name: plan.examine(parts[name], made) for name in ("decode", "update")}
    return {"plan": made, "bounds": plan.bounds(made)} | figures


def test_decoding_on_a_tpu_moves_no_weight_and_copies_neither_weights_nor_cache(tpu):
    assert tpu["plan"].config.rows == 128 and tpu["plan"].config.max_prompt_tokens == 256
    assert tpu["decode"]["weight_bytes_gathered_per_step"] == 0
    assert tpu["decode"]["copied_bytes_per_step"] == 0
    assert 0 < tpu["decode"]["collective_bytes_per_step"] <= 60e6


def test_no_program_on_a_tpu_receives_less_than_its_bound(tpu):
    steps = tpu["plan"].config.max_new_tokens
    assert tpu["decode"]["collective_bytes_per_step"] >= tpu["bounds"]["decode"].network_bytes / steps
    assert tpu["update"]["collective_bytes_per_step"] >= tpu["bounds"]["update"].network_bytes


def test_an_update_of_a_whole_step_fits_on_a_tpu(tpu):
    assert plan.total_gib(tpu["decode"]) < plan.total_gib(tpu["update"]) <= 15.75
    leaves = jax.tree.leaves(plan.axes(tpu["plan"].model))
    assert tpu["update"]["aliased_inputs"] >= 3 * len(leaves)  # weights and both moments stay where they are

"""The law that scripts/plan.py compiles the programs that a training step runs."""

from dataclasses import replace
from typing import Any

import jax
import pytest

import grpo.rollout
import grpo.step
import grpo.update
from grpo.notebook import load
from grpo.step import one_step
from models.sampler import Sampling
from scripts import plan

# As on the command line, for both. The vocabulary is cut, hence rollout_tp.
SETTINGS = dict(
    group_size=2, prompts_per_step=8, new_problems=16, sessions=1, max_prompt_tokens=48, max_new_tokens=4, rollout_tp=2
)


def recorded(policy: Any) -> list[tuple[str, tuple]]:
    """The names and arguments of the programs that a real step runs, in order; arrays as their shapes and shardings."""
    calls: list[tuple[str, tuple]] = []

    def record(module: Any, name: str, patch: pytest.MonkeyPatch) -> None:
        real = getattr(module, name)

        def spy(*arguments):
            calls.append((name, jax.tree.map(described, arguments)))
            return real(*arguments)

        patch.setattr(module, name, spy)

    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(policy.run.mesh):
        record(grpo.update, "moved_params", patch)
        for name in ("prefill", "decode"):
            record(grpo.rollout, name, patch)
        for name in ("completion_logprobs", "train_step"):
            record(grpo.step, name, patch)
        one_step(1, policy.run.sessions[0], policy.state, policy.run, policy.reference, policy.base)
    return calls


def described(leaf: Any) -> Any:
    """What a program is compiled for: shape, dtype and sharding of an array; that a number is one. Anything else is static."""
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        spec = [tuple([axis] if isinstance(axis, str) else axis or ()) for axis in leaf.sharding.spec]  # type: ignore[union-attr]
        spec += [()] * (leaf.ndim - len(spec))
        return f"{leaf.dtype}{list(leaf.shape)} {spec} weak={getattr(leaf, 'weak_type', False)}"
    if isinstance(leaf, Sampling):
        return replace(leaf, stop_ids=())  # those of the tokenizer, which the planner does not read
    return "a number" if isinstance(leaf, float) else leaf


@pytest.mark.parametrize(
    ("updates", "rank"), [(2, 2), *(pytest.param(*case, marks=pytest.mark.long) for case in ((1, 0), (2, 0), (1, 2)))]
)
@pytest.mark.usefixtures("quick_to_compile")
def test_the_planned_programs_are_those_that_a_step_runs(updates, rank):
    """Shapes, dtypes, shardings and static arguments; stop ids, seed and the value of the rate are not known to the planner."""
    settings = SETTINGS | {"updates_per_rollout": updates, "lora_rank": rank}
    calls = recorded(load("tiny", **settings))
    planned = plan.make_plan(replace(plan.STARTS["tiny"], **settings))
    with jax.set_mesh(planned.mesh):
        programs = plan.programs(planned)
    order = ["sampling_params", "prefill", "decode", "reference", *["old"] * (updates > 1), *["update"] * updates]
    assert list(programs) == list(dict.fromkeys(order)) and len(calls) == len(order)
    for name, (function, arguments) in zip(order, calls, strict=True):
        assert programs[name].function.__name__ == function, name
        expected = jax.tree.map(described, programs[name].arguments)
        assert jax.tree.structure(arguments) == jax.tree.structure(expected), name
        assert jax.tree.leaves(arguments) == jax.tree.leaves(expected), name

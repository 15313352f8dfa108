"""Laws of grpo/notebook.py: five calls by hand are a step of the trainer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo.notebook
from data.problems import Problem
from grpo.errors import ConfigError
from grpo.loss import grpo_loss, grpo_weights
from grpo.notebook import load, loss, sample, score
from grpo.session import learning_rates
from grpo.step import one_step
from models import ModelError

pytestmark = pytest.mark.usefixtures("quick_to_compile")

SETTINGS: dict[str, Any] = dict(
    group_size=2, prompts_per_step=8, new_problems=16, sessions=1, max_new_tokens=12, mask_truncated=False
)


@pytest.fixture(scope="module", params=[pytest.param(0, id="weights"), pytest.param(4, id="lora", marks=pytest.mark.long)])
def policy(request):
    return load(lora_rank=request.param, **SETTINGS)


@pytest.fixture(scope="module")
def stepped(policy):
    """The first step by the trainer, on a copy of the state; its metrics and completions."""
    run, state = policy.run, jax.tree.map(lambda leaf: leaf + 0, policy.state)
    with jax.set_mesh(run.mesh):
        return one_step(1, run.sessions[0], state, run, policy.reference, policy.base)


@pytest.fixture(scope="module")
def scored(policy):
    run = policy.run
    completions = sample(policy, [run.problems[i] for i in run.sessions[0].problems_of(1)])
    return completions, *score(policy, completions)


def test_five_calls_are_a_step_of_the_trainer(policy, stepped, scored):
    state, result = stepped
    metrics = {name: float(value) for name, value in result.stats.items()}
    completions, batch, rewards = scored
    assert completions.texts == result.completions.texts
    assert rewards.reshape(-1).tolist() == [grade["reward"] for grade in result.grades]
    assert np.asarray(batch.advantages).tolist() == result.advantages.reshape(-1).tolist()
    assert batch.old_logprobs is None and result.batch.old_logprobs is None  # with one update the policy is its own old one
    (rate,) = learning_rates(1, policy.run.sessions[0], policy.run.sessions[-1].end, policy.run.config)
    assert result.rates == [rate]
    copy = grpo.notebook.replace(policy, state=jax.tree.map(lambda leaf: leaf + 0, policy.state))
    after, stats = grpo.notebook.train_step(copy, batch, rate)
    assert stats["loss"] == pytest.approx(metrics["loss"], abs=1e-6) and metrics["grad_norm"] > 0.1
    assert stats["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-4)
    for mine, theirs in zip(jax.tree.leaves(after.state.opt_state), jax.tree.leaves(state.opt_state), strict=True):
        np.testing.assert_allclose(np.asarray(mine), np.asarray(theirs), atol=1e-6)  # of a gradient of norm 0.1 and more
    assert after.step == 1


def test_the_loss_and_its_terms_are_those_of_the_algorithm(policy, scored):
    _, batch, _ = scored
    value, terms = loss(policy, batch)
    host = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), batch)  # on one device
    expected, again = grpo_loss(
        jnp.asarray(terms["logprobs"]), jnp.asarray(terms["old"]), host.ref_logprobs, host.advantages, grpo_weights(host.mask),
        beta=policy.run.config.beta, sampler_logprobs=host.sampler_logprobs,
    )  # fmt: skip
    assert value == pytest.approx(float(expected), abs=1e-7)
    for name, term in again.items():
        np.testing.assert_allclose(terms[name], np.asarray(term), atol=1e-6)


def test_own_rewards_decide_the_advantages(policy, scored):
    completions, *_ = scored
    batch, rewards = score(policy, completions, rewards=[[1.0, 3.0]] * 7 + [[5.0, float("nan")]])
    spread = np.sqrt(2) + 1e-4
    np.testing.assert_allclose(np.asarray(batch.advantages), [-1 / spread, 1 / spread] * 7 + [0.0, 0.0], rtol=1e-5)
    assert np.asarray(batch.mask)[-1].sum() == 0 and rewards.shape == (8, 2)


def test_what_cannot_be_done_is_said(policy):
    with pytest.raises(ConfigError, match="preset 'big' is unknown: one of tiny"):
        load("big")
    with pytest.raises(ModelError, match="problems 3 must divide over 8 devices"):
        sample(policy, policy.run.problems[:3])
    with pytest.raises(ConfigError, match="problem long has a prompt above max_prompt_tokens 48"):
        sample(policy, [*policy.run.problems[:7], Problem("long", "Ann has 10 pens. " * 20, "1")])

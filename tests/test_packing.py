"""Laws of training on packed rows, of one question or of two: the numbers of the padded form, and none sees another."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np
import pytest
from jax import Array
from make_references import REFERENCES

from grpo.batch import Batch, make_batch
from grpo.config import Config
from grpo.update import UpdateConfig, logprobs_of
from models.formats.convert import load_params, read_config
from models.gemma import FAR, ExecutionConfig, GemmaConfig, Params
from models.sharding import STORE

# Four prompts, four completions each. A window of 8 starts inside the prompt at first, inside a long completion at last.
Q, G, P, C, FINER = 4, 4, 13, 12, 6
PROMPT_LENGTHS = np.array([13, 3, 10, 1])
LENGTHS = {  # rows a group -> completions of which the longest group needs so many: 1 x 18, 2 x 16, 3 x 14 slots
    1: [[12, 1, 3, 2], [2, 2, 7, 1], [4, 4, 4, 4], [1, 1, 1, 12]],
    2: [[12, 1, 12, 3], [2, 2, 7, 1], [4, 4, 4, 4], [1, 1, 1, 1]],
    3: [[12, 12, 3, 9], [2, 2, 7, 1], [4, 4, 4, 4], [12, 12, 12, 1]],
}
CONFIG = Config(
    prompts_per_step=Q,
    group_size=G,
    max_prompt_tokens=P,
    max_new_tokens=C,
    temperature=0.7,
    logprob_chunk=5 * Q * G,
    remat="none",
)

pytestmark = pytest.mark.usefixtures("mesh")


@dataclass(frozen=True)
class Case:
    config: GemmaConfig
    params: Params
    tokens: np.ndarray  # BC
    lengths: np.ndarray  # B

    def batch(self, tokens: np.ndarray, finer: int, parts: int = 0) -> Batch:
        prompts = np.random.default_rng(1).integers(3, 64, (Q, P)) * (np.arange(P) < PROMPT_LENGTHS[:, None])
        mask, zeros = np.arange(C) < self.lengths[:, None], np.zeros((Q * G, C), np.float32)
        return make_batch(prompts, PROMPT_LENGTHS, tokens, self.lengths, zeros, mask, zeros[:, 0], finer, parts)

    def results(self, tokens: np.ndarray, finer: int, parts: int = 0) -> tuple[np.ndarray, Params]:
        """Log-probabilities in the order of the completions, and gradients."""
        batch = self.batch(tokens, finer, parts)
        logprobs, gradients = logprobs_and_gradients(self.params, batch, batch.place(WEIGHTS), self.config)
        return batch.restore(np.asarray(logprobs)), gradients


@partial(jax.jit, static_argnames="config")
def logprobs_and_gradients(params: Params, batch: Batch, weights: Array, config: GemmaConfig) -> tuple[Array, Params]:
    """Log-probabilities of all tokens, and the gradients of a weighted sum of those that count."""

    def scalar(params):
        logprobs = logprobs_of(params, batch, config, ExecutionConfig(), UpdateConfig.of(CONFIG))
        return (logprobs * weights * batch.mask).sum(), logprobs

    gradients, logprobs = jax.grad(scalar, has_aux=True)(params)
    return logprobs, gradients


CASES = [
    pytest.param(("gemma1-mqa", 1), id="gemma1-mqa", marks=pytest.mark.long),
    pytest.param(("gemma2-gqa", 2), id="gemma2-gqa", marks=pytest.mark.long),
    pytest.param(("everything", 3), id="everything"),
]


@pytest.fixture(scope="module", params=CASES)
def case(request, mesh) -> Case:
    name, rows = request.param
    folder = REFERENCES / ("gemma3-gqa" if name == "everything" else name)
    config = read_config(folder)
    if name == "everything":  # of Gemma 2 and 3
        config = replace(config, attn_softcap=1.0, final_softcap=3.0, rope_factor=8.0)
    assert config.sliding_window == (FAR if name == "gemma1-mqa" else 8)
    lengths = np.array(LENGTHS[rows]).reshape(-1)
    tokens = np.random.default_rng(2).integers(3, 64, (Q * G, C)) * (np.arange(C) < lengths[:, None])
    case = Case(config, load_params(folder, config, mesh, STORE), tokens, lengths)
    apart, paired = (case.batch(tokens, FINER, parts) for parts in (0, 1))
    assert len(apart.packed.tokens) == Q * rows and paired.packed.tokens.size < apart.packed.tokens.size < tokens.size
    assert apart.order is None and sorted(np.asarray(paired.order).tolist()) == list(range(Q * G))
    return case


WEIGHTS = np.random.default_rng(3).normal(size=(Q * G, C)).astype(np.float32)


@pytest.mark.parametrize("parts", [0, 1], ids=["apart", "paired"])
def test_packed_logprobs_and_gradients_equal_the_padded_ones(case, parts):
    """To the rounding of sums in another order: 1e-5 of a nat, 5e-6 of a leaf's largest entry."""
    ours, gradients = case.results(case.tokens, FINER, parts)
    theirs, expected = case.results(case.tokens, 0)
    counts = np.arange(C) < case.lengths[:, None]
    np.testing.assert_allclose(ours[counts], theirs[counts], rtol=0, atol=1e-5)
    for leaf, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        largest = np.abs(other).max()
        assert largest > 0
        np.testing.assert_allclose(leaf / largest, other / largest, rtol=0, atol=5e-6)


@pytest.mark.parametrize("parts", [0, 1], ids=["apart", "paired"])
def test_a_packed_completion_sees_no_other(case, parts):
    """Other tokens in one of them, first or last or between: not a bit of the others' log-probabilities changes."""
    before, _ = case.results(case.tokens, FINER, parts)
    for b in (0, 1, 6, Q * G - 1):
        tokens = case.tokens.copy()
        tokens[b, : case.lengths[b]] = 3 + (tokens[b, : case.lengths[b]] - 2) % 61
        after, _ = case.results(tokens, FINER, parts)
        changed = (before != after) & (np.arange(C) < case.lengths[:, None])
        assert changed[b, : case.lengths[b]].all()
        assert not np.delete(changed, b, axis=0).any()

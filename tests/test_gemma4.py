"""Laws of Gemma 4, on tiny models shaped like E2B, E4B and the 12B, against what transformers computed (make_references.py).

Each public report of a broken Gemma 4 has a test that names it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_references import GEMMA4, REFERENCES, make
from test_gemma import close, expect_references, our_logits, rows_of
from test_gemma import model as model  # a fixture
from test_packing import FINER, LENGTHS, Case, logprobs_and_gradients
from test_sharding import result

from models.formats.convert import layers_of, leaf_names, read_config
from models.formats.weight_names import from_ours, hugging_face
from models.gemma import ExecutionConfig, GemmaConfig, Params, forward, forward_group, leaf_name, token_logprobs
from models.sampler import Sampling, row_keys, sample
from models.sharding import ROLLOUT

pytestmark = pytest.mark.usefixtures("mesh")
NAMES, LONG = pytest.mark.parametrize("name", GEMMA4), pytest.mark.long


@NAMES
def test_logits_equal_transformers_with_padding_left_right_and_none(model, name):
    """Three windows long. Keys and values are shared without a cache (transformers#45242, #45253), and the soft cap of the
    nested configuration is read (unsloth#4934)."""
    expect_references(model, REFERENCES / name)
    assert model(REFERENCES / name)[0].final_softcap == 3.0


@pytest.mark.long
@NAMES
def test_logits_equal_transformers_on_weights_made_now(model, name, tmp_path):
    pytest.importorskip("torch")
    make(name, tmp_path, seed=1000 + len(name))
    expect_references(model, tmp_path)


@NAMES
def test_unrolled_layers_equal_the_loop(model, name):
    config, params, reference = model(REFERENCES / name)
    close(our_logits(params, config, rows_of(reference), "right", ExecutionConfig(unroll=True)), reference["right"], 1e-4)


@NAMES
def test_both_dialects_of_config_json_mean_the_same(name, tmp_path):
    """`per_layer_config` of transformers 5.24, and `global_head_dim` of older files."""
    (tmp_path / "config.json").write_bytes((REFERENCES / name / "config_v4.json").read_bytes())
    assert read_config(tmp_path) == read_config(REFERENCES / name)


@NAMES
@pytest.mark.parametrize("remat", [pytest.param("none", marks=LONG), pytest.param("dots", marks=LONG), "full"])
def test_gradients_of_every_weight_equal_transformers(model, name, remat):
    """Through shared keys and values too, which others lose under checkpointing, with a correct forward pass
    (unsloth-zoo#1275)."""
    config, params, reference = model(REFERENCES / name)
    row = jnp.asarray(rows_of(reference)[0])[None]
    execution = ExecutionConfig(remat=remat)

    @jax.jit
    def gradients_of(params: Params) -> Params:
        def loss(params):
            hidden, _ = forward(params, row, jnp.arange(row.shape[1])[None], config, execution)
            return -token_logprobs(params, hidden[:, :-1], row[:, 1:], 1.0, config, execution, 7).mean()

        return jax.grad(loss)(params)

    found = dict(zip(leaf_names(config).items(), jax.tree.leaves(gradients_of(params)), strict=True))
    seen = set()
    for (leaf, letters), gradient in found.items():
        if leaf.endswith(".scale"):  # a buffer there, never trained here
            assert not np.asarray(gradient).any()
            continue
        for i, layer in enumerate(layers_of(leaf, config)):
            place = hugging_face(leaf, config).of(layer)
            ours = np.asarray(gradient[i] if letters[0] == "L" else gradient)
            theirs = reference[f"gradient/model.{place.name}"]
            assert np.abs(theirs).max() > 0
            close(from_ours(ours, place, letters.removeprefix("L")), theirs, 1e-4 * max(np.abs(theirs).max(), 1))
            seen.add(f"gradient/model.{place.name}")
    assert seen == {key for key in reference if key.startswith("gradient/")}


# ------------------------------------------------------------------------------------------------- the sampler and the trainer

Q, G, P, C = 3, 3, 13, 12
B = Q * G
PROMPT_LENGTHS = np.array([13, 3, 10])
PROMPTS = np.random.default_rng(5).integers(3, 64, (Q, P)) * (np.arange(P) < PROMPT_LENGTHS[:, None])


def drawn(config: GemmaConfig, params: Params, execution: ExecutionConfig) -> Any:
    args = jnp.asarray(PROMPTS), jnp.asarray(PROMPT_LENGTHS), row_keys(0, 0, jnp.arange(B)), jnp.ones(B)
    return jax.tree.map(np.asarray, sample(params, *args, config, execution, Sampling(C, ())))


@NAMES
@pytest.mark.parametrize("unroll", [False, True])
def test_cached_decoding_equals_the_full_pass_and_the_trainer(model, name, unroll):
    """Window 8 within 25 tokens. The chunked log-probabilities of others lack the soft cap (halo#11) and their rollouts are
    garbage (ms-swift#9096): here sampler and trainer agree to 1e-5."""
    config, params, _ = model(REFERENCES / name)
    samples = drawn(config, params, ExecutionConfig(ROLLOUT, unroll=unroll))
    for chunk in (5, C):
        trainer = jax.jit(trainer_logprobs, static_argnums=(4, 5))(
            params, PROMPTS, PROMPT_LENGTHS, samples.tokens, config, chunk
        )
        np.testing.assert_allclose(samples.logprobs, trainer, rtol=0, atol=1e-5)
    rows = [np.append(PROMPTS[b // G][: PROMPT_LENGTHS[b // G]], samples.tokens[b]) for b in range(B)]
    logits = our_logits(params, config, rows, "right").astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    ends = np.cumsum([len(row) for row in rows])
    for b, end in enumerate(ends):
        written_out = logprobs[end - C - 1 : end - 1][np.arange(C), samples.tokens[b]]
        np.testing.assert_allclose(samples.logprobs[b], written_out, rtol=0, atol=1e-5)


def trainer_logprobs(params, prompts, lengths, tokens, config, chunk):
    hidden = forward_group(params, prompts, lengths, tokens, config, ExecutionConfig())
    return token_logprobs(params, hidden, tokens, 1.0, config, ExecutionConfig(), chunk)


@pytest.mark.parametrize("name", ["gemma4-e2b", pytest.param("gemma4-12b", marks=pytest.mark.long)])
def test_packed_is_padded_with_gradients(model, name):
    config, params, _ = model(REFERENCES / name)
    lengths = np.concatenate(LENGTHS[2])
    tokens = np.random.default_rng(0).integers(3, 64, (16, 12)) * (np.arange(12) < lengths[:, None])
    case = Case(config, params, tokens, lengths)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(16, 12)), jnp.float32)
    padded, packed = (logprobs_and_gradients(params, case.batch(tokens, finer), weights, config) for finer in (0, FINER))
    mask = np.arange(12) < lengths[:, None]
    np.testing.assert_allclose(np.asarray(padded[0])[mask], np.asarray(packed[0])[mask], rtol=0, atol=1e-5)
    for mine, theirs in zip(jax.tree.leaves(packed[1]), jax.tree.leaves(padded[1]), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * max(float(np.abs(theirs).max()), 1))


@pytest.mark.parametrize("tp", [pytest.param(1, marks=LONG), pytest.param(2, marks=LONG), 4, pytest.param(8, marks=LONG)])
@pytest.mark.parametrize("name", ["gemma4-e2b", pytest.param("gemma4-12b", marks=LONG)])
def test_eight_devices_sample_and_learn_as_one(name, tp):
    config = read_config(REFERENCES / name)
    ours, one = result(8, tp, config, name), result(1, 1, config, name)
    np.testing.assert_array_equal(ours.samples.tokens, one.samples.tokens)
    np.testing.assert_allclose(ours.samples.logprobs, one.samples.logprobs, rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours.loss, one.loss, rtol=0, atol=1e-6)
    flat, _ = jax.tree_util.tree_flatten_with_path(one.gradients)
    for (path, theirs), mine in zip(flat, jax.tree.leaves(ours.gradients), strict=True):
        largest = np.abs(theirs).max()
        assert (largest > 0) == (not leaf_name(path).endswith(".scale"))
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * max(largest, 1e-6))

"""Laws of Gemma 4, on tiny models shaped like E2B, E4B and the 12B, against what transformers computed (make_references.py).

Each public report of a broken Gemma 4 has a test that names it.
"""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import write_gguf
from make_references import GEMMA4, REFERENCES, load, make, pad, real_logits
from safetensors.numpy import load_file, save_file
from test_gemma import close, expect_references, our_logits, rows_of
from test_gemma import model as model  # a fixture
from test_packing import FINER, LENGTHS, Case, logprobs_and_gradients
from test_sharding import result

from data import DataError
from data.prompts import encode_prompt
from data.tokenizer import load_tokenizer
from models import ModelError
from models.continuous_batching import sample_continuously
from models.formats.adapters import LoadedAdapters, read_peft, write_peft
from models.formats.convert import layers_of, leaf_names, load_params, open_weights, place_params, read_config
from models.formats.save import save_params, text_config
from models.formats.weight_names import from_ours, hugging_face
from models.gemma import ExecutionConfig, GemmaConfig, Params, forward, forward_group, leaf_name, token_logprobs, vocab_logits
from models.lora import PROJECTIONS, adapter_axes, attach, init_adapters
from models.sampler import Sampling, row_keys, sample
from models.sharding import ROLLOUT, STORE, make_mesh

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


@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_keys_and_values_stored_for_sharing_layers_are_passed_over(form, tmp_path, mesh):
    """As transformers passes over them (`_keys_to_ignore_on_load_unexpected`); those of any other layer are needed."""
    source = REFERENCES / "gemma4-e2b"
    weights, config = load_file(source / "model.safetensors"), read_config(source)
    last = f"model.layers.{config.num_layers - 1}.self_attn"
    assert not any(name.startswith(f"{last}.k_") for name in weights)
    more = {
        f"{last}.k_proj.weight": np.ones((8, 4)),
        f"{last}.v_proj.weight": np.ones((8, 4)),
        f"{last}.k_norm.weight": np.ones(8),
    }
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(weights | {name: array.astype(np.float32) for name, array in more.items()}, tmp_path / "model.safetensors")
    path = tmp_path
    if form == "gguf":
        pytest.importorskip("gguf")
        write_gguf(path := tmp_path / "model.gguf", tmp_path)
    loaded, expected = load_params(path, config, mesh, STORE), load_params(source, config, mesh, STORE)
    assert all((one == other).all() for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True))
    del weights["model.layers.0.self_attn.k_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.k_proj\.weight is missing"):
        load_params(tmp_path, config, mesh, STORE)


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


def drawn(config: GemmaConfig, params: Params, execution: ExecutionConfig, width: int = C) -> Any:
    args = jnp.asarray(PROMPTS), jnp.asarray(PROMPT_LENGTHS), row_keys(0, 0, jnp.arange(B)), jnp.ones(B)
    return jax.tree.map(np.asarray, sample(params, *args, config, execution, Sampling(width, ())))


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


@pytest.mark.parametrize("name", ["gemma4-e2b", pytest.param("gemma4-12b", marks=LONG)])
def test_attention_reads_what_is_written_of_both_kinds_of_caches(model, name):
    """150 slots of the local layers and 260 of the global ones; unrolled layers read all of them."""
    config, params, _ = model(REFERENCES / name)
    config = replace(config, sliding_window=150)
    loop, unrolled = (drawn(config, params, ExecutionConfig(ROLLOUT, unroll=unroll), 260) for unroll in (False, True))
    np.testing.assert_array_equal(loop.tokens, unrolled.tokens)
    np.testing.assert_allclose(loop.logprobs, unrolled.logprobs, rtol=0, atol=1e-5)


def trainer_logprobs(params, prompts, lengths, tokens, config, chunk):
    hidden = forward_group(params, prompts, lengths, tokens, config, ExecutionConfig())
    return token_logprobs(params, hidden, tokens, 1.0, config, ExecutionConfig(), chunk)


@pytest.mark.parametrize("name", ["gemma4-e4b", pytest.param("gemma4-e2b", marks=LONG), pytest.param("gemma4-12b", marks=LONG)])
def test_smaller_batches_and_continuous_ones_draw_the_same(model, name):
    """Rows that move carry both kinds of keys and values with them."""
    config, params, _ = model(REFERENCES / name)
    stops, execution = tuple(range(3, 13)), ExecutionConfig(ROLLOUT)  # one token in six
    prompts, lengths = PROMPTS[[0, 1, 2, 1]], PROMPT_LENGTHS[[0, 1, 2, 1]]
    keys = row_keys(5, 0, jnp.arange(8))
    args = jnp.asarray(prompts), jnp.asarray(lengths), keys, jnp.ones(8)
    whole, halved = (sample(params, *args, config, execution, Sampling(C, stops, halvings=count)) for count in (0, 2))
    np.testing.assert_array_equal(whole.tokens, halved.tokens)
    temperatures, sampling = np.ones(2, np.float32), Sampling(C, stops)
    found = sample_continuously(params, prompts, lengths, temperatures, 2, 4, 5, 0, config, execution, sampling)
    for ended in found:
        for i, tokens in zip(ended.index, ended.tokens, strict=True):
            np.testing.assert_array_equal(tokens, whole.tokens[i])


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


# ----------------------------------------------------------------------------------------------------------------- the template

TEMPLATE = """{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' %}\
{% if enable_thinking or system %}{{ '<|turn>system\\n' }}{{ '<|think|>\\n' if enable_thinking }}{{ system or '' }}\
{{ '<turn|>\\n' }}{% endif %}\
{% for m in messages if m.role != 'system' %}{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}\
{{ m.content | trim + '<turn|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|turn>model\\n' }}{{ '' if enable_thinking else '<|channel>thought\\n<channel|>' }}\
{% endif %}"""
PIECES = ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>")


@pytest.fixture
def speaks_gemma4(small_tokenizer_folder):
    """A tokenizer with the control pieces of Gemma 4, and a template with its turns, its system role and its thoughts."""
    content = json.loads((small_tokenizer_folder / "tokenizer.json").read_text("utf-8"))
    for piece in PIECES:
        token = {"content": piece, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        content["added_tokens"].append({"id": len(content["model"]["vocab"]), "special": True, **token})
        content["model"]["vocab"][piece] = len(content["model"]["vocab"])
    (small_tokenizer_folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    settings = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "chat_template": TEMPLATE}
    (small_tokenizer_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return small_tokenizer_folder


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("system", ["", "Answer in <answer>."])
def test_a_prompt_is_the_folders_template_with_its_system_role(speaks_gemma4, thinking, system):
    """Token for token. With thinking the prompt holds no closed thought, which would end it before it begins (maxtext#5013)."""
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(speaks_gemma4, thinking), AutoTokenizer.from_pretrained(speaks_gemma4)
    turns = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": "How many?"}]
    wanted = theirs.apply_chat_template(turns, add_generation_prompt=True, enable_thinking=thinking)["input_ids"]
    assert encode_prompt(ours, " How many?\n", system) == wanted
    assert (ours.piece_id("<channel|>") in wanted) == (not thinking) and (ours.piece_id("<|think|>") in wanted) == thinking
    assert ours.stop_ids == (ours.eos_id, ours.piece_id("<turn|>"))
    injected = encode_prompt(ours, "<turn|>\n<|turn>model\n<|channel>", "<|think|><turn|>")
    plain = encode_prompt(ours, "x", "x")
    assert [injected.count(ours.piece_id(piece)) for piece in PIECES] == [plain.count(ours.piece_id(piece)) for piece in PIECES]


def test_rewards_read_what_stands_outside_the_thoughts(speaks_gemma4):
    tokenizer = load_tokenizer(speaks_gemma4, thinking=True)
    opened, closed, end = (tokenizer.piece_id(piece) for piece in ("<|channel>", "<channel|>", "<turn|>"))
    thought, answer = tokenizer.encode("thought\n<answer>7</answer>"), tokenizer.encode("<answer>8</answer>")
    assert tokenizer.decode([opened, *thought, closed, *answer, end]) == "<answer>8</answer>"
    assert tokenizer.decode([*answer, opened, *thought, closed]) == "<answer>8</answer>"
    assert tokenizer.decode([opened, *thought]) == ""  # truncated while it thought
    assert tokenizer.decode([*answer, end]) == "<answer>8</answer>"
    assert "<|channel>" in tokenizer.pieces([opened, *thought, closed])  # the page shows all


def test_thinking_needs_a_template_that_knows_it(small_tokenizer_folder):
    with pytest.raises(DataError, match=r"^thinking true: the chat template of .* cannot switch it on; leave it out$"):
        load_tokenizer(small_tokenizer_folder, thinking=True)
    assert not load_tokenizer(small_tokenizer_folder).has_system_role


# ------------------------------------------------------------------------------------------------------------- LoRA and exports


@NAMES
def test_adapters_reach_every_projection_and_come_back_from_peft(model, name, tmp_path):
    """Only layers that have keys and values get adapters for these. Written and read as PEFT they are the same to the bit."""
    config, params, reference = model(REFERENCES / name)
    fresh = init_adapters(jax.random.key(0), config, PROJECTIONS, 2, STORE)
    assert set(fresh) == set(adapter_axes(config, PROJECTIONS))
    assert not any(key in fresh for key in ("shared_local.k", "shared_global.v"))
    assert ("global.v" in fresh) == (not config.values_are_keys)
    leaves, tree = jax.tree.flatten(fresh)
    random = [jax.random.normal(jax.random.key(i), leaf.shape) / 2 for i, leaf in enumerate(leaves)]
    adapters = jax.tree.unflatten(tree, random)
    write_peft(tmp_path, LoadedAdapters(jax.device_get(adapters), 2, 0.5), config, "base")
    back = read_peft(tmp_path, config)
    assert back.scale == 0.5 and back.weights.keys() == adapters.keys()
    for ours, theirs in zip(jax.tree.leaves(back.weights), jax.tree.leaves(adapters), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    mesh = make_mesh(devices=jax.devices()[:1])
    merged = place_params(back.on(open_weights(REFERENCES / name, config), config), config, mesh, STORE, "float32")
    rows = rows_of(reference)
    apart = our_logits(attach(params, adapters, 0.5), config, rows, "right")
    close(apart, our_logits(merged, config, rows, "right"), 3e-5)
    assert np.abs(apart - reference["right"]).max() > 1


@LONG
@NAMES
def test_adapters_compute_what_peft_computes(model, name, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    config, params, reference = model(REFERENCES / name)
    fresh = init_adapters(jax.random.key(0), config, PROJECTIONS, 2, STORE)
    adapters = jax.tree.map(lambda leaf: 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), fresh)
    write_peft(tmp_path, LoadedAdapters(jax.device_get(adapters), 2, 0.5), config, "base")
    theirs = peft.PeftModel.from_pretrained(load(REFERENCES / name), tmp_path, is_trainable=True).eval()
    row, weights = rows_of(reference)[0], np.random.default_rng(1).normal(size=(26, config.vocab_size)).astype(np.float32)
    logits = theirs(input_ids=torch.tensor(row)[None]).logits
    (logits[0] * torch.tensor(weights)).sum().backward()

    def loss(adapters):
        hidden, _ = forward(
            attach(params, adapters, 0.5), jnp.asarray(row)[None], jnp.arange(26)[None], config, ExecutionConfig(remat="full")
        )
        found = vocab_logits(hidden, params, config, ExecutionConfig())
        return (found[0] * weights).sum(), found

    (_, ours), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapters)
    close(ours, logits.detach().numpy(), 1e-4)
    (tmp_path / "gradient").mkdir()
    write_peft(tmp_path / "gradient", LoadedAdapters(jax.device_get(gradients), 2, 0.5), config, "base")
    found = load_file(tmp_path / "gradient" / "adapter_model.safetensors")
    expected = {key.replace(".default", ""): weight.grad.numpy() for key, weight in theirs.named_parameters() if "lora" in key}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        close(found[key], gradient, 1e-4 * max(np.abs(gradient).max(), 1))


@NAMES
@pytest.mark.parametrize("nested", [False, True])
def test_what_is_saved_is_what_was_read_to_the_bit(name, nested, tmp_path):
    """Also from a multimodal folder, whose towers are passed over."""
    source, weights = REFERENCES / name, load_file(REFERENCES / name / "model.safetensors")
    given = json.loads((source / "config.json").read_text())
    if nested:
        folder, tower = tmp_path / "multimodal", {"model.vision_tower.patch_embedder.weight": np.ones((2, 2), np.float32)}
        folder.mkdir()
        renamed = {key.replace("model.", "model.language_model.", 1): weight for key, weight in weights.items()}
        save_file(renamed | tower, folder / "model.safetensors")
        given = {"architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "text_config": given}
        (folder / "config.json").write_text(json.dumps(given))
        source = folder
    config = read_config(source)
    assert config == read_config(REFERENCES / name)
    mesh = make_mesh(devices=jax.devices()[:1])
    save_params(tmp_path / "out", load_params(source, config, mesh, STORE), config, text_config(source / "config.json"))
    assert read_config(tmp_path / "out") == config
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == weights.keys() and all((saved[key] == weights[key]).all() for key in saved)


@LONG
@NAMES
def test_transformers_opens_an_export(name, tmp_path):
    pytest.importorskip("torch")
    reference, config = np.load(REFERENCES / name / "reference.npz"), read_config(REFERENCES / name)
    params = load_params(REFERENCES / name, config, make_mesh(devices=jax.devices()[:1]), STORE)
    save_params(tmp_path, params, config, json.loads((REFERENCES / name / "config.json").read_text()))
    close(real_logits(load(tmp_path), *pad(rows_of(reference), "right")), reference["right"], 1e-5)

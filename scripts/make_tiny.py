"""Make `models/tiny`: a Gemma 3 small enough for two CPU cores, warm on word problems, as a Hugging Face folder.

    python scripts/make_tiny.py [--out DIR] [--steps N] [--seed N]

A vocabulary of fixed pieces, then plain supervised training on correct demonstrations (data/arithmetic.py): most give the
bare result, some show every step, a few break the format. The loss is the mean of -log p over the completion tokens of a
batch, the stop token included. What it leaves to learn: that showing work pays. Trains on split "train", measures on split
"tune" the folder as it was written, and states the figures in the folder's README. Left out: everything about rewards.
"""

import argparse
import json
import re
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from data.arithmetic import SENTENCES, NAMES, THINGS, demonstration, make_problems
from data.problems import Problem
from data.prompts import encode_prompt, pad_prompts, render_prompt
from data.tokenizer import Tokenizer, load_tokenizer
from grpo.reward import TAGS, has_operation, is_correct, violates_format
from models.convert import load_params, read_config, save_params
from models.gemma import Compute, GemmaConfig, Params, forward_group, init_params, token_logprobs
from models.sampler import row_keys, sample
from models.sharding import ROLLOUT, TRAIN, make_mesh

FOLDER = Path(__file__).resolve().parents[1] / "models" / "tiny"
PROMPT_WIDTH, COMPLETION_WIDTH = 48, 32  # the longest that four operations need: see the folder's README
SHARES = {"terse": 0.85, "worked": 0.12, "slip": 0.03}
PROBLEMS, BATCH, STEPS, LEARNING_RATE, WARM_UP = 40_000, 64, 3000, 3e-3, 100
MEASURED, SAMPLES_EACH = 600, 4
Z95 = 1.959964  # two-sided 95% of a normal distribution

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
CHARACTERS = ["▁", "\n", *(chr(code) for code in range(33, 127))]
VOCAB_MULTIPLE = 8  # so that eight devices can cut it

CONFIG = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32, "max_position_embeddings": 512,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 64,
    "rope_theta": 10_000.0, "rope_local_base_freq": 10_000.0, "rope_scaling": None, "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "use_bidirectional_attention": False,
    "tie_word_embeddings": True, "initializer_range": 0.02, "use_cache": True,
    "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "torch_dtype": "bfloat16",
}  # fmt: skip


def units() -> list[str]:
    """What shall be one piece: operators with their blanks, tags, the words of the problems, the numbers 10 to 99."""
    sentences = " ".join(sentence for pair in SENTENCES.values() for sentence in pair)
    words = sorted({*re.findall("[A-Za-z]+", re.sub("{.*?}", "", sentences)), *NAMES, *THINGS, "has", "How", "many", "now"})
    signs = [".▁", *(f"▁{sign}▁" for sign in "+-*/=")]
    return [*signs, *TAGS, *(f"▁{word}" for word in words), "user", "model", "Then", "How", *NAMES, *map(str, range(10, 100))]


def make_tokenizer(folder: Path) -> Tokenizer:
    """Write Gemma's kind of byte-pair tokenizer, each unit merged from the left, and read it back."""
    from tokenizers import AddedToken, decoders, models, normalizers, processors
    from tokenizers import Tokenizer as Backend

    merges = list(dict.fromkeys((unit[:i], unit[i]) for unit in units() for i in range(1, len(unit))))
    pieces = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), *CHARACTERS, *(a + b for a, b in merges)]
    spare = -len(pieces) % VOCAB_MULTIPLE
    pieces += [f"<unused{i}>" for i in range(spare)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(piece, normalized=False) for piece in CONTROL])
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    named = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad")}
    more = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False, "padding_side": "left",
            "clean_up_tokenization_spaces": False, "model_max_length": CONFIG["max_position_embeddings"]}  # fmt: skip
    write_json(folder / "special_tokens_map.json", named)
    write_json(folder / "tokenizer_config.json", {**named, **more})
    tokenizer = load_tokenizer(folder)
    assert all(tokenizer.encode(unit.replace("▁", " ")) == [vocab[unit]] for unit in units())
    return tokenizer


def write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")


def encode_problems(problems: list[Problem], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of one width, and their lengths.  -> QP, Q"""
    prompts = [encode_prompt(tokenizer, render_prompt(p.question, "")) for p in problems]
    return pad_prompts(prompts, PROMPT_WIDTH, tokenizer.pad_id)


def encode_demonstrations(problems: list[Problem], tokenizer: Tokenizer, style: str) -> np.ndarray:  # -> QC
    ids = [[*tokenizer.encode(demonstration(p, style)), tokenizer.end_of_turn_id] for p in problems]
    return pad_prompts(ids, COMPLETION_WIDTH, tokenizer.pad_id)[0]


def loss_of(params: Params, prompts: Array, lengths: Array, completions: Array, config: GemmaConfig) -> Array:
    """Mean of -log p over the completion tokens of the batch.  QP, Q, QC -> scalar"""
    compute = Compute(TRAIN)
    hidden = forward_group(params, prompts, lengths, completions, config, compute)
    logprobs = token_logprobs(params, hidden, completions, 1.0, config, compute, COMPLETION_WIDTH)
    mask = completions != CONFIG["pad_token_id"]
    return -(logprobs * mask).sum() / mask.sum()


def train(config: GemmaConfig, tokenizer: Tokenizer, steps: int, seed: int) -> Params:
    problems = make_problems(PROBLEMS, seed, "train")
    prompts, lengths = encode_problems(problems, tokenizer)
    completions = np.stack([encode_demonstrations(problems, tokenizer, style) for style in SHARES])
    params = init_params(jax.random.key(seed), config, TRAIN)
    rate = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, WARM_UP, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
    opt_state = optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, *batch):
        loss, grads = jax.value_and_grad(loss_of)(params, *batch, config)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    rng = np.random.default_rng(seed)
    for i in range(steps):
        rows = rng.integers(PROBLEMS, size=BATCH)
        styles = rng.choice(len(SHARES), BATCH, p=list(SHARES.values()))
        params, opt_state, loss = step(params, opt_state, prompts[rows], lengths[rows], completions[styles, rows])
        if (i + 1) % 100 == 0:
            print(f"step {i + 1} of {steps}: loss {loss:.3f}", flush=True)
    return params


def measure(params: Params, config: GemmaConfig, tokenizer: Tokenizer, problems: list[Problem], samples: int, heat: float) -> dict:
    """Counts over `samples` completions of each problem at temperature `heat`."""
    prompts, lengths = encode_problems(problems, tokenizer)
    rows = len(problems) * samples
    out = sample(
        params, prompts, lengths, row_keys(0, 0, jnp.arange(rows)), jnp.full(rows, heat), config, Compute(ROLLOUT),
        width=COMPLETION_WIDTH, stop_ids=tokenizer.stop_ids,
    )  # fmt: skip
    texts = [tokenizer.decode(ids[:n]) for ids, n in zip(np.asarray(out.tokens), np.asarray(out.lengths), strict=True)]
    right = np.array([is_correct(text, problems[i // samples].answer) for i, text in enumerate(texts)])
    # not has_operation: a slip leaves no reasoning block to read
    worked = np.array([bool(re.search("[-+*/] ", text)) for text in texts])
    broken = [violates_format(text, cut) for text, cut in zip(texts, np.asarray(out.truncated).tolist(), strict=True)]
    return dict(
        n=rows, right=int(right.sum()), worked=int(worked.sum()), worked_right=int(right[worked].sum()),
        violations=sum(broken), tokens=int(out.lengths.sum()),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    mesh = make_mesh()
    jax.set_mesh(mesh)
    tokenizer = make_tokenizer(args.out)
    config_json = {"vocab_size": tokenizer.vocab_size, **CONFIG}
    write_json(args.out / "config.json", config_json)
    stops = {"bos_token_id": 2, "eos_token_id": list(tokenizer.stop_ids), "pad_token_id": 0, "do_sample": True}
    write_json(args.out / "generation_config.json", stops)
    config = read_config(args.out)
    params = train(config, tokenizer, args.steps, args.seed)
    trained = time.perf_counter()
    save_params(args.out, params, config, config_json, "bfloat16")
    params = load_params(args.out, config, mesh, ROLLOUT)
    problems = make_problems(MEASURED, args.seed, "tune")
    greedy = measure(params, config, tokenizer, problems, 1, 0.0)
    sampled = measure(params, config, tokenizer, problems, SAMPLES_EACH, 1.0)
    print(json.dumps({"greedy": greedy, "sampled": sampled, "seconds": trained - start}))


if __name__ == "__main__":
    main()

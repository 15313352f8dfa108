"""Make `models/tiny`: a Gemma 3 small enough for two CPU cores, pretrained on word problems, as a Hugging Face folder.

    python scripts/make_tiny.py [--out DIR] [--steps N] [--tuning_steps N] [--seed N]

Builds a vocabulary of fixed pieces, then trains on correct demonstrations (data/arithmetic.py) in two phases of supervised
learning. First most demonstrations show every step, so that the model learns to calculate; then most give only the result and a
few break the format, so that it rarely shows its work. GRPO can still learn that showing work pays. The loss is the mean of
-log p over the completion tokens of a batch, the stop token included. Trains on split "train". Then reads the written folder
back, measures it on split "tune" and writes the figures to the folder's README.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from data.arithmetic import NAMES, SENTENCES, THINGS, demonstration, make_problems
from data.batches import pad_prompts
from data.problems import Problem
from data.prompts import encode_prompt, render_prompt
from data.tokenizer import Tokenizer, load_tokenizer
from grpo.reports.consensus import wilson
from grpo.reward import TAGS, is_correct, violates_format
from grpo.runs.cli import run_script
from models.formats.convert import load_params, read_config
from models.formats.save import save_params, write_json
from models.gemma import ExecutionConfig, GemmaConfig, Params, forward_group, init_params, token_logprobs
from models.sampler import Sampling, row_keys, sample
from models.sharding import ROLLOUT, TRAIN, make_mesh

FOLDER = Path(__file__).resolve().parents[1] / "models" / "tiny"
PROMPT_WIDTH, COMPLETION_WIDTH = 48, 32  # enough for four operations; the folder's README states the longest lengths
STYLES = ("terse", "worked", "slip")
STEPS, RATE, SHARES = 1500, 3e-3, (0.3, 0.7, 0.0)  # the first phase: learn to calculate
TUNING_STEPS, TUNING_RATE, TUNING_SHARES = 200, 5e-4, (0.88, 0.08, 0.04)  # the second: learn to be brief
PROBLEMS, BATCH, WARM_UP = 20_000, 32, 50
MEASURED, SAMPLES_EACH = 600, 4
WORK = re.compile("[0-9] [-+*/] [0-9]")  # a calculation anywhere in the text, because a slip has no reasoning block

Shares = dict[str, tuple[int, int]]  # what completions do -> (how many do it, of how many)

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
CHARACTERS = ["▁", "\n", *(chr(code) for code in range(33, 127))]
VOCAB_MULTIPLE = 8  # so that the vocabulary can be sharded over eight devices

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
    """The strings that become one piece: operators with blanks, tags, the words of the problems, the numbers 10 to 99."""
    sentences = " ".join(sentence for pair in SENTENCES.values() for sentence in pair)
    words = sorted({*re.findall("[A-Za-z]+", re.sub("{.*?}", "", sentences)), *NAMES, *THINGS, "has", "How", "many", "now"})
    signs = [".▁", *(f"▁{sign}▁" for sign in "+-*/=")]
    return [*signs, *TAGS, *(f"▁{word}" for word in words), "user", "model", "Then", "How", *NAMES, *map(str, range(10, 100))]


def make_tokenizer(folder: Path) -> Tokenizer:
    """Write a byte-pair tokenizer like Gemma's, with merges that build each unit from left to right, and read it back."""
    from tokenizers import AddedToken, decoders, models, normalizers, processors
    from tokenizers import Tokenizer as Backend

    merges = list(dict.fromkeys((unit[:i], unit[i]) for unit in units() for i in range(1, len(unit))))
    pieces = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), *CHARACTERS, *(a + b for a, b in merges)]
    pieces += [f"<unused{i}>" for i in range(-len(pieces) % VOCAB_MULTIPLE)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    assert len(vocab) == len(pieces)
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(piece, normalized=False) for piece in CONTROL])
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    named = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad")}
    write_json(folder / "special_tokens_map.json", named)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, **named})
    tokenizer = load_tokenizer(folder)
    assert all(tokenizer.encode(unit.replace("▁", " ")) == [vocab[unit]] for unit in units())
    return tokenizer


def encode_problems(problems: list[Problem], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Padded prompts QP and their lengths Q."""
    prompts = [encode_prompt(tokenizer, render_prompt(p.question, "")) for p in problems]
    return pad_prompts(prompts, PROMPT_WIDTH, tokenizer.pad_id)


def encode_demonstrations(problems: list[Problem], tokenizer: Tokenizer, style: str) -> np.ndarray:  # -> QC
    """Padded demonstrations with their stop token."""
    ids = [[*tokenizer.encode(demonstration(p, style)), tokenizer.end_of_turn_id] for p in problems]
    return pad_prompts(ids, COMPLETION_WIDTH, tokenizer.pad_id)[0]


def loss_of(params: Params, prompts: Array, lengths: Array, completions: Array, config: GemmaConfig) -> Array:
    """The mean of -log p over the completion tokens of a batch.  QP, Q, QC -> scalar"""
    execution = ExecutionConfig(TRAIN)
    hidden = forward_group(params, prompts, lengths, completions, config, execution)
    logprobs = token_logprobs(params, hidden, completions, 1.0, config, execution, COMPLETION_WIDTH)
    mask = completions != CONFIG["pad_token_id"]
    return -(logprobs * mask).sum() / mask.sum()


def train(params: Params, config: GemmaConfig, draw: Callable, steps: int, rate: float) -> Params:
    """Train with AdamW on `steps` batches of `draw`; the learning rate warms up to `rate`, then follows a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, min(WARM_UP, steps // 2), steps, rate / 30)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98))
    opt_state = optimizer.init(params)  # type: ignore[arg-type]: optax names its own tree types

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, *batch):
        loss, grads = jax.value_and_grad(loss_of)(params, *batch, config)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    for step in range(1, steps + 1):
        params, opt_state, loss = update(params, opt_state, *draw())
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {loss:.3f}", flush=True)
    return params


def train_phases(config: GemmaConfig, tokenizer: Tokenizer, steps: int, tuning_steps: int, seed: int) -> Params:
    """Train random weights in both phases."""
    problems = make_problems(PROBLEMS, seed, "train")
    prompts, lengths = encode_problems(problems, tokenizer)
    completions = np.stack([encode_demonstrations(problems, tokenizer, style) for style in STYLES])
    rng = np.random.default_rng(seed)

    def draw(shares):
        rows, styles = rng.integers(PROBLEMS, size=BATCH), rng.choice(len(STYLES), BATCH, p=shares)
        return prompts[rows], lengths[rows], completions[styles, rows]

    params = init_params(jax.random.key(seed), config, TRAIN)
    params = train(params, config, partial(draw, SHARES), steps, RATE)
    return train(params, config, partial(draw, TUNING_SHARES), tuning_steps, TUNING_RATE)


def measure(
    params: Params, config: GemmaConfig, tokenizer: Tokenizer, problems: list[Problem], samples: int, temperature: float
) -> Shares:
    """Draw `samples` completions of each problem and count what they do."""
    prompts, lengths = encode_problems(problems, tokenizer)
    rows = len(problems) * samples
    out = sample(
        params,
        jnp.asarray(prompts),
        jnp.asarray(lengths),
        row_keys(0, 0, jnp.arange(rows)),
        jnp.full(rows, temperature),
        config,
        ExecutionConfig(ROLLOUT),
        Sampling(COMPLETION_WIDTH, tokenizer.stop_ids),
    )
    texts = [tokenizer.decode(ids[:n]) for ids, n in zip(np.asarray(out.tokens), np.asarray(out.lengths), strict=True)]
    right = np.array([is_correct(text, problems[i // samples].answer) for i, text in enumerate(texts)])
    worked = np.array([WORK.search(text) is not None for text in texts])
    broken = [violates_format(text, cut) for text, cut in zip(texts, np.asarray(out.truncated).tolist(), strict=True)]
    return {
        "right": (int(right.sum()), rows),
        "shows its work": (int(worked.sum()), rows),
        "right where it does": (int(right[worked].sum()), int(worked.sum())),
        "right where it does not": (int(right[~worked].sum()), int((~worked).sum())),
        "breaks the format": (sum(broken), rows),
    }


def share(count: int, of: int) -> str:
    """A share and its 95% Wilson interval: `40.2% of 600 (36.3 to 44.1)`."""
    if of == 0:
        return "none"
    low, high = wilson(count, of)
    return f"{100 * count / of:.1f}% of {of} ({100 * low:.1f} to {100 * high:.1f})"


README = """# A tiny pretrained Gemma 3

{parameters:,} parameters and a vocabulary of {vocab} pieces, as an ordinary Hugging Face folder, trained from random weights by

    {command}

on generated word problems (`data/arithmetic.py`, split "train", empty system prompt). All demonstrations had the right answer.
In the first phase {first} of them showed each step and the others only the result. In the second {terse} gave only the result,
{worked} showed each step, and {slip} did so but broke the format. So the model can calculate step by step, rarely does, and is
mostly wrong when it does not: GRPO can learn that showing work pays. It knows nothing else.

Measured by the same script on {problems} problems of split "tune", with 95% Wilson intervals that treat
the {samples} samples of a problem as independent.

| completion | greedy | sampled at temperature 1 |
|---|---|---|
{rows}
The longest prompt has {prompt} tokens, the longest demonstration {completion} including its stop token.
"""


def write_readme(folder: Path, facts: dict, greedy: Shares, sampled: Shares) -> None:
    """Write the folder's README."""
    rows = "".join(f"| {name} | {share(*greedy[name])} | {share(*sampled[name])} |\n" for name in greedy)
    names = ("first", "terse", "worked", "slip")
    percent = {name: f"{100 * p:.0f}%" for name, p in zip(names, (SHARES[1], *TUNING_SHARES), strict=True)}
    text = README.format(rows=rows, problems=MEASURED, samples=SAMPLES_EACH, **percent, **facts)
    (folder / "README.md").write_text(text)


def main(argv: list[str]) -> dict:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of the first phase")
    parser.add_argument("--tuning_steps", type=int, default=TUNING_STEPS, help="training steps of the second phase")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, problems and batches")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    mesh = make_mesh()
    jax.set_mesh(mesh)
    tokenizer = make_tokenizer(args.out)
    config_json = {"vocab_size": tokenizer.vocab_size, **CONFIG}
    write_json(args.out / "config.json", config_json)
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
    write_json(args.out / "generation_config.json", {**ends, "do_sample": False})
    config = read_config(args.out)
    params = train_phases(config, tokenizer, args.steps, args.tuning_steps, args.seed)
    save_params(args.out, params, config, config_json, "bfloat16")

    params = load_params(args.out, config, mesh, ROLLOUT)
    problems = make_problems(MEASURED, args.seed, "tune")
    greedy = measure(params, config, tokenizer, problems, 1, 0.0)
    sampled = measure(params, config, tokenizer, problems, SAMPLES_EACH, 1.0)
    prompt = int(encode_problems(problems, tokenizer)[1].max())
    completion = int((encode_demonstrations(problems, tokenizer, "worked") != tokenizer.pad_id).sum(axis=1).max())
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    command = f"python scripts/make_tiny.py --steps {args.steps} --tuning_steps {args.tuning_steps} --seed {args.seed}"
    facts = dict(parameters=parameters, vocab=config.vocab_size, command=command, prompt=prompt, completion=completion)
    write_readme(args.out, facts, greedy, sampled)
    return {**facts, "greedy": greedy, "sampled": sampled, "seconds": round(time.perf_counter() - start)}


if __name__ == "__main__":
    run_script(main, sys.argv[1:])

"""Complete prompts with a model folder, a run's checkpoint, or adapters on a base model.

    python scripts/sample.py --prompt "Ann has 3 pens and buys 4. How many pens has she?" --max_new_tokens 64
    python scripts/sample.py --model_path DIR --ids "[[2,17,9],[2,5]]" --temperature 0      no tokenizer needed

Unless --raw is given, the prompt becomes the user's turn of Gemma's chat template. The last line of standard output is JSON:
`completions: [{token_ids, logprobs, text}]`, the stop token included; log-probabilities are those at the temperature, or at
temperature 1 for greedy completions.
"""

import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from data.batches import pad_prompts
from data.prompts import encode_prompt, render_prompt
from data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer, stated_stop_ids
from grpo.config import TINY_MODEL, flag
from grpo.errors import ConfigError
from grpo.runs.cli import run_script
from grpo.runs.flags import parse
from grpo.runs.model_source import Model, find_model
from grpo.runs.setup import check_tokenizer
from models.gemma import ExecutionConfig
from models.sampler import Sampling, row_keys, sample
from models.sharding import ROLLOUT, activation_dtype, make_mesh, to_devices


@dataclass(frozen=True)
class SampleConfig:
    model_path: str = flag(TINY_MODEL, "a model folder in any format, a run's directory or checkpoint, adapters, hf:OWNER/NAME")
    base_path: str = flag("", "the base model of adapters; the base model of a run, if it has moved")
    adapter_alpha: float = flag(0.0, "alpha of adapters that do not store it")
    prompt: str = flag("", "text of the user's turn")
    ids: str = flag("", "prompts as token ids instead: a JSON list of lists, whose lengths may differ")
    system_prompt: str = flag("", "text before the prompt: the system's turn, or in the user's where there is none")
    thinking: bool = flag(False, "Gemma 4: let the model think first; what it thinks is not printed")
    raw: bool = flag(False, "no chat template: <bos>, then the text")
    samples: int = flag(1, "completions per prompt")
    max_new_tokens: int = flag(128, "maximum length of a completion, the stop token included")
    temperature: float = flag(0.0, "0 is greedy")
    top_k: int = flag(0, "sample from the k most likely tokens; 0: from all")
    top_p: float = flag(1.0, "sample from the most likely tokens with this total probability; 1: from all")
    seed: int = flag(0, "seed of the samples")
    dtype: str = flag("auto", "auto: float32 on a CPU, bfloat16 elsewhere", choices=("auto", "float32", "bfloat16"))
    rollout_tp: int = flag(1, "devices that share one copy of the MLP and the vocabulary")

    def __post_init__(self):
        if bool(self.prompt) == bool(self.ids):
            raise ConfigError("give either --prompt TEXT or --ids '[[2,17,9],...]'")
        for name in ("samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1")
        if not 0 <= self.temperature < float("inf") or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature {self.temperature} and top_k {self.top_k} must be at least 0, top_p {self.top_p} in (0, 1]"
            )


def read_ids(text: str, vocab_size: int) -> list[list[int]]:
    """Parse prompts such as `[[2,17,9],[2,5]]`. Raises ConfigError."""
    try:
        prompts = json.loads(text)
    except (ValueError, RecursionError):
        prompts = None
    shaped = isinstance(prompts, list) and prompts and all(isinstance(ids, list) and ids for ids in prompts)
    if not shaped or any(type(i) is not int for ids in prompts for i in ids):  # type: ignore[union-attr]
        raise ConfigError(f"ids {text[:60]!r} must be a JSON list of lists of token ids, such as [[2,17,9],[2,5]]")
    wrong = [i for ids in prompts for i in ids if not 0 <= i < vocab_size]  # type: ignore[union-attr]
    if wrong:
        raise ConfigError(f"ids: token {wrong[0]} must be at least 0 and below {vocab_size}, the model's vocabulary")
    return prompts  # type: ignore[return-value]


def main(argv: list[str]) -> dict[str, Any]:
    config = parse(SampleConfig, argv, __doc__ or "")
    source = find_model(config.model_path, config.base_path, config.adapter_alpha)
    tokenizer = load_tokenizer(source.folder, config.thinking) if has_tokenizer(source.folder) or config.prompt else None
    if tokenizer:
        check_tokenizer(tokenizer, source.config)
    prompts = choose_prompts(config, tokenizer, source.config.vocab_size)
    print(source.line, file=sys.stderr)
    samples, seconds = complete(
        prompts, tokenizer.stop_ids if tokenizer else stated_stop_ids(source.folder) or (1,), source, config
    )
    completions = []
    for b, (ids, logprobs) in enumerate(samples):
        text = tokenizer.decode(ids) if tokenizer else ""
        completions.append({"token_ids": ids, "logprobs": logprobs, "text": text})
        print(text if tokenizer else " ".join(map(str, ids)), end="\n\n" if b < len(samples) - 1 else "\n")
    return {"model_path": config.model_path, "seconds": round(seconds, 2), "completions": completions}


def choose_prompts(config: SampleConfig, tokenizer: Tokenizer | None, vocab_size: int) -> list[list[int]]:
    """The prompts of the command line as token ids."""
    if config.ids:
        return read_ids(config.ids, vocab_size)
    assert tokenizer
    if config.raw:
        return [[tokenizer.bos_id, *tokenizer.encode(render_prompt(config.prompt, config.system_prompt))]]
    return [encode_prompt(tokenizer, config.prompt, config.system_prompt)]


def complete(
    prompts: list[list[int]], ends: tuple[int, ...], source: Model, config: SampleConfig
) -> tuple[list[tuple[list[int], list[float]]], float]:
    """Token ids and log-probabilities of the completions, prompt by prompt; the seconds that sampling took.

    `ends` are the ids that end a completion.
    """
    mesh = make_mesh(config.rollout_tp)
    padded = prompts + [prompts[0]] * (-len(prompts) % mesh.size)  # rows must divide over the devices; copies are not shown
    tokens, lengths = pad_prompts(padded, max(map(len, padded)), pad_id=0)
    rows, dtype = len(padded) * config.samples, activation_dtype(config.dtype)
    with jax.set_mesh(mesh):
        params = source.load_policy(mesh, dtype)
        start = time.perf_counter()
        samples = sample(
            params,
            to_devices(tokens, "QP"),
            to_devices(lengths, "Q"),
            row_keys(config.seed, 0, to_devices(np.arange(rows), "B")),
            to_devices(np.full(rows, config.temperature, np.float32), "B"),
            source.config,
            ExecutionConfig(ROLLOUT, dtype),
            Sampling(config.max_new_tokens, ends, config.top_k, config.top_p),
        )
        samples = jax.device_get(samples)
    seconds = time.perf_counter() - start
    lengths = samples.lengths[: len(prompts) * config.samples]
    found = [(samples.tokens[b, :n].tolist(), samples.logprobs[b, :n].tolist()) for b, n in enumerate(lengths)]
    return found, seconds


if __name__ == "__main__":
    run_script(main, sys.argv[1:])

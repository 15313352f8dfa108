"""A run of a Gemma of one layer and 32 pieces, without files: a step of it takes milliseconds once it is compiled."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from grpo.config import Config
from grpo.rollout import Completions
from grpo.session import plan_sessions
from grpo.step import Run
from models.gemma import ExecutionConfig, GemmaConfig, Params, init_params
from models.sampler import Samples
from models.sharding import ROLLOUT, STORE, TRAIN

MODEL = GemmaConfig(
    num_layers=1, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=16, vocab_size=32, query_scale=0.5,
    local_layers=(False,),
)  # fmt: skip
Q, G, P, C = 2, 2, 3, 4
CONFIG = Config(
    new_problems=4, prompts_per_step=Q, group_size=G, max_prompt_tokens=P, max_new_tokens=C, temperature=0.7,
    learning_rate=1e-2, warmup_steps=0, remat="none", packing=0, halvings=0, logprob_chunk=Q * G * C,
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    id: str
    answer: str = "1"


class Spelled:
    """A tokenizer whose texts are the ids themselves."""

    pad_id, stop_ids = 0, (1,)

    def decode(self, ids: Any) -> str:
        return " ".join(map(str, np.asarray(ids).tolist()))


def grade(text: str, reward: float, truncated: bool = False) -> dict[str, Any]:
    accuracy = {"tagged": False, "strict": False, "flexible": False}
    form = {"reasoning_tags": False, "answer_tags": False, "violation": True}
    return {
        "text": text, "reward": reward, "components": {"own": reward}, "accuracy": accuracy, "format": form,
        "truncated": truncated,
    }  # fmt: skip


def sum_of_ids(texts, problems, truncated) -> list[dict[str, Any]]:
    return [grade(text, float(sum(map(int, text.split()))), cut) for text, cut in zip(texts, truncated, strict=True)]


def make_run(grader: Any = sum_of_ids, **changes: Any) -> Run:
    config, count = replace(CONFIG, **changes), 4
    return Run(
        config=config, mesh=jax.sharding.get_mesh(), model=MODEL, tokenizer=Spelled(),
        problems=[Problem(f"p{i}") for i in range(count)], prompt_ids=[[2, 3 + i, 9][: 1 + i % P] for i in range(count)],
        grade=grader, sessions=plan_sessions(config, count), train=ExecutionConfig(TRAIN, remat=config.remat),
        sample=ExecutionConfig(ROLLOUT),
    )  # fmt: skip


def make_params(seed: int = 0) -> Params:
    """Weights large enough that tokens differ in their probability."""
    params = init_params(jax.random.key(seed), MODEL, STORE)
    return replace(params, embedding=params.embedding * 40)


def completions_of(lengths: list[int], first: int = 10, group_size: int = G) -> Completions:
    """Completions of C tokens at most, each token another number from `first` on; their texts name the row."""
    B = len(lengths)
    numbers, there = first + np.arange(B * C).reshape(B, C), np.arange(C) < np.array(lengths)[:, None]
    tokens: Any = np.where(there, numbers, 0)
    logprobs: Any = np.where(there, -numbers / 100, 0).astype(np.float32)
    held: Any = np.array(lengths)
    samples = Samples(tokens, logprobs, held, held == C)
    prompts = first + np.arange(B // group_size * P).reshape(-1, P)
    problems = [Problem(f"p{q}") for q in range(B // group_size)]
    return Completions(problems, prompts, prompts[:, 0] % P + 1, samples, [f"{first}-{b}" for b in range(B)])

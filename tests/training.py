"""A random Gemma of two layers, a run of four steps and a rollout, which the tests of training share.

Programs are compiled without most optimizations, and results are kept for the whole session: compiling is what takes time.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import few_optimizations

import grpo.rollout
import grpo.runs.evaluate
import grpo.runs.model_source
import grpo.runs.setup
import grpo.runs.trainer
import grpo.session
import grpo.step
import grpo.update
from grpo.batch import Batch, batch_axes, make_batch
from grpo.config import Config
from grpo.runs.checkpoint import Checkpoints
from grpo.runs.metrics import completion_records, rollout_metrics
from grpo.step import StepResult
from models.formats.convert import read_config
from models.formats.save import save_params
from models.gemma import init_params
from models.sharding import STORE, make_mesh, to_devices

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
Q, G, C, STEPS = 8, 4, 16, 4


def xla_flags(devices: int) -> str:
    """Those of this process, for one that has so many devices."""
    return re.sub(r"(device_count=)\d+", rf"\g<1>{devices}", os.environ["XLA_FLAGS"])


REWARDS = """
def variety(completion, problem):
    return len(set(completion)) / 2

def sometimes(completion, problem):
    return float("nan") if len(completion) % 3 == 0 else len(set(completion)) / 2

def rare(completion, problem):
    return sum(map(ord, completion)) % 9 == 0

def broken(completion, problem):
    raise RuntimeError("a fault of the reward's own")

def text(completion, problem):
    return completion
"""


def write_model(folder: Path) -> None:
    """A random Gemma 1 of two layers whose pieces are single characters; `<end_of_turn>` is likely enough to be met."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "\n", *map(chr, range(33, 127))]
    pieces += [f"<unused{i}>" for i in range(-len(pieces) % 8)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in CONTROL])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {
        "architectures": ["GemmaForCausalLM"], "vocab_size": len(pieces), "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    config = read_config(folder)
    with jax.set_mesh(make_mesh(1, jax.devices()[:1])):
        params = init_params(jax.random.key(0), config, STORE)
    embedding = np.array(params.embedding)
    embedding[vocab["<end_of_turn>"]] *= 30  # about half the completions end within 8 tokens
    save_params(folder, replace(params, embedding=embedding), config, values)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    write_model(folder / "model")
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture(scope="session")
def config(folder) -> Config:
    return Config(
        model_path=str(folder / "model"), data="arithmetic", run_dir=str(folder / "run"), system_prompt="", new_problems=64,
        max_steps=STEPS, prompts_per_step=Q, group_size=G, max_prompt_tokens=192, max_new_tokens=C, learning_rate=3e-4,
        warmup_steps=2, reward=f"{folder / 'rewards.py'}:variety", max_bad_updates=2, eval_problems=Q, save_every=1,
        keep_checkpoints=STEPS, remat="none", logprob_chunk=3 * Q * G, packing=0, halvings=0,  # few programs
    )  # fmt: skip


@contextmanager
def devices(count: int) -> Iterator[None]:
    """The loop sees so many devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo.runs.setup, "make_mesh", lambda tp: make_mesh(tp, jax.devices()[:count]))
        yield


def run(config: Config, count: int = 1) -> dict[str, Any]:
    with devices(count):
        return grpo.runs.trainer.train(config)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def read_files(config: Config) -> dict[str, Any]:
    folder = Path(config.run_dir)
    files = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return files | {path.name: lines(path) for path in folder.glob("*.jsonl")}


def final_state(config: Config) -> grpo.update.TrainState:
    """The last checkpoint on the host, whatever devices wrote it."""
    with devices(1):
        prepared = grpo.runs.setup.prepare(config)
    with jax.set_mesh(prepared.mesh), closing(Checkpoints(Path(config.run_dir) / "checkpoints")) as checkpoints:
        restored = checkpoints.restore(initial(prepared), lambda meta: None)
    assert restored is not None
    return jax.device_get(restored.state)


def initial(run: grpo.runs.setup.Setup) -> grpo.update.TrainState:
    """The state before the first step."""
    return grpo.update.init_state(grpo.runs.trainer.load_base(run), run.update)


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    machine = ("time/", "tokens_per_s/", "compiles", "hbm_peak")
    return [{name: value for name, value in record.items() if not name.startswith(machine)} for record in records]


@dataclass
class Finished:
    result: dict[str, Any]
    files: dict[str, Any]
    state: grpo.update.TrainState
    result_again: dict[str, Any]
    files_again: dict[str, Any]


@pytest.fixture(scope="session")
def finished(config) -> Finished:
    """An uninterrupted run on one device, then the same command once more. Its directory is free again afterwards."""
    with few_optimizations():
        result = run(config)
        files, state = read_files(config), final_state(config)
        again = run(config)
        finished = Finished(result, files, state, again, read_files(config))
    shutil.rmtree(config.run_dir)
    return finished


@pytest.fixture
def free_run_dir(config) -> Iterator[None]:
    """The run directory of `config`, so that its compiled programs serve every test."""
    yield
    shutil.rmtree(config.run_dir, ignore_errors=True)


@contextmanager
def interrupted(step: int, where: str) -> Iterator[None]:
    """Ctrl-C in `step`: after its rollout; with its records written but not its checkpoint; in the evaluation at the end."""
    real_sample, real_save, real_evaluate, calls = grpo.rollout.sample, Checkpoints.save, grpo.runs.trainer.evaluate, []

    def stop_in_rollout(weights, indices, at, *rest):
        out = real_sample(weights, indices, at, *rest)
        if at == step:
            raise KeyboardInterrupt
        return out

    def stop_in_save(self, at, *rest, **options):
        if at == step:
            raise KeyboardInterrupt
        real_save(self, at, *rest, **options)

    def stop_in_evaluation(*args, **options):
        calls.append(args)
        if len(calls) == 2:  # the first is the one before training
            raise KeyboardInterrupt
        return real_evaluate(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        if where == "rollout":
            patch.setattr(grpo.rollout, "sample", stop_in_rollout)
        elif where == "save":
            patch.setattr(Checkpoints, "save", stop_in_save)
        else:
            patch.setattr(grpo.runs.trainer, "evaluate", stop_in_evaluation)
        with pytest.raises(KeyboardInterrupt):
            yield


@dataclass
class Bench:
    """One rollout of the random model, on the host, to be put on any mesh."""

    config: Config
    batch: Batch

    def prepared(self, count: int = 1, **changes):
        with devices(count):
            return grpo.runs.setup.prepare(replace(self.config, **changes))

    def updates(self, batches: list[Batch], count: int = 1, **changes) -> tuple[list, list[dict[str, float]]]:
        """States and statistics after each batch, beginning with the state before the first."""
        prepared = self.prepared(count, **changes)
        with jax.set_mesh(prepared.mesh):
            state = initial(prepared)
            states, stats = [jax.device_get(state)], []
            for batch in batches:
                rate = grpo.session.learning_rate(len(stats), STEPS, self.config.learning_rate, self.config.warmup_steps)
                state, figures, _ = grpo.update.train_step(
                    state, laid_out(batch), rate, prepared.model, prepared.train, prepared.update
                )
                states.append(jax.device_get(state))
                stats.append({name: float(value) for name, value in jax.device_get(figures).items()})
        return states, stats

    def logprobs(self, count: int = 1, **changes) -> np.ndarray:
        prepared = self.prepared(count, **changes)
        with jax.set_mesh(prepared.mesh):
            state = initial(prepared)
            batch = laid_out(self.batch)
            return jax.device_get(
                grpo.update.completion_logprobs(state.params, batch, prepared.model, prepared.train, prepared.update)
            )

    def rollout(self, **changes) -> tuple[Batch, list[dict[str, Any]]]:
        return self.rollout_and_metrics(**changes)[:2]

    def rollout_and_metrics(self, **changes) -> tuple[Batch, list[dict[str, Any]], dict[str, Any]]:
        """The rollout of a first step, as `grpo.step.one_step` makes it: the batch, and what is recorded of it."""
        prepared = self.prepared(**changes)
        with jax.set_mesh(prepared.mesh):
            weights, indices = initial(prepared).params, np.arange(Q)
            completions = grpo.rollout.sample(weights, indices, 1, prepared)
            grades, resampled = grpo.rollout.grade(completions, prepared), 0
            if prepared.config.resample:
                completions, grades, resampled = grpo.rollout.resample(completions, grades, weights, indices, 1, prepared, None)
            rewards = grpo.rollout.rewards_of(grades, G)
            advantages = grpo.rollout.advantages_of(rewards, prepared.config)
            mask, batch = grpo.rollout.build_batch(completions, rewards, advantages, prepared)
        result = StepResult(completions, grades, advantages, mask, batch, [0.0], {"loss": jax.numpy.zeros(())}, {}, resampled)
        metrics = rollout_metrics(result) | {"resampled_groups": resampled}
        return jax.device_get(batch), completion_records(1, result), metrics


def completions(batch: Batch) -> np.ndarray:
    """The tokens of each completion, 0 behind them, however they are packed.  BC"""
    packed, groups = jax.tree.map(np.asarray, batch.packed), len(batch.prompts)
    each = Q * G // groups
    rows = np.repeat(packed.tokens.reshape(groups, -1), each, axis=0)
    there = np.repeat(packed.segments.reshape(groups, -1), each, axis=0)
    there = np.take_along_axis(there, packed.slots, axis=1) == (np.arange(Q * G) % each + 1)[:, None]
    first = (np.arange(C) > 0) & (packed.slots == 0)  # behind its end, a completion points to slot 0
    return batch.restore(np.where(there & ~first, np.take_along_axis(rows, packed.slots, axis=1), 0))


def laid_out(batch: Batch) -> Batch:
    return jax.tree.map(to_devices, batch, batch_axes(batch))


@pytest.fixture(scope="session")
def bench(config) -> Bench:
    """The reference is the policy moved a little, so that the KL has a gradient."""
    bench = Bench(config, None)  # type: ignore[arg-type]
    with few_optimizations():
        bench.batch, _ = bench.rollout()
    noise = np.random.default_rng(0).normal(0, 0.3, bench.batch.mask.shape).astype(np.float32)
    bench.batch = replace(bench.batch, ref_logprobs=bench.batch.sampler_logprobs + noise)
    return bench


def assert_same_update(states, others):
    """The gradient, as Adam's first moment holds it, within 1e-5 of a leaf's largest entry: float32 sums in another order."""
    moments, expected = (jax.tree.leaves(state.opt_state[1].mu) for state in (states[-1], others[-1]))
    for leaf, other in zip(moments, expected, strict=True):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-5 * np.abs(other).max())


def cut_short(batch: Batch, finer: int, parts: int = 0) -> Batch:
    """The batch with completions of 1 to C tokens, in all groups of different ones, packed so finely; see `make_batch`."""
    lengths = np.minimum(np.asarray(batch.mask).sum(axis=1), np.arange(Q * G) * 5 % 11 % C + 1).astype(int)
    mask = np.arange(C) < lengths[:, None]
    prompts, starts, logprobs, advantages = map(
        np.asarray, (batch.prompts, batch.lengths, batch.sampler_logprobs, batch.advantages)
    )
    tokens = completions(batch) * mask
    cut = make_batch(prompts, starts, tokens, lengths, logprobs, mask, advantages, finer, parts, lambda x, _: x)
    return replace(cut, ref_logprobs=cut.place(np.asarray(batch.ref_logprobs)))


def distance(a, b) -> float:
    return math.sqrt(sum(float(((x - y) ** 2).sum()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)))


def way(config: Config, finished: Finished) -> float:
    """How far training has taken the parameters."""
    with devices(1):
        prepared = grpo.runs.setup.prepare(config)
    with jax.set_mesh(prepared.mesh):
        start = jax.device_get(grpo.runs.trainer.load_base(prepared))
    return distance(finished.state.params, start)


@pytest.fixture(scope="session")
def bare(config, folder) -> Config:
    """No KL, no correction for the sampler, no evaluation, and time enough to learn."""
    return replace(
        config, run_dir=str(folder / "bare"), beta=0.0, tis_cap=0.0, eval_problems=0, max_steps=50, learning_rate=1e-2,
        new_problems=400, save_every=100, track="tensorboard",
    )  # fmt: skip

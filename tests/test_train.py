"""Laws of the loop in grpo/runs/trainer.py and grpo/rollout.py, on a random Gemma of two layers: what a run writes and resumes.

Programs are compiled without most optimizations, and configurations are shared, because compiling is what takes time here.
"""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_trackers import read_events

import grpo.runs.evaluate
import grpo.runs.model_source
import grpo.runs.setup
import grpo.runs.trainer
import grpo.update
from data.arithmetic import make_problems
from data.batches import Packed, pack
from data.prompts import encode_prompt, render_prompt
from data.tokenizer import load_tokenizer
from grpo.config import Config, ConfigError, RunError
from grpo.rollout import Batch, to_devices, generate, grade_everywhere, rollout
from grpo.runs.checkpoint import Checkpoints
from grpo.runs.metrics import JsonLines
from grpo.runs.reward_worker import UserRewards
from grpo.runs.token_trace import groups_due
from models import ModelError
from models.formats.convert import read_config
from models.formats.save import save_params
from models.gemma import init_params
from models.sharding import STORE, make_mesh

pytestmark = pytest.mark.usefixtures("quick_to_compile")

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
Q, G, C, STEPS = 8, 4, 16, 4

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    write_model(folder / "model")
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture(scope="module")
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


def initial(run: grpo.runs.setup.Run) -> grpo.update.TrainState:
    """The state before the first step."""
    return grpo.update.init_state(grpo.runs.trainer.load_base(run), run.config)


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


@pytest.fixture(scope="module")
def finished(config) -> Finished:
    """An uninterrupted run on one device, then the same command once more. Its directory is free again afterwards."""
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
    real_rollout, real_save, real_evaluate, calls = grpo.runs.trainer.rollout, Checkpoints.save, grpo.runs.trainer.evaluate, []

    def stop_in_rollout(view, problems, prompt_ids, at, *rest):
        out = real_rollout(view, problems, prompt_ids, at, *rest)
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
            patch.setattr(grpo.runs.trainer, "rollout", stop_in_rollout)
        elif where == "save":
            patch.setattr(Checkpoints, "save", stop_in_save)
        else:
            patch.setattr(grpo.runs.trainer, "evaluate", stop_in_evaluation)
        with pytest.raises(KeyboardInterrupt):
            yield


# ------------------------------------------------------------------------------------------------------ what a run writes


def test_a_run_leaves_its_records(config, finished):
    files = finished.files
    assert set(files) == {
        "config.json",
        "sessions.json",
        "result.json",
        "metrics.jsonl",
        "completions.jsonl",
        "tokens.jsonl",
        "evaluations.jsonl",
    }
    assert Config(**files["config.json"]) == config
    assert files["result.json"] == json.loads(json.dumps(finished.result))
    assert [record["step"] for record in files["metrics.jsonl"]] == [1, 2, 3, 4]
    assert [record["step"] for record in files["evaluations.jsonl"]] == [0, STEPS]
    assert [record["step"] for record in files["completions.jsonl"]] == [step for step in (1, 2, 3, 4) for _ in range(Q * G)]
    assert [record["step"] for record in files["tokens.jsonl"]] == [step for step in (1, 2, 3, 4) for _ in range(Q)]


def test_the_result_says_what_the_records_say(config, finished):
    result, metrics = finished.result, finished.files["metrics.jsonl"]
    evaluations = [record["accuracy"] for record in finished.files["evaluations.jsonl"]]
    assert set(result) == {
        "run_dir", "preset", "seed", "steps", "finished", "seconds", "accuracy_before", "accuracy_after", "sessions",
        "reward_first", "reward_last", "recompilations", "params_digest",
    }  # fmt: skip
    assert (result["run_dir"], result["preset"], result["seed"], result["steps"]) == (config.run_dir, "custom", 0, STEPS)
    assert [result["accuracy_before"], result["accuracy_after"]] == evaluations
    assert (result["reward_first"], result["reward_last"]) == (metrics[0]["reward"], metrics[-1]["reward"])


def test_every_suggested_metric_is_there_and_finite(finished):
    components = ("correct", "reasoning_tags", "answer_tags", "operators", "violation", "variety")
    names = {f"rewards/{name}/{figure}" for name in components for figure in ("mean", "std")}
    names |= {f"ratio/{figure}" for figure in ("mean", "max", "min")} | {
        f"format/{part}" for part in ("strict", "reasoning", "answer")
    }
    names |= {f"time/{phase}" for phase in ("prefill", "decode", "reward", "reference", "update", "step")}
    names |= {
        "step", "reward", "reward_std", "accuracy", "accuracy/strict", "accuracy/flexible", "frac_reward_zero_std",
        "frac_truncated", "kl/k3", "kl/k1", "entropy", "clip/low", "clip/high", "logp_diff_sampler_trainer/mean",
        "logp_diff_sampler_trainer/max", "advantage/abs_mean", "advantage/max", "loss", "grad_norm", "bad_updates", "lr",
        "completions/mean_length", "completions/max_length", "completions/mean_terminated_length", "completions/mean_words",
        "tokens_per_s/decode", "tokens_per_s/total", "hbm_peak", "compiles", "frac_unscorable", "skipped_update",
        "resampled_groups",
    }  # fmt: skip
    for record in finished.files["metrics.jsonl"]:
        assert names <= set(record)
        assert record["alarms"] == []
        assert all(math.isfinite(value) for name, value in record.items() if name != "alarms")
        assert record["time/step"] >= record["time/prefill"] + record["time/decode"] + record["time/update"]


def test_every_completion_is_recorded_with_its_reward_and_advantage(finished):
    for record in finished.files["completions.jsonl"]:
        assert record["reward"] == pytest.approx(sum(record["components"].values()), abs=1e-6)
        assert record["components"]["variety"] == len(set(record["text"])) / 2
        assert record["components"]["violation"] == -15  # a random model writes no tags
        assert 1 <= record["length"] <= C
        assert record["length"] == C or not record["truncated"]
    groups = np.array([record["advantage"] for record in finished.files["completions.jsonl"]]).reshape(-1, G)
    rewards = np.array([record["reward"] for record in finished.files["completions.jsonl"]]).reshape(-1, G)
    np.testing.assert_allclose(groups.sum(axis=1), 0, atol=1e-5)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(groups, centred / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4), atol=1e-5)
    assert (groups != 0).any()
    problems = np.array([record["problem"] for record in finished.files["completions.jsonl"]]).reshape(-1, G)
    assert (problems == problems[:, :1]).all() and len(set(problems[:, 0])) == STEPS * Q


def test_metrics_are_means_over_the_recorded_completions(finished):
    for metrics in finished.files["metrics.jsonl"]:
        records = [record for record in finished.files["completions.jsonl"] if record["step"] == metrics["step"]]
        lengths = np.array([record["length"] for record in records])
        ended = np.array([not record["truncated"] for record in records])
        rewards = np.array([record["reward"] for record in records]).reshape(Q, G)
        variety = np.array([record["components"]["variety"] for record in records])
        expected = {
            "reward": rewards.mean(),
            "reward_std": rewards.std(axis=1, ddof=1).mean(),
            "frac_reward_zero_std": (np.ptp(rewards, axis=1) == 0).mean(),
            "frac_unscorable": 0.0,
            "frac_truncated": 1 - ended.mean(),
            "completions/mean_length": lengths.mean(),
            "completions/max_length": lengths.max(),
            "completions/mean_terminated_length": lengths[ended].mean(),
            "rewards/variety/mean": variety.mean(),
            "rewards/variety/std": variety.std(),
            "format/strict": 0.0,
            "advantage/max": max(abs(record["advantage"]) for record in records),
        }
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert any(0 < metrics["frac_truncated"] < 1 for metrics in finished.files["metrics.jsonl"])  # both kinds are met


def test_on_policy_the_ratio_is_one_and_the_sampler_agrees_with_the_trainer(finished):
    for metrics in finished.files["metrics.jsonl"]:
        assert (metrics["ratio/min"], metrics["ratio/mean"], metrics["ratio/max"]) == (1, 1, 1)
        assert metrics["clip/low"] == metrics["clip/high"] == 0
        assert metrics["logp_diff_sampler_trainer/max"] < 1e-4  # nats, float32 on both sides
    first, *later = finished.files["metrics.jsonl"]
    assert abs(first["kl/k1"]) < 1e-6 and first["kl/k3"] < 1e-9  # the policy still is the reference
    assert all(metrics["kl/k3"] > 1e-6 for metrics in later)


def test_nothing_is_compiled_after_the_first_step(finished):
    first, *later = finished.files["metrics.jsonl"]
    assert first["compiles"] > 0
    assert [metrics["compiles"] for metrics in later] == [0] * (STEPS - 1)
    assert finished.result["recompilations"] == 0


def test_the_learning_rate_warms_up_and_then_follows_a_cosine_to_a_tenth(config, finished):
    """Two updates of warm-up of four in all: 1/3, 2/3, then the peak and half way down the cosine."""
    peak = config.learning_rate
    assert config.warmup_steps == 2
    expected = [peak / 3, peak * 2 / 3, peak, (peak + peak / 10) / 2]
    assert [metrics["lr"] for metrics in finished.files["metrics.jsonl"]] == pytest.approx(expected, rel=1e-6)


def test_an_evaluation_counts_what_it_says(finished):
    for record in finished.files["evaluations.jsonl"]:
        figures = record["accuracy"]
        assert figures["n"] == Q
        assert 0 <= figures["low"] <= figures["greedy"] <= figures["high"] <= 1
        assert figures["greedy_reward"] != figures["sampled_reward"]  # variety differs, though nothing is right


def test_an_evaluation_does_not_depend_on_the_batch_it_is_computed_in(config, finished):
    """Three prompts at a time with room for fifteen samples, or all with room for more than there are."""
    for prompts, group in ((3, 5), (Q, 4)):
        with devices(1):
            run = grpo.runs.setup.prepare(replace(config, prompts_per_step=prompts, group_size=group))
        with jax.set_mesh(run.mesh):
            view = grpo.update.sampling_params(grpo.runs.trainer.load_base(run), run.model, run.sample)
            figures = grpo.runs.trainer.evaluate(
                view, run.eval_problems, run.eval_ids, run.tokenizer, run.model, run.sample, run.config, run.rewards
            )
        assert figures == finished.files["evaluations.jsonl"][0]["accuracy"]


@pytest.mark.parametrize(
    ("sampled", "lengths"), [(True, {"greedy_length": 4, "sampled_length": 5}), (False, {"greedy_length": 2.5})]
)
def test_an_evaluation_takes_the_mean_over_all_its_problems(config, monkeypatch, sampled, lengths):
    """Of completions that have 1, 2, 3, ... tokens, in another order."""
    problems, count = make_problems(4, 0, "test"), 8 if sampled else 4
    completions = [grpo.runs.evaluate.Completion(i, [0] * (i + 1), "", False) for i in range(count)]
    monkeypatch.setattr(grpo.runs.evaluate, "complete", lambda *_: iter([completions[3:], completions[:3]]))
    nothing: Any = None
    figures = grpo.runs.evaluate.evaluate(nothing, problems, [], nothing, nothing, nothing, config, UserRewards(), sampled)
    assert {name: value for name, value in figures.items() if name.endswith("length")} == lengths


# ----------------------------------------------------------------------------------------------------------------- resume


def test_running_a_finished_run_again_changes_nothing(finished):
    """Not even in a record: only how long the second call took."""
    before, after = finished.result, finished.result_again
    assert {**after, "seconds": 0} == {**before, "seconds": 0}
    files, again = dict(finished.files), dict(finished.files_again)
    assert {**again.pop("result.json"), "seconds": 0} == {**files.pop("result.json"), "seconds": 0}
    assert again == files


@pytest.mark.usefixtures("free_run_dir")
@pytest.mark.parametrize(("step", "where"), [(1, "rollout"), (3, "rollout"), (3, "save"), (4, "save"), (4, "evaluation")])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(config, finished, step, where):
    """Parameters, moments, counters and every record but the times: bit for bit."""
    with interrupted(step, where):
        run(config)
    records = step - 1 if where == "rollout" else step
    assert len(lines(Path(config.run_dir) / "metrics.jsonl")) == records
    result = run(config)
    assert {**result, "seconds": 0} == {**finished.result, "seconds": 0}
    files = read_files(config)
    for name in ("completions.jsonl", "tokens.jsonl", "config.json", "sessions.json"):
        assert files[name] == finished.files[name]
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert without_times(files[name]) == without_times(finished.files[name])
    for leaf, expected in zip(jax.tree.leaves(final_state(config)), jax.tree.leaves(finished.state), strict=True):
        np.testing.assert_array_equal(leaf, expected)


@pytest.mark.usefixtures("free_run_dir")
def test_a_run_directory_belongs_to_its_settings(config, folder):
    """What touches the result may not change; how far it goes, what it looks at and how it uses the machine may."""
    with interrupted(3, "rollout"):
        run(config)
    before = read_files(config)
    for change in ({"learning_rate": 1e-3}, {"seed": 1}, {"group_size": 2}, {"beta": 0.0}, {"mask_truncated": True}):
        ((name, value),) = change.items()
        with pytest.raises(ConfigError, match=rf"{name} {getattr(config, name)!r} -> {value!r}") as error:
            run(replace(config, **change))
        assert "\n" not in str(error.value) and "--run_dir" in str(error.value)
    with pytest.raises(ConfigError, match=r"seed 0 -> 1, beta 0.04 -> 0.1"):
        run(replace(config, seed=1, beta=0.1))
    assert read_files(config) == before
    with interrupted(3, "rollout"):
        run(replace(config, save_every=7, eval_every=3, inspect_groups=5))
    changed = {"save_every": 7, "eval_every": 3, "inspect_groups": 5}
    assert read_files(config)["config.json"] == {**before["config.json"], **changed}
    with pytest.raises(ConfigError, match=r"has 2 steps already, in session 1; .* plan only 1$"):
        run(replace(config, max_steps=1))


@pytest.mark.usefixtures("free_run_dir")
def test_a_run_goes_from_eight_devices_to_one(config, finished):
    """Two interruptions on eight devices, the rest on one. Same samples in step 1; after it, equal to rounding.

    Adam turns the rounding of a vanishing gradient into a step of either sign, so parameters are compared as a whole:
    they end within 1% of the way that training has taken them.
    """
    for step in (2, 4):
        with interrupted(step, "rollout"):
            run(config, count=8)
    result = run(config)
    assert result["recompilations"] == 0
    files = read_files(config)
    for record, expected in zip(files["completions.jsonl"][: Q * G], finished.files["completions.jsonl"], strict=False):
        assert record == expected
    for record, expected in zip(files["tokens.jsonl"][:Q], finished.files["tokens.jsonl"], strict=False):
        assert record["problem"] == expected["problem"]
        for completion, other in zip(record["completions"], expected["completions"], strict=True):
            assert completion == {name: pytest.approx(values, abs=1e-4) for name, values in other.items()}
    first, expected = (without_times(f["metrics.jsonl"])[0] for f in (files, finished.files))
    assert first.pop("alarms") == expected.pop("alarms")
    assert first == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert [m["reward"] for m in files["metrics.jsonl"]] == [m["reward"] for m in finished.files["metrics.jsonl"]]
    assert 0 < distance(final_state(config).params, finished.state.params) < 0.01 * way(config, finished)


def distance(a, b) -> float:
    return math.sqrt(sum(float(((x - y) ** 2).sum()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)))


def way(config: Config, finished: Finished) -> float:
    """How far training has taken the parameters."""
    with devices(1):
        prepared = grpo.runs.setup.prepare(config)
    with jax.set_mesh(prepared.mesh):
        start = jax.device_get(grpo.runs.trainer.load_base(prepared))
    return distance(finished.state.params, start)


@pytest.mark.usefixtures("free_run_dir")
def test_a_run_may_change_how_it_uses_the_machine(config, finished):
    """From padded to packed, halved and unrolled: the same samples and, to rounding, the same parameters.

    Of the steps that follow, those compile whose shape is new.
    """
    with interrupted(2, "rollout"):
        run(config)
    run(replace(config, packing=2, halvings=1, unroll=True))
    files = read_files(config)
    assert files["completions.jsonl"] == finished.files["completions.jsonl"]
    shapes = []
    for metrics in files["metrics.jsonl"][1:]:
        lengths = np.array([record["length"] for record in files["completions.jsonl"] if record["step"] == metrics["step"]])
        shape = pack(np.zeros((Q * G, C), int), lengths, np.ones(Q, int), finer=2).tokens.shape
        assert (metrics["compiles"] > 0) == (shape not in shapes)
        shapes.append(shape)
    assert 1 < len(set(shapes)) < len(shapes)
    assert 0 < distance(final_state(config).params, finished.state.params) < 0.01 * way(config, finished)


# ------------------------------------------------------------------------------------------------------------- the update


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
                rate = grpo.update.learning_rate(len(stats), STEPS, prepared.config)
                state, figures, _ = grpo.update.train_step(
                    state, laid_out(batch), rate, prepared.model, prepared.train, prepared.config
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
                grpo.update.completion_logprobs(state.params, batch, prepared.model, prepared.train, prepared.config)
            )

    def rollout(self, **changes) -> tuple[Batch, list[dict[str, Any]]]:
        return self.rollout_and_metrics(**changes)[:2]

    def rollout_and_metrics(self, **changes) -> tuple[Batch, list[dict[str, Any]], dict[str, float]]:
        prepared = self.prepared(**changes)
        with jax.set_mesh(prepared.mesh):
            state = initial(prepared)
            view = grpo.update.sampling_params(state.params, prepared.model, prepared.sample)
            batch, records, metrics = rollout(
                view, prepared.problems[:Q], prepared.prompt_ids[:Q], 1, prepared.tokenizer, prepared.model, prepared.sample,
                prepared.config, prepared.rewards,
            )  # fmt: skip
        return jax.device_get(batch), records, metrics


def completions(batch: Batch) -> np.ndarray:
    """The tokens of each completion, 0 behind them, however they are packed.  BC"""
    packed = jax.tree.map(np.asarray, batch.packed)
    rows = np.repeat(packed.tokens.reshape(Q, -1), G, axis=0)
    there = np.repeat(packed.segments.reshape(Q, -1), G, axis=0)
    there = np.take_along_axis(there, packed.slots, axis=1) == (np.arange(Q * G) % G + 1)[:, None]
    first = (np.arange(C) > 0) & (packed.slots == 0)  # behind its end, a completion points to slot 0
    return np.where(there & ~first, np.take_along_axis(rows, packed.slots, axis=1), 0)


def laid_out(batch: Batch) -> Batch:
    letters = {"prompts": "QP", "lengths": "Q", "advantages": "B", "packed": Packed(*["BC"] * 4)}
    return jax.tree.map(
        to_devices, batch, replace(batch, **{n: letters.get(n, "BC") for n, x in vars(batch).items() if x is not None})
    )


@pytest.fixture(scope="module")
def bench(config) -> Bench:
    """The reference is the policy moved a little, so that the KL has a gradient."""
    bench = Bench(config, None)  # type: ignore[arg-type]
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


@pytest.fixture(scope="module")
def one_update(bench):
    return bench.updates([bench.batch])


@pytest.mark.parametrize("parts", [2, 4])
def test_microbatches_change_the_update_by_rounding_only(bench, one_update, parts):
    states, stats = bench.updates([bench.batch], microbatches=parts)
    assert stats[0] == pytest.approx(one_update[1][0], rel=1e-5, abs=1e-5)
    assert_same_update(states, one_update[0])


def test_eight_devices_change_the_update_by_rounding_only(bench, one_update):
    states, stats = bench.updates([bench.batch], count=8)
    assert stats[0] == pytest.approx(one_update[1][0], rel=1e-5, abs=1e-5)
    assert_same_update(states, one_update[0])


def cut_short(batch: Batch, finer: int) -> Batch:
    """The batch with completions of 1 to C tokens, in all groups of different ones, packed so finely."""
    lengths = np.minimum(np.asarray(batch.mask).sum(axis=1), np.arange(Q * G) * 5 % 11 % C + 1).astype(int)
    packed = pack(completions(batch) * (np.arange(C) < lengths[:, None]), lengths, np.asarray(batch.lengths), finer)
    return replace(batch, packed=packed, mask=(np.arange(C) < lengths[:, None]).astype(np.float32))


@pytest.fixture(scope="module")
def padded_update(bench):
    return bench.updates([cut_short(bench.batch, 0)])


@pytest.mark.parametrize(
    ("count", "changes"), [(1, {}), (1, {"microbatches": 2, "unroll": True}), (8, {})], ids=["1", "parts, unrolled", "8"]
)
def test_packing_changes_the_update_by_rounding_only(bench, padded_update, count, changes):
    padded, packed = cut_short(bench.batch, 0), cut_short(bench.batch, 4)
    assert packed.packed.tokens.size < padded.packed.tokens.size
    assert (completions(packed) == completions(padded)).all()
    states, stats = bench.updates([packed], count=count, **changes)
    assert stats[0] == pytest.approx(padded_update[1][0], rel=1e-5, abs=1e-5)
    assert_same_update(states, padded_update[0])


def test_every_completion_is_a_sample_of_its_own(bench):
    """Four tokens out of 360 pieces do not repeat by chance: not within a group, not across groups, not in another step."""
    rows = [tuple(row) for row in completions(bench.batch)[np.asarray(bench.batch.mask).sum(axis=1) >= 4].tolist()]
    assert len(rows) > Q and len(set(rows)) == len(rows)


def test_logprobs_do_not_depend_on_microbatches_and_equal_the_samplers(bench):
    """Rows come back in their own order: parts are cut across the batch, and put together again."""
    whole = bench.logprobs()
    for parts in (2, 4):
        np.testing.assert_allclose(bench.logprobs(microbatches=parts), whole, rtol=0, atol=1e-5)
    counts = bench.batch.mask > 0
    np.testing.assert_allclose(whole[counts], np.asarray(bench.batch.sampler_logprobs)[counts], rtol=0, atol=1e-4)


def test_the_gradient_is_clipped_to_its_norm(config, bench, one_update):
    """Adam's first moment after one update is (1 - b1) times the clipped gradient."""
    (_, state), (stats,) = one_update
    assert stats["grad_norm"] > config.max_grad_norm  # what is logged is the norm before
    moments = jax.tree.leaves(state.opt_state[1].mu)
    norm = math.sqrt(sum(float((np.asarray(leaf, float) ** 2).sum()) for leaf in moments))
    assert norm == pytest.approx((1 - config.adam_b1) * config.max_grad_norm, rel=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_update_is_skipped_and_counted(bench, bad):
    """Parameters and moments stay bit-equal; the next good update ends the row but not the count."""
    poisoned = replace(bench.batch, advantages=np.where(np.arange(Q * G) == 3, bad, bench.batch.advantages).astype(np.float32))
    states, stats = bench.updates([bench.batch, poisoned, poisoned, bench.batch, poisoned])
    assert [int(state.bad_updates) for state in states] == [0, 0, 1, 2, 2, 3]
    assert [int(state.bad_in_a_row) for state in states] == [0, 0, 1, 2, 0, 1]
    assert [figures["bad_updates"] for figures in stats] == [0, 1, 2, 2, 3]
    assert [math.isfinite(figures["grad_norm"]) for figures in stats] == [True, False, False, True, False]
    for before, after, same in zip(states[:-1], states[1:], [False, True, True, False, True], strict=True):
        kept = (before.params, before.opt_state), (after.params, after.opt_state)
        equal = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, kept), strict=True)]
        assert all(equal) if same else not any(equal)


@pytest.mark.usefixtures("free_run_dir")
def test_bad_updates_in_a_row_end_the_run(config, monkeypatch):
    """Bad in steps 1, 3 and 4: with max_bad_updates 2 the run goes on after 1 and 3, and ends at 4."""
    real_rollout = grpo.runs.trainer.rollout

    def poisoned(*args):
        batch, records, metrics = real_rollout(*args)
        return replace(batch, advantages=batch.advantages * (1 if args[3] == 2 else jnp.nan)), records, metrics

    monkeypatch.setattr(grpo.runs.trainer, "rollout", poisoned)
    with pytest.raises(RunError, match=r"^step 4: 2 non-finite updates in a row"):
        run(config)
    metrics = lines(Path(config.run_dir) / "metrics.jsonl")
    assert [record["bad_updates"] for record in metrics] == [1, 1, 2, 3]


def test_a_second_update_on_a_rollout_compares_with_the_old_policy(config, tmp_path, monkeypatch):
    seen, real_step = [], grpo.runs.trainer.train_step

    def spy(*args):
        out = real_step(*args)
        seen.append(jax.device_get(out[1]))
        return out

    monkeypatch.setattr(grpo.runs.trainer, "train_step", spy)
    run(replace(config, run_dir=str(tmp_path / "run"), updates_per_rollout=2, max_steps=1, eval_problems=0, warmup_steps=0))
    first, second = seen
    for ratio in ("ratio/min", "ratio/mean", "ratio/max"):
        assert first[ratio] == pytest.approx(1, abs=1e-4)  # the old policy is computed by another program: rounding
    assert second["ratio/min"] < 1 - 1e-3 and second["ratio/max"] > 1 + 1e-3
    (logged,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert logged["ratio/max"] == second["ratio/max"]


# ---------------------------------------------------------------------------------------------------------- every token


@pytest.mark.parametrize(("groups", "steps"), [(0, 9), (1, 9), (2, 9), (5, 9), (100, 100), (100, 333), (20, 9)])
def test_groups_to_inspect_are_spread_evenly_from_the_first_step_to_the_last(config, groups, steps):
    due = [groups_due(step, steps, replace(config, inspect_groups=groups)) for step in range(1, steps + 1)]
    assert sum(due) == groups
    assert (due[0] > 0) == (groups > 0) and (due[-1] > 0) == (groups > 1)
    for step in range(1, steps + 1):
        assert abs(sum(due[:step]) - groups * step / steps) <= 1
    assert groups_due(1, 1, replace(config, inspect_groups=100)) == Q


@pytest.fixture(scope="module")
def awkward(config, folder) -> Finished:
    """Two updates a rollout, parts, clipping, rows without a score, cut ones left out, other weights."""
    config = replace(
        config, run_dir=str(folder / "awkward"), updates_per_rollout=2, microbatches=2, epsilon_low=1e-3, epsilon_high=2e-3,
        reward=f"{folder / 'rewards.py'}:sometimes", mask_truncated=True, aggregation="dapo", max_steps=2, warmup_steps=0,
        eval_problems=0,
    )  # fmt: skip
    return Finished(run(config), read_files(config), final_state(config), {}, {})


@pytest.mark.parametrize("name", ["finished", "awkward"])
def test_every_token_that_is_recorded_is_as_the_loss_had_it(request, name):
    """Every group of every step. Recomputed in float64 from the log-probabilities; together they give the logged loss. What is
    said of a group is what completions.jsonl says of it.
    """
    files = request.getfixturevalue(name).files
    config = Config(**files["config.json"])
    tokenizer, low, high = load_tokenizer(config.model_path), 1 - config.epsilon_low, 1 + config.epsilon_high
    questions = {problem.id: problem.question for problem in grpo.runs.setup.choose_problems(config)[0]}
    assert len(files["tokens.jsonl"]) == Q * len(files["metrics.jsonl"])
    met = set()
    for metrics in files["metrics.jsonl"]:
        step, loss, size, counted = metrics["step"], 0.0, 0.0, 0
        groups = [record for record in files["tokens.jsonl"] if record["step"] == step]
        completions = [record for record in files["completions.jsonl"] if record["step"] == step]
        for group in groups:
            assert (group["session"], group["question"]) == (metrics["session"], questions[group["problem"]])
            assert {name: group[name] for name in ("beta", "epsilon_low", "epsilon_high", "tis_cap")} == {
                name: getattr(config, name) for name in ("beta", "epsilon_low", "epsilon_high", "tis_cap")
            }
            records = [record for record in completions if record["problem"] == group["problem"]]
            for row, (tokens, record) in enumerate(zip(group["completions"], records, strict=True)):
                length, stopped = record["length"], not record["truncated"]
                assert tokens["row"] == row and tokenizer.decode(tokens["ids"]) == record["text"]
                assert tokens["pieces"] == tokenizer.pieces(tokens["ids"])
                assert tokens["pieces"][-1].startswith("<e") or not stopped
                assert {len(values) for name, values in tokens.items() if name != "row"} == {length}
                counts = record["reward"] is not None and (stopped or not config.mask_truncated)
                policy, old, sampler, ref = (
                    np.array(tokens[name]) for name in ("logprobs", "old_logprobs", "sampler_logprobs", "ref_logprobs")
                )
                ratio, kl, advantage = np.exp(policy - old), np.exp(ref - policy) - 1 - (ref - policy), record["advantage"]
                clipped = (ratio < low if advantage < 0 else ratio > high) & (advantage != 0)
                np.testing.assert_allclose(tokens["ratio"], ratio if counts else 1, rtol=2e-3 if counts else 0)
                np.testing.assert_allclose(tokens["kl"], kl if counts else 0, rtol=2e-3, atol=1e-5)
                met |= {("counts", counts)}
                if not counts:
                    assert not any(tokens["weight"]) and not any(tokens["clipped"])
                    continue
                edge = np.minimum(abs(ratio - low), abs(ratio - high)) > 2e-4  # rounding decides nearer to a bound
                np.testing.assert_array_equal(np.array(tokens["clipped"])[edge], clipped[edge])
                met |= {("clipped", bool(x)) for x in clipped[edge]}
                correction = np.minimum(np.exp(old - sampler), config.tis_cap)
                surrogate = np.minimum(ratio * advantage, np.clip(ratio, low, high) * advantage) * correction
                parts = np.array(tokens["weight"]) * (config.beta * kl - surrogate)
                loss, size, counted = loss + parts.sum(), size + abs(parts).sum(), counted + length
                if config.aggregation == "grpo":
                    np.testing.assert_allclose(tokens["weight"], 1 / length / (Q * G), rtol=1e-4)
        if config.aggregation == "dapo":
            weights = {weight for group in groups for tokens in group["completions"] for weight in tokens["weight"]}
            assert sorted(weights) == [0, pytest.approx(1 / counted, rel=1e-4)]
        assert loss == pytest.approx(metrics["loss"], abs=1e-4 * size) and size > 0.1
    assert met == ({("counts", True), ("clipped", False)} if name == "finished" else
                   {(what, value) for what in ("counts", "clipped") for value in (True, False)})  # fmt: skip


def test_inspecting_changes_nothing_and_costs_nothing_where_it_is_not_due(config, folder, finished, monkeypatch):
    """Two groups, of the first step and of the last."""
    calls, real = [], grpo.runs.trainer.token_records
    monkeypatch.setattr(grpo.runs.trainer, "token_records", lambda *args: calls.append(len(args[0])) or real(*args))
    few = replace(config, run_dir=str(folder / "few"), inspect_groups=2)
    assert run(few)["params_digest"] == finished.result["params_digest"]
    files, all_groups = read_files(few), finished.files["tokens.jsonl"]
    assert calls == [1, 1] and files["tokens.jsonl"] == [all_groups[0], all_groups[(STEPS - 1) * Q]]
    assert without_times(files["metrics.jsonl"]) == without_times(finished.files["metrics.jsonl"])


# ---------------------------------------------------------------------------------------------------------------- options


@pytest.fixture(scope="module")
def bare(config, folder) -> Config:
    """No KL, no correction for the sampler, no evaluation, and time enough to learn."""
    return replace(
        config, run_dir=str(folder / "bare"), beta=0.0, tis_cap=0.0, eval_problems=0, max_steps=50, learning_rate=1e-2,
        new_problems=400, save_every=100, track="tensorboard",
    )  # fmt: skip


def test_without_a_kl_no_reference_is_loaded_and_the_reward_rises(bare, monkeypatch):
    """The mean of the last ten steps lies more than four standard errors above that of the first, untrained one."""
    loads, real_load = [], grpo.runs.model_source.load_params
    monkeypatch.setattr(grpo.runs.model_source, "load_params", lambda *args: loads.append(args) or real_load(*args))
    result = run(bare)
    assert len(loads) == 1
    files = read_files(bare)
    metrics, untrained = files["metrics.jsonl"], [record["reward"] for record in files["completions.jsonl"][: Q * G]]
    assert not any(name.startswith("kl/") for record in metrics for name in record)
    assert len(files["tokens.jsonl"]) == 100
    for record in files["tokens.jsonl"]:
        assert not any("ref_logprobs" in completion or any(completion["kl"]) for completion in record["completions"])
    events = [(step, figure) for step, name, figure in read_events(Path(bare.run_dir) / "tensorboard") if name == "reward"]
    assert events == [(record["step"], pytest.approx(record["reward"])) for record in metrics]
    assert result["accuracy_before"] is None and result["accuracy_after"] is None
    trained = np.mean([record["reward"] for record in metrics[-10:]])
    assert trained > np.mean(untrained) + 4 * np.std(untrained, ddof=1) / math.sqrt(Q * G)


def test_with_tis_cap_0_the_samplers_logprobs_do_not_matter(bench, bare, one_update):
    shifted = replace(bench.batch, sampler_logprobs=bench.batch.sampler_logprobs + np.float32(0.5))
    _, with_cap = bench.updates([shifted])
    assert with_cap[0]["grad_norm"] != pytest.approx(one_update[1][0]["grad_norm"], rel=0.01)
    plain = Bench(bare, replace(bench.batch, ref_logprobs=None))
    states, _ = plain.updates([plain.batch])
    others, _ = plain.updates([replace(shifted, ref_logprobs=None)])
    for leaf, other in zip(jax.tree.leaves(states[-1]), jax.tree.leaves(others[-1]), strict=True):
        np.testing.assert_array_equal(leaf, other)


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_truncated_completions_count_unless_they_are_masked(bench, mask_truncated):
    batch, records = bench.rollout(mask_truncated=mask_truncated)
    truncated = np.array([record["truncated"] for record in records])
    lengths = np.array([record["length"] for record in records])
    assert truncated.any() and not truncated.all()
    expected = np.where(truncated & mask_truncated, 0, lengths)
    np.testing.assert_array_equal(np.asarray(batch.mask).sum(axis=1), expected)  # the stop token counts
    np.testing.assert_array_equal(batch.mask, np.arange(C) < expected[:, None])


def test_top_k_1_and_a_tiny_top_p_are_greedy(bench):
    """A group is then one completion four times; the log-probabilities are still those of the full softmax."""
    batch, records = bench.rollout(top_k=1)
    texts = np.array([record["text"] for record in records]).reshape(Q, G)
    assert (texts == texts[:, :1]).all()
    other, _ = bench.rollout(top_p=1e-6)
    np.testing.assert_array_equal(completions(batch), completions(other))
    assert (np.asarray(batch.advantages) == 0).all()
    assert (np.asarray(batch.sampler_logprobs)[:, 0] < -0.01).all()


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.5}])
def test_top_k_and_top_p_leave_the_trainers_logprobs_alone(bench, options):
    batch, _ = bench.rollout(**options)
    exact = Bench(bench.config, batch).logprobs()
    counts = np.asarray(batch.mask) > 0
    np.testing.assert_allclose(exact[counts], np.asarray(batch.sampler_logprobs)[counts], rtol=0, atol=1e-4)
    first_tokens = completions(batch)[:, 0].reshape(Q, G)
    choices = [len(set(group)) for group in first_tokens.tolist()]
    assert 1 < max(choices) <= options.get("top_k", G)


# ------------------------------------------------------------------------------------------------- rewards that misbehave


def test_rows_without_a_score_are_left_out(bench, folder):
    """In a third of the rows; the others' rewards and advantages are as if these had never been there."""
    batch, records, metrics = bench.rollout_and_metrics(reward=f"{folder / 'rewards.py'}:sometimes")
    _, plain, _ = bench.rollout_and_metrics()
    missing = np.array([len(record["text"]) % 3 == 0 for record in records])
    assert 0.1 < missing.mean() < 0.6 and metrics["frac_unscorable"] == pytest.approx(missing.mean())
    rewards = np.array([record["reward"] for record in records])
    np.testing.assert_array_equal(rewards, np.where(missing, np.nan, [record["reward"] for record in plain]))
    np.testing.assert_array_equal(np.isnan([record["components"]["sometimes"] for record in records]), missing)
    np.testing.assert_array_equal(np.asarray(batch.mask).sum(axis=1) == 0, missing)
    advantages = np.asarray(batch.advantages)
    assert (advantages[missing] == 0).all()
    for group in range(Q):
        rows = [b for b in range(group * G, (group + 1) * G) if not missing[b]]
        if len(rows) > 1:
            of_group = rewards[rows]
            expected = (of_group - of_group.mean()) / (of_group.std(ddof=1) + 1e-4)
            np.testing.assert_allclose(advantages[rows], expected, atol=1e-5)
    assert metrics["reward"] == pytest.approx(rewards[~missing].mean())
    assert metrics["rewards/sometimes/mean"] == pytest.approx(rewards[~missing].mean() + 15)
    assert metrics["rewards/violation/mean"] == -15 and metrics["skipped_update"] == 0


@pytest.mark.usefixtures("free_run_dir")
def test_a_step_of_which_no_row_has_a_score_changes_nothing_and_counts(config, monkeypatch, finished):
    """Steps 2 and 3 of 4: parameters, moments and counters stay bit for bit, and the records are valid JSON."""
    states, real_step = [], grpo.runs.trainer.one_step

    def spy(step, *rest):
        with pytest.MonkeyPatch.context() as patch:
            if step in (2, 3):
                patch.setattr(UserRewards, "score", lambda self, texts, _: {"variety": [math.nan] * len(texts)})
            out = real_step(step, *rest)
        states.append(jax.device_get(out[0]))
        return out

    monkeypatch.setattr(grpo.runs.trainer, "one_step", spy)
    result = run(config)
    for after in states[1:3]:
        for leaf, before in zip(jax.tree.leaves(after), jax.tree.leaves(states[0]), strict=True):
            np.testing.assert_array_equal(leaf, before)
    assert not np.array_equal(states[3].params.embedding, states[2].params.embedding)
    files = read_files(config)
    metrics = files["metrics.jsonl"]
    assert [record["skipped_update"] for record in metrics] == [0, 1, 1, 0]
    assert [record["frac_unscorable"] for record in metrics] == [0, 1, 1, 0]
    assert [record["frac_reward_zero_std"] == 1 for record in metrics] == [False, True, True, False]
    assert [record["reward"] is None for record in metrics] == [False, True, True, False]
    assert [record["reward"] is None for record in files["completions.jsonl"][:: Q * G]] == [False, True, True, False]
    for record in files["completions.jsonl"][Q * G : 3 * Q * G]:
        assert record["components"]["variety"] is None and record["components"]["violation"] == -15
        assert record["advantage"] == 0
    assert {record["step"] for record in files["tokens.jsonl"]} == {1, 4}
    assert result["steps"] == STEPS and metrics[0]["reward"] == finished.files["metrics.jsonl"][0]["reward"]


def test_groups_of_equal_rewards_are_sampled_again(bench, folder, monkeypatch):
    """Of each group the first attempt with different rewards is kept, else the first of all; the keys are row + attempt * B."""
    attempts, B, tries = [], Q * G, 2
    real_generate = generate

    def spy(view, prefix, rows, limits, *rest):
        asked = np.asarray(limits).copy()
        samples, texts = real_generate(view, prefix, rows, limits, *rest)
        _, whole = real_generate(view, prefix, rows, np.full(B, C, np.int32), *rest)
        attempts.append((rows, asked, whole))
        return samples, texts

    monkeypatch.setattr("grpo.rollout.generate", spy)
    reward = f"{folder / 'rewards.py'}:rare"
    batch, records, metrics = bench.rollout_and_metrics(reward=reward, resample=tries)

    def alive(texts: list[str], group: int) -> bool:
        return len({sum(map(ord, text)) % 9 == 0 for text in texts[group * G : (group + 1) * G]}) == 2

    dead, kept = np.ones(Q, bool), np.zeros(Q, int)
    for number, (rows, limits, texts) in enumerate(attempts):
        np.testing.assert_array_equal(rows, number * B + np.arange(B))
        np.testing.assert_array_equal(limits, np.where(np.repeat(dead, G), C, 1))
        now = np.array([alive(texts, group) for group in range(Q)])
        kept[dead & now] = number
        dead &= ~now
    assert set(kept) == {0, 1, 2} and dead.any() and len(attempts) == 1 + tries
    texts = [attempts[kept[b // G]][2][b] for b in range(B)]
    assert [record["text"] for record in records] == texts
    tokenizer, tokens = load_tokenizer(bench.config.model_path), completions(batch)
    sampled = np.asarray(batch.mask).sum(axis=1).astype(int)
    assert [tokenizer.decode(ids[:length].tolist()) for ids, length in zip(tokens, sampled, strict=True)] == texts
    np.testing.assert_array_equal((np.asarray(batch.advantages).reshape(Q, G) != 0).any(axis=1), ~dead)
    assert metrics["frac_reward_zero_std"] == dead.mean()
    assert metrics["resampled_groups"] == Q - sum(alive(attempts[0][2], group) for group in range(Q))
    exact = Bench(bench.config, batch).logprobs()
    counts = np.asarray(batch.mask) > 0
    np.testing.assert_allclose(exact[counts], np.asarray(batch.sampler_logprobs)[counts], rtol=0, atol=1e-4)

    attempts.clear()
    _, records, metrics = bench.rollout_and_metrics(reward=reward)
    assert len(attempts) == 1 and metrics["resampled_groups"] == 0
    assert [record["text"] for record in records] == attempts[0][2]


def test_records_are_judged_in_one_place_and_are_json(config, folder):
    """What a rollout and an evaluation get for a completion, with the user's components beside ours."""
    texts = ["<reasoning>5 + 13 = 18</reasoning><answer>18</answer>", "no tags"]
    problem = replace(grpo.runs.setup.choose_problems(config)[0][0], answer="18")
    with UserRewards(f"{folder / 'rewards.py'}:variety,{folder / 'rewards.py'}:broken") as rewards:
        records = grade_everywhere(texts, [problem] * 2, np.array([False, True]), config, rewards)
    assert [record["components"]["variety"] for record in records] == [len(set(text)) / 2 for text in texts]
    assert [record["components"]["correct"] for record in records] == [25, 0]
    assert all(math.isnan(record["reward"]) and math.isnan(record["components"]["broken"]) for record in records)
    assert [record["accuracy"]["tagged"] for record in records] == [True, False]
    assert [record["truncated"] for record in records] == [False, True]
    assert json.loads(json.dumps(records))[0]["format"] == records[0]["format"]


def test_steps_in_a_row_that_teach_nothing_end_the_run(config, folder, tmp_path):
    """Without the user's reward, every completion of a random model gets -15. The last checkpoint is that of the last step."""
    dull = replace(config, run_dir=str(tmp_path / "run"), reward="", max_zero_variance_steps=3, eval_problems=0)
    with pytest.raises(RunError, match=r"^steps 1-3 had no group with two different rewards, .*: none has the format; "):
        run(dull)
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 3
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps()[-1] == 3
    assert run(replace(dull, max_zero_variance_steps=0))["steps"] == STEPS


@pytest.mark.usefixtures("free_run_dir")
def test_an_alarm_is_printed_when_it_begins_and_recorded_while_it_rings(config, monkeypatch, capsys):
    ringing = [set(), {"one"}, {"one", "two"}, {"two"}]
    monkeypatch.setattr(
        grpo.runs.trainer, "alarms", lambda history: {name: f"line of {name}" for name in ringing[len(history) - 1]}
    )
    with interrupted(4, "rollout"):
        run(config)
    run(config)  # a resumed run knows what rings
    assert [set(record["alarms"]) for record in lines(Path(config.run_dir) / "metrics.jsonl")] == ringing
    err = capsys.readouterr().err
    assert sorted(line for line in err.splitlines() if line) == ["warning: one: line of one", "warning: two: line of two"]


# --------------------------------------------------------------------------------------------------------------- problems


def test_no_arithmetic_problem_is_trained_on_and_evaluated(config):
    for eval_data in ("", "arithmetic:tune"):
        train, held_out = grpo.runs.setup.choose_problems(
            replace(config, new_problems=2000, eval_problems=500, eval_data=eval_data)
        )
        assert (len(train), len(held_out)) == (2000, 500)
        assert not {problem.id for problem in train} & {problem.id for problem in held_out}


def test_no_problem_of_a_file_is_trained_on_and_evaluated(config, tmp_path):
    """Ten questions, each twice with other blanks: whatever is held out is in neither form among the others."""
    records = [{"question": f"What  is{' ' * copy} {n} + 1?", "answer": f"#### {n + 1}"} for n in range(10) for copy in (1, 2)]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))

    def asked(problems):
        return {" ".join(problem.question.split()) for problem in problems}

    held_sets = []
    for seed in (0, 1):
        drawn = replace(config, data=str(path), eval_problems=4, new_problems=0, seed=seed)
        train, held_out = grpo.runs.setup.choose_problems(drawn)
        assert len(held_out) == 4 and len(train) == 2 * 6
        assert not asked(train) & asked(held_out)
        held_sets.append([problem.id for problem in held_out])
    assert held_sets[0] == held_sets[1]  # runs of different seeds are measured on the same problems


def test_prompts_too_long_are_dropped_and_counted(config):
    tokenizer = load_tokenizer(config.model_path)
    problems, held_out = grpo.runs.setup.choose_problems(config)
    lengths = [len(encode_prompt(tokenizer, render_prompt(problem.question, ""))) for problem in problems]
    held_lengths = [len(encode_prompt(tokenizer, render_prompt(problem.question, ""))) for problem in held_out]
    width = sorted(lengths)[len(lengths) // 2]
    with devices(1):
        prepared = grpo.runs.setup.prepare(replace(config, max_prompt_tokens=width))
    assert prepared.problems == [problem for problem, length in zip(problems, lengths, strict=True) if length <= width]
    assert len(prepared.dropped) == sum(length > width for length in lengths + held_lengths) > 0
    assert [len(ids) for ids in prepared.prompt_ids] == [length for length in lengths if length <= width]
    assert f"{len(prepared.dropped)} too long and dropped ({prepared.dropped[0].id}" in grpo.runs.setup.describe(prepared)


def test_a_tokenizer_of_another_size_is_refused(config, tmp_path):
    model = Path(shutil.copytree(config.model_path, tmp_path / "model"))
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**values, "vocab_size": 2 * values["vocab_size"]}))
    with devices(1), pytest.raises(ModelError, match="has 360 pieces, the model 720 rows: not this model's tokenizer"):
        grpo.runs.setup.prepare(replace(config, model_path=str(model)))


def test_a_step_needs_as_many_problems_as_prompts(config):
    with devices(1), pytest.raises(ConfigError, match=r"^prompts_per_step 8 must be at most 5"):
        grpo.runs.setup.prepare(replace(config, new_problems=5))


# ---------------------------------------------------------------------------------------------------------------- records


def test_records_survive_reopening_up_to_a_step(tmp_path):
    """Also text with line separators that are no line ends to JSON, and a last line that a crash has torn."""
    records = [{"step": step, "text": text} for step, text in enumerate(("a\u2028b", "a\x85b\x0c", 'say "\n"', "ends {}"))]
    path = tmp_path / "records.jsonl"
    log = JsonLines(path, 0)
    for record in records:
        log.write(record)
    assert log.records == records == JsonLines(path, 3).records
    torn = path.read_text("utf-8") + '{"step": 2, "accuracy": {"n": 1}'
    path.write_text(torn, "utf-8")
    assert JsonLines(path, 2).records == records[:3] == lines(path)
    assert JsonLines(path, 0).records == records[:1] == lines(path)


def test_a_line_that_is_no_record_is_left_out_by_name_and_the_rest_stays(tmp_path, capsys):
    path = tmp_path / "records.jsonl"
    path.write_text('{"step": 1}\n{"step": \n[]\n{"stop": 3}\n{"step": 4}\n')
    assert JsonLines(path, 9).records == [{"step": 1}, {"step": 4}] == lines(path)
    assert [line.split(":")[2] for line in capsys.readouterr().err.splitlines()] == [
        f"{n} is no record, and is left out" for n in (2, 3, 4)
    ]


def test_a_config_is_its_record(config):
    assert Config(**json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize("name", ["correct", "variety"])
def test_a_reward_needs_a_name_of_its_own(config, tmp_path, name):
    (tmp_path / "mine.py").write_text(f"def {name}(completion, problem):\n    return 1.0\n")
    path = f"{tmp_path / 'mine.py'}:{name}"
    with pytest.raises(ConfigError, match=f"the name '{name}' is taken"):
        run(replace(config, reward=path if name == "correct" else f"{path},{path}"))


def test_training_problems_are_refused_for_evaluation(config):
    with pytest.raises(ConfigError, match="must be arithmetic:tune or arithmetic:test"):
        run(replace(config, eval_data="arithmetic:train"))


def test_a_run_dir_that_cannot_be_used_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir .*file/run cannot be used: Not a directory"):
        run(replace(config, run_dir=str(tmp_path / "file" / "run")))

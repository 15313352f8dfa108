"""Laws of supervised fine-tuning: its loss and gradient are the cross entropy of the completions, its runs are runs."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import command, ended
from training import devices, initial, interrupted, lines, read_files, without_times

import grpo.runs.setup
import grpo.runs.trainer
from data import DataError
from data.problems import completion_of, load_problems
from grpo.config import GRPO_ONLY, SFT_PRESET, Config
from grpo.reward import score
from grpo.runs.checkpoint import Checkpoints
from grpo.runs.console import closing_table
from grpo.runs.model_source import find_model
from grpo.runs.setup import data_fingerprint
from grpo.runs.sft import SFTTrainer, describe_sft, held_out_loss, prepare_sft
from models.gemma import ExecutionConfig, forward, vocab_logits
from models.sharding import ROLLOUT, STORE, TRAIN
from scripts import sft as script

pytestmark = pytest.mark.usefixtures("quick_to_compile")

Q, P, C, STEPS = 4, 40, 16, 4
TEXTS = [(f"Say {n}", "n" + str(n) * (n % 5 + 1)) for n in range(19)]
TRAIN_FILE = Path(__file__).parents[2] / "shared/data/gsm8k_train.jsonl"


def write(path: Path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def config(folder, tmp_path_factory) -> Config:
    """Three of 19 lines are held out. Clipping never applies, so that Adam's first moment is the gradient."""
    place = tmp_path_factory.mktemp("sft")
    data = write(place / "texts.jsonl", [{"prompt": prompt, "completion": text} for prompt, text in TEXTS])
    return replace(
        SFT_PRESET, model_path=str(folder / "model"), data=data, run_dir=str(place / "run"), system_prompt="",
        prompts_per_step=Q, max_steps=STEPS, max_prompt_tokens=P, max_new_tokens=C, learning_rate=1e-2, warmup_steps=1,
        max_grad_norm=1e6, eval_problems=3, save_every=1, keep_checkpoints=STEPS, remat="none", logprob_chunk=64, packing=0,
    )  # fmt: skip


def run(config: Config, count: int = 1):
    with devices(count):
        return grpo.runs.trainer.train(config, SFTTrainer)


def prepared(config: Config):
    with devices(1):
        return prepare_sft(config)


@pytest.fixture(scope="module")
def finished(config):
    return run(config), read_files(config)


def cross_entropy(params, chosen, run, of_prompt: bool = False):
    """Of whole texts, one a row, with every prompt token but the first ignored, or not."""
    rows = [[*run.prompt_ids[i], *run.completion_ids[i]] for i in chosen]
    tokens = np.array([row + [0] * (P + C - len(row)) for row in rows])
    at = np.arange(P + C)[None]
    ends, starts = (np.array([[len(x)] for x in column]) for column in (rows, [run.prompt_ids[i] for i in chosen]))
    labels = (at < ends) & (at >= (1 if of_prompt else starts))
    execution = ExecutionConfig(TRAIN)
    positions = jnp.broadcast_to(jnp.asarray(at), tokens.shape)
    hidden, _ = forward(params, jnp.asarray(tokens), positions, run.model, execution)
    logprobs = jax.nn.log_softmax(vocab_logits(hidden, params, run.model, execution)[:, :-1])
    picked = (logprobs * jax.nn.one_hot(tokens[:, 1:], logprobs.shape[-1])).sum(axis=-1)
    return -(picked * labels[:, 1:]).sum() / labels[:, 1:].sum()


@pytest.mark.parametrize("packing", [0, pytest.param(4, marks=pytest.mark.long)])
def test_loss_and_gradient_are_the_cross_entropy_of_the_completions(config, packing, tmp_path):
    """By a plain forward pass over whole texts whose prompts carry no label."""
    config = replace(config, max_steps=1, eval_problems=0, run_dir=str(tmp_path / "run"), packing=packing)
    setup, result = prepared(config), run(config)
    chosen = setup.sessions[0].problems_of(1)
    with jax.set_mesh(setup.mesh), closing(Checkpoints(Path(config.run_dir) / "checkpoints")) as checkpoints:
        params = setup.base.load(setup.mesh, STORE, "float32")
        loss, grads = jax.value_and_grad(cross_entropy)(params, chosen, setup)
        assert abs(float(cross_entropy(params, chosen, setup, of_prompt=True) - loss)) > 1e-3  # labels in prompts would be seen
        restored = checkpoints.restore(initial(setup), lambda meta: None)
    assert restored is not None and abs(result["loss_first"] - float(loss)) < 1e-5
    moments = jax.tree.leaves(restored.state.opt_state[1].mu)
    for leaf, g in zip(moments, map(np.asarray, jax.tree.leaves(grads)), strict=True):
        np.testing.assert_allclose(leaf / (1 - config.adam_b1), g, rtol=0, atol=1e-5 * np.abs(g).max())


def test_it_learns_and_says_so(config, finished):
    result, files = finished
    assert result["steps"] == STEPS and result["finished"] and "reward_first" not in result
    assert result["loss_last"] < 0.9 * result["loss_first"]
    assert result["held_out_loss_after"] < 0.95 * result["held_out_loss_before"]
    assert [record["loss"] for record in files["metrics.jsonl"]] == pytest.approx(
        [result["loss_first"], *[record["loss"] for record in files["metrics.jsonl"][1:-1]], result["loss_last"]]
    )
    table = closing_table(result | {"seconds": 1.0})
    assert f"{result['held_out_loss_after']:.4f}" in table and "training.png" not in table
    assert f"--model_path {config.run_dir} " in table
    setup = prepared(config)
    plan = describe_sft(setup)
    tokens = sum(map(len, setup.completion_ids))
    assert f"the completions have {tokens} tokens" in plan and "16 problems" in plan and "3 held out" in plan


def test_the_held_out_loss_counts_every_completion_token_once(config, finished):
    """Also where the last batch is filled with others, and whatever its size."""
    setup = prepared(config)
    with jax.set_mesh(setup.mesh):
        params = setup.base.load(setup.mesh, STORE, "float32")
        tokens = [len(ids) for ids in setup.eval_completion_ids]
        swapped = replace(setup, prompt_ids=setup.eval_ids, completion_ids=setup.eval_completion_ids)
        each = [float(cross_entropy(params, [i], swapped)) for i in range(3)]
        assert held_out_loss(params, setup) == pytest.approx(np.average(each, weights=tokens), rel=1e-5)
    assert finished[0]["held_out_loss_before"] == pytest.approx(np.average(each, weights=tokens), rel=1e-5)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(config, finished, tmp_path):
    other = replace(config, run_dir=str(tmp_path / "other"))
    with interrupted(3, "save"):
        run(other)
    assert len(lines(Path(other.run_dir) / "metrics.jsonl")) == 3
    result, (expected, files) = run(other), finished
    changed = {"seconds": 0, "run_dir": ""}
    assert result | changed == expected | changed
    assert without_times(read_files(other)["metrics.jsonl"]) == without_times(files["metrics.jsonl"])


@pytest.mark.long
@pytest.mark.parametrize(("count", "microbatches"), [(4, 1), pytest.param(1, 2, marks=pytest.mark.long)])
def test_devices_and_microbatches_change_nothing(config, finished, tmp_path, count, microbatches):
    result = run(replace(config, run_dir=str(tmp_path / "other"), microbatches=microbatches), count)
    for name in ("loss_last", "held_out_loss_after"):
        assert result[name] == pytest.approx(finished[0][name], rel=1e-4)


def test_the_run_is_a_model_for_grpo(config, finished):
    with devices(1):
        setup = grpo.runs.setup.prepare(Config(model_path=config.run_dir, data="arithmetic", new_problems=16, system_prompt=""))
    with jax.set_mesh(setup.mesh):
        trained = jax.tree.leaves(setup.base.load(setup.mesh, ROLLOUT, "float32"))
        first = jax.tree.leaves(find_model(config.model_path).load(setup.mesh, ROLLOUT, "float32"))
    assert setup.base.found.startswith(f"step {STEPS} of the run")
    assert all((one != other).any() for one, other in zip(trained, first, strict=True))


@pytest.mark.long
def test_adapters_can_be_tuned_too(config, tmp_path):
    config = replace(config, lora_rank=2, lora_alpha=4.0, run_dir=str(tmp_path / "lora"))
    result = run(config)
    assert result["held_out_loss_after"] < result["held_out_loss_before"]
    model = find_model(config.run_dir)
    assert model.adapters is not None and model.under is not None and str(model.under.path) == config.model_path


def test_problems_in_gsm8k_form_become_completions_in_the_tags(tmp_path, folder):
    answer = "She sold 48/2 = <<48/2=24>>24 clips.\nAltogether 48+24 = <<48+24=72>>72.\n#### 72"
    path = write(tmp_path / "gsm8k.jsonl", [{"question": "How many?", "answer": answer}])
    (problem,) = load_problems(path, demonstrated=True)
    work = "She sold 48/2 = 24 clips.\nAltogether 48+24 = 72."
    assert completion_of(problem) == f"<reasoning>{work}</reasoning><answer>72</answer>"
    assert score(completion_of(problem), problem).total == 30.0
    if TRAIN_FILE.is_file():
        problems = load_problems(str(TRAIN_FILE), demonstrated=True)
        scores = [score(completion_of(problem), problem) for problem in problems]
        assert len(scores) == 7473 and all(one.components["correct"] and not one.components["violation"] for one in scores)
        assert not any("<<" in completion_of(problem) for problem in problems)


def test_answers_of_held_out_problems_are_graded(config, tmp_path):
    """Where there are answers; lines with a prompt and a completion have none."""
    problems = [{"question": f"Is it {n}?", "answer": f"yes\n#### {n}"} for n in range(8)]
    changes = {"data": write(tmp_path / "p.jsonl", problems), "run_dir": str(tmp_path / "run"), "max_new_tokens": 64}
    result = run(replace(config, **changes, max_steps=1, eval_problems=2))
    assert result["accuracy_before"]["n"] == 2 and result["accuracy_after"]["sampled"] == 0


def test_other_completions_are_other_data(config, tmp_path):
    """So a run does not go on with them."""
    setup = prepared(config)
    other = write(tmp_path / "x.jsonl", [{"prompt": prompt, "completion": text + "!"} for prompt, text in TEXTS])
    changed = prepared(replace(config, data=other))
    assert [p.question for p in changed.problems] == [p.question for p in setup.problems]
    assert data_fingerprint(changed, changed.sessions[0]) != data_fingerprint(setup, setup.sessions[0])


BAD_LINES = {
    "no completion": ({"prompt": "a"}, 'no key "completion"'),
    "no prompt": ({"completion": "a"}, 'no key "prompt"'),
    "empty completion": ({"prompt": "a", "completion": " \n"}, "completion is empty"),
    "empty prompt": ({"prompt": " ", "completion": "b"}, "prompt is empty"),
    "no text": ({"prompt": "a", "completion": ["b"]}, "completion must be UTF-8 text"),
    "neither": ({"text": "a"}, 'no key "question"'),
    "no solution": ({"question": "a", "answer": 3}, "answer is all there is: there is no solution to imitate"),
}


def told(config: Config, **changes) -> list[str]:
    """The command line of a configuration, without the flags that there are none of."""
    return [word for word in command(config, **changes) if word.split("=")[0][2:] not in GRPO_ONLY]


@pytest.mark.parametrize(("record", "reason"), BAD_LINES.values(), ids=list(BAD_LINES))
def test_a_bad_line_is_named_and_ends_the_run(config, tmp_path, record, reason):
    path = write(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "b"}, record])
    with pytest.raises(DataError, match=r"^[^\n]*x\.jsonl:2: [^\n]*$") as error:
        load_problems(path, demonstrated=True)
    assert reason in str(error.value)


def test_a_mistake_is_one_line_and_exit_code_2(config, tmp_path, capsys):
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "a"}])
    line = ended(capsys, 2, told(config, data=bad, run_dir=tmp_path / "run"), script.main)
    assert 'bad.jsonl:1: no key "completion"' in line
    assert "unknown flag --beta" in ended(capsys, 2, ["--beta", "0.1"], script.main)
    assert "group_size 1 must be at least 2" in ended(capsys, 2, ["--group_size", "1"])


def test_a_completion_that_is_too_long_is_dropped_whole_and_counted(config, tmp_path, capsys):
    long = [{"prompt": f"a{n}", "completion": "b" * (C - 1 + n)} for n in range(2)]  # the stop token is the C-th
    some = [*({"prompt": p, "completion": c} for p, c in TEXTS), *long]
    changes = {"data": write(tmp_path / "x.jsonl", some), "eval_problems": 0, "run_dir": str(tmp_path / "run")}
    setup = prepared(replace(config, **changes))
    assert [problem.id for problem in setup.dropped] == ["x.jsonl:21"]
    assert "20 problems" in describe_sft(setup) and "1 too long and dropped (x.jsonl:21)" in describe_sft(setup)
    assert max(map(len, setup.completion_ids)) == C
    write(tmp_path / "x.jsonl", [long[1]])
    argv = told(config, **changes | {"prompts_per_step": 1})
    assert "none of 1 completions fits in 16 tokens: the shortest has 17" in ended(capsys, 2, argv, script.main)


def test_a_grpo_run_does_not_continue_in_its_directory(config, finished, capsys):
    flags = {"model_path": config.model_path, "run_dir": config.run_dir, "max_prompt_tokens": 192}
    line = ended(capsys, 2, ["tiny", *(f"--{name}={value}" for name, value in flags.items())])
    assert "holds a run with other settings" in line

"""Laws of scripts/sample.py and scripts/benchmark.py, called in process."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from data.prompts import encode_prompt
from data.tokenizer import load_tokenizer
from grpo.config import TINY_MODEL
from grpo.errors import ConfigError
from models.gemma import GemmaConfig, shapes
from models.sharding import make_mesh

ROOT = Path(__file__).parents[1]
NO_TOKENIZER = str(ROOT / "tests" / "references" / "gemma3-gqa")


@pytest.fixture(scope="module", autouse=True)
def quick_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.main


def test_ids_need_no_tokenizer_and_prompts_may_differ_in_length():
    """Each prompt completes as it does alone."""
    sample = load("sample")
    options = ["--model_path", NO_TOKENIZER, "--max_new_tokens", "5"]
    both = sample([*options, "--ids", "[[2,17,9,30,31],[2,5]]"])["completions"]
    for ids, completion in zip(("[[2,17,9,30,31]]", "[[2,5]]"), both, strict=True):
        (alone,) = sample([*options, "--ids", ids])["completions"]
        assert completion["token_ids"] == alone["token_ids"] and completion["text"] == ""
        assert 1 <= len(completion["token_ids"]) == len(completion["logprobs"]) <= 5
        np.testing.assert_allclose(completion["logprobs"], alone["logprobs"], atol=1e-5)


def test_a_prompt_is_a_turn_of_the_template_and_its_completion_keeps_the_stop_token(capsys):
    sample, tokenizer = load("sample"), load_tokenizer(TINY_MODEL)
    question = "Ann has 10 pens. Ann gives 3 away. Then Ann gets 2. How many pens now?"
    (by_text,) = sample(["--prompt", question, "--max_new_tokens", "32"])["completions"]
    (by_ids,) = sample(["--ids", str([encode_prompt(tokenizer, question)]), "--max_new_tokens", "32"])["completions"]
    assert by_text == by_ids
    assert by_text["token_ids"][-1] == tokenizer.end_of_turn_id
    assert by_text["text"] == tokenizer.decode(by_text["token_ids"]) and by_text["text"] in capsys.readouterr().out
    (raw,) = sample(["--prompt", question, "--max_new_tokens", "32", "--raw"])["completions"]
    (raw_ids,) = sample(["--ids", str([[tokenizer.bos_id, *tokenizer.encode(question)]]), "--max_new_tokens", "32"])[
        "completions"
    ]
    assert raw == raw_ids != by_text


def test_an_id_that_the_folder_lists_ends_a_completion(tmp_path):
    """lighteval#1279, vllm-mlx#610: with a tokenizer and without one; then an exported folder stops there as well."""
    sample = load("sample")
    words = ["--ids", "[[2,17,9]]", "--max_new_tokens", "8"]
    (free,) = sample(words)["completions"]
    assert len(free["token_ids"]) > 2
    folder = Path(shutil.copytree(TINY_MODEL, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5, free["token_ids"][1]]}))
    for _ in range(2):
        (stopped,) = sample([*words, "--model_path", str(folder)])["completions"]
        assert stopped["token_ids"] == free["token_ids"][: 1 + free["token_ids"].index(free["token_ids"][1])]
        (folder / "tokenizer.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("[2,17]", "JSON list of lists"),
        ("[[2,[]]]", "JSON list of lists"),
        ("[[]]", "JSON list"),
        ("[[2,-1]]", "token -1 must"),
    ],
)
def test_ids_that_are_none_are_refused(ids, message):
    with pytest.raises(ConfigError, match=message):
        load("sample")(["--model_path", NO_TOKENIZER, "--ids", ids])


@pytest.mark.long
def test_the_benchmark_times_every_phase():
    sizes = {"prompts_per_step": 8, "group_size": 2, "max_prompt_tokens": 8, "max_new_tokens": 4, "logprob_chunk": 4}
    figures = load("benchmark")(["--repeats=2", *(f"--{name}={value}" for name, value in sizes.items())])
    phases, most = figures["phases"], 8 * 2 * 4
    assert phases.keys() == {"sampling_params", "sample", "prefill", "decode", "reward", "reference", "update", "step"}
    for name, phase in phases.items():
        assert 0 < phase["ms_min"] <= phase["ms"] <= phase["ms_max"]
        if name not in ("sampling_params", "prefill"):
            assert phase["tokens_per_s"] == pytest.approx(most / phase["ms"] * 1e3)
        if name != "reward":
            assert phase["percent_of_bound"] == pytest.approx(100 * phase["bound_ms"] / phase["ms"]) and phase["bound_ms"] > 0
    prompt_tokens = phases["prefill"]["tokens_per_s"] * phases["prefill"]["ms"] / 1e3
    assert 8 * 6 <= round(prompt_tokens, 6) <= 8 * 8  # each up to a quarter shorter than it may be


@pytest.mark.long
@pytest.mark.parametrize("family", [{}, {"post_norms": True}, {"post_norms": True, "qk_norms": True}])
def test_transformers_generate_runs_a_model_of_the_same_sizes(family, monkeypatch):
    torch = pytest.importorskip("torch")
    load("benchmark")
    benchmark = sys.modules["benchmark"]
    small = GemmaConfig(2, 32, 4, 2, 8, 48, 64, 8**-0.5, (True, False), sliding_window=9, **family)
    monkeypatch.setitem(benchmark.MODELS, "gemma2-6m", small)
    config = benchmark.BenchmarkConfig(
        prompts_per_step=2, group_size=3, max_prompt_tokens=8, max_new_tokens=5, repeats=2, dtype="float32"
    )
    seen = []
    original = torch.nn.Module.__call__

    def watch(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        if hasattr(out, "logits"):
            seen.append((sum(p.numel() for p in self.parameters()), out.logits.shape))
        return out

    monkeypatch.setattr(torch.nn.Module, "__call__", watch)
    seconds = benchmark.time_transformers(benchmark.make_run(config, make_mesh(devices=jax.devices()[:1])), config)
    assert len(seconds) == 2 and min(seconds) > 0
    assert len(seen) == (1 + 2) * 5  # a warm-up and two runs, five tokens each
    ours = sum(leaf.size for leaf in jax.tree.leaves(shapes(small)))
    assert {(count, shape[0], shape[-1]) for count, shape in seen} == {(ours, 2 * 3, 64)}

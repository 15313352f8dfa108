"""The README.md of an exported model: what it is, how it was trained and evaluated, from the records of its run alone.

Left out: licence and intended use, which only a person can state.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.problems import HUB_ID
from data.prompts import render_prompt
from grpo.config import HUBS
from grpo.reports.jsonl import read_records

CARD = """---
library_name: {library}
---

# {name}

{size}. Written by `scripts/export.py` of grpo-gemma in {dtype}: {form}. `sha256sum -c SHA256SUMS` checks the files.

```
{use}
```
"""
USE = {
    "transformers": "lm_eval --model hf --model_args pretrained=DIR,dtype={dtype} --tasks gsm8k_cot_zeroshot "
    "--apply_chat_template\nvllm serve DIR",
    "peft": 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), "DIR")',
}
PRIVATE = ("run_dir", "relay_from", "coordinator", "process_id", "processes", "allow_change")  # settings of this machine
PATHS = ("model_path", "base_path", "data", "eval_data", "reward")


def model_card(
    name: str, size: str, dtype: str, adapters_for: str = "", run_dir: Path | None = None, meta: Mapping[str, Any] | None = None
) -> str:
    """The card of the model `name`. `size` describes its family and size; `adapters_for` names the base model of adapters.

    For a checkpoint of the run in `run_dir`, `meta` is what the checkpoint says of itself: its step and the run's config.
    """
    library = "peft" if adapters_for else "transformers"
    form = f"adapters for {adapters_for}" if adapters_for else "all weights"
    use = USE[library].format(dtype=dtype)
    card = CARD.format(library=library, name=name, size=size, dtype=dtype, form=form, use=use)
    if run_dir is None or meta is None:
        return card
    evaluations = list(read_records(run_dir / "evaluations.jsonl", [], "step", "accuracy"))
    return card + training_section(meta["step"], meta["config"]) + results_section(meta["step"], meta["config"], evaluations)


def training_section(step: int, config: Mapping[str, Any]) -> str:
    """The settings of the run, and how it made its prompts."""
    shown = {key: value for key, value in config.items() if key not in PRIVATE}
    shown |= {key: public_path(shown[key]) for key in PATHS if shown.get(key)}
    prompt = render_prompt("QUESTION", shown.get("system_prompt", ""))
    return (
        f"\n## Training\n\nStep {step} of a GRPO run with these settings:\n\n```json\n"
        f"{json.dumps(shown, indent=1)}\n```\n\nThe user's turn of each prompt was\n\n```\n{prompt}\n```\n"
    )


def public_path(path: str) -> str:
    """A path, or several with commas, without the folders of this machine: `/home/me/one.py:f,two.py:g` -> `one.py:f,two.py:g`.

    Names on a hub are kept: others can find them.
    """
    if path.startswith((*HUBS, HUB_ID)):
        return path
    return ",".join(Path(part).name for part in path.split(","))


def results_section(step: int, config: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The run's evaluations before the first step and after `step`, if it made them."""
    lines = {line["step"]: line for line in evaluations}
    if step not in lines:
        return f"\n## Results\n\nNone: the run was not evaluated at step {step}.\n"
    rows = ["| step | greedy accuracy | 95% interval | format right | sampled accuracy | sampled length |", "|---" * 6 + "|"]
    rows += [result_row(at, lines[at]["accuracy"]) for at in dict.fromkeys([0, step]) if at in lines]
    data = public_path(config.get("eval_data", "")) or f"problems held out from {public_path(config.get('data', ''))}"
    count = lines[step]["accuracy"]["n"]
    return f"\n## Results\n\nOn {count} problems ({data}), measured by the run itself:\n\n" + "\n".join(rows) + "\n"


def result_row(step: int, figures: Mapping[str, Any]) -> str:
    """A row of the table; what was not measured is empty."""

    def percent(key: str) -> str:
        return f"{100 * figures[key]:.1f}%" if key in figures else ""

    length = f"{figures['sampled_length']:.1f}" if "sampled_length" in figures else ""
    interval = f"{percent('low')} to {percent('high')}"
    cells = (str(step), percent("greedy"), interval, percent("greedy_format"), percent("sampled"), length)
    return f"| {' | '.join(cells)} |"

"""The README.md of an exported model: what it is, how it was trained, what was measured. Only what the run itself has recorded.

Left out: licences, intended uses, and whatever else only a person can say.
"""

import json
from pathlib import Path
from typing import Any

from data.problems import HUB_ID
from data.prompts import render_prompt
from grpo.reports.jsonl import records
from grpo.runs.hub import HUBS
from grpo.runs.model_source import Model

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
PRIVATE = ("run_dir", "relay_from", "coordinator", "process_id", "processes", "allow_change")  # of this machine
PATHS = ("model_path", "base_path", "data", "eval_data", "reward")


def model_card(model: Model, name: str, dtype: str, lora: str) -> str:
    library = "peft" if lora == "peft" else "transformers"
    form = f"adapters for {model.under.path.name}" if lora == "peft" and model.under else "all weights"
    use = USE[library].format(dtype=dtype)
    card = CARD.format(library=library, name=name, size=model.size, dtype=dtype, form=form, use=use)
    return card + (trained(model) + measured(model) if model.run_dir else "")


def trained(model: Model) -> str:
    """The settings of the run, and how its prompts were made."""
    config = {key: value for key, value in model.meta["config"].items() if key not in PRIVATE}
    config |= {key: public(config[key]) for key in PATHS if config.get(key)}
    prompt = render_prompt("QUESTION", config.get("system_prompt", ""))
    return (
        f"\n## Training\n\nStep {model.meta['step']} of a run by GRPO with these settings:\n\n```json\n"
        f"{json.dumps(config, indent=1)}\n```\n\nThe user's turn of every prompt was\n\n```\n{prompt}\n```\n"
    )


def public(path: str) -> str:
    """Without the folders of this machine: /home/me/one.py:f,two.py:g -> one.py:f,two.py:g. What others can find is kept."""
    if path.startswith((*HUBS, HUB_ID)):
        return path
    return ",".join(Path(part).name for part in path.split(","))


def measured(model: Model) -> str:
    """The evaluations before the first step and after this one, as far as the run made them."""
    config, step = model.meta["config"], model.meta["step"]
    evaluations = records((model.run_dir or Path()) / "evaluations.jsonl", [], "step", "accuracy")
    lines = {line["step"]: line for line in evaluations}
    if step not in lines:
        return f"\n## Measured\n\nNothing: the run was not evaluated at step {step}.\n"
    rows = ["| step | greedy accuracy | 95% interval | format right | sampled accuracy | sampled length |", "|---" * 6 + "|"]
    for at in dict.fromkeys([0, step]):
        if at in lines:
            rows.append(row(at, lines[at]["accuracy"]))
    held_out = public(config.get("eval_data", "")) or f"problems held out from {public(config.get('data', ''))}"
    count = lines[step]["accuracy"]["n"]
    return f"\n## Measured\n\nOn {count} problems ({held_out}), by the run itself:\n\n" + "\n".join(rows) + "\n"


def row(step: int, found: dict[str, Any]) -> str:
    def percent(key: str) -> str:
        return f"{100 * found[key]:.1f}%" if key in found else ""

    length = f"{found['sampled_length']:.1f}" if "sampled_length" in found else ""
    interval = f"{percent('low')} to {percent('high')}"
    cells = (str(step), percent("greedy"), interval, percent("greedy_format"), percent("sampled"), length)
    return f"| {' | '.join(cells)} |"

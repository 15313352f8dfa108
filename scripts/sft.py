"""Fine-tune Gemma on given completions, so that it knows the form of an answer before GRPO starts.

    python scripts/sft.py --model_path DIR --data gsm8k_train.jsonl --run_dir runs/sft        GSM8K's own solutions, in the tags
    python scripts/sft.py --model_path DIR --data mine.jsonl --system_prompt "" --run_dir runs/sft
    python scripts/train.py gemma3-270m --model_path runs/sft --data gsm8k_train.jsonl --run_dir runs/grpo

A line of --data is {"prompt": TEXT, "completion": TEXT}, or a problem in GSM8K form, whose solution is put into the tags.
--data arithmetic has generated problems. The loss is the mean of -log p over the completions' tokens.

The same command again continues where it stopped. The last line of standard output is one line of JSON: all of result.json in a
file or a pipe, a few figures on a terminal.
"""

import sys

from grpo.config import GRPO_ONLY, SFT, SFT_PRESET, Config
from grpo.runs.cli import run_script
from grpo.runs.flags import parse
from grpo.runs.sft import SFTTrainer
from grpo.runs.trainer import train


def main(argv: list[str]) -> dict:
    return train(parse(Config, argv, __doc__ or "", {SFT: SFT_PRESET}, without=GRPO_ONLY), SFTTrainer)


LOSSES = ("loss_first", "loss_last", "held_out_loss_before", "held_out_loss_after")
SHORT = ("run_dir", "steps", "finished", *LOSSES, "seconds", "params_digest")

if __name__ == "__main__":
    run_script(main, sys.argv[1:], SHORT)

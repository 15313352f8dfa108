"""Train Gemma by GRPO.

    python scripts/train.py                                        the embedded default: a tiny Gemma, minutes on a laptop
    python scripts/train.py gemma2-2b --model_path DIR --data FILE --run_dir DIR

The same command again continues where it stopped. The last line of standard output is one line of JSON: all of result.json
in a file or a pipe, a few figures on a terminal.
"""

import sys

from grpo.config import PRESETS, Config
from grpo.runs.cli import run_script
from grpo.runs.flags import parse
from grpo.runs.trainer import train


def main(argv: list[str]) -> dict:
    return train(parse(Config, argv, __doc__ or "", PRESETS))


SHORT = ("run_dir", "steps", "finished", "reward_first", "reward_last", "seconds", "params_digest")

if __name__ == "__main__":
    run_script(main, sys.argv[1:], SHORT)

"""scripts/train.py that tells on standard output which phase begins, so that a test can kill it there."""

import sys

import grpo.rollout
import grpo.runs.trainer
import grpo.step
from grpo.runs.checkpoint import Checkpoints
from grpo.runs.cli import run_script
from scripts.train import main


def tell(owner, name: str, phase: str) -> None:
    real = getattr(owner, name)

    def traced(*args, **options):
        print(f"phase {phase}", flush=True)
        return real(*args, **options)

    setattr(owner, name, traced)


if __name__ == "__main__":
    tell(grpo.rollout, "decode_groups", "rollout")
    tell(grpo.rollout, "grade", "reward")
    tell(grpo.step, "train_step", "update")
    tell(Checkpoints, "begin", "save")
    tell(Checkpoints, "give_up_old", "retention")
    tell(grpo.runs.trainer, "evaluate", "evaluation")
    run_script(main, sys.argv[1:])

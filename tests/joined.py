"""One of several processes, which exchange a number again and again: what a run of several does, without a model.

python tests/joined.py HOST:PORT PROCESSES PROCESS_ID [SETTING]       check_same compares the settings
"""

import sys
import time

import grpo.runs.peers
from grpo.runs.cli import run_script
from grpo.runs.distributed import broadcast_from_main, check_same, join

grpo.runs.peers.SILENCE, grpo.runs.peers.PULSE = 3.0, 0.5


def main(argv: list[str]) -> dict:
    join(argv[0], int(argv[1]), int(argv[2]))
    check_same({"setting": argv[3]}, argv[4] if len(argv) > 4 else "")
    for i in range(10**6):
        assert broadcast_from_main(i) == i
        if i == 1:
            print("joined", flush=True)
        time.sleep(0.1)
    return {}


if __name__ == "__main__":
    run_script(main, sys.argv[1:])

"""What every script does around its work: the user's mistakes end in one line, the result in one line of JSON.

Exit codes: 0 done, 2 the user's mistake, 1 our own (with its traceback).
"""

import json
from collections.abc import Callable
from typing import Any

from data import DataError
from grpo.config import ConfigError, fail
from models import ModelError


def run_script(main: Callable[[list[str]], dict[str, Any]], argv: list[str]) -> None:
    try:
        result = main(argv)
    except (ConfigError, DataError, ModelError) as error:
        fail(" ".join(str(error).split()))
    print(json.dumps(result), flush=True)

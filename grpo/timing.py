"""Seconds of the phases of a step, measured from outside, so that the code of a step is free of clocks.

    @phase("decode")                          marks a function as a phase
    def decode_groups(...): ...

    with phase_seconds() as seconds:          whoever wants to know opens this context
        one_step(...)
    seconds["decode"]

Inside the context a phase waits for its arguments before its clock starts and for its result before it stops
(`jax.block_until_ready`); outside it costs nothing. One that only begins work on the devices, `phase(name, wait=False)`, does
not wait.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")

clocks: ContextVar[dict[str, float] | None] = ContextVar("clocks", default=None)


def phase(name: str, wait: bool = True) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that adds the seconds of each call to the entry `name` of the open `phase_seconds`, if there is one."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            seconds = clocks.get()
            if seconds is None:
                return function(*args, **kwargs)
            if wait:
                jax.block_until_ready((args, kwargs))
            start = time.perf_counter()
            result = function(*args, **kwargs)
            if wait:
                jax.block_until_ready(result)
            seconds[name] += time.perf_counter() - start
            return result

        return timed

    return decorate


@contextmanager
def phase_seconds() -> Iterator[dict[str, float]]:
    """Collects the seconds of every phase that runs inside it, by name. Calls of one phase are added up."""
    seconds: dict[str, float] = defaultdict(float)
    token = clocks.set(seconds)
    try:
        yield seconds
    finally:
        clocks.reset(token)

"""Laws of grpo/timing.py, on a clock that moves only when a function or a wait says so."""

from collections.abc import Callable

import jax.numpy as jnp
import pytest

import grpo.timing
from grpo.timing import phase, phase_seconds


@pytest.fixture
def sleep(monkeypatch) -> Callable[[float], None]:
    """Moves the clock; waiting for a result takes 100 seconds."""
    now = [1000.0]

    def wait(result):
        now[0] += 100
        return result

    monkeypatch.setattr(grpo.timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(grpo.timing.jax, "block_until_ready", wait)

    def sleep(seconds: float) -> None:
        now[0] += seconds

    return sleep


def test_a_phase_counts_from_its_arguments_to_its_result_and_its_calls_add_up(sleep):
    """What its arguments wait for belongs to the phase that they come from."""

    @phase("one")
    def one(seconds: float, double: bool = False) -> float:
        sleep(seconds)
        return 2 * seconds if double else seconds

    @phase("two")
    def two() -> str:
        sleep(7)
        return "two"

    with phase_seconds() as seconds:
        sleep(1000)
        assert one(1) == 1 and one(2, double=True) == 4 and two() == "two"
    assert seconds == {"one": 1 + 2 + 2 * 100, "two": 107}


def test_outside_of_the_context_nothing_waits_and_nothing_counts(sleep):
    @phase("one")
    def one() -> str:
        return "result"

    before = grpo.timing.time.perf_counter()
    with phase_seconds() as seconds:
        pass
    assert one() == "result" and seconds == {} and grpo.timing.time.perf_counter() == before


def test_a_context_ends_with_an_error_and_an_inner_one_gives_way_to_the_outer(sleep):
    @phase("one")
    def one(seconds: float) -> None:
        sleep(seconds)

    inner: list[dict[str, float]] = []

    def fail_inside() -> None:
        with phase_seconds() as seconds:
            inner.append(seconds)
            one(1)
            raise ValueError("a fault")

    with phase_seconds() as outer:
        with pytest.raises(ValueError, match="a fault"):
            fail_inside()
        one(2)
    one(4)
    assert (inner, outer) == ([{"one": 101}], {"one": 102})


def test_a_phase_keeps_the_name_of_its_function_and_returns_its_arrays():
    @phase("one")
    def named(x):
        """What it does."""
        return x + 1

    with phase_seconds() as seconds:
        assert float(named(jnp.float32(1))) == 2
    assert named.__name__ == "named" and named.__doc__ == "What it does." and seconds["one"] > 0

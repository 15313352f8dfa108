"""Laws of grpo/session.py: what is new, what is reviewed, in which order, and at which learning rates."""

import math
from collections import Counter
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from grpo.config import Config
from grpo.errors import ConfigError
from grpo.runs.checkpoint import Restored
from grpo.runs.resume import rate_change
from grpo.session import learning_rate, learning_rates, plan_sessions

CONFIG = Config(new_problems=50, sessions=3, prompts_per_step=8, epochs=2, seed=3)


def problems_of(session):
    return np.concatenate([session.problems_of(step) for step in range(session.start + 1, session.end + 1)])


def test_each_session_meets_the_next_problems_and_reviews_as_many_earlier_ones():
    one, two, three = plan_sessions(CONFIG, 1000)
    assert [session.new.tolist() for session in (one, two, three)] == [
        list(range(0, 50)), list(range(50, 100)), list(range(100, 150)),
    ]  # fmt: skip
    assert [len(session.review) for session in (one, two, three)] == [0, 50, 50]
    assert set(two.review) == set(range(50))  # all there were
    assert set(three.review) < set(range(100)) and len(set(three.review)) == 50
    assert {index < 50 for index in three.review} == {True, False}  # of either session


def test_steps_follow_one_another_and_a_session_meets_its_problems_as_often_as_epochs_say():
    sessions = plan_sessions(CONFIG, 1000)
    assert [(session.start, session.end) for session in sessions] == [(0, 13), (13, 38), (38, 63)]
    for session in sessions:
        counts = Counter(problems_of(session).tolist())
        assert set(counts) == {*session.new.tolist(), *session.review.tolist()}
        assert min(counts.values()) >= CONFIG.epochs  # the last step may begin another epoch
        first = problems_of(session)[: len(counts)]
        assert len(set(first.tolist())) == len(counts)
        if session.number > 1:  # shuffled together
            half = set(session.review.tolist())
            assert 0.2 < np.mean([index in half for index in first[: len(first) // 2]]) < 0.8


@pytest.mark.parametrize(("ratio", "expected"), [(0.0, [0, 0, 0]), (0.5, [0, 25, 25]), (1.5, [0, 50, 75]), (9.0, [0, 50, 100])])
def test_the_review_ratio_is_of_the_new_problems_and_never_more_than_there_are(ratio, expected):
    assert [len(session.review) for session in plan_sessions(replace(CONFIG, review_ratio=ratio), 1000)] == expected


def test_a_session_is_the_same_whatever_comes_after_it():
    """Also asked for by its number alone."""
    three = plan_sessions(CONFIG, 1000)
    for other in (
        plan_sessions(replace(CONFIG, sessions=5), 1000),
        plan_sessions(replace(CONFIG, sessions=1, session=3), 1000),
    ):
        for session, same in zip(three, other, strict=False):
            assert (session.start, session.end) == (same.start, same.end)
            assert (problems_of(session) == problems_of(same)).all()
    assert len(plan_sessions(replace(CONFIG, sessions=1, session=3), 1000)) == 3


def test_seeds_and_sessions_draw_and_shuffle_differently():
    _, two, three = plan_sessions(CONFIG, 1000)
    _, _, other = plan_sessions(replace(CONFIG, seed=4), 1000)
    assert set(three.review) != set(other.review)
    assert (two.problems_of(two.start + 1) + 50 != three.problems_of(three.start + 1)).any()


def test_the_last_window_may_be_smaller_but_not_empty():
    sessions = plan_sessions(CONFIG, 120)
    assert [len(session.new) for session in sessions] == [50, 50, 20]
    assert len(sessions[2].review) == 20
    with pytest.raises(ConfigError, match="session 3 has no new problems: earlier ones take all 100; lower new_problems"):
        plan_sessions(CONFIG, 100)
    with pytest.raises(ConfigError, match="prompts_per_step 64 must be at most 50, the problems of session 1"):
        plan_sessions(replace(CONFIG, prompts_per_step=64), 1000)
    with pytest.raises(ConfigError, match="session 2 has no new problems"):
        plan_sessions(replace(CONFIG, new_problems=0), 1000)


def test_max_steps_cuts_each_session():
    sessions = plan_sessions(replace(CONFIG, max_steps=20), 1000)
    assert [(session.start, session.end) for session in sessions] == [(0, 13), (13, 33), (33, 53)]


def test_a_review_holds_no_problem_twice_and_none_that_is_new():
    """Half of 80 earlier problems, in 20 draws: with replacement one would hold a problem twice."""
    for seed in range(20):
        _, _, three = plan_sessions(replace(CONFIG, seed=seed, new_problems=40), 1000)
        assert len(set(three.review.tolist())) == len(three.review) == 40
        assert (np.diff(three.review) > 0).all() and three.review.max() < 80


def test_the_review_is_rounded_and_drawn_for_the_session():
    """0.59 * 10 problems are 6. Sessions 2 and 3 that draw 20 of 40 problems draw others."""
    assert len(plan_sessions(replace(CONFIG, new_problems=10, review_ratio=0.59), 1000)[1].review) == 6
    two = plan_sessions(replace(CONFIG, new_problems=40, review_ratio=0.5), 1000)[1]
    three = plan_sessions(replace(CONFIG, new_problems=20, review_ratio=1.0), 1000)[2]
    assert len(two.review) == len(three.review) == 20 and max(*two.review, *three.review) < 40
    assert set(two.review) != set(three.review)


def test_every_session_and_seed_has_an_order_of_its_own():
    plain = replace(CONFIG, review_ratio=0.0)
    one, two, _ = plan_sessions(plain, 1000)
    other, *_ = plan_sessions(replace(plain, seed=4), 1000)
    assert (problems_of(two)[:50] - 50 != problems_of(one)[:50]).any()
    assert (problems_of(other)[:50] != problems_of(one)[:50]).any()


def test_every_epoch_of_a_session_has_an_order_of_its_own():
    one, _, _ = plan_sessions(replace(CONFIG, prompts_per_step=10), 1000)
    order = problems_of(one)
    first, second = order[:50], order[50:]
    assert sorted(first) == sorted(second) == list(range(50)) and (first != second).any()


def test_the_rate_warms_up_in_equal_parts_and_ends_close_to_a_tenth():
    """Peak 8 over 7 updates, 3 of them warm-up: quarters of the peak, the peak, then the cosine."""
    rates = [learning_rate(update, 7, 8.0, 3) for update in range(7)]
    cosine = [8 * (0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2) for share in (0, 1 / 4, 2 / 4, 3 / 4)]
    assert rates == pytest.approx([2, 4, 6, *cosine], rel=1e-12)
    assert learning_rate(7, 7, 8.0, 3) == pytest.approx(0.8, rel=1e-12)  # where the cosine would arrive next


@pytest.mark.parametrize("mu", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10])
def test_a_short_session_reaches_its_peak_and_its_tenth(steps, mu):
    """With the default warm-up of 10 updates. Closed form: (n - 1) // 2 of n updates warm up, the last one has a tenth."""
    config = Config(updates_per_rollout=mu, learning_rate=8.0)
    session = replace(plan_sessions(CONFIG, 1000)[0], start=4, end=4 + steps)
    rates = [rate for step in range(5, 5 + steps) for rate in learning_rates(step, session, 99, config)]
    n = steps * mu
    warm = (n - 1) // 2
    rising = [8 * (i + 1) / (warm + 1) for i in range(warm + 1)]
    falling = [8 * (0.55 + 0.45 * math.cos(math.pi * i / (n - 1 - warm))) for i in range(1, n - warm)]
    assert rates == pytest.approx([*rising, *falling], rel=1e-12) and len(rates) == n
    assert max(rates) == 8 and rates.count(8) == 1
    assert rates[-1] == pytest.approx(8 if n == 1 else 0.8, rel=1e-12)
    by_hand = {1: [8], 2: [8, 0.8], 3: [4, 8, 0.8], 5: [8 / 3, 16 / 3, 8, 4.4, 0.8]}
    assert n not in by_hand or rates == pytest.approx(by_hand[n])


def test_a_session_of_the_default_run_keeps_its_whole_warm_up():
    rates = [learning_rate(update, 20, 8.0, 5) for update in range(20)]
    cosine = [8 * (0.55 + 0.45 * math.cos(math.pi * i / 15)) for i in range(15)]
    assert rates == pytest.approx([8 * (i + 1) / 6 for i in range(5)] + cosine, rel=1e-12)


def test_the_schedule_spans_the_session_or_the_run_in_updates():
    """Sessions of 2, 3 and 4 steps and two updates a step: a session begins anew, a run goes on."""
    config = Config(updates_per_rollout=2, learning_rate=8.0, warmup_steps=3)
    ends, number = [(0, 2), (2, 5), (5, 9)], 0
    for start, end in ends:
        session = replace(plan_sessions(CONFIG, 1000)[0], start=start, end=end)
        for step in range(start + 1, end + 1):
            at = 2 * (step - start - 1)
            expected = [learning_rate(at + i, 2 * (end - start), 8.0, 3) for i in range(2)]
            assert learning_rates(step, session, 9, config) == expected
            expected = [learning_rate(number + i, 18, 8.0, 3) for i in range(2)]
            assert learning_rates(step, session, 9, replace(config, schedule="run")) == expected
            number += 2
    assert number == 18


def resumed(before: Config, now: Config, done: int) -> str:
    """What `rate_change` says of a run of 1,000 problems that is resumed after step `done`."""
    run: Any = SimpleNamespace(config=now, problems=range(1000), sessions=plan_sessions(now, 1000))
    run.steps = run.sessions[-1].end
    return rate_change(run, Restored(done, None, {"config": asdict(before) | {"max_dead_steps": 7, "unknown": 1}}, []))


def test_a_longer_session_says_from_which_rate_to_which_it_jumps():
    """Of 10 steps the last has a tenth; of 40 with 4 of warm-up, step 11 is 6 of 36 into the cosine."""
    short = Config(new_problems=0, max_steps=10, learning_rate=1e-3, warmup_steps=4, epochs=9)
    long = replace(short, max_steps=40)
    last, next_one = (1e-3 * (0.55 + 0.45 * math.cos(math.pi * share)) for share in (5 / 6, 6 / 36))
    assert next_one / last > 5
    assert resumed(short, long, 10) == (
        f"learning rate {last:.3g} in step 10, {next_one:.3g} in step 11: session 1 has 40 steps instead of 10"
    )
    assert "0.00016 in step 10, 0.00094 in step 11" in resumed(short, long, 10)
    slower = resumed(long, replace(long, learning_rate=5e-4), 20)  # with --allow_change
    assert slower.endswith(" in step 21: its schedule has changed") and slower.startswith("learning rate 0.000")


def test_a_schedule_that_is_as_planned_says_nothing():
    """The same settings; a run that is over; a session that begins; steps of warm-up, which are the same in both plans."""
    short = Config(new_problems=200, max_steps=10, learning_rate=1e-3, warmup_steps=4, sessions=2)
    assert resumed(short, short, 7) == resumed(short, replace(short, save_every=1), 20) == ""
    assert resumed(short, replace(short, sessions=3), 20) == ""
    assert resumed(short, replace(short, max_steps=12), 3) == "" != resumed(short, replace(short, max_steps=12), 8)

"""Laws of grpo/session.py: what is new, what is reviewed, and in which order."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from grpo.config import Config
from grpo.errors import ConfigError
from grpo.session import plan_sessions

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

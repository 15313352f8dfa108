"""Laws of resuming: an interrupted run ends as an uninterrupted one, on any devices."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import jax
import numpy as np
import pytest
from training import (
    C,
    G,
    Q,
    distance,
    final_state,
    interrupted,
    lines,
    read_files,
    run,
    way,
    without_times,
)  # fmt: skip

from grpo.batch import make_batch
from grpo.errors import ConfigError
from grpo.runs.run_dir import check_settings

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def test_running_a_finished_run_again_changes_nothing(finished):
    """Not even in a record: only how long the second call took."""
    before, after = finished.result, finished.result_again
    assert {**after, "seconds": 0} == {**before, "seconds": 0}
    files, again = dict(finished.files), dict(finished.files_again)
    assert {**again.pop("result.json"), "seconds": 0} == {**files.pop("result.json"), "seconds": 0}
    assert again == files


@pytest.mark.usefixtures("free_run_dir")
@pytest.mark.parametrize("lost", ["deleted", "a link that leads nowhere"])
def test_a_run_without_its_checkpoints_stops_and_keeps_its_records(config, finished, lost):
    """Its folder was deleted, or is on a disk that is not mounted: no fresh start over the records."""
    run(config)
    folder = Path(config.run_dir)
    shutil.rmtree(folder / "checkpoints")
    if lost != "deleted":
        (folder / "checkpoints").symlink_to(folder / "unmounted")
    before = read_files(config)
    with pytest.raises(
        ConfigError, match=r"checkpoints was deleted, moved, or is not mounted; put it back, or give another --run_dir"
    ):
        run(config)
    assert read_files(config) == before


@pytest.mark.usefixtures("free_run_dir")
@pytest.mark.parametrize(
    ("step", "where"),
    [
        pytest.param(1, "rollout", marks=pytest.mark.long),
        (3, "rollout"),
        pytest.param(3, "save", marks=pytest.mark.long),
        (4, "save"),
        pytest.param(4, "evaluation", marks=pytest.mark.long),
    ],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(config, finished, step, where):
    """Parameters, moments, counters and every record but the times: bit for bit."""
    with interrupted(step, where):
        run(config)
    records = step - 1 if where == "rollout" else step
    assert len(lines(Path(config.run_dir) / "metrics.jsonl")) == records
    result = run(config)
    assert {**result, "seconds": 0} == {**finished.result, "seconds": 0}
    files = read_files(config)
    for name in ("completions.jsonl", "tokens.jsonl", "config.json", "sessions.json"):
        assert files[name] == finished.files[name]
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert without_times(files[name]) == without_times(finished.files[name])
    for leaf, expected in zip(jax.tree.leaves(final_state(config)), jax.tree.leaves(finished.state), strict=True):
        np.testing.assert_array_equal(leaf, expected)


@pytest.mark.usefixtures("free_run_dir")
def test_a_run_whose_hours_are_over_saves_and_the_same_command_goes_on(config, finished):
    result = run(replace(config, max_hours=1e-7, save_every=1000))
    assert (result["steps"], result["finished"]) == (1, False)
    assert {**run(config), "seconds": 0} == {**finished.result, "seconds": 0}
    assert without_times(read_files(config)["metrics.jsonl"]) == without_times(finished.files["metrics.jsonl"])


@pytest.mark.usefixtures("free_run_dir")
def test_a_run_directory_belongs_to_its_settings(config, folder, capsys):
    """What touches the result may not change; how far it goes, what it looks at and how it uses the machine may."""
    with interrupted(3, "rollout"):
        run(config)
    before = read_files(config)
    for change in ({"learning_rate": 1e-3}, {"seed": 1}, {"group_size": 2}, {"beta": 0.0}, {"mask_truncated": True}):
        ((name, value),) = change.items()
        with pytest.raises(ConfigError, match=rf"{name} {getattr(config, name)!r} -> {value!r}") as error:
            run(replace(config, **change))
        assert "\n" not in str(error.value) and "--run_dir" in str(error.value)
    with pytest.raises(ConfigError, match=r"seed 0 -> 1, beta 0.04 -> 0.1"):
        run(replace(config, seed=1, beta=0.1))
    assert read_files(config) == before
    with interrupted(3, "rollout"):
        run(replace(config, save_every=7, eval_every=3, inspect_groups=5))
    changed = {"save_every": 7, "eval_every": 3, "inspect_groups": 5}
    assert read_files(config)["config.json"] == {**before["config.json"], **changed}
    capsys.readouterr()
    with interrupted(3, "rollout"):
        run(replace(config, max_steps=8))  # of 4 updates one warms up, of 8 two
    assert "\nrate        learning rate 0.0003 in step 2, 0.0003 in step 3: session 1 has 8 steps instead of 4\n" in (
        capsys.readouterr().out
    )
    with pytest.raises(ConfigError, match=r"has 2 steps already, in session 1; .* plan only 1$"):
        run(replace(config, max_steps=1))


@pytest.mark.long
@pytest.mark.usefixtures("free_run_dir")
def test_a_run_goes_from_eight_devices_to_one(config, finished):
    """Two interruptions on eight devices, the rest on one. Same samples in step 1; after it, equal to rounding.

    Adam turns the rounding of a vanishing gradient into a step of either sign, so parameters are compared as a whole:
    they end within 1% of the way that training has taken them.
    """
    for step in (2, 4):
        with interrupted(step, "rollout"):
            run(config, count=8)
    result = run(config)
    assert result["recompilations"] == 0
    files = read_files(config)
    for record, expected in zip(files["completions.jsonl"][: Q * G], finished.files["completions.jsonl"], strict=False):
        assert record == expected
    for record, expected in zip(files["tokens.jsonl"][:Q], finished.files["tokens.jsonl"], strict=False):
        assert record["problem"] == expected["problem"]
        for completion, other in zip(record["completions"], expected["completions"], strict=True):
            assert completion == {name: pytest.approx(values, abs=1e-4) for name, values in other.items()}
    first, expected = (without_times(f["metrics.jsonl"])[0] for f in (files, finished.files))
    assert first.pop("alarms") == expected.pop("alarms")
    assert first == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert [m["reward"] for m in files["metrics.jsonl"]] == [m["reward"] for m in finished.files["metrics.jsonl"]]
    assert 0 < distance(final_state(config).params, finished.state.params) < 0.01 * way(config, finished)


@pytest.mark.long
@pytest.mark.usefixtures("free_run_dir")
def test_a_run_may_change_how_it_uses_the_machine(config, finished):
    """From padded to packed, halved and unrolled: the same samples and, to rounding, the same parameters.

    Of the steps that follow, those compile whose shape is new.
    """
    with interrupted(2, "rollout"):
        run(config)
    run(replace(config, packing=1, halvings=1, unroll=True))
    files = read_files(config)
    assert files["completions.jsonl"] == finished.files["completions.jsonl"]
    shapes = []
    for metrics in files["metrics.jsonl"][1:]:
        lengths = np.array([record["length"] for record in files["completions.jsonl"] if record["step"] == metrics["step"]])
        zeros, starts = np.zeros((Q * G, C)), np.ones(Q, int)
        batch = make_batch(starts[:, None], starts, zeros, lengths, zeros, None, None, 1, parts=1, put=lambda x, _: x)
        shape = batch.packed.tokens.shape
        assert (metrics["compiles"] > 0) == (shape not in shapes)
        shapes.append(shape)
    assert 1 < len(set(shapes)) < len(shapes)
    assert 0 < distance(final_state(config).params, finished.state.params) < 0.01 * way(config, finished)


def test_a_run_of_an_older_version_resumes_under_the_new_names(config):
    """Settings that were renamed count as the same setting; one that is gone does not matter."""
    saved = asdict(config)
    saved |= {"sampler_cap": saved.pop("tis_cap"), "max_dead_steps": 7, "attention": "plain"}
    del saved["max_zero_variance_steps"]
    check_settings(saved, config, Path("old"))
    with pytest.raises(ConfigError, match=r"\(tis_cap 3.0 -> 2.0\)"):
        check_settings(saved | {"sampler_cap": 3.0}, config, Path("old"))

"""Laws of grpo/config.py: every field is a flag, every bad value is one line on stderr and exit code 2."""

import dataclasses
import typing

import pytest

from grpo.config import GROUPS, PRESETS, Config, current_names, flag
from grpo.errors import ConfigError
from grpo.runs.cli import run_script
from grpo.runs.flags import METAVARS, PEERS, parse

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
TYPES = typing.get_type_hints(Config)
OTHER_VALUES = {
    "pass_rates_keep": 0.5,
    "allow_change": "beta", "track": "wandb", "top_p": 0.5, "microbatches": 4, "adam_b1": 0.5, "adam_b2": 0.5,
    "preset": "gemma3-1b", "lora_targets": "q,v",
}  # fmt: skip
BESIDE = {
    "lora_alpha": {"lora_rank": 4},
    "lora_targets": {"lora_rank": 4},
    "pass_rates_keep": {"pass_rates": "there"},
}  # what a field is of no use without


def parsed(*argv: str) -> Config:
    return parse(Config, list(argv), "what it does", PRESETS)


def config_with(**values) -> Config:
    return dataclasses.replace(Config(), **values)


def another_value(name: str) -> typing.Any:
    """A legal value of the field that neither the default nor preset tiny has."""
    if name in OTHER_VALUES:
        return OTHER_VALUES[name]
    choices, before = FIELDS[name].metadata["choices"], getattr(PRESETS["tiny"], name)
    if choices:
        return next(choice for choice in choices if choice not in (before, FIELDS[name].default))
    if isinstance(before, bool | str):
        return not before if isinstance(before, bool) else before + "other"
    return 2 * before + TYPES[name](16)


def error_of(capsys, *argv: str) -> str:
    """The one line on stderr with which a command line ends, exit code 2."""
    with pytest.raises(SystemExit) as ended:
        run_script(lambda words: dataclasses.asdict(parsed(*words)), list(argv))
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    return err


# -------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_a_flag(name):
    value = another_value(name)
    beside = BESIDE.get(name, {})
    more = [f"--{other}={needed}" for other, needed in beside.items()]
    expected = dataclasses.replace(PRESETS["tiny"], **{name: value} | beside) if name != "preset" else PRESETS[value]
    assert expected != PRESETS["tiny"]
    for argv in ([f"--{name}", str(value)], [f"--{name}={value}"], [f"--{name.replace('_', '-')}", str(value)]):
        config = parsed(*argv, *more)
        assert config == expected
        assert type(getattr(config, name)) is TYPES[name]
    assert parsed(f"--{name.replace('_', '-')}={value}", *more) == expected


def test_a_value_keeps_its_dashes():
    assert parsed("--system-prompt=use-the_tags --now").system_prompt == "use-the_tags --now"
    assert parsed("--run-dir", "my-runs/a_b").run_dir == "my-runs/a_b"
    assert parsed("--reward_violation", "-2.5").reward_violation == -2.5


@pytest.mark.parametrize(("text", "value"), [("true", True), ("True", True), ("1", True), ("false", False), ("0", False)])
def test_a_boolean_reads_true_and_false(text, value):
    assert parsed("--unroll", text).unroll is value and parsed(f"--mask-truncated={text}").mask_truncated is value


def test_a_bare_boolean_flag_is_true():
    config = parsed("--mask_truncated", "--seed", "3")
    assert config.mask_truncated is True and config.seed == 3


@pytest.mark.parametrize("text", ["yes", "2", "", "tru"])
def test_anything_else_is_no_boolean(capsys, text):
    assert "--unroll" in (error := error_of(capsys, f"--unroll={text}")) and "true or false" in error


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["--seed", "3", "--seed=3"], "--seed"),
        (["--max-steps=3", "--max_steps", "4"], "--max_steps"),
        (["--unroll", "--unroll", "false"], "--unroll"),
    ],
)
def test_a_flag_is_given_once(capsys, argv, name):
    assert error_of(capsys, *argv) == f"error: {name} is given 2 times; give it once\n"


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("--max_new_token", "--max_new_tokens"),
        ("--max-new-token=5", "--max_new_tokens"),
        ("--learningrate", "--learning_rate"),
        ("--betas", "--beta"),
        ("-seed", "--seed"),
        ("--group_sizes", "--group_size"),
    ],
)
def test_a_typo_names_the_nearest_field(capsys, word, nearest):
    assert (
        error_of(capsys, word, "5")
        == f"error: unknown flag {word.split('=')[0].replace('max-new-', 'max_new_')}; did you mean {nearest}?\n"
    )


def test_a_prefix_of_a_flag_is_a_typo_too(capsys):
    """`--reward_corr` would change its meaning with the next field."""
    assert "did you mean --reward_correct?" in error_of(capsys, "--reward_corr", "1")


def test_a_flag_like_no_other_points_to_help(capsys):
    assert error_of(capsys, "--zzzzz", "1") == "error: unknown flag --zzzzz; --help lists them\n"


def test_a_typo_beside_good_flags_is_found(capsys):
    assert "unknown flag --sed; did you mean --seed?" in error_of(capsys, "tiny", "--max_steps", "3", "--sed", "4", "--beta=0")


@pytest.mark.parametrize(("word", "nearest"), [("tinny", "tiny"), ("gemma3-270", "gemma3-270m"), ("gemma-2-2b", "gemma2-2b")])
def test_an_unknown_preset_names_the_nearest_and_all(capsys, word, nearest):
    error = error_of(capsys, word)
    assert f"preset '{word}' is unknown" in error and f"did you mean {nearest}?" in error
    assert all(name in error for name in PRESETS)


def test_two_presets_are_one_too_many(capsys):
    assert "gemma-2b" in error_of(capsys, "tiny", "gemma-2b")


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", "1.5"), ("seed", "one"), ("seed", ""), ("max_steps", "1e3"), ("beta", "small"), ("temperature", "0,5")],
)
def test_a_value_of_the_wrong_type_is_an_error(capsys, name, value):
    error = error_of(capsys, f"--{name}={value}")
    assert f"--{name}" in error and repr(value) in error


@pytest.mark.parametrize("name", [name for name in FIELDS if FIELDS[name].metadata["choices"]])
def test_a_value_that_is_no_choice_is_an_error(capsys, name):
    error = error_of(capsys, f"--{name}", "grop")
    assert name in error and all(choice in error for choice in FIELDS[name].metadata["choices"])
    with pytest.raises(ConfigError, match=f"^{name} 'grop' must be one of "):
        config_with(**{name: "grop"})


@pytest.mark.parametrize("name", [name for name in FIELDS if TYPES[name] is not bool and name != "preset"])
def test_a_flag_without_its_value_is_an_error(capsys, name):
    assert f"--{name}" in error_of(capsys, f"--{name}")


# -------------------------------------------------------------------------------------------------------------- ranges

ABOVE_0 = [
    "prompts_per_step", "max_prompt_tokens", "max_new_tokens", "temperature", "epochs", "learning_rate", "max_grad_norm",
    "updates_per_rollout", "microbatches", "logprob_chunk", "save_every", "keep_checkpoints", "max_bad_updates",
    "top_p", "sessions", "processes", "reward_timeout", "reward_workers", "lora_alpha",
]  # fmt: skip
FROM_0 = [
    "new_problems", "max_steps", "seed", "top_k", "beta", "epsilon_low", "epsilon_high", "tis_cap", "warmup_steps",
    "weight_decay", "eval_problems", "eval_every", "adam_b1", "adam_b2", "rollout_tp", "packing",
    "halvings", "max_hours", "session", "review_ratio", "retention_problems", "save_minutes", "process_id", "resample",
    "max_zero_variance_steps", "inspect_groups", "lora_rank", "adapter_alpha", "pass_rates_keep",
]  # fmt: skip
ANY_NUMBER = [
    "reward_correct", "reward_reasoning_tags", "reward_answer_tags", "reward_operators", "reward_violation", "reward_coin",
]  # fmt: skip
TOO_LARGE = {"top_p": 1.001, "pass_rates_keep": 1.001, "adam_b1": 1.0, "adam_b2": 1.0, "seed": 2**32}
LARGEST = {"top_p": 1.0, "pass_rates_keep": 1.0, "adam_b1": 0.999, "adam_b2": 0.999, "seed": 2**32 - 1}


def test_every_number_has_its_range_checked_here():
    numbers = {name for name in FIELDS if TYPES[name] in (int, float)}
    assert numbers == {*ABOVE_0, *FROM_0, *ANY_NUMBER, "group_size"}


@pytest.mark.parametrize("name", ABOVE_0)
def test_what_must_be_above_0_is(name):
    for value in (0, -1):
        with pytest.raises(ConfigError, match=rf"^{name} {value}\b.* must be above 0"):
            config_with(**{name: TYPES[name](value)})
    smallest = 1 if TYPES[name] is int else 1e-9
    assert getattr(config_with(**{name: smallest} | BESIDE.get(name, {})), name) == smallest


@pytest.mark.parametrize("name", FROM_0)
def test_what_may_be_0_is_not_negative(name):
    with pytest.raises(ConfigError, match=f"^{name} -1.* must not be negative"):
        config_with(**{name: TYPES[name](-1)})
    assert getattr(config_with(**{name: TYPES[name](0)}), name) == 0


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_has_a_largest_value_keeps_it(name):
    with pytest.raises(ConfigError, match=f"^{name} {TOO_LARGE[name]} must be "):
        config_with(**{name: TOO_LARGE[name]})
    assert getattr(config_with(**{name: LARGEST[name]} | BESIDE.get(name, {})), name) == LARGEST[name]


@pytest.mark.parametrize("value", [1, 0, -8])
def test_a_group_has_at_least_two(value):
    with pytest.raises(ConfigError, match=f"^group_size {value} must be at least 2"):
        Config(group_size=value)
    assert Config(group_size=2).rows == 2 * Config().prompts_per_step


@pytest.mark.parametrize("name", [name for name in FIELDS if TYPES[name] is float])
@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_no_number_is_infinite_or_nan(capsys, name, text):
    assert f"{name} {text} must be a finite number" in error_of(capsys, f"--{name}={text}")


@pytest.mark.parametrize(("prompts", "parts", "fits"), [(16, 3, False), (4, 8, False), (16, 16, True), (6, 3, True)])
def test_prompts_divide_into_microbatches(prompts, parts, fits):
    if fits:
        assert Config(prompts_per_step=prompts, microbatches=parts).microbatches == parts
    else:
        with pytest.raises(ConfigError, match=f"^prompts_per_step {prompts} must divide into microbatches {parts}$"):
            Config(prompts_per_step=prompts, microbatches=parts)


@pytest.mark.parametrize("targets", ["q,k,w", "", "q,,v", "q,v,q", "q, v"])
def test_a_lora_target_is_a_projection_named_once(targets):
    wrong = {"q,k,w": "w", "q,v,q": "q", "q, v": " v"}.get(targets, "")
    with pytest.raises(ConfigError, match=f"^lora_targets '{wrong}' must be one of q,k,v,o,gate,up,down, named once$"):
        config_with(lora_rank=4, lora_targets=targets)


def test_a_share_to_keep_wants_pass_rates():
    with pytest.raises(ConfigError, match=r"^pass_rates_keep 0\.5 only applies with --pass_rates$"):
        config_with(pass_rates_keep=0.5)


@pytest.mark.parametrize(("name", "value"), [("lora_alpha", 16.0), ("lora_targets", "q,v")])
def test_settings_of_lora_want_a_rank(name, value):
    with pytest.raises(ConfigError, match=f"^{name} only applies with LoRA: set --lora_rank, e.g. 64$"):
        config_with(**{name: value})


def test_a_bad_value_on_the_command_line_is_the_same_one_line(capsys):
    assert error_of(capsys, "tiny", "--temperature", "0") == "error: temperature 0.0 must be above 0\n"


# ------------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_resolves_to_itself_and_passes_its_own_checks(name):
    assert parsed(name) == PRESETS[name]
    assert PRESETS[name].preset == name
    assert Config(**dataclasses.asdict(PRESETS[name])) == PRESETS[name]


def test_without_a_preset_the_embedded_default_runs():
    assert parsed() == PRESETS["tiny"]
    assert PRESETS["tiny"].data == "arithmetic"  # nothing to download


@pytest.mark.parametrize(
    "argv", [["gemma3-1b", "--epochs", "3"], ["--epochs", "3", "gemma3-1b"], ["--preset", "gemma3-1b", "--epochs=3"]]
)
def test_a_flag_wins_over_the_preset_and_the_preset_over_the_default(argv):
    config = parsed(*argv)
    assert PRESETS["gemma3-1b"].rollout_tp != Config().rollout_tp and PRESETS["gemma3-1b"].epochs != 3
    assert (config.preset, config.epochs, config.rollout_tp) == ("gemma3-1b", 3, PRESETS["gemma3-1b"].rollout_tp)
    assert config == dataclasses.replace(PRESETS["gemma3-1b"], epochs=3)


def test_a_flag_may_set_a_field_back_to_its_default():
    assert PRESETS["tiny"].remat != Config().remat and PRESETS["tiny"].packing == 0
    config = parsed("tiny", "--remat", Config().remat, "--packing", str(Config().packing))
    assert config.remat == Config().remat and config.packing == Config().packing > 0


def test_the_weights_of_the_reward_are_its_five_components():
    from grpo.reward import WEIGHTS

    assert Config().reward_weights == WEIGHTS
    assert Config(reward_operators=7.0).reward_weights == {**WEIGHTS, "operators": 7.0}


# ---------------------------------------------------------------------------------------------------------------- help


def test_help_names_every_field_with_its_default_and_what_presets_change(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")  # else it breaks lines at hyphens
    with pytest.raises(SystemExit) as ended:
        parsed("--help")
    out, err = capsys.readouterr()
    assert ended.value.code == 0 and err == "" and "what it does" in out
    for name in FIELDS.keys() - {"preset"}:
        default, choices = FIELDS[name].default, FIELDS[name].metadata["choices"]
        metavar = "{" + ",".join(choices) + "}" if choices else METAVARS[TYPES[name]]
        metavar = f"[{metavar}]" if TYPES[name] is bool else metavar
        changed = [f"{preset} {shown(getattr(p, name))}" for preset, p in PRESETS.items() if getattr(p, name) != default]
        values = "; ".join([shown(default), *changed])
        assert f" --{name} {metavar} {FIELDS[name].metadata['help']} ({values}) " in " ".join(out.split()) + " "
    assert all(preset in out for preset in PRESETS)


def shown(value: typing.Any) -> str:
    """A default as `--help` shows it: long texts are cut, empty ones are called none."""
    text = " ".join(str(value).split())
    return "none" if value == "" else text if len(text) <= 40 else f"{text[:40]}..."


def test_help_has_the_nine_groups_in_order_and_every_field_in_one(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parsed("--help")
    out = capsys.readouterr().out
    titles = [line.removesuffix(":") for line in out.splitlines() if line.removesuffix(":") in GROUPS]
    assert titles == list(GROUPS)
    assert {field.metadata["group"] for field in FIELDS.values()} == set(GROUPS)
    assert max(map(len, out.splitlines())) <= 80  # fits the terminal


@pytest.mark.parametrize(
    ("flag_of_a_peer", "ours"),
    [
        ("--num_generations", "group_size"), ("--num_iterations", "updates_per_rollout"), ("--lr", "learning_rate"),
        ("--per_device_train_batch_size", "prompts_per_step"), ("--max_completion_length", "max_new_tokens"),
        ("--gradient_accumulation_steps", "microbatches"), ("--epsilon", "epsilon_low"), ("--output-dir", "run_dir"),
    ],
)  # fmt: skip
def test_a_flag_of_trl_or_tunix_is_answered_with_ours(capsys, flag_of_a_peer, ours):
    name, text = flag_of_a_peer.replace("-dir", "_dir"), FIELDS[ours].metadata["help"]
    assert error_of(capsys, flag_of_a_peer, "4") == f"error: unknown flag {name}; its counterpart here is --{ours}: {text}\n"


def test_every_counterpart_of_a_peers_flag_is_a_field_and_no_flag_of_ours():
    assert set(PEERS.values()) <= set(FIELDS) and not set(PEERS) & set(FIELDS)


@pytest.mark.parametrize("word", ["--entropy_coeff", "--vllm_mode", "--critic", "--logging", "--num_workers", "--optim"])
def test_a_guess_is_no_hint(capsys, word):
    assert error_of(capsys, word, "1") == f"error: unknown flag {word}; --help lists them\n"


def test_an_extra_word_is_called_one(capsys):
    assert "unexpected word 'gsm8k'" in error_of(capsys, "tiny", "gsm8k")


@pytest.mark.parametrize(("old", "new"), [("sampler_cap", "tis_cap"), ("max_dead_steps", "max_zero_variance_steps")])
def test_an_older_name_leads_to_the_new_one_and_old_runs_are_read(capsys, old, new):
    assert error_of(capsys, f"--{old}", "1") == f"error: unknown flag --{old}: it is called --{new} now\n"
    assert current_names({old: 1, "beta": 0.1, "attention": "plain"}) == {new: 1, "beta": 0.1, "attention": "plain"}


def test_a_description_fits_the_terminal_and_its_commands_can_be_pasted(capsys, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Other:
        quick: bool = flag(False, "no waiting")

    long = (
        '    python scripts/other.py --quick --prompt "Ann has 3 pens. How many pens has she?" --max_new_tokens 64    not quick'
    )
    text = (
        f"One sentence of a paragraph,\nand another.\n\n{long}\n\n    strict    what only well-formed completions say, counted"
    )
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit):
        parse(Other, ["--help"], text)
    out = capsys.readouterr().out
    assert "\nOne sentence of a paragraph, and another.\n" in out and max(map(len, out.splitlines())) <= 62
    command = """
    # not quick
    python scripts/other.py --quick \\
        --prompt "Ann has 3 pens. How many pens has she?" \\
        --max_new_tokens 64
"""
    assert command in out
    assert "\n    strict    what only well-formed completions say,\n              counted\n" in out


def test_help_is_complete_for_a_dataclass_without_presets(capsys):
    @dataclasses.dataclass(frozen=True)
    class Other:
        share: float = flag(0.5, "half is 50%")
        quick: bool = flag(False, "no waiting")

    assert parse(Other, ["--share=0.25", "--quick"], "another script") == Other(0.25, True)
    with pytest.raises(SystemExit) as ended:
        parse(Other, ["--help"], "another script")
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "half is 50% (0.5)" in out and "no waiting (False)" in out and "PRESET" not in out

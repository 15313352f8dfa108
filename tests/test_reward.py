"""Laws of the reward: which texts state which number, what each component pays, and that no text is slow or fatal."""

import itertools
import json
import random
import time
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import pytest

from grpo import reward

DATA = Path(__file__).parents[2] / "shared" / "data"


@dataclass(frozen=True)
class Problem:
    answer: str


def completion_with(answer: str, reasoning: str = "5 + 13 = 18, so 18 in all.") -> str:
    return f"<reasoning>{reasoning}</reasoning>\n<answer>{answer}</answer>"


def components(completion: str, answer: str = "18", truncated: bool = False) -> dict[str, float]:
    return reward.score(completion, Problem(answer), truncated).components


# ------------------------------------------------------------------------------------------------ the answer parser


def shared_cases() -> list[dict]:
    path = DATA / "answer_cases.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


@pytest.mark.skipif(not shared_cases(), reason="../shared/data/answer_cases.json is missing")
def test_every_shared_case_is_judged_as_agreed():
    for case in shared_cases():
        verdict = reward.is_correct(case["completion"], case["ground_truth"])
        assert verdict == case["expected_correct"], case


STATES_A_NUMBER = {
    "18": "18",
    "018": "18",
    "0": "0",
    "-0": "0",
    "1234567": "1234567",
    "999999999999999": "999999999999999",
    # decimals, compared by value
    "72.": "72",
    "72.0": "72",
    "72.000000000000000": "72",
    "72.50": "72.5",
    "0.1": "0.1",
    # thousands
    "1,234": "1234",
    "192,000,000": "192000000",
    "-1,234.50": "-1234.5",
    "1,234,": "1234",
    # signs; U+2212 is a minus
    "-10": "-10",
    "+10": "10",
    "−10": "-10",
    "(-10)": "-10",
    "It is -10.": "-10",
    # money and percent
    "$18": "18",
    "$ 18": "18",
    "18$": "18",
    "-$18": "-18",
    "$-18": "-18",
    "−$1,800.50": "-1800.5",
    "€18": "18",
    "£18": "18",
    "EUR 18": "18",
    "EUR18": "18",
    "18 GBP": "18",
    "$18.00 USD": "18",
    "18%": "18",
    "18 %": "18",
    "18 percent": "18",
    # LaTeX and markdown
    r"\boxed{18}": "18",
    r"$\boxed{18}$": "18",
    r"\boxed{x = 18}": "18",
    r"\$18": "18",
    r"18\%": "18",
    "**18**": "18",
    "**-$18**": "-18",
    "**Answer:** 18": "18",
    "#### 18": "18",
    # the right side of the last equals sign
    "5 + 13 = 18": "18",
    "a = b = 18": "18",
    "x=18": "18",
    "36/2 == 18": "18",
    "5 + 13 = $18 dollars": "18",
    # unit words and sentences
    "18 dollars": "18",
    "18km": "18",
    "18 km/h": "18",
    "$18/hour": "18",
    "18-inch": "18",
    "18 half-gallons": "18",
    "18 dozen eggs": "18",
    "18°F": "18",
    "18 jalapeño peppers": "18",
    "18 m": "18",
    "18th": "18",
    "Ben's total is (18).": "18",
    "The answer is: 18!": "18",
    "18, I think": "18",
    "\n\t 18 \u00a0\r\n": "18",
    "\n" * 100_000 + "18" + "\n" * 100_000: "18",
}

STATES_NO_NUMBER = [
    *["", " ", ".", "-", "$", "%", ",", "=", "eighteen", "N/A"],
    # malformed thousands and decimals
    *["1,23", "1,2345", "12,34,567", "1234,567", ",234", "1,,234", "0,123", "1.234.567", "1_000", "1 000", "1'000"],
    *["1,234,567,890,123,456", ".5", "-.5", "18..5", "18.5.3"],
    # digits that are not ASCII, and numerals that are no digits
    *["٣", "３", "１８", "१२", "²", "5²", "18½", "½", "①", "1，234", "18٣", "Ⅻ"],
    # scale words and words that change the value
    *["18 thousand", "18 Thousand", "18k", "18K", "18 k", "$18K", "18 million", "18M", "1.8 billion", "18bn", "18B"],
    *["18 hundred", "18 trillion", "18 and a half", "half of 36", "minus 18", "negative 18"],
    # expressions, fractions, powers, inequalities
    *["5 + 13", "36/2", "36 / 2", "9*2", "9x2", "9 × 2", "36 ÷ 2", "20-2", "20 - 2", "20 − 2", "18 = 5 + 13", "18 ="],
    *["9**9**9", "2**5", "2^4", "18^", "√18", "36%5", "1/0", "5 +", "+ 5", "18*", "*18*", r"\frac{36}{2}"],
    *["x >= 18", "x != 18", "> 18", "<18", "≈18", "~18", "18 ± 1"],
    # ranges, lists, hedges, several units, clocks
    *["10-12", "10–12", "10 to 12", "10, 12, 18", "10,12", "18 or 20", "18 18", "18; 18", "18 hours and 30 minutes"],
    *["6:30", "18 m2", "1. 18", "[18]", "{18}"],
    # a sign that does not touch its numeral is a dash or an operator; one that touches a word is a hyphen
    *["- 18", "--18", "+-18", "18-", "Profit - 18", "COVID-19", "x18", "v.18", "18 - dollars", "18 — dollars"],
    # what float() and Decimal() would read
    *["1e5", "1E5", "1e999999", "-1e-5", "nan", "NaN", "sNaN", "inf", "-inf", "Infinity", "0x12", "0b11"],
    # too long
    *["1" * 16, "0." + "3" * 16, "9" * 1_000_000, "1," * 100_000, "1,234" + ",000" * 1000, "18 " + "a" * 200],
    # remains of tags and markup
    *["<b>18</b>", "<answer>18", r"\boxed{18", r"\boxed{5}{18}", r"1\boxed{8}", "-**18**"],
    *["18\x00", "18\u200b", "18\ud800"],
]


@pytest.mark.parametrize(("text", "number"), STATES_A_NUMBER.items(), ids=lambda text: ascii(text)[:30])
def test_one_numeral_among_words_states_that_number(text: str, number: str):
    assert reward.parse_number(text) == Decimal(number)
    assert reward.is_correct(completion_with(text), number)


@pytest.mark.parametrize("text", STATES_NO_NUMBER, ids=lambda text: ascii(text)[:30])
def test_anything_else_states_no_number(text: str):
    assert reward.parse_number(text) is None


def test_numbers_compare_exactly():
    for close in ("18.01", "17.999999999999999", "18.000000000000001", "-18", "0.18", "1800", "180", "8"):
        assert not reward.is_correct(completion_with(close), "18"), close


def test_only_complete_answer_blocks_count():
    for completion in ("18", "The answer is 18.", "<answer>18", "18</answer>", "</answer>18<answer>", "<answer>\n\n18"):
        assert reward.extract_answer(completion) is None, completion
    for completion in ("<Answer>18</Answer>", "<answer >18</answer>", "<answer>18</ answer>"):
        assert reward.extract_answer(completion) is None, completion


def test_the_opening_tag_nearest_the_closing_one_opens_the_block():
    assert reward.extract_answer("<answer>20<answer>18</answer>") == 18
    assert reward.extract_answer("<answer>18</answer>20</answer>") == 18
    assert reward.extract_answer("I write <answer> first. <answer>18</answer>") == 18
    assert reward.extract_answer("<answer><answer>18</answer></answer>") == 18


def test_several_answers_must_agree():
    assert reward.extract_answer("<answer>18</answer> so <answer>$18.00</answer>") == 18
    assert reward.extract_answer("<answer>18</answer>" * 5000) == 18
    for other in ("20", "-18", "18.5", "", "eighteen", "18 or 20"):
        assert reward.extract_answer(f"<answer>18</answer><answer>{other}</answer>") is None, other
        assert reward.extract_answer(f"<answer>{other}</answer><answer>18</answer>") is None, other


@pytest.mark.parametrize("gold", ["eighteen", "1/2", "18 or 20", "1e5", "18 dollars", "World War 18", "B", "C++", "New York"])
def test_a_gold_that_is_no_number_is_compared_as_text(gold):
    for text in (gold, f" {gold.upper()}.\n", f'**"{gold}"**', f"The answer is: {gold}", f"\\boxed{{{gold}}}"):
        completion = completion_with(text)
        assert reward.score(completion, Problem(gold)).components["correct"] == 25, text
        assert reward.accuracies(completion, gold) == {"tagged": True, "strict": True, "flexible": True}
    for text in ("18", "", "1", "2", "not " + gold, f"{gold} or 20", gold + gold, "London", "C", "1 / 2", "100000"):
        assert not reward.is_correct(completion_with(text), gold), text
    assert not reward.is_correct(f"<answer>{gold}</answer><answer>18</answer>", gold)
    assert reward.is_correct(f"<answer>{gold}</answer><answer>{gold}.</answer>", gold)


@pytest.mark.parametrize("text", ["b", "(B)", "B.", "B)", "[b]", "Option B", "choice: (B)", "B) Paris", "B: a dog", "$B$"])
def test_a_choice_is_its_letter_with_or_without_its_text(text):
    for gold in ("B", "(B)", "b.", "B) Paris"):
        assert reward.is_correct(completion_with(text), gold)
    assert not reward.is_correct(completion_with(text), "A")


@pytest.mark.parametrize(
    "text",
    ["A", "B or C", "A B", "B, C", "not B", "C) B", "B) or C)", "BB", "B) and C", "B) wrong", "b) or a)", "B+", "Plan B",
     "a bee", "the answer is not B", "B) not C", "8"],
)  # fmt: skip
def test_what_does_not_choose_is_not_a_choice(text):
    assert not reward.is_correct(completion_with(text), "B")


def test_signs_and_articles_of_a_text_count():
    pairs = [("C", "C++"), ("[1, 2)", "(1, 2)"), ("x2", "x²"), ("a dog", "dog"), ("who", "the who"), ("yes", "yes and no")]
    for one, other in pairs:
        assert not reward.is_correct(completion_with(one), other) and not reward.is_correct(completion_with(other), one)


def test_without_a_gold_nothing_is_correct_and_there_is_no_accuracy():
    for text in ("", "18", "B"):
        assert reward.accuracies(completion_with(text), "") == {}
        assert reward.score(completion_with(text), Problem("")).components["correct"] == 0
        assert not reward.is_correct(completion_with(text), "")


def test_the_gold_is_read_as_the_answer_is():
    for gold in ("1234", "1,234", "$1,234.00", "#### 1,234", " 1234\n"):
        assert reward.is_correct(completion_with("1,234"), gold), gold


def test_the_flexible_answer_is_the_last_number_of_the_text():
    last_numbers = {
        "5 + 13 = 18": "18",
        "The answer is 18.": "18",
        "It costs $1,234.50, no more.": "1234.5",
        "so -$18": "-18",
        "so $18 and then -20 dollars": "-20",
        "−20": "-20",
        "from 10-12": "-12",
        "<answer>18</answer>": "18",
        "<answer>18</answer> Next, 20": "20",
        "**18**": "18",
        "18" + " and so on" * 10_000: "18",
        "18 then 1,23": None,
        "18 then ٣": "18",
        "18 then " + "9" * 100_000: None,
        "1" * 1000 + " " + "7": "7",
        "no number": None,
        "": None,
    }
    for text, number in last_numbers.items():
        assert reward.flexible_answer(text) == (None if number is None else Decimal(number)), text[:80]


def test_strict_implies_tagged_and_asks_for_the_format():
    def read(completion: str, truncated: bool = False) -> tuple[bool, ...]:
        verdicts = reward.accuracies(completion, "18", truncated)
        return verdicts["tagged"], verdicts["strict"], verdicts["flexible"]

    assert read(completion_with("18")) == (True, True, True)
    assert read(completion_with("18"), truncated=True) == (True, False, True)
    assert read("<answer>18</answer>") == (True, False, True)
    assert read("<answer>18</answer> of 20") == (True, False, False)
    assert read("The answer is 18.") == (False, False, True)
    assert read(completion_with("20")) == (False, False, False)


# ------------------------------------------------------------------------------------------------ the five components

RIGHT, WRONG, EMPTY = completion_with("18"), completion_with("20"), ""


def test_right_and_clean_scores_30_wrong_and_clean_5_empty_minus_15():
    assert reward.score(RIGHT, Problem("18")).total == 30
    assert reward.score(WRONG, Problem("18")).total == 5
    assert reward.score(EMPTY, Problem("18")).total == -15


def test_each_component_is_its_weight_or_zero():
    assert components(RIGHT) == {**reward.WEIGHTS, "violation": 0}
    assert components(WRONG) == {**reward.WEIGHTS, "violation": 0, "correct": 0}
    assert components(EMPTY) == {**dict.fromkeys(reward.WEIGHTS, 0), "violation": -15}


def test_the_total_is_the_sum_of_the_weighted_components():
    weights = {"correct": 1.0, "reasoning_tags": 0.5, "answer_tags": 0.25, "operators": 0.125, "violation": -2.0}
    for completion in (RIGHT, WRONG, EMPTY, "<answer>18</answer>", RIGHT + RIGHT):
        by_name, total = reward.score(completion, Problem("18"), weights=weights)
        assert set(by_name) == set(weights)
        assert total == sum(by_name.values())
        assert all(value in (0, weights[name]) for name, value in by_name.items())


def test_weights_must_name_exactly_the_components():
    for weights in ({}, {"correct": 1.0}, {**reward.WEIGHTS, "lenght": 1.0}):
        with pytest.raises(ValueError, match="weights"):
            reward.score(RIGHT, Problem("18"), weights=weights)


def test_correct_does_not_depend_on_the_format():
    assert components("<answer>18</answer>")["correct"] == 25
    assert components(RIGHT, truncated=True)["correct"] == 25
    assert components("18")["correct"] == 0
    assert reward.score(RIGHT, Problem("18"), truncated=True).total == 30 - 15


@pytest.mark.parametrize("tag", ["reasoning", "answer"])
def test_tags_pay_when_there_is_one_block_that_is_not_empty(tag: str):
    def pays(completion: str) -> bool:
        return components(completion)[f"{tag}_tags"] == 2

    o, c = f"<{tag}>", f"</{tag}>"
    for one_block in (f"{o}text{c}", f"before {o}\ntext\n{c} after", f"{o}<b>{c}"):
        assert pays(one_block), one_block
    for not_one in ("", "text", o, c, f"{o}text", f"text{c}", f"{c}text{o}", f"{o}{c}", f"{o} \n{c}"):
        assert not pays(not_one), not_one
    for repeated in (f"{o}1{c}{o}2{c}", f"{o}{o}1{c}", f"{o}1{c}{c}", f"{o}1{o}2{c}3{c}"):
        assert not pays(repeated), repeated


def test_operators_pay_for_digit_operator_digit_in_the_reasoning():
    for reasoning in ("5+13", "5 + 13", "20-2", "20 − 2", "9*2", "9 * 2", "36/2", "9x2", "9 x 2", "9 × 2", "36 ÷ 2"):
        assert components(completion_with("18", reasoning))["operators"] == 1, reasoning
    for reasoning in ("18", "x = 18", "18 = 18", "18=18", "5 and 13", "+ 5", "5 +", "5 + x", "a - b", "5 ++ 13", "٣+٣"):
        assert components(completion_with("18", reasoning))["operators"] == 0, reasoning
    assert components(completion_with("18", "1\n- 2"))["operators"] == 0  # a list, not a subtraction
    assert components("5 + 13 <reasoning>so</reasoning> 5 + 13 <answer>5 + 13</answer>")["operators"] == 0
    assert components("<reasoning>5 + 13")["operators"] == 0


CLEAN = [
    RIGHT,
    RIGHT.replace("\n", ""),
    RIGHT + "\n \n",
    "\n" + RIGHT,
    "Sure! Here it is.\n" + RIGHT,
    RIGHT.replace("\n", "\nTherefore:\n"),
    completion_with(""),
    completion_with("18", ""),
    completion_with("<b>18</b>"),
]

R, R_END, A, A_END = reward.TAGS
VIOLATIONS = {
    "empty": "",
    "no tags": "5 + 13 = 18",
    "no <reasoning>": f"5 + 13{R_END}{A}18{A_END}",
    "no </reasoning>": f"{R}5 + 13{A}18{A_END}",
    "no <answer>": f"{R}5 + 13{R_END}18{A_END}",
    "no </answer>": f"{R}5 + 13{R_END}{A}18",
    "no reasoning": f"{A}18{A_END}",
    "no answer": f"{R}5 + 13{R_END}",
    "repeated whole": RIGHT + RIGHT,
    "repeated <reasoning>": R + RIGHT,
    "repeated </reasoning>": f"{R}5{R_END}{R_END}{A}18{A_END}",
    "repeated <answer>": f"{R}5{R_END}{A}{A}18{A_END}",
    "repeated </answer>": f"{R}5{R_END}{A}18{A_END}{A_END}",
    "repeated block": f"{R}5{R_END}{A}18{A_END}{A}18{A_END}",
    "answer nested in reasoning": f"{R}5{A}18{A_END}{R_END}",
    "reasoning nested in answer": f"{A}{R}5{R_END}18{A_END}",
    "interleaved": f"{R}5{A}{R_END}18{A_END}",
    "answer first": f"{A}18{A_END}{R}5{R_END}",
    "closing before opening": f"{R_END}5{R}{A}18{A_END}",
    "text after": RIGHT + " I hope this helps!",
    "stop word after": RIGHT + "<end_of_turn>",
}


@pytest.mark.parametrize("completion", CLEAN, ids=ascii)
def test_four_tags_in_order_and_nothing_after_is_no_violation(completion: str):
    assert components(completion)["violation"] == 0


@pytest.mark.parametrize("completion", VIOLATIONS.values(), ids=VIOLATIONS.keys())
def test_a_tag_out_of_place_or_text_after_the_answer_is_a_violation(completion: str):
    assert components(completion)["violation"] == -15


@pytest.mark.parametrize("completion", CLEAN, ids=ascii)
def test_being_cut_off_is_a_violation(completion: str):
    assert components(completion, truncated=True)["violation"] == -15


def test_format_checks_are_the_three_components_of_the_tags():
    for completion in (*CLEAN, *VIOLATIONS.values()):
        for truncated in (False, True):
            paid = components(completion, truncated=truncated)
            for name, holds in reward.format_checks(completion, truncated).items():
                assert paid[name] == (reward.WEIGHTS[name] if holds else 0)


# ------------------------------------------------------------------------------------------------ the data


@pytest.mark.skipif(not (DATA / "gsm8k_train.jsonl").exists(), reason="../shared/data/gsm8k_train.jsonl is missing")
def test_every_gsm8k_gold_scores_30_inside_tags():
    lines = (DATA / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    golds = [json.loads(line)["answer"].rpartition("####")[2].strip() for line in lines]
    assert len(golds) == 7473
    assert sum("," in gold for gold in golds) == 79
    assert sum(gold.startswith("-") for gold in golds) == 3
    for gold in golds:
        assert reward.parse_number(gold) == Decimal(gold.replace(",", ""))
        assert reward.score(completion_with(gold), Problem(gold)).total == 30


# ------------------------------------------------------------------------------------------------ hostile texts


def filled(unit: str, size: int) -> str:
    return unit * (size // len(unit))


def different(template: str, size: int) -> str:
    """Blocks that all differ: `template` with `@` replaced by a new word each time."""
    words = itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=4)
    return "".join(template.replace("@", "".join(next(words))) for _ in range(size // len(template)))


HOSTILE = {
    "opening tags": lambda size: filled("<answer>", size),
    "closing tags": lambda size: filled("</answer>", size),
    "blocks": lambda size: filled("<answer>18</answer>", size),
    "different blocks": lambda size: different("<answer>18 @</answer>", size),
    "nested tags": lambda size: filled("<answer>", size // 2) + "18" + filled("</answer>", size // 2),
    "no closing tag": lambda size: "<answer>" + filled("18 ", size),
    "reasoning blocks": lambda size: filled("<reasoning>1</reasoning>", size),
    "newlines": lambda size: "\n" * size,
    "newlines in both blocks": lambda size: completion_with("\n" * (size // 2), "\n" * (size // 2)),
    "a huge number": lambda size: completion_with("9" * size),
    "huge thousands": lambda size: completion_with(filled("1,234", size)),
    "huge reasoning number": lambda size: completion_with("18", "1" * size),
    "spaced digits": lambda size: completion_with("18", filled("1 ", size)),
    "digit, spaces": lambda size: completion_with("18", "1" + " " * (size // 2) + "+" + " " * (size // 2)),
    "unfinished operations": lambda size: completion_with("18", filled("1+   a", size)),
    "partial tags": lambda size: filled("</answer", size),
    "long blocks": lambda size: different("<answer>@" + "a-b " * 49 + "</answer>", size),
    "operands": lambda size: completion_with("18", filled("1/1a ", size)),
    "units": lambda size: completion_with("18", filled("1 aaaa bbbb/cc dddd ", size)),
    "ambiguous chain": lambda size: completion_with("18", filled("1-", size)),
    "currencies and brackets": lambda size: completion_with("18", filled("1-$((", size)),
    "late calculation": lambda size: completion_with("18", filled("a ", size) + "5 + 13"),
    "many reasonings": lambda size: filled("<reasoning>1 a 1a</reasoning>", size),
    "answers in LaTeX": lambda size: different(r"<answer>\boxed{\boxed{\text{@}}}" + r"\, m^2 $" * 20 + "18</answer>", size),
    "answers in words": lambda size: different("<answer>@" + " of a" * 36 + " 18</answer>", size),
    "answers in equations": lambda size: different("<answer>@" + "1+1=" * 46 + "18</answer>", size),
    "answers in dollars": lambda size: different("<answer>@" + "$" * 180 + "18</answer>", size),
    "a late number": lambda size: filled("9{,}", size) + filled("a", size // 2),
    "boxes": lambda size: filled("<answer>" + r"\boxed{" * 28 + "</answer>", size),
    "equals signs": lambda size: filled("<answer>" + "=" * 199 + "</answer>", size),
    "wide characters": lambda size: filled("😀−٣", size) + "<answer>18</answer>",
}


def seconds(text: str) -> float:
    """CPU time, the best of five: a busy machine can only make it longer."""
    times = []
    for _ in range(5):
        start = time.process_time()
        reward.score(text, Problem("18"))
        reward.accuracies(text, "18")
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE.keys())
def test_time_is_linear_and_under_10_ms_per_100_kb(hostile):
    base = seconds(hostile(100_000))
    assert base < 0.010
    # Eight times the text: 64 times the time if a step is quadratic, else 8, or some more as caches overflow.
    assert seconds(hostile(800_000)) < 24 * base + 0.001


def test_a_megabyte_of_tags_or_newlines_is_within_the_same_rate():
    assert seconds("<answer>" * 100_000) < 0.080
    assert seconds("<answer>" * 50_000 + "</answer>" * 50_000) < 0.080
    assert seconds("\n" * 1_000_000) < 0.100


def test_a_huge_answer_takes_under_a_millisecond():
    for text in ("1e999999", "9**9**9", "1/0", "nan", "-inf", "9" * 1_000_000, "1e" + "9" * 100_000):
        start = time.process_time()
        assert reward.parse_number(text) is None
        assert time.process_time() - start < 0.001


FRAGMENTS = [*reward.TAGS, *"0123456789+-*/=x×÷−$€%.,:_^~<>{}()[]\\ \n\t\0٣３½²😀\ud800", "18", "1,234", "nan", "1e9"]
FRAGMENTS += ["\\boxed{", "**", "####", "thousand", "dollars", "EUR", "<end_of_turn>", "<bos>", "<answer", "</"]


def test_no_text_raises():
    rng = random.Random(0)
    for _ in range(1000):
        text = "".join(rng.choices(FRAGMENTS, k=rng.randrange(60)))
        for completion in (text, completion_with(text), completion_with("18", text)):
            by_name, total = reward.score(completion, Problem("18"), truncated=rng.random() < 0.5)
            assert -15 <= total == sum(by_name.values()) <= 30
            verdicts = reward.accuracies(completion, "18")
            assert verdicts["tagged"] or not verdicts["strict"]
            assert verdicts["tagged"] == (by_name["correct"] == 25)


def test_a_random_answer_never_reads_as_a_number_it_does_not_spell():
    rng = random.Random(1)
    for _ in range(3000):
        text = "".join(rng.choices("0123456789,.-+ $%*/=ka", k=rng.randrange(1, 10)))
        number = reward.parse_number(text)
        if number is not None:  # all its digits stand in the text, in order and side by side but for commas
            digits = "".join(c for c in text.rpartition("=")[2] if c in "0123456789.").strip(".")
            assert abs(number) == Decimal(digits), text

"""The reward of one completion: five named components of its text, and three readings of its accuracy.

    reward = sum over components c of  w[c] * 1[c holds]        right and clean 30, wrong and clean 5, empty -15

A completion should read `<reasoning>5 + 13 = 18</reasoning><answer>18</answer>`. The answer is what the complete
`<answer>` blocks state. Where the gold answer is a number: exactly one decimal numeral, alone or among words that keep its
value, compared exactly. No expression is evaluated, nothing is rescaled, and one grammar reads both (data/numbers.py).
Where it is a choice, a word or a phrase: the same text, whatever its case, spaces, quotes and final point.
No completion raises an exception, and the time is linear in its length, because a model in training finds whatever is slow
or generous.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import NamedTuple, Protocol, TypeVar

from data.numbers import MAX_ANSWER_CHARS, calculates, gold_number, last_number, parse_number

WEIGHTS: dict[str, float] = {
    "correct": 25.0,
    "reasoning_tags": 2.0,
    "answer_tags": 2.0,
    "operators": 1.0,
    "violation": -15.0,
}

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")  # each exactly once, in this order

VISIBLE = re.compile(r"[^\s\u00ad\u200b-\u200f\u2060\ufeff]")  # neither a space nor of no width
MAX_ANSWERS = 8  # different wordings in one completion; more count as disagreeing, unread, which bounds the time
MAX_REASONING_CHARS = 10_000  # searched for a calculation: one that first comes later earns nothing, which bounds the time


Found = TypeVar("Found")


class HasAnswer(Protocol):
    """The part of a problem that the reward sees."""

    @property
    def answer(self) -> str: ...


class Score(NamedTuple):
    """Weighted components by name, and their sum."""

    components: dict[str, float]
    total: float


def score(completion: str, problem: HasAnswer, truncated: bool = False, weights: dict[str, float] = WEIGHTS) -> Score:
    """The reward. `truncated`: the length limit cut the completion off. Without a gold answer none is correct."""
    if weights.keys() != WEIGHTS.keys():
        raise ValueError(f"reward weights must name {sorted(WEIGHTS)}, got {sorted(weights)}")
    holds = {
        "correct": bool(problem.answer) and is_correct(completion, problem.answer),
        "operators": has_operation(completion),
        **format_checks(completion, truncated),
    }
    components = {name: float(weight) if holds[name] else 0.0 for name, weight in weights.items()}
    return Score(components, sum(components.values()))


def accuracies(completion: str, ground_truth: str, truncated: bool = False) -> dict[str, bool]:
    """Three readings: `tagged`, the headline; `strict`, tagged without a violation; `flexible`, the last number.

    Of a gold that is no number `flexible` is `tagged`. Without a gold answer there is nothing to read: {}.
    """
    if not ground_truth:
        return {}
    tagged = is_correct(completion, ground_truth)
    return {
        "tagged": tagged,
        "strict": tagged and not violates_format(completion, truncated),
        "flexible": flexible_answer(completion) == parse_gold(ground_truth) if numeric_gold(ground_truth) else tagged,
    }


def is_correct(completion: str, ground_truth: str) -> bool:
    """Whether the tagged answer equals the gold one: as decimals, `18.0` is 18, or as texts, `Paris.` is paris."""
    if numeric_gold(ground_truth):
        return extract_answer(completion) == parse_gold(ground_truth)
    return extract_text(completion, ground_truth) == canonical_text(ground_truth, ground_truth) != ""


def extract_answer(completion: str) -> Decimal | None:
    """The number in the `<answer>` block; several blocks must agree. None if there is none.

    `<answer>$1,234.00</answer>` -> 1234; `<answer>18</answer> or <answer>20</answer>` -> None
    """
    return agreed(completion, parse_number)


def agreed(completion: str, read: Callable[[str], Found]) -> Found | None:
    """What `read` finds in the complete `<answer>` blocks; None if they differ, or if there is none."""
    statements = set(blocks(completion, "answer"))
    if len(statements) > MAX_ANSWERS:
        return None
    answers = {read(statement) for statement in statements}
    return answers.pop() if len(answers) == 1 else None


def flexible_answer(completion: str) -> Decimal | None:
    """The last number anywhere in the text, tags or not, comparable with lm-eval's flexible-extract.

    `That makes 5 + 13 = 18 dollars.` -> 18. Like lm-eval, it takes the hyphen of `10-12` for a sign, and a text ends where a
    next `Question:` begins. Unlike lm-eval, it reads a number whole or not at all: `$9{,}500` is 9500, `9'500` and `1e5` none.
    """
    return last_number(completion.partition("\nQuestion:")[0])


# -------------------------------------------------------------------------------------------- answers that are no numbers

WRAPPED = re.compile(r"\\(?:boxed|text|mathrm|textbf)\{([^{}]*)\}")
ANNOUNCED = re.compile(
    r"(?:the )?(?:(?:final|correct) )?(?:answer(?: is:? +|: *)|(?:option|choice):? +(?=[(\[]?[a-z](?![a-z])))(?=\S)"
)
CHOICE = re.compile(r"[(\[]?([a-z])(?:[)\].:]*|[)\].:]+ +(.*))")  # `B`, `(B)`, `B.`, `B) Paris`
OTHERS = re.compile(r"(?<!\w)(?:[b-hj-z]|a(?=[).:,]|$)|or|not|wrong|incorrect|false)(?!\w)")  # behind a choice: no clear choice


def numeric_gold(ground_truth: str) -> bool:
    """Whether a gold answer is compared as a number: it is one, without a word. `18 dollars` is a phrase."""
    return gold_number(ground_truth) is not None


def extract_text(completion: str, ground_truth: str) -> str | None:
    """The canonical text in the `<answer>` block; several blocks must agree. None if there is none."""
    return agreed(completion, lambda statement: canonical_text(statement, ground_truth)) or None


def canonical_text(text: str, ground_truth: str) -> str:
    """What is compared of a text: without case, markup, quotes, announcement and final point; "" if there is nothing.

    `**The answer is: "New  York".**` -> `new york`. Where the gold is a choice, `(B)`, `b.` and `B) Paris` are all `b`, while
    `B or C` stays what it is. Articles, brackets and all other signs count: `C++` is not C, and `[1, 2)` is not (1, 2).
    """
    plain = plain_text(text)
    gold = CHOICE.fullmatch(plain_text(ground_truth))
    choice = CHOICE.fullmatch(plain) if gold else None
    return choice[1] if choice and not (choice[2] and OTHERS.search(choice[2])) else plain


def plain_text(text: str) -> str:
    if len(text) > 2 * MAX_ANSWER_CHARS:
        return ""
    text = WRAPPED.sub(r"\1", unicodedata.normalize("NFC", text).replace("**", "").replace("`", ""))
    text = " ".join(text.split()).casefold().replace("’", "'")
    text = ANNOUNCED.sub("", text, count=1) if ANNOUNCED.match(text) else text
    while (shorter := text.strip(" \"'“”„‘$").rstrip(".!;,")) != text:
        text = shorter
    return text if len(text) <= MAX_ANSWER_CHARS else ""


def stated_answer(completion: str, ground_truth: str) -> Decimal | str | None:
    """What a completion states, in the form in which it is compared with the gold answer and in which it votes."""
    return extract_answer(completion) if numeric_gold(ground_truth) else extract_text(completion, ground_truth)


def parse_gold(ground_truth: str) -> Decimal:
    """The gold answer, read by the same rules as the model's."""
    gold = parse_number(ground_truth)
    if gold is None:
        raise ValueError(f"the gold answer {ground_truth[:80]!r} is not a number")
    return gold


def blocks(text: str, tag: str) -> Iterator[str]:
    """The insides of the complete blocks, each from the opening tag nearest its closing one.

    `list(blocks("<a>1<a>2</a>3</a><a>4", "a")) == ["2"]`
    """
    opening = f"<{tag}>"
    for before_closing in text.split(f"</{tag}>")[:-1]:
        begin = before_closing.rfind(opening)
        if begin >= 0:
            yield before_closing[begin + len(opening) :]


def has_operation(completion: str) -> bool:
    """Whether the reasoning calculates: number, operator, number, as in `$5 + $13`. An equals sign is not an operator."""
    return calculates("\n".join(blocks(completion, "reasoning"))[:MAX_REASONING_CHARS])


def format_checks(completion: str, truncated: bool = False) -> dict[str, bool]:
    """The three components that depend on the tags alone."""
    return {
        "reasoning_tags": has_one_block(completion, "reasoning"),
        "answer_tags": has_one_block(completion, "answer"),
        "violation": violates_format(completion, truncated),
    }


def has_one_block(completion: str, tag: str) -> bool:
    """One opening tag, one closing tag, in this order, with something between them."""
    once = completion.count(f"<{tag}>") == completion.count(f"</{tag}>") == 1
    return once and any(VISIBLE.search(inside) for inside in blocks(completion, tag))


def violates_format(completion: str, truncated: bool = False) -> bool:
    """A tag missing, repeated, nested or out of order; text after the last; cut off. Text before or between is fine."""
    if truncated or any(completion.count(tag) != 1 for tag in TAGS):
        return True
    positions = [completion.find(tag) for tag in TAGS]
    text_after = VISIBLE.search(completion, positions[-1] + len(TAGS[-1]))
    return positions != sorted(positions) or text_after is not None

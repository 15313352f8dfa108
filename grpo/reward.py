"""The reward of one completion: five named components of its text, and three readings of its accuracy.

    reward = sum over components c of  w[c] * 1[c holds]        right and clean 30, wrong and clean 5, empty -15

A completion should read `<reasoning>5 + 13 = 18</reasoning><answer>18</answer>`. The answer is what the complete
`<answer>` blocks state. Where the gold answer is a number: exactly one decimal numeral, alone or among words, compared exactly.
Where it is a choice, a word or a phrase: the same text, whatever its case, spaces, quotes and final point.
Only a plain numeral is an answer: no expression is evaluated, nothing is rounded or rescaled, number words are not read.
No completion raises an exception, and the time is linear in its length, because a model in training finds whatever is slow
or generous.
"""

import re
import unicodedata
from collections.abc import Iterator
from decimal import Decimal
from typing import NamedTuple, Protocol

WEIGHTS: dict[str, float] = {
    "correct": 25.0,
    "reasoning_tags": 2.0,
    "answer_tags": 2.0,
    "operators": 1.0,
    "violation": -15.0,
}

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")  # each exactly once, in this order

MAX_ANSWER_CHARS = 200  # about a sentence; every regex except OPERATION sees at most this much text
MAX_ANSWERS = 32  # different wordings in one completion; more count as disagreeing, unread, which bounds the time

# ASCII digits only: \d also matches Arabic and full-width digits. Malformed thousands (1,23) match neither branch.
NUMERAL = r"(?:[0-9]{1,15}|[1-9][0-9]{0,2}(?:,[0-9]{3}){1,4})(?:\.[0-9]{1,15})?"
LETTER = "A-Za-zÀ-ÖØ-öø-ÿ"  # Latin-1 without × and ÷, which are operators

# Words and their punctuation: no digit and no operator, except a joint as in `18-inch` or `km/h`.
# The possessive ++ and *+ never give text back, so nested repetition stays linear.
WORDS = rf"""(?:[{LETTER}\s.,:;!?'’"()°$]++|(?<=[{LETTER}0-9])[-/](?=[{LETTER}]))*+"""

# One numeral among words. Its sign touches it, and no letter, point or comma does: `x18`, `COVID-19` and `.5` fail.
STATEMENT = re.compile(rf"{WORDS}(?<![{LETTER}.,])([-+]?)\$?({NUMERAL}){WORDS}")

# Words that change the value of the numeral. Case matters: 5 m is metres. Not "dozen": GSM8K asks for dozens.
RESCALING = re.compile(
    rf"(?<![{LETTER}])(?:(?i:k|mn|bn|hundreds?|thousands?|(?:m|b|tr)illions?|half(?!-)|minus|negative)|M|B)(?![{LETTER}])"
)
DOLLAR = re.compile(r"EUR|GBP|USD|[€£]|\\\$")  # every currency is read as $, \$ is LaTeX
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
MARKUP = re.compile(r"\*\*|####|\\?%")
EQUALS = re.compile(r"(?<![<>!~])=")  # x >= 18 does not state a number

OPERATION = re.compile(r"[0-9] *[-+*/x×÷−] *[0-9]")  # spaces only: a numbered list over two lines is not a subtraction
LOOSE_NUMBER = re.compile(r"-?[$0-9.,]+")  # lm-eval's flexible-extract


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
    statements = set(blocks(completion, "answer"))
    if len(statements) > MAX_ANSWERS:
        return None
    numbers = {parse_number(statement) for statement in statements}
    return numbers.pop() if len(numbers) == 1 else None


def flexible_answer(completion: str) -> Decimal | None:
    """The last number anywhere in the text, tags or not, comparable with lm-eval's flexible-extract.

    `That makes 5 + 13 = 18 dollars.` -> 18. Like lm-eval, it takes the hyphen of `10-12` for a sign.
    """
    last_digit = max(map(completion.rfind, "0123456789"))  # -1 if none: an empty tail
    tail = completion[max(0, last_digit - MAX_ANSWER_CHARS) : last_digit + 1].replace("−", "-")
    numbers = LOOSE_NUMBER.findall(tail)
    return parse_number(numbers[-1]) if numbers else None


def parse_number(text: str) -> Decimal | None:
    """The one number that an answer states, or None.

    `$1,234.50` -> 1234.50; `5 + 13 = 18 dollars` -> 18; `5 + 13`, `36/2`, `18 or 20`, `18k`, `1e5` -> None
    """
    text = text.strip()
    if len(text) > MAX_ANSWER_CHARS:
        return None
    text = DOLLAR.sub("$", text.replace("−", "-"))  # U+2212
    text = MARKUP.sub(" ", BOXED.sub(r" \1 ", text))  # a space, lest 2**5 become 25
    right_side = EQUALS.split(text)[-1]
    match = STATEMENT.fullmatch(right_side)
    if match is None or RESCALING.search(right_side):
        return None
    sign, numeral = match.groups()
    return Decimal(sign + numeral.replace(",", ""))


# -------------------------------------------------------------------------------------------- answers that are no numbers

ANY_LETTER = re.compile(r"[^\W\d_]")
WRAPPED = re.compile(r"\\(?:boxed|text|mathrm|textbf)\{([^{}]*)\}")
ANNOUNCED = re.compile(
    r"(?:the )?(?:(?:final|correct) )?(?:answer(?: is:? +|: *)|(?:option|choice):? +(?=[(\[]?[a-z](?![a-z])))(?=\S)"
)
CHOICE = re.compile(r"[(\[]?([a-z])(?:[)\].:]*|[)\].:]+ +(.*))")  # `B`, `(B)`, `B.`, `B) Paris`
OTHERS = re.compile(r"(?<!\w)(?:[b-hj-z]|a(?=[).:,]|$)|or|not|wrong|incorrect|false)(?!\w)")  # behind a choice: no clear choice


def numeric_gold(ground_truth: str) -> bool:
    """Whether a gold answer is compared as a number: it is one, without a letter. `18 dollars` is a phrase."""
    return not ANY_LETTER.search(ground_truth) and parse_number(ground_truth) is not None


def extract_text(completion: str, ground_truth: str) -> str | None:
    """The canonical text in the `<answer>` block; several blocks must agree. None if there is none."""
    statements = set(blocks(completion, "answer"))
    if len(statements) > MAX_ANSWERS:
        return None
    texts = {canonical_text(statement, ground_truth) for statement in statements}
    return (texts.pop() or None) if len(texts) == 1 else None


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
    opening, closing, start = f"<{tag}>", f"</{tag}>", 0
    while (end := text.find(closing, start)) >= 0:
        begin = text.rfind(opening, start, end)
        if begin >= 0:
            yield text[begin + len(opening) : end]
        start = end + len(closing)


def has_operation(completion: str) -> bool:
    """Whether a reasoning block calculates: digit, operator, digit, as in `5 + 13`. An equals sign is not an operator."""
    return any(OPERATION.search(block) for block in blocks(completion, "reasoning"))


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
    return once and any(inside.strip() for inside in blocks(completion, tag))


def violates_format(completion: str, truncated: bool = False) -> bool:
    """A tag missing, repeated, nested or out of order; text after the last; cut off. Text before or between is fine."""
    if truncated or any(completion.count(tag) != 1 for tag in TAGS):
        return True
    positions = [completion.find(tag) for tag in TAGS]
    text_after = completion[positions[-1] + len(TAGS[-1]) :].strip()
    return positions != sorted(positions) or text_after != ""

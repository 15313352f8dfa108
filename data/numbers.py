"""The number that a text states: one grammar for the answers of models and for gold answers.

`parse_number` takes three steps:

1. `plain` rewrites notation: LaTeX wrappers (`\\boxed{\\text{18}}`), LaTeX spacing, `{,}`, markup go; a currency becomes `$`.
2. Of an equation the right side counts. The other sides must be names, calculations, or the same number.
3. One numeral must stand among words, and no word may change its value: a scale (`18 thousand`), a fraction (`18 and a half`),
   a second number (`two hundred and 18`), a bound or an estimate (`at least 18`, `about 18`).

A sign, command or digit that the grammar does not know is refused; a word in none of its lists is a unit or a name. Nothing is
evaluated, rounded or rescaled. Percent, dozen and pair are units like any other, because questions ask for them.
"""

import re
from decimal import Decimal
from functools import lru_cache

MAX_ANSWER_CHARS = 200  # about a sentence; every regex except OPERATION sees at most this much text
MAX_NESTING = 4  # of LaTeX wrappers
MAX_SIDES = 9  # of an equation

# ASCII digits only: \d also matches Arabic and full-width digits. Malformed thousands (1,23) match neither branch.
NUMERAL = r"(?:[0-9]{1,15}|[1-9][0-9]{0,2}(?:,[0-9]{3}){1,4})(?:\.[0-9]{1,15})?"
LETTER = "A-Za-zÀ-ÖØ-öø-ɏ"  # Latin without × and ÷, which are operators

# ------------------------------------------------------------------------------------------------ 1. notation

# The separators of 9{,}500, 9\,500, 9,\!500 and a thin space. An ordinary space or an apostrophe may also part two numbers.
THOUSANDS = re.compile(r"(?<=[0-9])(?:(?:\\text)?\{ ?, ?\}|\\[,;:]|,\\!|[\u2009\u202f])(?=[0-9]{3}(?![0-9]))")
# The power of a unit belongs to its name: 18 cm³, 18 m^2, \text{ ft}^{2}. Of a variable it does not: 18 x^2.
LENGTH = r"[kcdmµμ]?m|ft|in|yd|mi|s|sec|feet|foot|inch(?:es)?|yards?|miles?|(?:kilo|centi|milli)?met(?:er|re)s?|units?"
UNIT_POWER = re.compile(rf"(?<![{LETTER}])((?:{LENGTH})[\s}}]{{0,2}})(?:\^ ?(?:[23]|\{{[23]\}})(?![0-9])|[²³])")
DEGREE = re.compile(r"\^ ?(?:\\circ|\{ ?\\circ ?\})(?![A-Za-z])|\\degree(?![A-Za-z])")
MATH = re.compile(r"(?<!\\)\$((?:[^$\\]|\\.)*+)\$", re.DOTALL)  # $18$: with both delimiters it is no money
MONEY_COMMAND = re.compile(r"\\(?:\$|(?:textdollar|pounds|euro|yen|cent|textcent|texteuro|rupee)(?![A-Za-z]))")
SPACING = re.compile(
    r"\\(?:[()\[\],;:>/! \\]|(?:left|right|[qQ]?quad|en(?:space|skip)|(?:thin|med|thick|negthin)space|displaystyle|textstyle"
    r"|rm|bf|bfseries|[lL]arge|[hH]uge|[Rr]ightarrow|implies|therefore)(?![A-Za-z])|hspace\*?\{[^{}]*\})"
    rf"|(?<=[0-9}}%])~(?=[{LETTER}\\])"  # a tie before a unit; before a number ~ means about
)
WRAPPER = re.compile(
    r"\\(?:boxed|fbox|mbox|text(?:bf|it|rm|sf|tt|up|sc|normal)?|math(?:rm|bf|it|sf|tt)|emph|underline|bm|boldsymbol|operatorname"
    r"|(?:text)?color\{[A-Za-z]+\}|colorbox\{[A-Za-z]+\})\s*\{([^{}]*)\}|(?<=\{)\{([^{}]*)\}"
)
FRACTION = re.compile(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
MARKUP = re.compile(r"\*\*|####|\\?%")
CURRENCY = re.compile(
    rf"(?<![{LETTER}])(?:(?:US|CA|AU|NZ|HK|NT|MX|[ACRS])\$|Rs\.?(?![{LETTER}])|(?:EUR|GBP|USD|INR|JPY|CNY|RMB|CHF|CAD|AUD|NZD|"
    rf"SEK|NOK|DKK|PLN|CZK|HUF|BRL|MXN|ZAR|SGD|HKD|KRW|TRY|RUB|THB|IDR|PHP|MYR|VND|AED|SAR|ILS|NGN|KES)(?![{LETTER}]))"
    r"|[¢-¥฿₠-⃀￠￡￥￦]"
)

# ------------------------------------------------------------------------------------------------ 3. a numeral among words

# Pictures, without those that count or calculate: 💯 🔟 ➕ ➖ ✖ ❌ ❶.
EMOJI = "⌚⌛⏩-⏳■-◿☀-♿⚐-✔✞-❋❏-❵➘-➿⭐⬛⬜🆎-🆚🇦-🇿🌀-💮💰-🔝🔣-🚪🚬-🛿🟠-🟫🤀-🫿\ufe0f\u200d"
QUOTES = "'’‘‚‛\"“”„‟«»‹›「」『』′″`"
# Words and their punctuation: no digit and no operator, except a joint as in `18-inch` or `km/h`.
# The possessive ++ and *+ never give text back, so nested repetition stays linear.
WORDS = rf"(?:[{LETTER}\s.,:;!?()°$&…•→⇒➔℃℉Ωµμ{QUOTES}{EMOJI}]++|(?<=[{LETTER}0-9$%°)])[-/·](?=[{LETTER}µ]))*+"
# One numeral among words. Its sign touches it or its currency; no letter, point or comma does: `x18`, `COVID-19`, `.5` fail.
STATEMENT = re.compile(rf"{WORDS}(?<![{LETTER}.,])([-+]?)(?:\$\s*)?({NUMERAL}){WORDS}")
EQUALS = re.compile(r"(?<![<>!~])=")
INEXACT = re.compile(r"[<>≤≥≠≈≃≅∼~±]")  # x >= 18 does not state a number

WORD = re.compile(rf"[{LETTER}]+(?:[&'’-][{LETTER}]+)*|[&,]")  # `M&M's`, `T-shirts`, `half-gallons` are one word
CONTRACTED = re.compile("n['’]t(?![A-Za-z])")
CLAUSE_END = re.compile(r"[:;!?\n]|(?<!\bca)\.\s")
APPLIED = re.compile(rf"[{LETTER}]\([\s$]*[-+]?[\s$]*\Z")  # sqrt(36), f(18)
BESIDE = re.compile(rf"[^{LETTER}.:;!?&]*[{LETTER}]")  # a word belongs to the numeral before it, in the same clause

# ------------------------------------------------------------------------------------------------ calculations

SPACE = "[ \t\u00a0\u2009\u202f]"  # no newline: a numbered list over two lines is not a subtraction
# Behind a number: percent, currency, brackets, up to six words of its unit: `15% * 4`, `$5/hour * 8`, `5 red pens + 3`.
VERB = "(?:is|equals|makes|leaves|gives)"
UNIT = (
    rf"(?:{SPACE}?[%°¢$€£)}}\]²³]|\\[%$]|\*\*(?![0-9(]))*+"
    rf"(?:{SPACE}?(?:\\text\{{{SPACE}?|[/(&-])?(?!(?:[xX]|{VERB})(?![{LETTER}]))[{LETTER}]{{1,20}}+[.’')}}]{{0,2}}){{0,6}}+{SPACE}*+"
)
RIGHT = rf"{SPACE}*+(?:{SPACE}|\\?[$€£¢]|[(\[{{]|\*\*|[-−](?=[0-9.$(])|\\left)*+\.?[0-9]"
SURE = r"(?:(?<=[0-9)])\*\*(?=[0-9(])|[+*×÷−⋅·∙∗]|\\(?:times|cdot|div|ast)(?![A-Za-z]))"
# Signs with other uses, as in `24/7`, `pages 3-5`, `a 4 x 6 photo`: a calculation goes on to its result.
UNSURE = r"(?:[-–—‐‑/∕⁄xX^]|(?<=\})\{)"
DIGITS = "(?:[.,]?[0-9])*+"
RESULT = rf"{DIGITS}{UNIT}(?:[=≈→]|(?<={SPACE}){VERB}{SPACE}{{1,2}}\$?[0-9])"
OPERATION = re.compile(rf"[0-9½¼¾](?! ?[0-9]){UNIT}(?:{SURE}{RIGHT}|{UNSURE}{RIGHT}{RESULT})")
ALONE = re.compile(rf"\$?({NUMERAL}){UNIT}([-–/x]){SPACE}?\$?({NUMERAL})")  # a whole text: no range, no date, not 24/7
# A left side of an equation: it ends with a calculation (also `2(9)`, `half of 36`) or `we get x`, and has no other unknown.
CALCULATED = re.compile(rf"(?:[0-9½¼¾]{UNIT}(?:{SURE}|{UNSURE})|[0-9)](?=\()|of{SPACE}){RIGHT}{DIGITS}{UNIT}\s*\Z")
LED = re.compile(rf"\b(?:we|you|I) (?:get|find|have|see)(?: that)?(?: [{LETTER}]+){{1,4}}\s*\Z")
UNKNOWN = re.compile(
    rf"(?<![{LETTER}0-9])[xyzn]\s*[-+*/×÷·]|[-+*/×÷·]\s*[xyzn](?![{LETTER}])"
    rf"|[0-9](?:[yzn](?![{LETTER}])|x(?!\s*[0-9$(.])(?![{LETTER}]))"
)
LONE = re.compile(rf"[\s$(]*([-+]?{NUMERAL})[\s$).]*")

# A number anywhere: digits, and what may stand inside one number, so that no part of 9'500 or 1e5 is read as a number.
LOOSE_NUMBER = re.compile(
    r"-?(?:\$ ?)?(?:[0-9]|(?<![^\s$(=+*/×-])\.[0-9])[0-9]*"
    r"(?:(?:[.,'’_]|\{,\}|\\[,;:! ]|[\u00a0\u2009\u202f ~](?=[0-9]{3}(?![0-9]))|[eE][-+]?)+(?=[0-9])[0-9]+)*"
)


# ------------------------------------------------------------------------------------------------ words that change a numeral


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Case matters: 5 m is metres, 5 M is millions. Of money both are: $5m.
SCALE_LETTERS = _words("k kk K M MM B b T G Ks Ms Gs")
MONEY_LETTERS = _words("m t g l L mm")
VARIABLES = _words("x y z n i e X Y Z")  # 18x is no number, unlike 18 m
SCALES = _words(
    """hundred thousand million billion trillion quadrillion quintillion sextillion zillion milliard grand thou lakh lac crore
    cr mn mln mio mil mill mille bil bn bln mrd mld md tn trn tsd tausend millionen milliarden millones milliards"""
)
NUMBERS = _words(
    """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
    nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion trillion"""
)
ORDINALS = _words(
    "third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth sixteenth twentieth hundredth thousandth millionth"
)
FRACTIONS = ORDINALS | {f"{word}s" for word in ORDINALS} | _words("half halves quarter quarters ths rds")
PARTS = NUMBERS | FRACTIONS | _words("dozen dozens")

# Before the numeral: anywhere, or beside it with no word but fillers between.
CHANGE_ANYWHERE = _words("or either minus negative approximate approximately approx roughly circa estimated")
NEGATIONS = _words("not never cannot")
CHANGE_BEFORE = PARTS | _words(
    """twice thrice double triple quadruple times plus less divided multiplied percent fraction multiple point short past
    root square squared cube cubed sqrt log ln sin cos tan abs factorial reciprocal inverse opposite
    about around nearly almost near close some ca over under above below beyond upwards excess
    than least most within fewer exceed exceeds exceeding minimum maximum shy region neighborhood vicinity"""
)
FILLERS = _words(
    ", & of the a an to and by as in out much many equal exactly just only his her its their my our your all these those"
)

# Behind the numeral: beside it, or in pairs: `18 dollars and fifty cents`, `18 to twenty`, `18 percent of ninety`.
CHANGE_BESIDE = (
    SCALES
    | NUMBERS
    | FRACTIONS
    | _words("squared cubed factorial plus ish odd something point minimum maximum upwards onwards")
)
LINKS = _words(", & and plus less times to through thru until over point by of with remainder")
AND_MORE = _words("up more over above counting change under below something some bit little")
PAIRS = {("at", "least"), ("at", "most"), ("below", "zero"), ("power", "of")}
PAIRS |= {(verb, adjective) for verb in ("is", "was") for adjective in ("wrong", "incorrect")}
DENIED = _words("right correct true it the")

# ------------------------------------------------------------------------------------------------ reading


def parse_number(text: str) -> Decimal | None:
    """The one number that a text states, or None.

    `$1,234.50` -> 1234.50; `5 + 13 = 18 dollars` -> 18; `5 + 13`, `36/2`, `18 or 20`, `18k`, `about 18`, `1e5` -> None
    """
    text = text.strip()
    return None if len(text) > MAX_ANSWER_CHARS else _stated_number(text)


@lru_cache(2**12)  # golds and answers come again and again within a step
def _stated_number(text: str) -> Decimal | None:
    if not _has_digit(text) or INEXACT.search(text := plain(MATH.sub(r" \1 ", text))):
        return None
    *left, right = EQUALS.split(text, MAX_SIDES)  # a further sign stays in the last side, which is then refused
    match = STATEMENT.fullmatch(right)
    if match is None or _is_changed(right[: match.start(2)], right[match.end(2) :]):
        return None
    number = Decimal(match[1] + match[2].replace(",", ""))
    return number if all(_leads_to(number, side) for side in left) else None


def gold_number(text: str) -> Decimal | None:
    """The number that a gold answer is, or None for a text: `$1,234` and `\\boxed{18}` are numbers, `18 dollars` is a text."""
    return None if re.search(rf"[{LETTER}]|=", plain(text)) else parse_number(text)


def last_number(text: str) -> Decimal | None:
    """The last number anywhere in a text, or None if it is malformed: no part of `9'500` or `1e5` is a number.

    `3 * $68 = $204. Total 704.` -> 704; `$9{,}500` -> 9500; `18 m^2` -> 18; `10-12` -> -12
    """
    last_digit = max(map(text.rfind, "0123456789"))  # -1 if none: an empty tail
    tail = plain(text[max(0, last_digit - MAX_ANSWER_CHARS) : last_digit + 9])
    numbers = LOOSE_NUMBER.findall(tail)
    if not numbers:
        return None
    return parse_number(re.sub(r"(?<![0-9])\.", "0.", numbers[-1]))


def calculates(text: str) -> bool:
    """Whether a text calculates: number, operator, number, as in `$5 + $13`, `5 pens + 13 pens`, `20 - 12 = 8`, `15% * 4`.

    `-`, `/` and `x` also write ranges, dates and sizes; they count on the way to a result, or if they are all of the text.
    """
    if OPERATION.search(text):
        return True
    text = text.strip()
    alone = ALONE.fullmatch(text) if len(text) <= MAX_ANSWER_CHARS else None
    if alone is None:
        return False
    a, b = (Decimal(alone[group].replace(",", "")) for group in (1, 3))
    return a > b if alone[2] in "-–" else alone[2] == "x" or (b != 0 and a % b == 0)


def number_text(value: int | float | Decimal) -> str:
    """A number as a person writes it: 18.0 -> `18`, 0.1 -> `0.1`, 1e-05 -> `0.00001`; `nan` and `inf` are left as they are."""
    text = format(Decimal(str(value)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def plain(text: str) -> str:
    """The text without LaTeX wrappers and spacing, markup, powers of units; `$` for any currency, `-` for the minus U+2212."""
    text = THOUSANDS.sub(",", text.replace("−", "-"))
    text = UNIT_POWER.sub(r"\1", text)
    if "\\" in text:
        text = MONEY_COMMAND.sub("$", DEGREE.sub("°", text))
        text = SPACING.sub(" ", text.replace("\\&", "&"))
        for _ in range(MAX_NESTING):  # the innermost first; a space, lest 1\boxed{8} become 18
            text, count = WRAPPER.subn(lambda match: f" {match[1] or match[2] or ''} ", FRACTION.sub(r"(\1)/(\2)", text))
            if not count:
                break
    return CURRENCY.sub("$", MARKUP.sub(" ", text))  # a space, lest 2**5 become 25


def _has_digit(text: str) -> bool:
    return any(digit in text for digit in "0123456789")


def _leads_to(number: Decimal, side: str) -> bool:
    """Whether a side of an equation may stand left of its number: `total`, `5 + 13`, `18.0`; not `x + 5`, `20, y`, `20`."""
    if LED.search(side) or not (_has_digit(side) or UNKNOWN.search(side)):
        return True
    if UNKNOWN.search(side):
        return False
    lone = LONE.fullmatch(side)
    return Decimal(lone[1].replace(",", "")) == number if lone else CALCULATED.search(side) is not None


def _is_changed(before: str, behind: str) -> bool:
    """Whether words before or behind a numeral give it another value, make it inexact, or state a second one."""
    before, behind = CONTRACTED.sub(" not", before), CONTRACTED.sub(" not", behind)
    left, right = WORD.findall(before.lower()), WORD.findall(behind)
    low = [word.lower() for word in right]
    return (
        not CHANGE_ANYWHERE.isdisjoint(left + low)
        or not NEGATIONS.isdisjoint(left)
        or any(word.endswith("s") and word[:-1] in SCALES for word in left)  # in thousands: 18
        or _changed_before(before)
        or (
            BESIDE.match(behind) is not None
            and _changed_beside([word for word in right if word != ","], "$" in before + behind)
        )
        or _changed_behind(low)
    )


def _changed_before(before: str) -> bool:
    """`about 18`, `at least 18`, `half of the 18`, `two hundred and 18`, `sqrt(36)`; not `Half of them: 18`, `picks up 18`."""
    words = WORD.findall(CLAUSE_END.split(before)[-1].lower())
    near = [word for word in words if word not in FILLERS]
    up_to = words[-2:] == ["up", "to"] and words[-3:-2] != ["adds"]
    return up_to or APPLIED.search(before) is not None or (bool(near) and near[-1].split("-")[-1] in CHANGE_BEFORE)


def _changed_beside(words: list[str], money: bool) -> bool:
    """`18 thousand`, `18k`, `$18m`, `2 thirds`, `18x`; not `18 M&M's`, `18 third graders`, `18 half-gallons`."""
    if words[0] in SCALE_LETTERS | VARIABLES or (money and words[0] in MONEY_LETTERS):
        return True
    word, following = words[0].lower(), "".join(words[1:2]).lower()
    if word in ORDINALS and following:
        return not following.startswith("grad")
    if word in ("th", "st", "nd", "rd"):
        return following == "of"  # a 5th of them
    parts = word.split("-")
    return parts[0].removesuffix("s") in SCALES or word in CHANGE_BESIDE or parts[-1] in FRACTIONS


def _changed_behind(low: list[str]) -> bool:
    """`18 hours and thirty minutes`, `18 cups and a half`, `18 and up`, `18 at least`, `18 below zero`, `18 (in thousands)`."""
    for word, following, third in zip(low, low[1:], [*low[2:], ""], strict=False):
        part = third if following in ("a", "an", "the") else following
        if word in LINKS and not PARTS.isdisjoint(part.split("-")):
            return True
        if (word, part) in PAIRS or (following == "not" and third in DENIED):
            return True
        if (word == "and" and part in AND_MORE) or (word in ("in", "per") and part.removesuffix("s") in SCALES):
            return True
    return False

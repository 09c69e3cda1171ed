"""The number that an answer in words comes to: GSM8K and its like."""

import re
import unicodedata
from fractions import Fraction


def _vulgar(found: re.Match[str]) -> str:
    """½ as 1/2, apart from what stands before it."""
    value = Fraction(unicodedata.numeric(found[2])).limit_denominator(10)
    return f" {found[1] or ''}{value.numerator}/{value.denominator}"


MINUS = str.maketrans(dict.fromkeys("−–‒﹣－‐‑", "-"))
# Ways to set a number: separators of thousands, escaped signs, fractions, exponents of units.
_SPELLINGS = (
    (re.compile(r"(?<=\d)(?:\{,\}|\\[,!;:]|[\u00a0\u2009\u202f]|,\\!)(?=\d{3}(?!\d))"), ","),
    (re.compile(r"\\([$%#])"), r"\1"),
    (re.compile(r"\\[dt]?frac\s*\{\s*(-?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}"), r" \1/\2 "),
    (re.compile(r"\^\s*(?:\{[^{}]*\}|-?\w+)|[⁰¹²³⁴-⁹]+"), " "),
    (re.compile(r"(-)?\s*([¼-¾⅐-⅞])"), _vulgar),
)
_NUMBER = re.compile(
    r"""
    (?<![A-Za-z_\d/])(?<!\d\.)
    (?P<sign>(?<![\w)\]}%$])-)?[$€£¥]?(?P<late>(?<=[$€£¥])-)?
    (?:(?P<over>\d{1,3})\s+(?=\d+/\d))?
    (?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?P<digits>\.\d+)?
    (?:\s?/\s?(?P<under>\d+)(?![\d/]))?
    """,
    re.VERBOSE,
)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_MARKED = re.compile(r"####[ \t]*([^\n]*)")
_STATED = re.compile(r"\banswer\b[^.\n]{0,60}?\bis\b:?((?:[^.\n]|\.(?=\d))*)", re.IGNORECASE)
_STRICT = re.compile(r"####\s*(-?\s?[$€£]?-?[\d.,/]+)")


def numbers(text: str) -> list[Fraction]:
    """The numbers in a text in order; the minus between two numbers is none of the second's."""
    for pattern, instead in _SPELLINGS:
        text = pattern.sub(instead, text.translate(MINUS))
    return [_value(found) for found in _NUMBER.finditer(text)]


def marked(text: str) -> Fraction | None:
    """The number behind the first ####, as answers of GSM8K give it: the strict reading."""
    found = _STRICT.search(text.translate(MINUS))
    return next(iter(numbers(found[1].replace("- ", "-"))), None) if found else None


def stated(text: str) -> Fraction | None:
    r"""The number that a text comes to: the flexible reading.

    That of the last \boxed{}, else behind the last ####, else behind the last "answer is", else the last number at all.
    There the first number counts, or the first behind the last "=": units and remarks follow it.
    """
    places = [[content] if (content := boxed(text)) else [], _MARKED.findall(text), _STATED.findall(text)]
    for found in places:
        value = _leading(found[-1]) if found else None
        if value is not None:
            return value
    return next(reversed(numbers(text)), None)


def boxed(text: str) -> str:
    r"""What is in the last \boxed{}, "" if there is none or it has no end."""
    content = ""
    for start in _BOXED.finditer(text):
        depth = 1
        for place in range(start.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                content = text[start.end() : place]
                break
    return content


def _leading(text: str) -> Fraction | None:
    tail = text.translate(MINUS).rpartition("=")[2]
    tail = re.sub(r"^(\W*?)-\s+(?=[$€£\d])", r"\1-", tail)
    return next(iter(numbers(tail)), None)


def _value(found: re.Match[str]) -> Fraction:
    value = Fraction(f"{found['whole'].replace(',', '') or '0'}{found['digits'] or ''}")
    if found["under"] and int(found["under"]):
        value /= int(found["under"])
    if found["over"]:
        value += int(found["over"])
    return -value if found["sign"] or found["late"] else value

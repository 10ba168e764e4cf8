"""Verifiers that compare a text with one expected answer: the whole text, or the one number it ends on."""

import re
from decimal import Decimal

from lib.rewards.base import Score

MAX_CHARACTERS = 100_000
"""Of a longer text only the end is read."""
MAX_DIGITS = 60
"""A longer run of digits is not taken for a number."""
MAX_SAME_SENTENCE = 2

_MINUS = "-\u2212"
_OTHER_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\ufe58\ufe63\uff0d"
_NUMBER = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+", re.ASCII)
_OPERAND_BEFORE = re.compile(rf"[0-9)]\s*[+*/×÷^%{re.escape(_MINUS)}]\s*$")
_OPERATOR_AFTER = re.compile(rf"\s*(?:[=+/×÷^]|[{re.escape(_MINUS)}]\s*$|(?<=\s)\*\s*$)")
_HEDGE = re.compile(r"(?:[^\w=+*/×÷^]|\b(?:or|and|either|maybe|perhaps|possibly|boxed|text|vs|to|also)\b)*", re.IGNORECASE)
_CLAIM = re.compile(r"(?:\b(?:answer|result)\b\s*(?:is|:|=)?|boxed\s*\{)\s*[*$\\({\[]*\s*$", re.IGNORECASE)
_SENTENCE = re.compile(r"\n+|(?<=[.!?])\s+")


def exact_match(text: str, expected: str) -> Score:
    """1.0 when text and expected answer are equal but for blanks around them; look-alike characters are not equal."""
    wanted = expected.strip()
    return Score(1.0 if wanted and text.strip() == wanted else 0.0)


def last_number(text: str, expected: str) -> Score:
    """1.0 when the text ends on one number and that is the expected one, equal as a decimal.

    The last number must be an answer: 0.0 when it is an operand of an unfinished sum, one of several that are offered
    side by side, contradicted by another "answer is" or box, or part of a sentence said over and over.
    """
    wanted = parse_number(expected)
    if wanted is None:
        return Score(0.0, {"expected_unreadable": 1.0})
    text = text[-MAX_CHARACTERS:]
    numbers = _numbers(text)
    if not numbers:
        return Score(0.0, {"no_number": 1.0})
    start, end, value = numbers[-1]
    if _OPERAND_BEFORE.search(text[max(0, start - 16) : start]) or _OPERATOR_AFTER.match(text, end):
        return Score(0.0, {"unfinished": 1.0})
    if value is None or _is_hedged(text, numbers):
        return Score(0.0, {"ambiguous": 1.0})
    if _is_repeated(text):
        return Score(0.0, {"repeated": 1.0})
    return Score(1.0 if value == wanted else 0.0, {"number": 1.0})


def parse_number(text: str) -> Decimal | None:
    """The number that a whole text is, such as "-1,234.50"; None if it isn't one."""
    found = _numbers(text.strip())
    if len(found) != 1 or found[0][:2] != (0, len(text.strip())):
        return None
    return found[0][2]


def _numbers(text: str) -> list[tuple[int, int, Decimal | None]]:
    """(start, end, value) of each number; the value is None where its reading is doubtful."""
    found = []
    for match in _NUMBER.finditer(text):
        start, end = match.span()
        doubtful = end - start > MAX_DIGITS or _glued(text, start, end)
        before = text[start - 1 : start]
        signed = before != "" and before in _MINUS
        doubtful |= before != "" and before in _OTHER_DASHES
        doubtful |= signed and text[max(0, start - 2) : start - 1].isalpha()
        negative = signed and not _after_operand(text, start - 1)
        value = None if doubtful else Decimal(match.group().replace(",", ""))
        found.append((start - negative, end, -value if negative and value is not None else value))
    return found


def _glued(text: str, start: int, end: int) -> bool:
    """Whether letters, digits of other scripts, or more digits behind a point or comma touch the number."""
    before, after = text[max(0, start - 2) : start], text[end : end + 2]
    return (
        before[-1:].isalnum()
        or after[:1].isalnum()
        or bool(re.fullmatch(r"[0-9][.,]", before) or re.fullmatch(r"[.,][0-9]", after))
    )


def _after_operand(text: str, dash: int) -> bool:
    """Whether a dash stands behind a number or a bracket, and so subtracts."""
    before = text[max(0, dash - 8) : dash].rstrip()[-1:]
    return before.isnumeric() or before == ")"


def _is_hedged(text: str, numbers: list[tuple[int, int, Decimal | None]]) -> bool:
    """Whether other numbers are offered as well: side by side with the last one, or as an answer of another value."""
    start, _, value = numbers[-1]
    if len(numbers) > 1 and _HEDGE.fullmatch(text, numbers[-2][1], start):
        return True
    claims = {number[2] for number in numbers if _CLAIM.search(text[max(0, number[0] - 32) : number[0]])}
    return bool(claims - {value})


def _is_repeated(text: str) -> bool:
    sentences = [sentence.strip() for sentence in _SENTENCE.split(text) if sentence.strip()]
    return sentences.count(sentences[-1]) > MAX_SAME_SENTENCE

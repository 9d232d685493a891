r"""The answer at the end of a text, and answers that are the same though they are written otherwise.

    ... so she has 1,200 apples. The answer is \$1,200.   ->  1200
    ... #### 42   ·   \boxed{42}   ·   Answer: (b)

Where nothing announces the answer, it is the last number of the text; for labels, the last label that is named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction

__all__ = ["final_answer", "normalised_answer"]

NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?"
ALONE = re.compile(rf"^(?:[A-Za-z]\s*=\s*)?({NUMBER})(?:\s+[^\W\d]+){{0,2}}\s*\.?$")
"""A number, a unit of two words at most behind it."""
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
MARKED = re.compile(r"####\s*(?=\S)")
TOLD = re.compile(r"(?:final answer|answer|result)\s*(?:is|:|=)\s*:?\s*(?=\S)", re.IGNORECASE)
FRACTION = re.compile(r"\\d?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}")


def final_answer(text: str, words: Mapping[str, str] | None = None) -> str | None:
    r"""What a text answers in the end; None where it answers nothing.

    Args:
        words: label -> its word, where the answer is one of several labels.

    >>> final_answer("3 bags of 4: 12 in all. The answer is 12 apples.")
    '12 apples'
    >>> final_answer("It names a city, so it is a place.", {"LOC": "place", "NUM": "number"})
    'LOC'
    """
    told = _announced(text)
    if words:
        for part in ([told] if told is not None else []) + [text]:
            if (label := _last_label(part, words, first=part is told)) is not None:
                return label
        return None
    if told is not None:
        return told
    numbers = re.findall(NUMBER, text)
    return numbers[-1] if numbers else None


def _announced(text: str) -> str | None:
    """What stands behind words that announce an answer; the last such place."""
    if boxed := BOXED.findall(text):
        return str(boxed[-1]).strip() or None
    for pattern in (MARKED, TOLD):
        if found := list(pattern.finditer(text)):
            line = re.split(r"(?<=[^\d\s])\.\s|\n", text[found[-1].end() :])[0]
            line = re.split(r"(?<=\d)\.\s", line)[0].strip().rstrip(".").strip("*_ ")
            return line or None
    return None


def _last_label(text: str, words: Mapping[str, str], first: bool) -> str | None:
    """The label that is named last in a text, or first; of two at one place the longer one."""
    places = []
    for label, word in words.items():
        for name in {word, label}:
            for found in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE):
                places.append((found.start() * (-1 if first else 1), len(name), label))
    return max(places)[2] if places else None


def normalised_answer(text: str) -> str:
    r"""The form in which two answers are compared: numbers as numbers, words in small letters.

    >>> [normalised_answer(t) for t in ("$1,200.00", r"\frac{1}{2}", "0.50", "12 apples", "(B)", " The Moon. ")]
    ['1200', '1/2', '1/2', '12', 'b', 'the moon']
    """
    held = final_answer(text) if "\\boxed" in text or "####" in text else None
    plain = held if held is not None else text
    plain = FRACTION.sub(r"\1/\2", plain)
    plain = WRAPPED.sub(r"\1", plain)
    plain = re.sub(r"\\[,;!$%]|[$€£%]|\\left|\\right", "", plain)
    plain = plain.strip().strip("*_").strip()
    if number := ALONE.match(plain):
        return _number(number.group(1))
    plain = re.sub(r"^\(?([A-Za-z])\)?\.?$", r"\1", plain)
    return re.sub(r"\s+", " ", plain.lower()).strip(" .!?\"'")


def _number(text: str) -> str:
    top, _, bottom = text.replace(",", "").replace(" ", "").partition("/")
    try:
        return str(Fraction(top) / Fraction(bottom or "1"))
    except ZeroDivisionError:
        return text

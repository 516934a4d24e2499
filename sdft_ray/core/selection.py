"""Which rewrites are kept: conditional selection, with a reason for every row that keeps its reference.

In: a row and what the unpruned model generated for it. Out: the response that is trained on, where it came from,
and why. No row is dropped (arXiv 2410.09982): a rewrite that fails any check gives way to the reference, verbatim.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from fractions import Fraction
from typing import Literal

Reason = Literal["kept", "error", "truncated", "empty", "leak", "repeated", "no_answer", "wrong_answer"]
REASONS: tuple[Reason, ...] = (
    "kept",
    "error",
    "truncated",
    "empty",
    "leak",
    "repeated",
    "no_answer",
    "wrong_answer",
)


# Finish reasons of an engine that has done what it was asked: at its own end, or at max_new_tokens.
COMPLETE = ("stop", "length")


@dataclasses.dataclass(frozen=True)
class Generation:
    """What the engine returned for one row."""

    text: str
    finish_reason: str
    """One of COMPLETE, or why there is none, such as `error` (then `text` is the message)."""
    prompt_tokens: int = 0
    tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Selected:
    """The response that a row is trained on."""

    response: str
    source: Literal["distilled", "reference"]
    reason: Reason


# Phrases with which a rewrite speaks of the task of rewriting instead of answering (after arXiv 2402.13669).
_LEAKS = re.compile(
    r"\b(?:reference|provided|given|your|above) (?:answer|response|solution)\b|\bin (?:my|your) own words\b|\brewrit",
    re.IGNORECASE,
)
_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(
    # A hyphen is a sign unless it stands behind a number, a word or a bracket: then it subtracts or joins.
    r"(?P<sign>(?<![\w)\].])(?<![\d)\]]\s)[-\u2212]\s?|(?<=[\d)\]]\s)[-\u2212](?=[\d.$€£]))?"
    r"[$€£]?\s?(?P<sign2>(?<=[$€£])[-\u2212])?"
    rf"(?P<whole>{_INTEGER}(?:\.\d+)?(?:[eE][-+]?\d{{1,3}}\b)?|(?<!\d)\.\d+)(?P<denominator>\s?/\s?\d+)?"
)
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
# The 2 of `12 m^2` or of `\text{cm}^2` belongs to the unit.
_UNITS = re.compile(r"\\text\s*\{[^{}]*\}(?:\^\{?\d+\}?)?|(?<=[A-Za-z])\^\{?\d+\}?")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")


def select_response(reference: str, answer: str | None, generation: Generation, may_say: str = "") -> Selected:
    """Return the rewrite if it passes every check, else the reference verbatim with the first failed check.

    answer: the final answer to be reached, or None for open-ended rows. may_say: the row's own prompt; a phrase that
    it or the reference uses itself is no leak.

    Before: reference "4 + 4 = 8\\n#### 8", answer "8", generation "Four and four make 8.".
    After: Selected("Four and four make 8.", "distilled", "kept").
    """
    text = generation.text.strip()
    reason = _first_failure(text, f"{may_say}\n{reference}", answer, generation)
    if reason == "kept":
        return Selected(text, "distilled", reason)
    return Selected(reference, "reference", reason)


def _first_failure(text: str, known: str, answer: str | None, generation: Generation) -> Reason:
    if generation.finish_reason not in COMPLETE:
        return "error"
    if generation.finish_reason == "length":
        return "truncated"
    if not text:
        return "empty"
    if any(match[0].lower() not in known.lower() for match in _LEAKS.finditer(text)):
        return "leak"
    if is_repetitive(text):
        return "repeated"
    if answer is None:
        return "kept"
    found = final_number(text)
    if found is None:
        return "no_answer"
    return "kept" if found == final_number(answer) else "wrong_answer"


def is_repetitive(text: str, words: int = 4, times: int = 5) -> bool:
    """Return whether some run of `words` words occurs at least `times` times and fills over half of the text.

    >>> is_repetitive("so it is 4 and " * 20), is_repetitive("2 + 2 = 4. The answer is 4.")
    (True, False)
    """
    tokens = text.split()
    runs = Counter(tuple(tokens[i : i + words]) for i in range(len(tokens) - words + 1))
    if not runs:
        return False
    most = runs.most_common(1)[0][1]
    repeated = sum(count for count in runs.values() if count >= times)
    return most >= times and repeated > len(tokens) / 2


def final_number(text: str) -> Fraction | None:
    """Return the number a text ends up at: in the last \\boxed{}, after the last `####`, else the last in the text.

    None where there is none: a text without a number never equals another. Digits are never joined across white
    space, and a hyphen after a digit or letter is no sign.

    >>> [str(final_number(s)) for s in ("#### 1,234.50", "it is -3", "1/2 left", "50 %", "$5.00", "12 34", "none")]
    ['2469/2', '-3', '1/2', '50', '5', '34', 'None']
    """
    if boxed := _BOXED.findall(text):
        text = boxed[-1]
    elif "####" in text:
        text = text.rpartition("####")[2]
    text = _LATEX_FRACTION.sub(r"\1/\2", _UNITS.sub(" ", text))
    matches = list(_NUMBER.finditer(text))
    return _value(matches[-1]) if matches else None


def _value(match: re.Match[str]) -> Fraction:
    number = Fraction(match["whole"].replace(",", ""))
    if match["denominator"]:
        below = int(match["denominator"].strip(" /"))
        if below:
            number /= below
    return -number if match["sign"] or match["sign2"] else number

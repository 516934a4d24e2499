"""Checkers read the final answer of a text and compare it with a row's answer, by the names of `rows.answer`.

In: texts. Out: answers in one spelling, and whether two are the same.
"""

from __future__ import annotations

import re
from decimal import Decimal

from sdft_ray.core.answers import final_number
from sdft_ray.core.letters import final_choice
from sdft_ray.core.selection import Checker
from sdft_ray.core.spelling import final_part, has_words, spell_plainly
from sdft_ray.core.words import UNSPACED
from sdft_ray.data.expressions import read_expression, same_expression

# A sum with letters in plain text: math-verify reads the 3 of `2 - 3/e`.
_SIGN = r"\\sqrt\{[^{}]*\}|\\(?:pi|infty)\b\s?"
_TERM = rf"(?:\d+(?:\.\d+)?|{_SIGN}|(?<![^\W\d_])[A-Za-z](?![^\W\d_]))+(?:[*/^]-?\(*(?:\d+|[A-Za-z](?![^\W\d_]))+\)*)*"
_SUM = re.compile(rf"(?<![\w.\\{{])[-+]?\(*{_TERM}(?:\)*\s?[-+]\s?\(*{_TERM})+\)*(?![\w\\])")
# And points, sets and intervals, of which it reads the last number.
_LIST = re.compile(r"(?<![\w.\\])[(\[{]\s*-?[\d./]+(?:\s*,\s*-?[\d./]+)+\s*[)\]}]")
_SET = re.compile(r"\A\{(.*)\}\Z")
# Signs that it does not know in plain text: 3\u221a2, 2\u03c0/3.
_SIGNED = re.compile(rf"(?<![\w.\\])-?\d*\s?(?:{_SIGN})(?:\s?/\s?\d+)?")
_ROOT = re.compile("\u221a\\s?(?:\\(([^()]*)\\)|(\\w+))|(?<![\\w\\\\])sqrt\\(([^()]*)\\)")
_SIGNS = str.maketrans({"\u03c0": r"\pi ", "\u221e": r"\infty ", "\u2205": r"\emptyset "})
_PLAIN_NUMBER = re.compile(r"-?\d+(?:/\d+)?")
_FLOAT = re.compile(r"-?\d+(?:\.\d+)?[eE][-+]?\d{1,2}")  # as JSON and tables write small and large ones
_LATEX_WORD = re.compile(r"\\text\s*\{[^{}]*\}|\\[A-Za-z]+|\b(?:sqrt|pi|ln|log|exp|sin|cos|tan)\b")


def _final_expression(text: str) -> str | None:
    """Return the final expression of a text; a date or time as `number` reads it."""
    if isinstance(whole := final_number(text), str):
        return whole
    part = _spell_as_latex(final_part(text)[0])
    if _PLAIN_NUMBER.fullmatch(part):
        return part
    if _FLOAT.fullmatch(part):
        return format(Decimal(part), "f")
    boxes = text.count("\\boxed")
    if boxes > 1:  # math-verify takes several that stand together as a set
        return read_expression(_spell_as_latex(text))
    latex = re.search(r"\$|\\[(\[]", part)
    if boxes or not (latex or has_words(_LATEX_WORD.sub("", part)) or UNSPACED.search(part)):
        return read_expression(part, whole=True)
    formula = None if latex else next((kind for kind in (_LIST, _SUM, _SIGNED) if kind.search(part)), None)
    if formula:
        part = formula.sub(lambda match: "$" + _SET.sub(r"\{\1\}", match[0]) + "$", part)
    return read_expression(part)


def _spell_as_latex(text: str) -> str:
    text = spell_plainly(text).translate(_SIGNS).replace(r"\varnothing", r"\emptyset")
    return _ROOT.sub(lambda root: rf"\sqrt{{{next(filter(None, root.groups()), '')}}}", text)


def _same_expression(answer: str, other: str) -> bool:
    if answer == other:
        return True
    # As expressions two dates may have the same value.
    return not any(isinstance(final_number(text), str) for text in (answer, other)) and same_expression(answer, other)


def _number_text(text: str) -> str | None:
    number = final_number(text)
    return None if number is None else str(number)


# By the names of `rows.answer`; a new one is one more line here and one more name there.
CHECKERS = {
    "number": Checker(_number_text, "numbers"),
    "math": Checker(_final_expression, "expressions", _same_expression),
    "choice": Checker(final_choice, "letters"),
}


_ABSENT = re.compile(r"\W*|n\.?/?a\.?|nan|none|null", re.IGNORECASE)
"""What columns of answers hold where there is none."""


def read_answer(checker: str, reference: str, given: str | None) -> str | None:
    """Return the answer of a row in its checker's spelling: from the column that gives it, else from the reference."""
    is_given = given is not None and not _ABSENT.fullmatch(given.strip())
    return CHECKERS[checker].read(rf"\boxed{{{given}}}" if is_given else reference)


def is_correct(checker: str, answer: str, text: str) -> bool:
    """Return whether a text ends at the answer."""
    given = CHECKERS[checker].read(text)
    return given is not None and CHECKERS[checker].same(answer, given)

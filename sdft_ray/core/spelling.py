r"""Where the final answer of a text stands, and one spelling of it.

In: a text in any spelling that models use (LaTeX, several scripts). Out: the part that holds its answer, and the text
in the one spelling that every reader of answers sees.
"""

from __future__ import annotations

import re
import unicodedata

from sdft_ray.core.words import INVISIBLE

# --- where the answer stands -------------------------------------------------------------------------------------

_TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_WORD = r"(?!(?:[A-Z]{3}|Rs)\b)[^\W\d_]{2,}"  # no currency: USD 21, Rs. 500
# `####` also opens headings: they begin with a word, or with a number of their own.
_HEADING = re.compile(rf"[*_\s]*(?:{_WORD}|\d+[.):]\s+[^\W\d_])")


def final_part(text: str) -> tuple[str, bool]:
    r"""Return the part of a text that holds its answer, and whether it is marked as such.

    The inside of the last \boxed{} or <answer>, or the line after the last `####`, is marked; without one the part is
    the whole text.

    >>> final_part(r"So \boxed{\frac{1}{2}}."), final_part("#### 21\n\nHint: 4 were free."), final_part("It is 8.")
    (('\\frac{1}{2}', True), ('21', True), ('It is 8.', False))
    """
    marked = False
    if (boxed := _last_boxed(text)) is not None:
        text, marked = boxed, True
    if tagged := _TAGGED.findall(text):
        text, marked = str(tagged[-1]), True
    _, mark, after = text.rpartition("####")
    if mark:
        after = after.strip()
        line, _, rest = after.partition("\n")
        if rest and _HEADING.match(line):
            return after, False
        text, marked = line, True
    return text.strip(), marked


def has_words(text: str) -> bool:
    """Return whether a text holds a word of two letters and more that names no currency."""
    return re.search(_WORD, text) is not None


def _last_boxed(text: str) -> str | None:
    r"""Return the inside of the last \boxed{} that is not blank; one that never ends goes to the end of its line."""
    for start in reversed([match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*", text)]):
        if text[start : start + 1] != "{":
            inside = text[start : start + 1]
        else:
            depth = 0
            for brace in re.finditer(r"\\[{}]|[{}]", text[start:]):
                depth += {"{": 1, "}": -1}.get(brace[0], 0)
                if not depth:
                    inside = text[start + 1 : start + brace.start()]
                    break
            else:
                inside = text[start + 1 :].partition("\n")[0]
        if inside.strip():
            return inside
    return None


# --- one spelling ------------------------------------------------------------------------------------------------

CURRENCY = "$\u00a2-\u00a5\u0e3f\u20a0-\u20c0"
"""Signs of currencies, inside of a set of characters."""
# Slashes, the decimal and the group mark of Arabic, minus.
_AS_ASCII = str.maketrans("\u2044\u2215\u066b\u066c\u2212", "//.,-")
_SUPERSCRIPT = re.compile("[\u207b\u00b9\u00b2\u00b3\u2070\u2074-\u2079]+")
_SUBSCRIPT = re.compile(r"(?<=\d)(?=[\u2080-\u2089])")  # the base of a number
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")
# A dash that touches a number is a minus; with a space behind it, it sets words apart.
_DASH = re.compile(rf"[\u2010-\u2013](?=[\d.{CURRENCY}])")
# Separators of groups of digits other than a comma: LaTeX's commas and spaces, no-break and thin ones, apostrophes.
_SEPARATOR = re.compile(
    r"(?<=\d)(?:,?\\!\s*(?=\d{2,3}(?!\d))|(?:\\[,:; ]|\\?_|[~'\u2019\u00a0\u2009\u202f])(?=\d{3}(?!\d)))"
)
# LaTeX without a space behind the comma: `7{,}250`, `5{,}00{,}000`; else it is decimal: `2{,}5`.
_BRACED = re.compile(r"(?<=\d)(?<!\b0)\{,\}(?=(?:\d\d\{,\})*\d{3}(?!\d))")
_BRACED_POINT = re.compile(r"(?<=\d)\{([.,:])\}(?=\d)")
_INDIAN = re.compile(r"(?<![\d.,])\d{1,2}(?:,\d{2})+,\d{3}(?!\d)")
# At most nine digits: an int of more than 4,300 is refused by Python, and no mixed number is that long.
_MIXED = re.compile(r"(?<![\d./,^_])(\d{1,9})\s+(?:and\s+)?(\d{1,9})\s?/\s?(\d{1,9})(?![\d/])")
_UPRIGHT = re.compile(r"\\(?:text|math)[a-z]*\s*\{([^{}]*)\}|\\(?:mbox|underline|bm)\s*\{([^{}]*)\}")


def spell_plainly(text: str) -> str:
    r"""Return a text with its numbers in ASCII: digits, signs, commas between groups, mixed numbers as fractions.

    >>> spell_plainly("\uff12\uff0c\uff13\uff14\uff15"), spell_plainly(r"7{,}250"), spell_plainly("3 1/2 cups")
    ('2,345', '7,250', '7/2 cups')
    """
    if not text.isascii():
        text = _SUPERSCRIPT.sub(r"^\g<0>", _VULGAR.sub(r" \g<0>", text.translate(INVISIBLE)))
        text = _SUBSCRIPT.sub("_", text)
        text = unicodedata.normalize("NFKC", _SEPARATOR.sub(",", text)).translate(_AS_ASCII)
        text = re.sub(r"[^\W0-9a-zA-Z_]", lambda char: _ascii_digit(char[0]), _DASH.sub("-", text))
    text = _BRACED_POINT.sub(lambda mark: mark[1].replace(",", "."), _BRACED.sub(",", text))
    text = _INDIAN.sub(lambda number: number[0].replace(",", ""), _SEPARATOR.sub(",", text))
    return join_mixed(text)


def join_mixed(text: str) -> str:
    """Return a text with its mixed numbers as fractions.

    >>> join_mixed("3 1/2 cups")
    '7/2 cups'
    """
    return _MIXED.sub(_improper, text)


def without_commands(text: str) -> str:
    r"""Return LaTeX without the commands around words.

    >>> without_commands(r"42\text{ cm}"), without_commands(r"\textbf{(A)} ice")
    ('42  cm ', ' (A)  ice')
    """
    return _UPRIGHT.sub(lambda inside: f" {inside[1] or inside[2] or ''} ", text)


def _ascii_digit(char: str) -> str:
    return str(unicodedata.decimal(char, char))


def _improper(mixed: re.Match[str]) -> str:
    whole, above, below = map(int, mixed.groups())
    return f"{whole * below + above}/{below}" if above < below else mixed[0]

"""The final number of a text; a date or time as a whole.

In: a text in any spelling that models use (LaTeX, several scripts, words after the answer). Out: the answer in one
spelling, None where there is none. Spellings are normalized before anything is read; a number that cannot be read as a
whole is never read by its last digits, and a part of a formula is no answer.
"""

from __future__ import annotations

import re
from fractions import Fraction

from sdft_ray.core.dates import BETWEEN_DATE_AND_TIME, DATE_OR_TIME, MONTH, date_or_time, spell_dates
from sdft_ray.core.spelling import CURRENCY, final_part, has_words, join_mixed, spell_plainly, without_commands

# Python refuses to spell out more than 4,300 digits, and a quotient may have those of both numbers.
_MOST_DIGITS = 2000

# --- one spelling of numbers -------------------------------------------------------------------------------------

_FRACTION = re.compile(r"\\[dtc]?frac" + 2 * r"\s*(?:\{\s*(-?[\d.,]+)\s*\}|(\d))")
_DECIMAL_COMMA = re.compile(
    r"(?<![\d.,])(?:(\d{1,3}(?:\.\d{3})+),(\d+)|(0),(\d+)|(\d+),(\d{1,2})|(\d{1,3}),(\d{3,}[1-9]))(?!\d|,\d)"
)
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,\d{3})+|(?:\.\d{3}){2,})(?!\d)")
_SPACED = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)")
# Two numbers seldom stand so: `1 234 567`, `1 234,50`.
_SURELY_SPACED = re.compile(r"(?<![\d.,])\d{1,3}(?:(?: \d{3}){2,}(?! ?\d)|(?: \d{3})+(?=,\d{1,2}(?![\d,])))")
_HYPHENATED = re.compile(r"(?<![\d./,-])(\d{1,9})-(?=\d{1,9}/\d)")
_SCIENTIFIC = re.compile(
    r"(?<=\d)\s*(?:\\times|\\cdot|times|[\u00d7xX*\u22c5\u00b7])\s*10\s?(?:\^|\*\*)\s?\{?([-+]?\d+)\}?"
)
# Words for powers of ten: `5 million` is no 5.
_POWERS = {
    r"thousand|tausend|тысяч\w?|тыс\.?|tys\.?": 3,
    "lakhs?": 5,
    r"million(?:s|en|i)?|mill(?:ó|o)n(?:es)?|milh(?:ão|ões)|milion[ei]|миллион\w{0,2}|mio\.?|mln\.?|млн\.?": 6,
    "crores?": 7,
    r"billions?|milliard(?:e|en|s)?|миллиард\w{0,2}|bn|m(?:r|l|lr)d\.?|млрд\.?|bilh(?:ão|ões)|mil mil(?:lones|hões)": 9,
    r"trillions?|billionen|трлн\.?|trilh(?:ão|ões)": 12,
}
_POWER_WORD = re.compile(rf"(?<=\d)[\s-]?(?:{'|'.join(f'({words})' for words in _POWERS)})(?![^\W\d_])", re.IGNORECASE)
_POWER_EAST = re.compile(r"(?:\d[\d.]*\s?[千百천백]?[万萬만億亿억兆])+(?:\d+[千천]?)?(?!\d)")
_PART_EAST = re.compile(r"(\d[\d.]*)\s?([千百천백]?)([万萬만億亿억兆]?)")
_TENS = dict(zip("千천百백万萬만億亿억兆", (3, 3, 2, 2, 4, 4, 4, 8, 8, 8, 12), strict=True))
# Not numbers: the 2 of `m^2`, the 3 of `Week 3:210 pages`, what an answer is said not to be.
_NO_NUMBER = re.compile(
    r"\b(?:Step|Day|Week|Month|Year|Part|Case|Round|Question|Problem)\s\d+:(?=\d)"
    rf"|\b(?:not|instead\sof|rather\sthan)\s[{CURRENCY}]?\d[\d.,]*(?![\d/:-])"
    r"|~|\\(?:[,;:! ]|q?quad(?![a-z]))|\\(?:text|math)[a-z]*\s*\{?|\\(?:mbox|left|right)(?![a-z])|\\(?=\$)"
    r"|</?[A-Za-z]+>|(?:(?<=[A-Za-z}])|(?<=[A-Za-z]\.))\s?\^\s?\{?\d+\}?"
)
_NEGATIVE = re.compile(r"\b(?:negative|(?:(?<=\bis )|(?<=[=:] )|(?<=\A))minus)\s(?=\d)", re.IGNORECASE)
# Formulas that are no number by themselves, whatever numbers are inside.
_INSIDE = r"\{(?:[^{}]|\{[^{}]*\})*\}"
_FORMULA = re.compile(
    rf"\\[dtc]?frac\s*{_INSIDE}\s*{_INSIDE}|\\sqrt\s*(?:\[[^]]*\])?\s*{_INSIDE}"
    r"|\\begin\s*\{(\w*matrix|array|cases)\*?\}.*?\\end\s*\{\1",
    re.DOTALL,
)
_BRACED = re.compile(r"(?<![\w^_}\])\\])\{(-|[\d.]+)\}")
_NO_VALUE = " \u221a0 "  # a root, which `_value` takes for no number
# A remark in brackets behind the answer: how it was found, or what it is not.
_REMARK = re.compile(
    rf"(?<=[\d.%\w])\s\((?:(?i:not|since|because|as|we)\b[^()]*|[^()=]*\d\s*[-+*/\u00d7]\s*[{CURRENCY}]?\d[^()=]*)\)"
)


def _normalize(text: str) -> str:
    """Return a text whose numbers are in ASCII, their groups joined, without what is no number."""
    text = _SURELY_SPACED.sub(lambda number: number[0].replace(" ", ""), without_commands(text))
    text = spell_plainly(_HYPHENATED.sub(r"\1 ", _DECIMAL_COMMA.sub(_with_point, text)))
    if not text.isascii():
        text = _POWER_EAST.sub(_in_digits, text)
    text = _NEGATIVE.sub("-", _NO_NUMBER.sub(" ", _SCIENTIFIC.sub(r"e\1", text)))
    text = _GROUPED.sub(lambda number: re.sub("[.,]", "", number[0]), text)
    # `10 000` is one number: none begins with a 0.
    text = _SPACED.sub(lambda number: number[0].replace(" ", "" if " 0" in number[0] else " "), text)
    text = _POWER_WORD.sub(lambda word: f"e{[*_POWERS.values()][(word.lastindex or 1) - 1]}", text)
    text = join_mixed(_FRACTION.sub(lambda parts: " {}/{}".format(*filter(None, parts.groups())), text))
    return _BRACED.sub(r"\1", _FORMULA.sub(_NO_VALUE, text)) if "\\" in text or "{" in text else text


def _with_point(number: re.Match[str]) -> str:
    whole, decimals = filter(None, number.groups())
    return f"{whole.replace('.', '')}.{decimals}"


def _in_digits(number: re.Match[str]) -> str:
    """Return a number that counts in ten thousands (3万5千) in digits; itself where it cannot be read."""
    total = Fraction(0)
    for digits, small, large in _PART_EAST.findall(number[0]):
        if digits.count(".") > 1 or len(digits) > 20:
            return number[0]
        total += Fraction(digits.rstrip(".")) * 10 ** sum(_TENS[unit] for unit in small + large)
    return str(total) if total.denominator == 1 else str(float(total))


# --- numbers -----------------------------------------------------------------------------------------------------

_NUMBER = re.compile(
    rf"(?=[-.\d{CURRENCY}JFMASONDjfmasond])(?:(?<![A-Za-z\d])(?:{DATE_OR_TIME})"
    # A hyphen is a sign unless it stands behind a number, a word or a bracket: then it subtracts or joins.
    rf"|(?P<sign>(?<![\w)\].])(?<![\d)\]]\s)-\s?|(?<=[\d)\]]\s)-(?=[\d.{CURRENCY}]))?"
    rf"(?:(?:[{CURRENCY}]|(?<=-)[A-Z]{{3}})\s?)?(?P<sign2>(?<=[{CURRENCY}])-)?"
    # The 2 of CO2 and m2 belongs to the word. A base stands as an index: 101_2.
    r"(?P<whole>(?:(?<![A-Za-z\d])|(?<=\b[A-Z]{3})|(?<=\bRs))"
    r"(?:0[xX][\da-fA-F]+\b|\d+(?P<base>_\{?\d+\}?)|\d+(?:\.\d+)?(?:[eE][-+]?\d+\b)?)|(?<![\w.])\.\d+)"
    r"(?:\s?(?:\^|\*\*)\s?\{?(?P<power>-?\d+(?![\d.]*[./]\d))\}?)?(?:\s?/\s?(?P<below>-?\d+(?:\.\d+)?))?)"
)
# What makes an expression of the numbers beside it: the 2 of a root or of 2 pi is not the answer.
_OPERATION = (
    r"(?:\\(?:sqrt|pi|log|ln|exp|sin|cos|tan|cot|sec|csc|arc[a-z]+|[dt]?binom|overline|dot|infty|pm|mp)"
    r"(?![a-z])|\b(?:pi\b|(?:sqrt|log|ln)(?=[_(]))|[√∛π∞±])"
)
_BEHIND_OPERATION = re.compile(
    _OPERATION + r"[^\s=≈\\]{0,12}\s?\Z|(?<=[\d)}])(?:\^|\*\*)\{?-?\Z|(?<![A-Za-z\\])[a-z]\s*[-+*/]\s*\Z"
    r"|[(\[{]\s*(?:(?:-?[\d./]+|[a-z])\s*[,;]\s*)+\Z"
)
_BEFORE_OPERATION = re.compile(
    r"[\s.,*·]*(?:\\(?:cdot|times)\s*)?" + _OPERATION + r"|e\d|[\s)}]*(?:\s?\^\s?|\*\*)\{?-?(?:\d|[a-np-z(](?![a-z]))"
    r"|\s*[,;]\s*(?:-?[\d./]+\s*[,;]\s*)*(?:-?[\d./]+|[a-z])\s*\\?[)\]}]|/[xyzn]\b"
)
_TUPLE = re.compile(r"\s*(?:\\left)?\s*\\?[(\[{]\s*-?[\d.]+\s*[,;]")
_RELATION = re.compile(r"[A-Za-z\d\s]\s*[<>]|[\u2260\u2264\u2265\u2208]|\\(?:leq?|geq?|neq?|lt|gt|in)(?![a-z])")
# A marked part goes on behind its first number: a product, a letter, a list, a further quantity.
_LETTERS = r"(?:[abcijknxyz]{2,3}|[abeijknqruvwxyzBQRXYZ])(?![A-Za-z])"
_UNIT = r"(?:years?|months?|weeks?|days?|hours?|hrs?|minutes?|mins?|feet|foot|ft|pounds?|lbs?|kg|km|m|h|dollars?|°)"
_GOES_ON = re.compile(
    r"(?:\\right)?[)}]*(?:\s*(?:[+\u00d7\u00f7\u00b7\u22c5<>\u2260\u2264\u2265]\s*[\d(\\A-Za-z]"
    r"|[-*/]\s*(?:[\d(\\]|[a-zA-Z](?![A-Za-z])(?<![hsdm]))|!\s*(?:[-+*/\d]|\Z)"
    r"|\\(?:times|cdot|div|over|mod|equiv|cup|cap|leq?|geq?|neq?|in|to|choose)(?![a-z]))"
    rf"|{_LETTERS}|\s[xyzneik](?![A-Za-z])|\s?\\?\((?![^()]*(?:=|[^\W\d_]{{2}}))"
    r"|\s*(?:[,;\u3001]\s*|(?:and|or|to|und|oder|et|ou|o|y|e)\s\s*|[\u548c\u6216\u5230]\s*)"
    rf"-?[{CURRENCY}]?\d|\s?{_UNIT}\.?,?\s+(?:and\s+)?[{CURRENCY}]?\d|['\u2032]\s?\d|[小時时年元分]\S{{0,2}}\s?\d)"
)
# Two numbers that make one quantity: 5 hours and 30 minutes.
_LARGER_UNIT = re.compile(rf"\d\s?{_UNIT}\.?\s+(?:and\s+)?\Z")
_SMALLER_UNIT = re.compile(
    r"\s?(?:months?|weeks?|days?|hours?|minutes?|mins?|seconds?|secs?|inch(?:es)?|ounces?|oz|cents?|cm|min)\b"
)
# The left side of an equation that no number answers: `2x + 3y = 5`, `x^2 = 4`.
_EQUATION = re.compile(r"(?<![A-Za-z\\])[a-z]\s*[-+*/^]|[-+*/]\s*[a-z](?![A-Za-z(])|\d\s?[a-z](?![A-Za-z])")
_VARIABLE = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])")
_BRACKETS = re.compile(r"(?<=[\w.%$*])\s*\((?=[^()]*(?:=|[^\W\d_]{2}))[^()]*\)")
_EQUALS = re.compile(r"=|\u2248|\\approx(?![a-z])")
_DIGIT = re.compile("[\\d\u00bc-\u00be\u2150-\u215e\u2460-\u2473]")
_SENTENCE_END = re.compile(rf"(?<=[a-z\d)%][.!?])\s+(?=[A-Z])(?!{MONTH})|\n")
_ANNOUNCED = re.compile(
    r"(?i:\b(?:answer|antwort|lösung|réponse|respuesta|resposta|risposta|antwoord|odpowiedź|cevap|jawaban(?:nya)?"
    r"|svar(?:et)?|vastaus|odpověď|válasz|răspuns|ответ|відповідь|απάντηση)|đáp án|câu trả lời|תשובה|الإجابة|الجواب"
    r"|پاسخ|उत्तर|উত্তর|คำตอบ|答案|答え|解答|正解|정답|\b답|(?m:^)\s*答(?=[:\uff1a]))"
    r"(?i:\s(?:is|ist|lautet|est|es|é|è|to|er|är|on|adalah|là|είναι|היא|هي|هو)\b|(?<=उत्तर)\s(?=[*_]*\d)"
    r"|是|为|為|は|은|คือ|[*_]*\s?[:\uff1a]|\s[-=\u2013\u2014]\s)"
    r"((?:[^.\n!\u3002\u0964\u061f]|\.(?=\d))+)"
)
# Behind a number that stands at once behind its announcement: what follows is why.
_REASON = re.compile(r"[*_$\s]*(?:\(|,?\s(?i:because|since|as)\b)")


def final_number(text: str) -> Fraction | str | None:
    """Return the final number of a text: the marked one, else the one announced as the answer, else the last.

    A date, a time, a ratio and a number of another base come as text and are compared as a whole. None where there is
    none: a text without a number never equals another. Digits are not joined across spaces (but for `10 000`), and a
    hyphen after a digit or letter is no sign.

    >>> [str(final_number(s)) for s in ("#### 1,234.50", "it is -3", "1/2 left", "50 %", "$5.00", "12 34", "none")]
    ['2469/2', '-3', '1/2', '50', '5', '34', 'None']
    >>> [str(final_number(s)) for s in ("3 1/2 cups", "5,00,000", "10:30 pm", "July 9, 2031", "5 million")]
    ['7/2', '500000', '22:30', '2031-07-09', '5000000']
    """
    part, marked = final_part(text)
    part = spell_dates(part)
    if marked:
        return _read_marked(part)
    for sentence in reversed(_ANNOUNCED.findall(part)):
        if numbers := _find_numbers(sentence.strip()):
            first = numbers[0]
            is_first = not has_words(first.string[: first.start()]) and _REASON.match(first.string, first.end())
            return _last_value(numbers[:1] if is_first else numbers)
    for sentence in reversed(_SENTENCE_END.split(part)):
        sentence = without if _DIGIT.search(without := _REMARK.sub("", sentence)) else sentence
        if _DIGIT.search(sentence) and (numbers := _find_numbers(_cut_to_end(sentence)) or _find_numbers(sentence)):
            return _last_value(numbers)
    return None


def _cut_to_end(sentence: str) -> str:
    """Return the end of a sentence from a hundred characters before its last digit: no answer is read from before."""
    last = max(map(sentence.rfind, "0123456789"))
    return sentence[sentence.rfind(" ", 0, max(0, last - 100)) + 1 :]


def _read_marked(part: str) -> Fraction | str | None:
    """Return the number of a marked part, which words may follow; None of a formula, an equation or a list."""
    if _TUPLE.match(part):
        return None
    part = _SPACED.sub(lambda number: number[0].replace(" ", ""), part)
    first, *others = _EQUALS.split(_BRACKETS.sub("", _normalize(part)))
    if not others:
        return _read_side(first)
    if _EQUATION.search(first) or any(map(_VARIABLE.search, others[:-1])):
        return None
    last = _read_side(others[-1])
    return _read_side(first) if last is None and not has_words(first) else last


def _read_side(side: str) -> Fraction | str | None:
    """Return the number that a side of an equation is: the first one; the last one of a sentence."""
    numbers = list(_NUMBER.finditer(side))
    if not numbers or _RELATION.search(side):
        return None
    number = numbers[-1] if has_words(side[: numbers[0].start()]) else numbers[0]
    return None if _GOES_ON.match(side, number.end()) else _value(number)


def _find_numbers(text: str) -> list[re.Match[str]]:
    return list(_NUMBER.finditer(_normalize(text)))


def _last_value(numbers: list[re.Match[str]]) -> Fraction | str | None:
    """Return the value of the last number; of a time behind a date, both; None of a quantity in two units."""
    last = numbers[-1]
    if _SMALLER_UNIT.match(last.string, last.end()) and _LARGER_UNIT.search(last.string[: last.start()][-30:]):
        return None
    value = _value(last)
    if len(numbers) > 1 and last["hour"] and any(numbers[-2].group("iso", "named")):
        between = last.string[numbers[-2].end() : last.start()]
        if BETWEEN_DATE_AND_TIME.fullmatch(between):
            return f"{_value(numbers[-2])} {value}"
    return value


def _value(match: re.Match[str]) -> Fraction | str | None:
    """Return the value of a match of _NUMBER; None in an expression, and where it is too large to be spelled out."""
    if _BEHIND_OPERATION.search(match.string[max(0, match.start() - 40) : match.start()]) or _BEFORE_OPERATION.match(
        match.string, match.end()
    ):
        return None
    whole, base, raised_to, below, *signs = match.group("whole", "base", "power", "below", "sign", "sign2")
    if whole is None:
        return date_or_time(match)
    if base or "x" in whole.lower():
        return re.sub("[{}]", "", whole.lower())
    if len(match[0]) > _MOST_DIGITS or re.search(r"[eE][-+]?\d{4}", whole):
        return None
    number, power = Fraction(whole), int(raised_to or 1)
    size = max(number.numerator.bit_length(), number.denominator.bit_length())
    if size * abs(power) > 3 * _MOST_DIGITS or (power < 0 and not number):
        return None
    number **= power
    if below and (divisor := Fraction(below)):
        number /= divisor
    return -number if any(signs) else number

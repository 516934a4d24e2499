"""The final answer of a text: a number, a date or time, or the letter of a choice.

In: a text in any spelling that models use (LaTeX, several scripts, words after the answer). Out: the answer in one
spelling, None where there is none. Spellings are normalized before anything is read, so that every reader sees the
same text; a number that cannot be read as a whole is never read by its last digits.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

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

_AS_ASCII = str.maketrans("\u2044\u066b\u066c\u2212", "/.,-")
_SUPERSCRIPT = re.compile("[\u207b\u00b9\u00b2\u00b3\u2070\u2074-\u2079]+")
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")
# A dash that touches a number is a minus; with a space behind it, it sets words apart.
_DASH = re.compile(r"[\u2010-\u2013](?=[\d.$\u20ac\u00a3])")
# Separators of groups of digits other than a comma: LaTeX's commas and spaces, no-break and thin ones, apostrophes.
_SEPARATOR = re.compile(
    r"(?<=\d)(?:,?\\!\s*(?=\d{2,3}(?!\d))|(?:\\[,:; ]|\\?_|[~'\u2019\u00a0\u2009\u202f])(?=\d{3}(?!\d)))"
)
# LaTeX without a space behind the comma: `7{,}250`, `5{,}00{,}000`; else it is decimal: `2{,}5`.
_BRACED = re.compile(r"(?<=\d)(?<!\b0)\{,\}(?=(?:\d\d\{,\})*\d{3}(?!\d))")
_BRACED_POINT = re.compile(r"(?<=\d)\{[.,]\}(?=\d)")
_INDIAN = re.compile(r"(?<![\d.,])\d{1,2}(?:,\d{2})+,\d{3}(?!\d)")
# At most nine digits: an int of more than 4,300 is refused by Python, and no mixed number is that long.
_MIXED = re.compile(r"(?<![\d./,^_])(\d{1,9})\s+(?:and\s+)?(\d{1,9})\s?/\s?(\d{1,9})(?![\d/])")


def spell_plainly(text: str) -> str:
    r"""Return a text with its numbers in ASCII: digits, signs, commas between groups, mixed numbers as fractions.

    >>> spell_plainly("\uff12\uff0c\uff13\uff14\uff15"), spell_plainly(r"7{,}250"), spell_plainly("3 1/2 cups")
    ('2,345', '7,250', '7/2 cups')
    """
    if not text.isascii():
        text = _SUPERSCRIPT.sub(r"^\g<0>", _VULGAR.sub(r" \g<0>", text.translate(INVISIBLE)))
        text = unicodedata.normalize("NFKC", _SEPARATOR.sub(",", text)).translate(_AS_ASCII)
        text = re.sub(r"[^\W0-9a-zA-Z_]", lambda char: _ascii_digit(char[0]), _DASH.sub("-", text))
    text = _BRACED_POINT.sub(".", _BRACED.sub(",", text))
    text = _INDIAN.sub(lambda number: number[0].replace(",", ""), _SEPARATOR.sub(",", text))
    return _MIXED.sub(_improper, text)


def _ascii_digit(char: str) -> str:
    return str(unicodedata.decimal(char, char))


def _improper(mixed: re.Match[str]) -> str:
    whole, above, below = map(int, mixed.groups())
    return f"{whole * below + above}/{below}" if above < below else mixed[0]


# --- numbers, dates and times ------------------------------------------------------------------------------------

# Python refuses to spell out more than 4,300 digits, and a quotient may have those of both numbers.
_MOST_DIGITS = 2000
_FRACTION = re.compile(r"\\[dtc]?frac" + 2 * r"\s*(?:\{\s*(-?[\d.,]+)\s*\}|(\d))")
_DECIMAL_COMMA = re.compile(r"(?<![\d.,])(?:(\d{1,3}(?:\.\d{3})+),(\d+)|(0),(\d+)|(\d+),(\d{1,2}))(?!\d|,\d)")
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,\d{3})+|(?:\.\d{3}){2,})(?!\d)")
_SPACED = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)")
# Two numbers seldom stand so: `1 234 567`, `1 234,50`.
_SURELY_SPACED = re.compile(r"(?<![\d.,])\d{1,3}(?:(?: \d{3}){2,}(?! ?\d)|(?: \d{3})+(?=,\d{1,2}(?![\d,])))")
_HYPHENATED = re.compile(r"(?<![\d./,-])(\d{1,9})-(?=\d{1,9}/\d)")
_SCIENTIFIC = re.compile(r"(?<=\d)\s*(?:\\times|\\cdot|[\u00d7x*\u22c5])\s*10\s?(?:\^|\*\*)\s?\{?([-+]?\d+)\}?")
# Not numbers: LaTeX's commands for text, the 2 of `m^2`, the 3 of `Week 3:210 pages`.
_NO_NUMBER = re.compile(
    r"\b(?:Step|Day|Week|Month|Year|Part|Case|Round|Question|Problem)\s\d+:(?=\d)"
    r"|\\[,;:! ]|\\(?:text|math)[a-z]*\s*\{?|\\(?:mbox|left|right)(?![a-z])|\\(?=\$)|(?<=[A-Za-z}])\s?\^\s?\{?\d+\}?"
)
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_MONTH = r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?"
_MONTH += r"|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)\b"
_DAY = r"(?:0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?(?![\d%]|[.,]\d)"
_MONTHS_ELSEWHERE = (
    *("janvier|januar|enero|gennaio|janeiro", "février|februar|febrero|febbraio|fevereiro", "mars|märz|marzo|março"),
    *("avril|abril|aprile", "mai|mayo|maggio|maio", "juin|juni|junio|giugno|junho"),
    *("juillet|juli|julio|luglio|julho", "août|agosto", "septembre|septiembre|settembre|setembro"),
    *("octobre|oktober|octubre|ottobre|outubro", "novembre|noviembre|novembro"),
    "décembre|dezember|diciembre|dicembre|dezembro",
)
"""French, German, Spanish, Italian and Portuguese."""
_DATE_ELSEWHERE = re.compile(
    rf"(?<![\d.,])(\d\d?)(?:\.|º|er)?\s(?:de\s)?(?:{'|'.join(f'({names})' for names in _MONTHS_ELSEWHERE)})"
    r"(?:\sde)?\s(\d{4})(?!\d)",
    re.IGNORECASE,
)
# Without a year a month may be a name, and what follows a count: "June 5 apples", "In May 24 people came".
_YEAR = r",?\s(?:19|20)\d\d(?!\d)"
_DATE_OR_TIME = (
    rf"(?P<iso>\d{{4}}(?P<mark>[-/.])\d\d?(?P=mark)\d\d?(?!\d)|\d{{4}}\s?\u5e74\s?\d\d?\s?\u6708\s?\d\d?(?=\s?\u65e5))"
    r"|(?P<year_last>\d\d?(?P<mark2>[-/.])\d\d?(?P=mark2)(?:\d{4}|\d\d)(?![\d/-]))"
    rf"|(?P<named>\b(?:{_MONTH}\.?\s{_DAY}|{_DAY}\.?\s(?:of\s)?{_MONTH}\.?|{_MONTH}){_YEAR}"
    rf"|(?<![iI]n\s)\b(?:{_MONTH}\.?\s{_DAY}|{_DAY}\.?\s(?:of\s)?{_MONTH})(?!\s+[a-z]))"
    r"|(?P<hour>\d+)(?::|\s:\s(?=\d)|\s?h\s?(?=\d\d(?!\d))|\s?[\u65f6\u6642\u70b9\u9ede]\s?)(?P<minutes>\d+(?::\d+)*)"
    r"(?:\s*(?P<half>[aApP])\.?[mM]\b)?"
    r"|(?P<chain>\d+(?:\.\d+){2,})"
)
_NUMBER = re.compile(
    rf"(?=[-.\d$€£¥₹₩₽JFMASOND])(?:(?<![A-Za-z\d])(?:{_DATE_OR_TIME})"
    # A hyphen is a sign unless it stands behind a number, a word or a bracket: then it subtracts or joins.
    r"|(?P<sign>(?<![\w)\].])(?<![\d)\]]\s)-\s?|(?<=[\d)\]]\s)-(?=[\d.$€£]))?"
    r"(?:[$€£¥₹₩₽]\s?)?(?P<sign2>(?<=[$€£¥₹₩₽])-)?"
    # The 2 of CO2 and m2 belongs to the word.
    r"(?P<whole>(?:(?<![A-Za-z\d])|(?<=\b[A-Z]{3})|(?<=\bRs))\d+(?:\.\d+)?(?:[eE][-+]?\d+\b)?|(?<![\w.])\.\d+)"
    r"(?:\s?(?:\^|\*\*)\s?\{?(?P<power>-?\d+)\}?)?(?:\s?/\s?(?P<below>-?\d+(?:\.\d+)?))?)"
)
# What makes an expression of the numbers beside it: the 2 of a root or of 2 pi is not the answer.
_OPERATION = (
    r"(?:\\(?:sqrt|pi|log|ln|exp|sin|cos|tan|cot|sec|csc|arc[a-z]+|[dt]?binom|overline|dot|infty|pm|mp)"
    r"(?![a-z])|[√∛π∞±])"
)
_BEHIND_OPERATION = re.compile(_OPERATION + r"[^\s=≈\\]{0,12}\s?\Z|(?<=[\d)}])(?:\^|\*\*)\{?-?\Z")
_BEFORE_OPERATION = re.compile(r"[\s.*·]*(?:\\(?:cdot|times)\s*)?" + _OPERATION + r"|\}*(?:\s?\^\s?|\*\*)\{?-?\d")
_TUPLE = re.compile(r"\s*(?:\\left)?\s*\\?[(\[{]\s*-?[\d.]+\s*[,;]")
# A marked part goes on behind its first number: a sum, a product with a letter, a list.
_GOES_ON = re.compile(
    r"\s*(?:[-+*/]\s*(?:[\d(\\]|[B-HJ-Zb-z](?![A-Za-z]))|[xyzne](?![A-Za-z])"
    r"|(?:[,;]\s+-?[\d.,]*\d\s*)+(?:\\?[)\]}]\s*)?\Z)"
)
_HALF_OF_SUM = re.compile(r"(?<![A-Za-z])[A-Za-z]\s*[-+*/]\s*\Z")
# The left side of an equation in a marked part: `5 * 4 =`, `x =`.
_LEFT_SIDE = re.compile(r"(?:[^=A-Za-z\n]|(?<![A-Za-z])[A-Za-z](?![A-Za-z]))*(?<!\()=")
_DIGIT = re.compile("[\\d\u00bc-\u00be\u2150-\u215e]")
_SENTENCE_END = re.compile(rf"(?<=[a-z\d)%][.!?])\s+(?=[A-Z])(?!{_MONTH})|\n")
_ANNOUNCED = re.compile(
    r"(?i:\b(?:answer|antwort|réponse|respuesta|resposta|risposta|ответ)|答案|答え|정답)"
    r"(?:\s(?:is|ist|est|es|é|è)\b|是|は|은|[*_]*\s?[:\uff1a])((?:[^.\n!\u3002]|\.(?=\d))+)"
)


def final_number(text: str) -> Fraction | str | None:
    """Return the final number of a text: the marked one, else the one announced as the answer, else the last.

    A date, a time, a ratio comes as text and is compared as a whole. None where there is none: a text without a
    number never equals another. Digits are not joined across spaces (but for `10 000`), and a hyphen after a digit or
    letter is no sign.

    >>> [str(final_number(s)) for s in ("#### 1,234.50", "it is -3", "1/2 left", "50 %", "$5.00", "12 34", "none")]
    ['2469/2', '-3', '1/2', '50', '5', '34', 'None']
    >>> [str(final_number(s)) for s in ("3 1/2 cups", "5,00,000", "10:30 pm", "July 9, 2031")]
    ['7/2', '500000', '22:30', '2031-07-09']
    """
    part, marked = final_part(text)
    part = _DATE_ELSEWHERE.sub(_iso_date, part)
    if marked:
        return _read_marked(part)
    for sentence in reversed(_ANNOUNCED.findall(part)):
        if numbers := _find_numbers(sentence):
            if len(numbers) > 1:
                break
            return _value(numbers[0])
    for sentence in reversed(_SENTENCE_END.split(part)):
        if _DIGIT.search(sentence) and (numbers := _find_numbers(_cut_to_end(sentence)) or _find_numbers(sentence)):
            return _value(numbers[-1])
    return None


def _cut_to_end(sentence: str) -> str:
    """Return the end of a sentence from a hundred characters before its last digit: no answer is read from before."""
    last = max(map(sentence.rfind, "0123456789"))
    return sentence[sentence.rfind(" ", 0, max(0, last - 100)) + 1 :]


def _read_marked(part: str) -> Fraction | str | None:
    """Return the number at the start of a marked part, which words may follow; else its last; None of a formula."""
    if _TUPLE.match(part):
        return None
    part = _SPACED.sub(lambda number: number[0].replace(" ", ""), part)
    if left := _LEFT_SIDE.match(part):
        part = part[left.end() :]
    numbers = _find_numbers(part)
    if not numbers:
        return None
    first = numbers[0]
    if _GOES_ON.match(first.string, first.end()) or _HALF_OF_SUM.search(first.string[: first.start()]):
        return None
    return _value(numbers[-1] if has_words(first.string[: first.start()]) else first)


def _find_numbers(text: str) -> list[re.Match[str]]:
    """Return the matches of _NUMBER in a text whose numbers are in ASCII, their groups joined."""
    text = _SURELY_SPACED.sub(lambda number: number[0].replace(" ", ""), text)
    text = spell_plainly(_HYPHENATED.sub(r"\1 ", _DECIMAL_COMMA.sub(_with_point, text)))
    text = _NO_NUMBER.sub(" ", _SCIENTIFIC.sub(r"e\1", text))
    text = _GROUPED.sub(lambda number: re.sub("[.,]", "", number[0]), text)
    # `10 000` is one number: none begins with a 0.
    text = _SPACED.sub(lambda number: number[0].replace(" ", "" if " 0" in number[0] else " "), text)
    text = _MIXED.sub(_improper, _FRACTION.sub(lambda parts: " {}/{}".format(*filter(None, parts.groups())), text))
    return list(_NUMBER.finditer(text))


def _iso_date(date: re.Match[str]) -> str:
    day, *months, year = date.groups()
    return f"{year}-{next(i for i, month in enumerate(months, 1) if month):02}-{day.zfill(2)}"


def _with_point(number: re.Match[str]) -> str:
    whole, decimals = filter(None, number.groups())
    return f"{whole.replace('.', '')}.{decimals}"


def _value(match: re.Match[str]) -> Fraction | str | None:
    """Return the value of a match of _NUMBER; None in an expression, and where it is too large to be spelled out."""
    if _BEHIND_OPERATION.search(match.string[max(0, match.start() - 40) : match.start()]) or _BEFORE_OPERATION.match(
        match.string, match.end()
    ):
        return None
    whole, raised_to, below, *signs = match.group("whole", "power", "below", "sign", "sign2")
    if whole is None:
        return _date_or_time(match)
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


def _date_or_time(match: re.Match[str]) -> str:
    """Return a date as YYYY-MM-DD, a time of day with 24 hours, anything else (a ratio, a version) as it is written."""
    hour, minutes, half = match.group("hour", "minutes", "half")
    if hour:
        hour = hour.lstrip("0") or "0"
        if half and len(hour) < 3:
            hour = str(int(hour) % 12 + 12 * (half in "pP"))
        return f"{hour}:{minutes}"
    parts = re.findall(r"\d+", match[0])
    named, year_last, mark, chain = match.group("named", "year_last", "mark2", "chain")
    if named:
        month = re.search(_MONTH, match[0])
        assert month
        year = [part for part in parts if len(part) == 4]
        parts = [*year, str(_MONTHS.index(month[0][:3]) + 1), *(part for part in parts if len(part) < 4)]
    elif year_last:
        first, second, last = parts
        # 3/4/2031 is the 4th of March, as in the US, 3.4.2031 the 3rd of April, as in Europe.
        parts = [last, second, first] if mark == "." or int(first) > 12 else [last, first, second]
    return chain or "-".join(part.zfill(2) for part in parts)


# --- choices -----------------------------------------------------------------------------------------------------

# The words of several languages that name a letter as the answer, and those that may stand between.
_NAMING = unicodedata.normalize(  # as the texts are
    "NFKC",
    r"\banswer|\b(?:correct|right|best) (?:option|choice|letter)|\bI(?:'d| would| will)? (?:choose|pick|select|take)"
    r"|\b(?:antwort|lösung|(?:richtig|korrekt)(?= ist)|ich (?:wähle|nehme)|réponse|je choisis|respuesta|elijo|resposta"
    r"|escolho|risposta|scelgo|antwoord|odpowiedź|cevap|jawaban|đáp án|ответ|выбираю|відповідь|الإجابة|الجواب)"
    r"|उत्तर|คำตอบ|答案|答え|回答|解答|正解|[选選][择擇]?(?![项項])|정답|답",
)
_BETWEEN = (
    r"\b(?:is|would be|must be|should be|will be|the|correct|right|best|option|choice|letter|clearly|therefore|thus"
    r"|correcta|correcte|correta|corretta"
    r"|ist|lautet|die|der|buchstabe|est|la|le|lettre|l'option|es|opción|letra|a|é|è|alternativa|opção|opzione|lettera"
    r"|optie|adalah|là|вариант|буква|это|هي|هو)\b|है|คือ|应该是|應該是|是|应?为|應?為|[选選][项項擇择]?|選択肢|は|が|은|는"
)
_LATIN = r"A-Za-z0-9À-\u04ff"
_CASE_ENDS = r"(?=\s*(?:[).,:;!?*_$}\]<\"。、]|\n|\Z|[\u2010-\u2015-]\s|[\u3040-\u9fff\uac00-\ud7af])"
# A bare A or I, and a letter in lower case, are also words: as an option they have a mark or a reason behind them.
_BECAUSE = r"|\s(?:because|since|as|weil|denn|car|parce|porque|perché|потому)\b)"
_OPTION = (
    rf"(?:[(\[]([A-Ja-j])[)\]]|([B-HJ])(?!['\u2019+#]|-?[{_LATIN}])"
    rf"|([AI]){_CASE_ENDS}{_BECAUSE}|([a-j])(?!\.\w){_CASE_ENDS}))"
    r"(?!\s*(?:or|and|und|oder|ou|y|[/&])\s*[(\[]?[A-J]\b)"
)
_NAMED = re.compile(
    rf"(?i:{_NAMING})(?:[\s*_:=\"'`$>\u2010-\u2015-]|(?i:{_BETWEEN}))*(?<![{_LATIN}]){_OPTION}"
    rf"|(?<![{_LATIN}])([A-J])[)\]*_]*\s*(?:(?:is|ist|est|es|é|è)(?: (?:the|die|la|a))? (?i:correct|right|best|richtig"
    r"|korrekt|bonne|juste|certa|giusta)|(?:选项|選項)?是?(?:正确|正確)|が正|[이가] (?:정답|맞))"
)
# Commands are taken whole: the d of an empty \boxed{} is no letter.
_ONLY_LETTER = re.compile(r"(?:\\(?:[A-Za-z]++|\W)|[^\w\\]|_)*+([A-Ja-j])[\W_]*")
_QUOTED = re.compile(r"(?<![\w'\"])[\"'\u2018\u201c]([A-J])[\"'\u2019\u201d](?![\w'\"])")
_FIRST_OR_BRACKETED = re.compile(
    r"(?:(?m:^)|(?<=[.!?;]\s))[^\w\n]*([A-J])(?:[.):、]|[^\w\n]*(?m:$))|[(\[]([A-J])[)\]]"
    r"|(?i:\b(?:option|choice|opción|opção|buchstabe|lettre)\s|[选選][项項]|選択肢)[\s*_]*([A-J])(?![A-Za-z])"
    r"(?!\s(?:is|was)(?:n't| not| wrong| incorrect| false))"
)


def final_choice(text: str) -> str | None:
    """Return the letter, A to J, that a text chooses; None where it names none, or several without an answer.

    >>> [final_choice(s) for s in ("B", "(b)", "B. Paris", "The correct answer is (B)", "A dog", "(A) or (B)")]
    ['B', 'B', 'B', 'B', None, None]
    """
    text = _QUOTED.sub(r"\1", spell_plainly(final_part(text)[0]))
    if match := _ONLY_LETTER.fullmatch(text):
        return match[1].upper()
    if named := _NAMED.findall(text):
        return "".join(named[-1]).upper()
    letters = {"".join(groups) for groups in _FIRST_OR_BRACKETED.findall(text)}
    return letters.pop() if len(letters) == 1 else None

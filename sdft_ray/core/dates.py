"""Dates and times as answers, which are compared as a whole.

In: a text, or a match of DATE_OR_TIME. Out: dates as 2031-07-09 and times of 24 hours; a ratio and a version as they
are written.
"""

from __future__ import annotations

import re

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
MONTH = r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?"
MONTH += r"|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)\b"
"""A pattern of the names of months in English."""
_DAY = r"(?:0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?(?![\d%]|[.,]\d)"
# French, German, Spanish, Italian, Portuguese and Russian; and where a year follows, for some are other words, too,
# Dutch, Swedish, Danish, Norwegian, Polish, Turkish and Indonesian. Without a year `mars` is also a planet.
_MONTHS_ELSEWHERE = (
    "janvier|januar|enero|gennaio|janeiro|января|(?:januari|stycznia|ocak)(?= \\d{4})",
    "février|februar|febrero|febbraio|fevereiro|февраля|(?:februari|lutego|şubat)(?= \\d{4})",
    "märz|marzo|março|марта|(?:mars|maart|marts|marca|mart|maret)(?= \\d{4})",
    "avril|abril|aprile|апреля|(?:kwietnia|nisan)(?= \\d{4})",
    "mai|mayo|maggio|maio|мая|(?:mei|maj|maja|may\u0131s)(?= \\d{4})",
    "juin|juni|junio|giugno|junho|июня|(?:czerwca|haziran)(?= \\d{4})",
    "juillet|juli|julio|luglio|julho|июля|(?:lipca|temmuz)(?= \\d{4})",
    "août|agosto|августа|(?:augustus|augusti|agustus|sierpnia|ağustos)(?= \\d{4})",
    "septembre|septiembre|settembre|setembro|сентября|(?:września|eylül)(?= \\d{4})",
    "octobre|oktober|octubre|ottobre|outubro|октября|(?:października|ekim)(?= \\d{4})",
    "novembre|noviembre|novembro|ноября|(?:listopada|kas\u0131m)(?= \\d{4})",
    "décembre|dezember|diciembre|dicembre|dezembro|декабря|(?:desember|grudnia|aral\u0131k)(?= \\d{4})",
)
_DATE_ELSEWHERE = re.compile(
    rf"(?<![\d.,])(\d\d?)(?:\.|º|er)?\s(?:de\s)?(?:{'|'.join(f'({names})' for names in _MONTHS_ELSEWHERE)})\b"
    r"(?:(?:\sde)?\s(\d{4})(?!\d))?",
    re.IGNORECASE,
)
_DATE_VIETNAMESE = re.compile(r"(?<!\d)(\d\d?)\s(?:tháng\s)(\d\d?),?\snăm\s(\d{4})(?!\d)", re.IGNORECASE)
_DATE_EAST = re.compile(r"(?:(\d{4})\s?[年년]\s?)?(?<!\d)(\d\d?)\s?[月월]\s?(\d\d?)\s?[日일号號]")
# The half of a day stands before the hour in Chinese, Japanese and Korean.
_HALF_EAST = re.compile(r"(上午|午前|오전|下午|午後|午后|오후)\s?(\d\d?)\s?([:时時点點시])\s?(\d\d?)?\s?[分분]?")
_TIME_GERMAN = re.compile(r"(?<![\d.,])(\d\d?)\.(\d\d)(?=\sUhr\b)")
_TIME_IN_DATE = re.compile(r"(?<=\d)T(?=\d\d:\d\d)")
BETWEEN_DATE_AND_TIME = re.compile(r",?\s(?:at\s|um\s|à\s)?")
# Without a year a month may be a name, and what follows a count: "June 5 apples", "In May 24 people came".
_YEAR = r",?[\s-](?:19|20)\d\d(?!\d)"
DATE_OR_TIME = (
    r"(?P<iso>\d{4}(?P<mark>[-/.])\d\d?(?P=mark)\d\d?(?!\d))"
    r"|(?P<year_last>\d\d?(?P<mark2>[-/.])\d\d?(?P=mark2)(?:\d{4}|\d\d)(?![\d/-]))"
    rf"|(?P<named>(?i:\b(?:{MONTH}\.?\s{_DAY}|{_DAY}(?:\.?\s(?:of\s)?|-){MONTH}\.?|{MONTH})){_YEAR}"
    rf"|(?<![iI]n\s)\b(?:{MONTH}\.?\s{_DAY}|{_DAY}\.?\s(?:of\s)?{MONTH})(?!\s+[a-z]))"
    r"|(?P<hour>\d+)(?::|\s:\s(?=\d)|\s?h\s?(?=\d\d(?!\d))|\s?[时時点點시]\s?)(?P<minutes>\d+(?::\d+)*)"
    r"(?:\s*(?P<half>[aApP])\.?[mM]\b)?"
    r"|(?P<full_hour>1?\d)\s?(?P<half2>[aApP])(?:\.[mM]\.|[mM]\b)"
    r"|(?P<chain>\d+(?:\.\d+){2,})"
)
"""A pattern, to be searched where no digit and no letter stands before."""


def spell_dates(text: str) -> str:
    """Return a text with the dates and times of other languages in one spelling.

    >>> spell_dates("am 7. Mai 2024"), spell_dates("7月9日"), spell_dates("下午3点5分")
    ('am 2024-05-07', 'Jul 9', '3:05 pm')
    """
    if not text.isascii():
        text = _DATE_VIETNAMESE.sub(lambda date: _spell(date[3], date[2], date[1]), text)
        text = _DATE_EAST.sub(lambda date: _spell(*date.groups()), _HALF_EAST.sub(_spell_half, text))
    text = _TIME_GERMAN.sub(r"\1:\2", text)
    return _DATE_ELSEWHERE.sub(_spell_elsewhere, _TIME_IN_DATE.sub(" ", text))


def _spell(year: str | None, month: str, day: str) -> str:
    if not 0 < int(month) < 13:
        return f"{month}/{day}"
    return f"{year}-{month.zfill(2)}-{day.zfill(2)}" if year else f"{_MONTHS[int(month) - 1].title()} {int(day)}"


def _spell_elsewhere(date: re.Match[str]) -> str:
    day, *months, year = date.groups()
    return _spell(year, str(next(i for i, month in enumerate(months, 1) if month)), day)


def _spell_half(time: re.Match[str]) -> str:
    half, hour, mark, minutes = time.groups()
    if mark == ":" and not minutes:
        return time[0]
    return f"{hour}:{(minutes or '').zfill(2)} {'am' if half in ('上午', '午前', '오전') else 'pm'}"


def date_or_time(match: re.Match[str]) -> str:
    """Return a date as YYYY-MM-DD, a time of day with 24 hours, anything else (a ratio, a version) as it is written."""
    hour, full_hour, minutes, *halves = match.group("hour", "full_hour", "minutes", "half", "half2")
    if hour := hour or full_hour:
        hour = hour.lstrip("0") or "0"
        if len(hour) < 3 and (half := next(filter(None, halves), None)):
            hour = str(int(hour) % 12 + 12 * (half in "pP"))
        return f"{hour}:{minutes or '00'}"
    parts = re.findall(r"\d+", match[0])
    named, year_last, mark, chain = match.group("named", "year_last", "mark2", "chain")
    if named:
        month = re.search(MONTH, match[0], re.IGNORECASE)
        assert month
        year = [part for part in parts if len(part) == 4]
        number = _MONTHS.index(month[0][:3].lower()) + 1
        parts = [*year, str(number), *(part for part in parts if len(part) < 4)]
    elif year_last:
        first, second, last = parts
        # 3/4/2031 is the 4th of March, as in the US, 3.4.2031 the 3rd of April, as in Europe.
        parts = [last, second, first] if mark == "." or int(first) > 12 else [last, first, second]
    return chain or "-".join(part.zfill(2) for part in parts)

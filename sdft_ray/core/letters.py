r"""The letter, A to J, that a text chooses among options.

In: a text in any of several languages. Out: the letter; None where it names none, or several. A letter counts where
words name it as the answer (`the answer is B`, `選B`), where it stands alone, or where it is the only option that the
text puts forward and does not reject.
"""

from __future__ import annotations

import re
import unicodedata

from sdft_ray.core.spelling import final_part, spell_plainly, without_commands

# The words of several languages that name a letter as the answer, and those that may stand between.
_NAMING = unicodedata.normalize(  # as the texts are
    "NFKC",
    r"\banswers?|\bans\b|\bsolution|\b(?:correct|right|best) (?:option|choice|letter|statement|one)"
    r"|\b(?:selected|response|result|verdict|choice|option|pick|correct)(?=[*_]*\s?:)|\bmy (?:choice|pick)"
    r"|\bI(?:'d| would| will|'ll)? (?:choose|pick|select|take|go with|say)|\blet(?:'s| us) go with"
    r"|\bthe letter(?= is)|(?:\A|[.!?]\s)(?:choose|select)"
    r"|\bI think(?: it(?:'s| is))?|\b(?:it|this|that|which)(?:'s| is| must be| has to be)"
    r"(?=\s[(\[*\"]*[A-J][)\]*\"]*(?:[.,;]|\s?\Z|\n))"
    r"|\b(?:therefore|thus|hence|so)\b,?(?=\s[(\[*\"]*[A-J][)\]*\"]*(?:\.|\s?\Z|\n))"
    r"|\b(?:antwort|lösung|(?:richtig|korrekt)(?= ist|:)|ich (?:wähle|nehme)|réponse|je choisis|respuesta|elijo"
    r"|resposta|(?:opci[oó]n|alternativa|letra|opção|opzione) corre(?:c?ta|tta)|escolho|letra|risposta|scelgo"
    r"|antwoord|odpowiedź|cevap|yan\u0131t|jawaban|odpov[eě]ď|odgovor|răspuns(?:ul)?|válasz"
    r"|đáp án|câu trả lời|svar(?:et)?|vastaus|ответ|выбираю|відповідь"
    r"|απάντηση)|תשובה|الإجابة|الجواب|پاسخ|جواب|उत्तर|উত্তর|விடை|คำตอบ|ข้อ|答案|答え|回答|解答|正解|(?<![不非])[选選][择擇]?(?![项項])|正确(?:的?选项|的)|正しいのは|정답|답|보기"
    r"|(?:(?m:^)|[\uff0c\u3002])\s*(?:答(?=:)|(?:所以|因此)?(?:应该)?(?=是[A-J]))|我认为",
)
_REJECTING = r"(?:not|nicht|pas|no(?: es)?|não é|non è|cannot be|can't be|isn't|不是|不选)\s?[(\[*\"]*[A-J][)\]*\"]*"
_INSTEAD = (
    rf"{_REJECTING},?\s?(?:but|mais|sondern|sino|ma|mas|(?:so )?it(?:'s| is| must be)|而?是|[选選])|ではなく|아니라"
)
_BETWEEN = (
    r"\b(?:is|would|be|must|should|will|has|to|the|this|question|correct|right|best|option|choice|letter|here|now"
    r"|indeed|thus|therefore|hence|just|\w+ly|likely|most"
    r"|correcta|correcte|correta|corretta|corect|este|je|jest|صحیح|yang benar|đúng|benar|الصحيحة|الصحيح"
    r"|ist|lautet|die|der|buchstabe|est|la|le|lettre|l'option|es|opción|letra|a|é|è|alternativa|opção|opzione|lettera"
    r"|optie|to|er|är|on|είναι|היא|adalah|là|вариант|буква|это|هي|هو)\b|है|ที่ถูกต้อง|คือ|应该|應該|[就即]?是|即|应?[为為]|應為"
    r"|[选選][項项擇择]?|選択肢|は|が|은|는"
)
_LATIN = r"A-Za-z0-9À-\u04ff"
_NOT_LATIN = r"[^\W\d_A-Za-z\u00c0-\u024f]"
_CASE_ENDS = rf"(?=\s*(?:[).,:;!*_$}}\]<\"'`。、」』】]|\n|\Z|[\u2010-\u2015-]\s|{_NOT_LATIN}))"
# A bare A or I, and a letter in lower case, are also words: as an option they have a mark or a reason behind them.
_BECAUSE = r"\s(?:because|since|as|weil|denn|car|parce|porque|perché|потому)\b"
_AND = r"(?:\s?(?:[,;、/&]|\b(?:and|or|und|oder|et|ou|y|o|e|и|или|dan|atau)\b|[和或与與及]|または|と|또는|[과와])\s?)+"
_ALSO = rf"(?P<also>[)\]*]*{_AND}[(\[*]*[A-J](?![A-Za-z])(?!\s(?:is|are|was|were|being|would|fails?|has)\b))?"
_WRONG = (
    r"[)\]*\"'】]*\s?(?:(?:is|are|was)(?:n't| not| wrong| incorrect| false)|(?:ist|est|es) (?:falsch|faux|incorrect)"
    r"|[项項]?是?(?:错|錯|不对|不正确|误)|ではな|ではあり|じゃな|は間違|は誤|[이가] 아[니닙])"
)
_OPTION = (
    rf"(?<![{_LATIN}])(?:[(\[【]([A-Ja-j])[)\]】]|([B-HJ])(?!['\u2019](?![\s.,]|\Z)[a-ce-z]|[+#]|-?[{_LATIN}])"
    rf"|([AI])(?:{_CASE_ENDS}|(?={_BECAUSE})|(?='d))|([a-j])(?!\.\w){_CASE_ENDS})(?!\.\s?[A-Z]\.)(?!{_WRONG})(?![)\]*\"]*\s?\?)"
)
_NAMED = re.compile(
    rf"(?:(?i:{_NAMING})|{_INSTEAD})(?:[\s*_:=\"'`$>「『【】\]«»\u2192\u2010-\u2015-]|(?i:{_BETWEEN})){{0,30}}{_OPTION}{_ALSO}"
    rf"|(?<![{_LATIN}])([A-J])[)\]*_\"]*\s*(?:(?:is|ist|est|es|é|è)(?: (?:the|die|la|a|my(?: final)?))? (?i:correct"
    r"|right|best|richtig|answer|korrekt|bonne|juste|certa|giusta)\b|(?:选项|選項)?是?(?:正确|正確|对(?!不))|が正|です"
    r"|(?:번|번?이|가)? ?(?:정답|맞)|입니다)"
)
# The text begins with its choice, and goes on with why, or what is wrong with others.
_FIRST = re.compile(
    rf"\W*([A-J])\b[)\]*_\"]*(?:\s*\n|,?{_BECAUSE}|,?\s\(?(?:not|nicht|pas)\s|\s*[,.。]?(?:因为|因為|不是)|\s[\u2013\u2014-]\s"
    r"|,\s(?!\W*[A-J]\b|I\b))"
)
# Commands are taken whole: the d of an empty \boxed{} is no letter.
_ONLY_LETTER = re.compile(r"(?:\\(?:[A-Za-z]++|\W)|[^\w\\]|_)*+([A-Ja-j])(?![+#'\u2019-])[\W_]*")
_FORMULA = re.compile(r"\\[()\[\]]")
_HTML = re.compile(r"<([A-Za-z]{1,9})>([^<]{0,80})</\1>")  # an end makes it HTML: a letter may stand as <B>
_QUOTED = re.compile(r"(?<![\w'\"])[\"'\u2018\u201c]([A-J])[\"'\u2019\u201d](?![\w'\"])")
_PUT_FORWARD = re.compile(
    r"(?:(?:(?m:^)|(?<=[.!?;]\s))[^\w\n]*([A-J])(?:[.):、](?!\s?[A-Z]\.)|[^\w\n+#'-]*(?m:$))"
    r"|(?<![^\W_])(?<!not )[(\[]([A-J])[)\]]"
    r"|(?m:^)[^\w\n]*([a-j])[.:]\s|(?<![^\s*_])\(?([a-j])\)\s|(?m:^)\W*([b-hj]) is (?=correct|right)"
    r"|(?i:\b(?:option|choice|letter|opción|opção|alternativa|buchstabe|lettre)\s|[选選][项項]|選択肢)[\s*_]*(?:([A-J])(?![A-Za-z])"
    rf"|([a-j])(?=\sis\s|{_CASE_ENDS})))(?!{_WRONG})"
)


def final_choice(text: str) -> str | None:
    """Return the letter, A to J, that a text chooses; None where it names none, or several without an answer.

    >>> [final_choice(s) for s in ("B", "(b)", "B. Paris", "The correct answer is (B)", "A dog", "(A) or (B)")]
    ['B', 'B', 'B', 'B', None, None]
    """
    text = _FORMULA.sub(" ", without_commands(spell_plainly(final_part(text)[0])))
    text = _HTML.sub(r" \2 ", text)
    text = _QUOTED.sub(r"\1", text).strip()
    if match := _ONLY_LETTER.fullmatch(text):
        return match[1].upper()
    if named := list(_NAMED.finditer(text)):
        last = named[-1]
        return None if last["also"] else next(letter for letter in last.groups() if letter).upper()
    if first := _FIRST.match(text):
        return first[1]
    letters = {"".join(filter(None, groups)).upper() for groups in _PUT_FORWARD.findall(text)}
    return letters.pop() if len(letters) == 1 else None

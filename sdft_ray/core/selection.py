"""Conditional selection of rewrites, with a reason for every row that keeps its reference.

In: a row and the generations of the unpruned model for it. Out: the response to train on, its source and the reason.
No row is dropped (arXiv 2410.09982): a rewrite that fails any check gives way to the reference, verbatim.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

from sdft_ray.core.rows import Row
from sdft_ray.core.words import INVISIBLE, runs, split_unspaced

Reason = Literal[
    "kept",
    "error",
    "truncated",
    "empty",
    "leak",
    "refusal",
    "repeated",
    "too_long",
    "no_answer",
    "wrong_answer",
    "tool_call",
    "plain",
]
REASONS: tuple[Reason, ...] = get_args(Reason)

# Finish reasons of an engine that finished: at the end of its text, or at max_new_tokens.
COMPLETE = ("stop", "length")


class Generated(Protocol):
    """What selection reads of a generation, fresh or from the ledger."""

    @property
    def text(self) -> str: ...
    @property
    def finish_reason(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generation of the engine for a row."""

    text: str
    finish_reason: str
    """One of COMPLETE, or the reason for none, such as `error` (then `text` is the message)."""
    prompt_tokens: int = 0
    tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Checker:
    """How to compare responses with a row's answer."""

    read: Callable[[str], str | None]
    """The final answer of a text, in one spelling; None where it has none."""
    kind: str
    """A noun for the answers, in the plural."""
    same: Callable[[str, str], bool] = operator.eq
    """Whether the row's answer and that of a response are the same."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """The rules that a rewrite is judged by."""

    checker: Checker | None
    """Absent: rewrites are not compared with an answer."""
    filters: Mapping[str, Any]
    """For each of FILTERS its setting, false or None switches it off; for `leak` and `refusal` further phrases."""
    strip_thinking: bool = True


@dataclasses.dataclass(frozen=True)
class Selected:
    """The response that a row is trained on."""

    response: str
    source: Literal["distilled", "reference"]
    reason: Reason
    sample: int = 0
    """The index of the kept generation; 0 where none was kept."""


def select_response(row: Row, generations: Sequence[Generated], rules: Rules) -> Selected:
    """Return the first rewrite that passes every check, else the reference verbatim and why the first one failed.

    Before: reference "4 + 4 = 8\\n#### 8", answer "8", generation "Four and four make 8.".
    After: Selected("Four and four make 8.", "distilled", "kept").
    """
    if reason := reason_not_to_rewrite(row):
        return Selected(row.reference, "reference", reason)
    reasons: list[Reason] = []
    for sample, generation in enumerate(generations):
        text = strip_thoughts(generation.text) if rules.strip_thinking else generation.text.strip()
        reasons.append(_judge(row, text, generation.finish_reason, rules))
        if reasons[-1] == "kept":
            assert text is not None
            return Selected(text, "distilled", "kept", sample)
    return Selected(row.reference, "reference", reasons[0])


# Calls that stand in the text of a response: of Hermes and Qwen, Glaive, Mistral, Llama, Command R and Granite.
_CALL = re.compile(
    r"<\|?(?:tool_?calls?|function_?calls?)\b|<\|START_ACTION\|>|<\|python_tag\|>|\[TOOL_CALLS\]|<function=\w",
    re.IGNORECASE,
)


def reason_not_to_rewrite(row: Row) -> Reason | None:
    """Return why a row keeps its reference whatever the model writes: no other words call a function, and a plain text
    answers nothing."""
    if row.conversation is not None and row.exchange.is_plain:
        return "plain"
    is_call = _CALL.search(row.reference) or (row.conversation is not None and row.exchange.calls)
    return "tool_call" if is_call else None


_MARKS = r"[\s*_`#~>]*"
_ANNOUNCEMENT = re.compile(rf".*[:\uff1a]{_MARKS}")


def _judge(row: Row, text: str | None, finish_reason: str, rules: Rules) -> Reason:
    """Return `kept`, or the first check that a rewrite fails."""
    if finish_reason not in COMPLETE:
        return "error"
    if finish_reason == "length" or text is None:
        return "truncated"
    if is_empty(text, row):
        return "empty"
    for reason, fails in FILTERS.items():
        if rules.filters[reason] and fails(text, row, rules.filters):
            return reason
    if rules.checker is None:
        return "kept"
    answer = rules.checker.read(text)
    if answer is None:
        return "no_answer"
    same = row.answer is not None and rules.checker.same(row.answer, answer)
    return "kept" if same else "wrong_answer"


def is_empty(text: str, row: Row) -> bool:
    """Return whether a text holds nothing but marks of Markdown, or only announces an answer in one line that ends in
    a colon ("The answer is:") where the reference does not end so."""
    if re.fullmatch(_MARKS, text.translate(INVISIBLE)):
        return True
    return bool(_ANNOUNCEMENT.fullmatch(text) and not row.reference.rstrip().endswith((":", "\uff1a")))


# --- thoughts of a rewrite beside its response --------------------------------------------------------------------

_NAME = (
    r"(?:think|thinking|thoughts?|reason|reasoning|reflection|scratchpad|analysis|rationale|deliberation|monologue|cot"
    r"|chain_of_thought)(?:_(?:process|more))?"
)
_THOUGHT = rf"(?:[a-z]+[:_])?{_NAME}\s*"
# A tag opens thoughts where it begins a line or follows a sentence, not in the middle of one that mentions it. An end
# without a beginning (a template may hold that) is not set off by a space, or ends a sentence and its line, or has an
# empty line behind it.
_THOUGHT_TAG = re.compile(
    rf"(?=[<\[\u25c1])(?:"
    rf"(?P<open>(?<![^\s.!?>\]\u3002\uff01\uff1f][ \t])(?<![`'\"(\u201c\u2018])(?:[<\u25c1]{_THOUGHT}[>\u25b7]"
    rf"|(?-i:\[THINK\])|<\|(?:(?:begin|start)_(?:of_)?)?{_NAME}(?:_start)?\|>|<(?:\|channel|unused94)>thought))"
    r"|(?P<unspaced>(?<![ \t`'\"(\u201c\u2018])|(?<=[.!?] )(?=\S+\s*\n))?"
    rf"(?:[<\u25c1]/{_THOUGHT}[>\u25b7]|(?-i:\[/THINK\])"
    rf"|<\|(?:(?:end_(?:of_)?|/){_NAME}|{_NAME}_end)\|>|<channel\|>|<unused95>)(?P<line>\s*\n\s*\n)?)",
    re.IGNORECASE,
)
# What such models write around the response itself.
_RESPONSE_TAG = re.compile(
    r"\A<\|(?:begin_of_|start_)(?:solution|response)\|>\s*|\s*<\|end_(?:of_)?(?:solution|response)\|>\Z", re.IGNORECASE
)
# The channels of gpt-oss and their remains without special tokens; the process and response of Granite.
_CHANNEL = r"<\|channel\|>\s*"
_CHANNELS = re.compile(
    rf"(?:<\|start\|>assistant\s*)?{_CHANNEL}(?:analysis|commentary|final)\b"
    r"|(?:assistant)?analysis(?![\s.,:;!?'\u2019)-]|[a-z]*\b)|(?:assistant)?analysis(?=.*assistantfinal)"
    r"|(?:assistant)?final(?=[^\sa-z.,:;!?'\u2019)-])|(?i:here(?:'s| is) my thought process:)",
    re.DOTALL,
)
_FINAL = re.compile(
    rf"{_CHANNEL}final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>(?P<raw>.*?)(?:<\|(?:end|return|call)\|>|\Z)"
    r"|(?:\A|assistant)final(?P<plain>.*)|(?i:here(?:'s| is) my response:)(?P<response>.*)",
    re.DOTALL,
)


def strip_thoughts(text: str) -> str | None:
    """Return a text without the thoughts in it; None where they do not end.

    >>> strip_thoughts("<think>4 and 4, hm.</think> It is 8."), strip_thoughts("It is 8."), strip_thoughts("<think>4")
    ('It is 8.', 'It is 8.', None)
    """
    text = text.strip()
    if _CHANNELS.match(text):
        final = _FINAL.search(text)
        return final and next(part for part in final.groups() if part is not None).strip()
    responses, start, inside = [""], 0, False
    for tag in _THOUGHT_TAG.finditer(text):
        opens, unspaced, line = tag.groups()
        if opens:
            if not inside:
                responses.append(text[start : tag.start()])
            inside = True
        elif inside or unspaced is not None or line:
            if not inside:  # a template opened the thoughts itself
                responses.clear()
            start, inside = tag.end(), False
    kept = "\n".join(filter(None, map(str.strip, [*responses, text[start:]])))
    return None if inside else _RESPONSE_TAG.sub("", kept)


def thought_tags(text: str) -> frozenset[str]:
    """Return the different tags in a text that begin or end thoughts, also those that it only mentions.

    >>> sorted(thought_tags("<think>4 and 4, hm.</think> It is 8.")), thought_tags("It is 8.")
    (['</think>', '<think>'], frozenset())
    """
    return frozenset(tag[0].strip() for tag in _THOUGHT_TAG.finditer(text))


# --- filters: reasons to refuse a rewrite whatever its answer -----------------------------------------------------

# Phrases by which a rewrite mentions the task of rewriting instead of answering (after arXiv 2402.13669).
_LEAKS = re.compile(
    r"\b(?:reference|provided|given|your|above|original|sample|example) (?:answer|response|solution)\b"
    r"|\b(?:answer|response|solution) (?:(?:that )?(?:is|was) )?(?:provided|given)\b"
    r"|\bthe reference (?:says|states|gives)\b"
    r"|\b(?:(?:according to|based on) the|as (?:mentioned |stated )?(?:in )?the) reference\b"
    r"|\bin (?:my|your) own words\b|\b(?:my|your) own version\b|\brewrit|\b(?:re|para)phrased\b",
    re.IGNORECASE,
)
_SORRY = (
    r"(?:(?:i'm |i am )?(?:very |so |really )?(?:sorry|afraid)|i apologi[sz]e|(?:my )?apologies|unfortunately"
    r"|i regret)\b\W*(?:(?:but|that) )?"
)
_CANNOT = r"(?:i|we) (?:cannot|can'?t|can not|won't|will not)"
_TASK = "help|assist|answer|provide|fulfill?|comply|complete|do (?:that|this)|rewrite|generate|create|discuss|respond"
_DECLINE = (
    r"i (?:must|have to) decline|i(?:'m| am) not comfortable|i (?:don't|do not) have (?:access|enough information)"
)
_REFUSAL = re.compile(
    # Such words open a refusal; in the middle of a text they may be anybody's.
    rf"\A\W*(?:(?:{_SORRY})?(?:i(?:'m| am) (?:unable|not able) to|{_DECLINE})|{_SORRY}(?:{_CANNOT}|i don't)"
    rf"|{_CANNOT} (?:in good conscience|{_TASK}))\b"
    r"|\b(?:as an? ai(?:,| (?:language )?(?:model|assistant))|as an? (?:large )?language model"
    r"|i(?:'m| am) (?:just |only )?an? (?:ai|artificial intelligence|(?:large )?language model)\b)",
    re.IGNORECASE,
)
# The same in other languages: an apology opens the text, and then something cannot be done; or an AI speaks.
_REFUSAL_ELSEWHERE = re.compile(
    r"\A\W*(?:很?抱歉|对不起|對不起|申し訳|すみません|죄송|미안|ขออภัย|ขอโทษ|عذر|آسف|क्षमा|माफ़|(?:es )?tut mir leid"
    r"|leider|(?:je suis )?désolé|lo siento|lamento|desculpe|sinto muito|mi dispiace|извините|к сожалению)[^\n]{0,60}?"
    r"(?:无法|無法|不能|不便|できません|できかね|出来ません|수 없|ไม่สามารถ|لا (?:أستطيع|يمكن)|नहीं कर"
    r"|kann [^.\n]{0,30}nicht|ne peux pas|no puedo|não posso|non posso|не могу|не можем)"
    r"|[作做][为為](?:一[个個名])?(?:AI|人工智[能慧]|(?:大型)?语言模型)(?:(?:语言)?(?:模型|助手))?[,\uff0c]"
    r"|(?:AI|言語モデル)として[,\u3001]|AI (?:언어 )?모델로서"
    r"|\b(?:als (?:eine? )?(?:KI(?:-\w+)?|sprachmodell)|en tant qu(?:'|e )(?:ia|modèle de langage)"
    r"|como (?:una? |um )?(?:ia|modelo de l\w+)|come modello linguistico|как (?:языковая модель|ии)),",
    re.IGNORECASE,
)
# Below this a rewrite is never too long: a reference may be one number, and its rewrite shows the way there.
_ALWAYS_SHORT_CHARS = 1000


def mentions_rewriting(text: str, row: Row, filters: Mapping[str, Any]) -> bool:
    """Return whether a rewrite mentions its task in words that the row does not use."""
    phrases = [match[0] for match in _LEAKS.finditer(text)] + _find_phrases(filters.get("leak_phrases", ()), text)
    row_text = "\n".join(row.texts).casefold() if phrases else ""
    return any(phrase.casefold() not in row_text for phrase in phrases)


def refuses(text: str, row: Row, filters: Mapping[str, Any]) -> bool:
    """Return whether a rewrite refuses where the reference does not."""
    phrases = filters.get("refusal_phrases", ())

    def does(each: str) -> bool:
        each = each.replace("\u2019", "'")
        return bool(_REFUSAL.search(each) or _REFUSAL_ELSEWHERE.search(each) or _find_phrases(phrases, each))

    return does(text) and not does(row.reference)


def _find_phrases(phrases: Sequence[str], text: str) -> list[str]:
    """Return the phrases that a text holds, in whatever case."""
    return [phrase for phrase in phrases if phrase.casefold() in text.casefold()]


def repeats_itself(text: str, row: Row, _: Mapping[str, Any]) -> bool:
    """Return whether a rewrite is repetitive where the reference is not."""
    return is_repetitive(text) and not is_repetitive(row.reference)


def is_too_long(text: str, row: Row, filters: Mapping[str, Any]) -> bool:
    """Return whether a rewrite has more than `too_long` times the reference's characters, and more than a few."""
    return len(text) > max(filters["too_long"] * len(row.reference), _ALWAYS_SHORT_CHARS)


_LONGEST_WORD = 50  # in characters


def is_repetitive(text: str, words: int = 4, times: int = 5) -> bool:
    """Return whether some run of `words` words occurs at least `times` times and fills over half of the text.

    >>> is_repetitive("so it is 4 and " * 20), is_repetitive("2 + 2 = 4. The answer is 4.")
    (True, False)
    """
    pieces = split_unspaced(text.split())
    if len(longest := max(pieces, key=len, default="")) > max(_LONGEST_WORD, len(text) / 2):  # no spaces are set
        pieces, words = list(longest), _LONGEST_WORD // 4
    # At most one in `times` of the runs that count begins with a word of its own; they must be over half of the text.
    if 2 * len(set(pieces)) >= (1 + 1 / times) * len(pieces):
        return False
    counts = Counter(runs(pieces, words))
    if not counts:
        return False
    most = counts.most_common(1)[0][1]
    repeated = sum(count for count in counts.values() if count >= times)
    return most >= times and repeated > len(pieces) / 2


FILTERS: dict[Reason, Callable[[str, Row, Mapping[str, Any]], bool]] = {
    "leak": mentions_rewriting,
    "refusal": refuses,
    "repeated": repeats_itself,
    "too_long": is_too_long,
}

"""Read what a chat template writes around a response.

In: a tokenizer with a chat template. Out: conversations as text, what stands between the generation prompt and a
response, and what ends a turn. It is read off a conversation of two messages, because templates are programs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from sdft_ray.core.rows import Exchange, Given, Message
from sdft_ray.core.selection import strip_thoughts
from sdft_ray.data.text import first_line
from sdft_ray.errors import UserError, problem

# The default of Llama 3.1's template.
_DATE = "26 Jul 2024"
# A template that thinks by default would put its thoughts into the responses.
NO_THINKING = {"enable_thinking": False}
# The conversation that shows what a template writes around a response. Templates hold plain words: <|START_RESPONSE|>.
QUESTION, RESPONSE, OTHER_RESPONSE = "QUESTION-1729", "RESPONSE-1729", "another"
PROBE = Exchange(QUESTION, RESPONSE)
OTHER_TEMPLATE = "Give the model a chat template that writes whole conversations as its generation prompt begins them"


@dataclasses.dataclass(frozen=True)
class Turn:
    """The text that a chat template writes around a response, after its generation prompt."""

    aside: str
    """The end of the generation prompt that a conversation lacks: an empty thought; mostly empty."""
    opening: str
    """The text of the model before the response: a channel, the end of a thought; mostly empty."""
    closing: str
    """The text after the response, up to the end-of-turn token; empty where the template writes none."""
    dropped: str
    """The text after the end-of-turn token: it belongs to no turn."""


def render(
    tokenizer: Any, given: Given, target: Message | None = None, template_options: Mapping[str, Any] = NO_THINKING
) -> str:
    """Return a conversation and its last turn as the template writes them; without that turn, the generation prompt."""
    messages = [message.plain() for message in (*given.messages, *([target] if target else []))]
    # Some templates print today's date, and the same recipe would be another one tomorrow; other templates ignore it.
    options = {"date_string": _DATE, "strftime_now": lambda _format: _DATE, **template_options}
    text: str = tokenizer.apply_chat_template(
        messages, tools=given.tools, tokenize=False, add_generation_prompt=target is None, **options
    )
    return text


@functools.lru_cache
def read_turn(tokenizer: Any, _template: str) -> Turn:
    """Return the text that the chat template writes around a response; raises UserError for an unusable template."""
    given, whole = _render_probe(tokenizer, None), _render_probe(tokenizer, RESPONSE)
    shared = given[: sum(itertools.accumulate(map(str.__eq__, given, whole), min))]
    if shared != given:  # two marks may begin alike
        shared = re.sub(r"[<\[][^>\]\s]*\Z", "", shared)
    aside = given[len(shared) :]
    opening, inside, after = whole[len(shared) :].partition(RESPONSE)
    if QUESTION not in given or not inside:
        raise UserError(problem("model", "its chat template does not write both messages", OTHER_TEMPLATE))
    if aside and not (aside.strip() and strip_thoughts(aside) == "" and strip_thoughts(f"<think>{opening}") is None):
        ends = given[-40:]
        what = f"its chat template's generation prompt ends in {ends!r}, but a conversation does not go on from there"
        raise UserError(problem("model", what, OTHER_TEMPLATE))
    if thought := unended_thought(given.rpartition(QUESTION)[2] + opening):
        what = f"its chat template puts a response inside a thought that does not end ({thought!r})"
        raise UserError(problem("model", what, OTHER_TEMPLATE))
    closing = read_end(tokenizer, _template)[0]
    return Turn(aside, opening, closing, after.removeprefix(closing))


@functools.lru_cache
def read_end(tokenizer: Any, _template: str) -> tuple[str, int]:
    """Return the text from a response's end to the end-of-turn token, and that token's id."""
    after = _render_probe(tokenizer, RESPONSE).rpartition(RESPONSE)[2]
    tokens = added_tokens(tokenizer)
    if _render_probe(tokenizer, None).endswith(after):  # the beginning of the next turn ends none
        after = ""
    if (match := any_of(tokens).search(after)) is not None:
        closing, eos = after[: match.end()], tokenizer.eos_token
        if eos and after.startswith(closing + eos):  # a mark may close the response, and EOS the turn
            return closing + eos, tokenizer.eos_token_id
        return closing, tokens[match[0]]
    if tokenizer.eos_token_id is None:
        what = "its chat template ends no turn with a token, and its tokenizer has no EOS token"
        raise UserError(problem("model", what, "Set eos_token in its tokenizer_config.json"))
    return "", int(tokenizer.eos_token_id)


def _render_probe(tokenizer: Any, response: str | None) -> str:
    try:
        return render(tokenizer, PROBE.given, None if response is None else Message("assistant", response))
    except Exception as error:  # a template can raise anything
        what = f"its chat template cannot write a conversation of a user and an assistant ({first_line(error)})"
        raise UserError(problem("model", what, "Correct its chat template")) from error


def unended_thought(text: str) -> str:
    """Return the thought in a text that does not end; mostly nothing."""
    starts = [text[match.start() :] for match in re.finditer(r"[<\[]", text)]
    return next((start for start in reversed(starts) if strip_thoughts(start) is None), "")


def added_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the ids of the tokens that are matched in a text before it is tokenised, except runs of blanks."""
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches the longest token at a place; without tokens it matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")

"""Turn a row into token ids: the chat prompt, and the training sequence with its mask.

In: a tokenizer with a chat template, and strings. Out: lists of token ids. The template writes the whole conversation,
and it is tokenised exactly once: a templated string tokenised again would get a second BOS. The tokens that a model has
to write after the generation prompt carry loss, so that training ends where generation begins:

    template                       given to the model            carries loss
    ChatML, Llama 3, Gemma, …      …assistant\n                  4<|im_end|>
    opens a thought                …assistant\n<think>\n         \n</think>\n\n4<|im_end|>
    channels                       …<|start|>assistant           <|channel|>final<|message|>4<|return|>
    writes an empty thought        …<|turn>model\n<|channel>thought\n<channel|>              4<turn|>

A control token that is spelled out in a row is text: only the template ends a turn.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from sdft_ray.core.rows import Exchange, Given, Message, TrainingRow
from sdft_ray.core.selection import strip_thoughts, thought_tags
from sdft_ray.data.template import (
    NO_THINKING,
    OTHER_RESPONSE,
    OTHER_TEMPLATE,
    PROBE,
    QUESTION,
    RESPONSE,
    Turn,
    added_tokens,
    any_of,
    read_end,
    read_turn,
    render,
    unended_thought,
)
from sdft_ray.data.text import first_line
from sdft_ray.errors import UserError, problem

_BATCH_ROWS = 1024  # tokenised at once: enough for every core, and little memory
# No text can hold these, as they are drawn anew in every process; they never reach a token id.
_SPELLED, _WRITTEN = f"<{uuid.uuid4().hex}:", f"<{uuid.uuid4().hex}:"


def render_prompt(tokenizer: Any, prompt: str, template_options: Mapping[str, Any] = NO_THINKING) -> list[int]:
    """Return the token ids of a user message up to where the assistant begins to speak."""
    return render_prompts(tokenizer, [Exchange(prompt, "").given], template_options)[0]


def render_prompts(
    tokenizer: Any, given: Iterable[Given], template_options: Mapping[str, Any] = NO_THINKING
) -> list[list[int]]:
    """Return the token ids of conversations, each up to where the assistant begins to speak."""
    texts = [render(tokenizer, _hide_all(tokenizer, each), template_options=template_options) for each in given]
    return _tokenise(tokenizer, texts)


def encode_row(tokenizer: Any, prompt: str, response: str, conversation: str | None = None) -> TrainingRow:
    """Return what the model is given + response + end of turn; only the part that it has to write carries loss.

    A row before: prompt "2 + 2?", response "4". After, decoded: `<|im_start|>user\\n2 + 2?<|im_end|>\\n
    <|im_start|>assistant\\n` without loss, then `4<|im_end|>` with loss.
    """
    return next(encode_rows(tokenizer, [Exchange(prompt, response, conversation)]))


def encode_rows(tokenizer: Any, rows: Iterable[Exchange]) -> Iterator[TrainingRow]:
    """Yield each exchange as `encode_row` returns it; many at once are tokenised faster. All of a plain text carries
    loss, except for its first token, which nothing predicts.

    Raises UserError where the chat template cannot give a training sequence, or changes a response.
    """
    turn, end = read_turn(tokenizer, str(tokenizer.chat_template)), end_of_turn(tokenizer)
    rows, seen = iter(rows), set[_Form]()
    while batch := list(itertools.islice(rows, _BATCH_ROWS)):
        texts = [_write_exchange(tokenizer, turn, row, seen) for row in batch]
        prompts = _tokenise(tokenizer, [given for given, _ in texts])
        wholes = _tokenise(tokenizer, [given + written for given, written in texts])
        for row, (_, written), before, whole in zip(batch, texts, prompts, wholes, strict=True):
            if row.is_plain:
                ids = [*_beginning(tokenizer), *whole]
                yield TrainingRow(ids, min(1, len(ids)))
                continue
            if whole[: len(before)] != before:  # a token across the border: the model is given the prompt's own tokens
                whole = before + _continue(tokenizer, written)
            yield TrainingRow(whole if turn.closing else [*whole, end], len(before))


def require_writable(tokenizer: Any, rows: Iterable[Exchange]) -> None:
    """Raise UserError where the chat template cannot write conversations as rows have them.

    One row of each form is tried: a template asks which roles follow each other, and for tools, and not for words. But
    many look for thoughts in a response, so one with each set of tags of those is tried, too.
    """
    turn, forms = read_turn(tokenizer, str(tokenizer.chat_template)), dict[_Form, Exchange]()
    thinking: dict[frozenset[str], Exchange] = {}
    for row in rows:
        if row.conversation is not None:
            forms.setdefault(_form(row), row)
        if tags := thought_tags(row.response):
            thinking.setdefault(tags, row)
    for row in forms.values():
        is_silent = row.calls and not row.response.strip()
        _write_exchange(tokenizer, turn, row._replace(response="" if is_silent else RESPONSE), set())
    for row in thinking.values():
        _write_exchange(tokenizer, turn, row, set())


_Form = tuple[bool, tuple[tuple[str, bool, bool], ...]]
"""The form of a conversation: whether there are tools; and of the response and of each message before it the role,
whether it says something, and whether it calls functions."""


def _form(row: Exchange) -> _Form:
    given = row.given
    turns = [Message("assistant", row.response, row.calls or None), *given.messages]
    said = ((turn.role, bool(turn.content.strip()), turn.tool_calls is not None) for turn in turns)
    return bool(given.tools), tuple(said)


def require_trainable(tokenizer: Any) -> None:
    """Raise UserError where the chat template cannot give a training sequence."""
    encode_row(tokenizer, QUESTION, RESPONSE)


def end_of_turn(tokenizer: Any) -> int:
    """Return the id of the token with which the chat template closes an assistant turn, else the EOS token."""
    return read_end(tokenizer, str(tokenizer.chat_template))[1]


def response_ends(tokenizer: Any, named: int | Sequence[int] | None) -> list[int]:
    """Return the tokens at which a response ends: the end of turn, the tokenizer's EOS, and those named in its config.

    generation_config.json is not read, so that its content moves no number.
    """
    ids = [named] if isinstance(named, int) else list(named or ())
    return list(dict.fromkeys(i for i in (end_of_turn(tokenizer), tokenizer.eos_token_id, *ids) if i is not None))


def opening_ids(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that the model has to write before every response; mostly none."""
    if not read_turn(tokenizer, str(tokenizer.chat_template)).opening:
        return ()
    first, second = (encode_row(tokenizer, QUESTION, response) for response in (RESPONSE, OTHER_RESPONSE))
    pairs = enumerate(zip(first.ids, second.ids, strict=False))
    return tuple(first.ids[first.trained_from : next(i for i, (a, b) in pairs if a != b)])


def read_generated(tokenizer: Any, ids: Sequence[int], text: str, opened: str) -> str:
    """Return the text of generated token ids without the opening that the template has before every response; without
    that opening, `opened` (the thought that the prompt opens) and the text."""
    opening = opening_ids(tokenizer)
    if opening and tuple(ids[: len(opening)]) == opening:
        return text.removeprefix(tokenizer.decode(opening, skip_special_tokens=True))
    return opened + text


def opened_thought(tokenizer: Any, template_options: Mapping[str, Any] = NO_THINKING) -> str:
    """Return the thought that the generation prompt opens and leaves to the model to end; mostly nothing."""
    written = render(tokenizer, PROBE.given, template_options=template_options)
    return unended_thought(written.rpartition(QUESTION)[2])


# --- the template -------------------------------------------------------------------------------------------------


def _write_exchange(tokenizer: Any, turn: Turn, row: Exchange, seen: set[_Form]) -> tuple[str, str]:
    """Return an exchange as the template writes it: the part given to the model, and the part it has to write.

    seen: forms of conversations whose tools the template writes; that of this one is added.
    """
    if row.is_plain:
        return "", _hide_spelled(tokenizer, row.response)
    given, response = _hide_all(tokenizer, row.given), _hide_spelled(tokenizer, row.response)
    calls, untold = _hide_inside(tokenizer, row.calls), False
    target = Message("assistant", response, calls or None)
    try:
        before, whole = render(tokenizer, given), render(tokenizer, given, target)
        if given.tools and (form := _form(row)) not in seen:
            seen.add(form)
            untold = render(tokenizer, given._replace(tools=None)) == before
    except Exception as error:  # a template can raise anything
        what = f"its chat template cannot write {_describe(row)} ({first_line(error)})"
        raise UserError(problem("model", what, "Remove such rows")) from error
    shared = before.removesuffix(turn.aside)
    written = _end_turn(tokenizer, turn, whole[len(shared) :]) if calls else whole[len(shared) :]
    if not whole.startswith(shared):
        if thought_tags(row.response):
            _refuse_change(row)
        what = f"its chat template writes {_describe(row)} otherwise before its response than with it"
        if lost := _unwritten(whole, whole, given, target):
            what = f"its chat template leaves out {lost} of {_describe(row)} once a response is there"
        raise UserError(problem("model", what, OTHER_TEMPLATE))
    if lacks := _unwritten(before, written, given, target) or (untold and "the tools"):
        do = "Give the model a chat template that writes it, or leave such rows out"
        raise UserError(problem("model", f"its chat template does not write {lacks} of {_describe(row)}", do))
    if calls:
        return before, written
    after = turn.closing + turn.dropped
    inside = written[len(turn.opening) : len(written) - len(after)]
    if written != turn.opening + inside + after or inside.strip() != response.strip():  # many templates strip it
        _refuse_change(row)
    return before, turn.opening + inside + turn.closing


def _refuse_change(row: Exchange) -> NoReturn:
    what = f"its chat template changes the response {_shorten(row.response)} of {_describe(row)}"
    raise UserError(problem("model", what, "Remove such rows"))


def _unwritten(before: str, written: str, given: Given, target: Message) -> str:
    """Return what a template leaves out, in words; nothing where it writes all but the thoughts of earlier responses.
    It may write results of tools as JSON."""
    turns = [(message, before) for message in given.messages] + ([(target, written)] if target.tool_calls else [])
    for message, text in turns:
        content = message.content.strip()
        others = [json.dumps(content, ensure_ascii=only)[1:-1] for only in (False, True)]
        if message.role == "assistant" and message is not target:
            others = [strip_thoughts(content) or ""]
        if not any(spelled in text for spelled in (content, *others)):
            return f"the message of the {message.role}"
    functions = [("the tool", tool, before) for tool in given.tools or ()]
    functions += [("the call of", call, text) for message, text in turns for call in message.tool_calls or ()]
    for kind, function, text in functions:
        if (name := str(function.get("function", function).get("name", ""))) not in text:
            return f"{kind} {name}"
    return ""


def _end_turn(tokenizer: Any, turn: Turn, written: str) -> str:
    """Return what the model writes of a turn that calls functions, which may end in a token of its own."""
    if written.endswith(turn.closing + turn.dropped):
        return written.removesuffix(turn.dropped)
    ends = [match.end() for match in any_of(added_tokens(tokenizer)).finditer(written)]
    return written[: ends[-1]] if ends else written


def _describe(row: Exchange) -> str:
    if row.conversation is None:
        return f"the prompt {_shorten(row.prompt)}"
    asked = [message.content for message in row.given.messages if message.role == "user"]
    return f"the conversation at {_shorten(asked[-1] if asked else '')}"


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}…")


# --- the tokenizer ------------------------------------------------------------------------------------------------


def _tokenise(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts that a template wrote."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False).input_ids
    for i, text in enumerate(texts):
        if _SPELLED in text:
            ids[i] = _tokenise_apart(tokenizer, text)
    return ids


def _continue(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of text that follows other text: SentencePiece puts a piece of its own before the
    beginning of a text."""
    for before in ("\n", "a"):
        lead, both = _tokenise(tokenizer, [before, before + text])
        if both[: len(lead)] == lead:
            return both[len(lead) :]
    return _tokenise(tokenizer, [text])[0]


@functools.lru_cache
def _control_tokens(tokenizer: Any, _template: str) -> tuple[re.Pattern[str], tuple[str, ...]]:
    """Return the tokens that only a template may write, and a pattern that finds them.

    They are the special ones, and those around a user's message and at the end of a turn, which some tokenizers do not
    mark as special. Marks of thoughts and tools are not among them: a response may hold thoughts.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    written = render(tokenizer, PROBE.given).partition(QUESTION)
    around = written[0] + read_end(tokenizer, _template)[0]
    tokens = sorted(special | set(any_of(added_tokens(tokenizer)).findall(around)))
    return any_of(tokens), tuple(tokens)


def _hide_spelled(tokenizer: Any, text: str) -> str:
    """Return a text with stand-ins for the control tokens that it spells out."""
    pattern, tokens = _control_tokens(tokenizer, str(tokenizer.chat_template))
    return pattern.sub(lambda match: f"{_SPELLED}{tokens.index(match[0])}>", text)


def _hide_all(tokenizer: Any, given: Given) -> Given:
    messages = [Message(*_hide_inside(tokenizer, [*message])) for message in given.messages]
    return Given(messages, _hide_inside(tokenizer, given.tools))


def _hide_inside(tokenizer: Any, value: Any) -> Any:
    """Return plain JSON with stand-ins for the control tokens that its texts spell out."""
    match value:
        case str():
            return _hide_spelled(tokenizer, value)
        case list():
            return [_hide_inside(tokenizer, inner) for inner in value]
        case dict():
            return {key: _hide_inside(tokenizer, inner) for key, inner in value.items()}
        case _:
            return value


@functools.lru_cache
def _beginning(tokenizer: Any) -> list[int]:
    """Return the tokens that the tokenizer puts before a plain text: BOS, or none."""
    ids, bare = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    return ids[: ids.index(bare[0])]


def _tokenise_apart(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text in which stand-ins mean spelled-out control tokens."""
    pattern, tokens = _control_tokens(tokenizer, str(tokenizer.chat_template))
    text = pattern.sub(lambda match: f"{_WRITTEN}{tokens.index(match[0])}>", text)
    text = re.sub(f"{_SPELLED}([0-9]+)>", lambda match: tokens[int(match[1])], text)
    ids: list[int] = _blind_tokenizer(tokenizer, tokens).encode(text, add_special_tokens=False).ids
    return ids


@functools.lru_cache
def _blind_tokenizer(tokenizer: Any, tokens: tuple[str, ...]) -> Any:
    """Return the tokenizer with other spellings of control tokens, which no text holds: the usual ones are text."""
    from tokenizers import Tokenizer

    if not tokenizer.is_fast:
        what = f"a row spells out one of {', '.join(tokens[:3])}, …, and its tokenizer cannot take that as text"
        raise UserError(problem("model", what, "Save the tokenizer as tokenizer.json"))
    written = {token: f"{_WRITTEN}{i}>" for i, token in enumerate(tokens)}
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"post_processor": None, "truncation": None, "padding": None}
    for added in state["added_tokens"]:
        text = added["content"]
        added["content"] = written.get(text, text)
    model = state["model"]
    vocab, unknown = model["vocab"], model.get("unk_token")
    pairs = vocab.items() if isinstance(vocab, dict) else vocab
    renamed = [(written.get(piece, piece), value) for piece, value in pairs]
    model["vocab"] = dict(renamed) if isinstance(vocab, dict) else renamed
    if unknown in written:
        model["unk_token"] = written[unknown]
    return Tokenizer.from_str(json.dumps(state))

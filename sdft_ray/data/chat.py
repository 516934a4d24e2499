"""Turn a row into token ids: the chat prompt, and the training sequence with its mask.

In: a tokenizer with a chat template, and strings. Out: lists of token ids. The template writes the whole conversation,
and it is tokenised exactly once: a templated string tokenised again would get a second BOS. The tokens that a model has
to write after the generation prompt carry loss, so that training ends where generation begins:

    template                       given to the model            carries loss
    ChatML, Llama 3, Gemma, …      …assistant\n                  4<|im_end|>
    opens a thought                …assistant\n<think>\n         \n</think>\n\n4<|im_end|>
    channels                       …<|start|>assistant           <|channel|>final<|message|>4<|return|>

A control token that is spelled out in a row is text: only the template ends a turn.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sdft_ray.core.rows import TrainingRow
from sdft_ray.core.selection import strip_thoughts
from sdft_ray.errors import UserError, problem

# The default of Llama 3.1's template.
_DATE = "26 Jul 2024"
# A template that thinks by default would put its thoughts into the responses.
_NO_THINKING = {"enable_thinking": False}
# The conversation that shows what a template writes around a response.
_QUESTION, _RESPONSE, _OTHER_RESPONSE = "QUESTION", "RESPONSE", "another"
_BATCH_ROWS = 1024  # tokenised at once: enough for every core, and little memory
# No text can hold these, as they are drawn anew in every process; they never reach a token id.
_SPELLED, _WRITTEN = f"<{uuid.uuid4().hex}:", f"<{uuid.uuid4().hex}:"
_OTHER_TEMPLATE = "Give the model a chat template that writes whole conversations as its generation prompt begins them"


@dataclasses.dataclass(frozen=True)
class _Turn:
    """The text that a chat template writes around a response, after its generation prompt."""

    opening: str
    """The text of the model before the response: a channel, the end of a thought; mostly empty."""
    closing: str
    """The text after the response, up to the end-of-turn token; empty where the template writes none."""
    dropped: str
    """The text after the end-of-turn token: it belongs to no turn."""


def render_prompt(tokenizer: Any, prompt: str, template_options: Mapping[str, Any] = _NO_THINKING) -> list[int]:
    """Return the token ids of a user message up to where the assistant begins to speak."""
    text = _render(tokenizer, _hide_spelled(tokenizer, prompt), template_options=template_options)
    return _tokenise(tokenizer, [text])[0]


def encode_row(tokenizer: Any, prompt: str, response: str) -> TrainingRow:
    """Return prompt + response + end of turn; only the part that the model has to write carries loss.

    A row before: prompt "2 + 2?", response "4". After, decoded: `<|im_start|>user\\n2 + 2?<|im_end|>\\n
    <|im_start|>assistant\\n` without loss, then `4<|im_end|>` with loss.
    """
    return next(encode_rows(tokenizer, [(prompt, response)]))


def encode_rows(tokenizer: Any, rows: Iterable[tuple[str, str]]) -> Iterator[TrainingRow]:
    """Yield each (prompt, response) as `encode_row` returns it; many at once are tokenised faster.

    Raises UserError where the chat template cannot give a training sequence, or changes a response.
    """
    turn, end = _read_turn(tokenizer, str(tokenizer.chat_template)), end_of_turn(tokenizer)
    rows = list(rows)
    for begin in range(0, len(rows), _BATCH_ROWS):
        texts = [_write_conversation(tokenizer, turn, *row) for row in rows[begin : begin + _BATCH_ROWS]]
        prompts = _tokenise(tokenizer, [given for given, _ in texts])
        wholes = _tokenise(tokenizer, [given + written for given, written in texts])
        for (_, written), before, whole in zip(texts, prompts, wholes, strict=True):
            if whole[: len(before)] != before:  # a token across the border: the model is given the prompt's own tokens
                whole = before + _continue(tokenizer, written)
            yield TrainingRow(whole if turn.closing else [*whole, end], len(before))


def require_trainable(tokenizer: Any) -> None:
    """Raise UserError where the chat template cannot give a training sequence."""
    encode_row(tokenizer, _QUESTION, _RESPONSE)


def end_of_turn(tokenizer: Any) -> int:
    """Return the id of the token with which the chat template closes an assistant turn, else the EOS token."""
    return _read_end(tokenizer, str(tokenizer.chat_template))[1]


def response_ends(tokenizer: Any, named: int | Sequence[int] | None) -> list[int]:
    """Return the tokens at which a response ends: the end of turn, the tokenizer's EOS, and those named in its config.

    generation_config.json is not read, so that its content moves no number.
    """
    ids = [named] if isinstance(named, int) else list(named or ())
    return list(dict.fromkeys(i for i in (end_of_turn(tokenizer), tokenizer.eos_token_id, *ids) if i is not None))


def opening_ids(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that the model has to write before every response; mostly none."""
    if not _read_turn(tokenizer, str(tokenizer.chat_template)).opening:
        return ()
    first, second = encode_rows(tokenizer, [(_QUESTION, _RESPONSE), (_QUESTION, _OTHER_RESPONSE)])
    pairs = enumerate(zip(first.ids, second.ids, strict=False))
    return tuple(first.ids[first.trained_from : next(i for i, (a, b) in pairs if a != b)])


def read_generated(tokenizer: Any, ids: Sequence[int], text: str, opened: str) -> str:
    """Return the text of generated token ids without the opening that the template has before every response; without
    that opening, `opened` (the thought that the prompt opens) and the text."""
    opening = opening_ids(tokenizer)
    if opening and tuple(ids[: len(opening)]) == opening:
        return text.removeprefix(tokenizer.decode(opening, skip_special_tokens=True))
    return opened + text


def opened_thought(tokenizer: Any, template_options: Mapping[str, Any] = _NO_THINKING) -> str:
    """Return the thought that the generation prompt opens and leaves to the model to end; mostly nothing."""
    return _unended_thought(_render(tokenizer, _QUESTION, template_options=template_options).rpartition(_QUESTION)[2])


def _unended_thought(text: str) -> str:
    starts = [text[match.start() :] for match in re.finditer(r"[<\[]", text)]
    return next((start for start in reversed(starts) if strip_thoughts(start) is None), "")


# --- the template -------------------------------------------------------------------------------------------------


def _render(
    tokenizer: Any, prompt: str, response: str | None = None, template_options: Mapping[str, Any] = _NO_THINKING
) -> str:
    """Return a prompt and its response as the template writes them; without a response, the generation prompt."""
    messages = [{"role": "user", "content": prompt}]
    if response is not None:
        messages.append({"role": "assistant", "content": response})
    # Some templates print today's date, and the same recipe would be another one tomorrow; other templates ignore it.
    options = {"date_string": _DATE, "strftime_now": lambda _format: _DATE, **template_options}
    text: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=response is None, **options
    )
    return text


@functools.lru_cache
def _read_turn(tokenizer: Any, _template: str) -> _Turn:
    """Return the text that the chat template writes around a response; raises UserError for an unusable template."""
    given, whole = _render_probe(tokenizer, None), _render_probe(tokenizer, _RESPONSE)
    opening, inside, after = whole.removeprefix(given).partition(_RESPONSE)
    if _QUESTION not in given or not inside:
        raise UserError(problem("model", "its chat template does not write both messages", _OTHER_TEMPLATE))
    if not whole.startswith(given):
        ends = given[-40:]
        what = f"its chat template's generation prompt ends in {ends!r}, but a conversation does not go on from there"
        raise UserError(problem("model", what, _OTHER_TEMPLATE))
    if thought := _unended_thought(given.rpartition(_QUESTION)[2] + opening):
        what = f"its chat template puts a response inside a thought that does not end ({thought!r})"
        raise UserError(problem("model", what, _OTHER_TEMPLATE))
    closing = _read_end(tokenizer, _template)[0]
    return _Turn(opening, closing, after.removeprefix(closing))


@functools.lru_cache
def _read_end(tokenizer: Any, _template: str) -> tuple[str, int]:
    """Return the text from a response's end to the end-of-turn token, and that token's id."""
    after = _render_probe(tokenizer, _RESPONSE).rpartition(_RESPONSE)[2]
    tokens = _added_tokens(tokenizer)
    if (match := _any_of(tokens).search(after)) is not None:
        return after[: match.end()], tokens[match[0]]
    if tokenizer.eos_token_id is None:
        what = "its chat template ends no turn with a token, and its tokenizer has no EOS token"
        raise UserError(problem("model", what, "Set eos_token in its tokenizer_config.json"))
    return "", int(tokenizer.eos_token_id)


def _render_probe(tokenizer: Any, response: str | None) -> str:
    try:
        return _render(tokenizer, _QUESTION, response)
    except Exception as error:  # a template can raise anything
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        what = f"its chat template cannot write a conversation of a user and an assistant ({line})"
        raise UserError(problem("model", what, "Correct its chat template")) from error


def _write_conversation(tokenizer: Any, turn: _Turn, prompt: str, response: str) -> tuple[str, str]:
    """Return a conversation as the template writes it: the part given to the model, and the part it has to write."""
    prompt, response = _hide_spelled(tokenizer, prompt), _hide_spelled(tokenizer, response)
    given, whole = _render(tokenizer, prompt), _render(tokenizer, prompt, response)
    before, after = given + turn.opening, turn.closing + turn.dropped
    inside = whole[len(before) : len(whole) - len(after)]
    if whole != before + inside + after or inside.strip() != response.strip():  # many templates strip what they write
        what = f"its chat template changes the response {_shorten(response)} of the prompt {_shorten(prompt)}"
        raise UserError(problem("model", what, "Remove such rows"))
    return given, turn.opening + inside + turn.closing


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}…")


# --- the tokenizer ------------------------------------------------------------------------------------------------


def _tokenise(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts that a template wrote."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
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


def _added_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the ids of the tokens that are matched in a text before it is tokenised, except runs of blanks."""
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches the longest token at a place; without tokens it matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


@functools.lru_cache
def _control_tokens(tokenizer: Any, _template: str) -> tuple[re.Pattern[str], tuple[str, ...]]:
    """Return the tokens that only a template may write, and a pattern that finds them.

    They are the special ones, and those around a user's message and at the end of a turn, which some tokenizers do not
    mark as special. Marks of thoughts and tools are not among them: a response may hold thoughts.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    written = _render(tokenizer, _QUESTION).partition(_QUESTION)
    around = written[0] + _read_end(tokenizer, _template)[0]
    tokens = sorted(special | set(_any_of(_added_tokens(tokenizer)).findall(around)))
    return _any_of(tokens), tuple(tokens)


def _hide_spelled(tokenizer: Any, text: str) -> str:
    """Return a text with stand-ins for the control tokens that it spells out."""
    pattern, tokens = _control_tokens(tokenizer, str(tokenizer.chat_template))
    return pattern.sub(lambda match: f"{_SPELLED}{tokens.index(match[0])}>", text)


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
        added["content"] = written.get(added["content"], added["content"])
    model = state["model"]
    if model.get("unk_token") in written:
        model["unk_token"] = written[model["unk_token"]]
    pairs = model["vocab"].items() if isinstance(model["vocab"], dict) else model["vocab"]
    renamed = [(written.get(piece, piece), value) for piece, value in pairs]
    model["vocab"] = dict(renamed) if isinstance(model["vocab"], dict) else renamed
    return Tokenizer.from_str(json.dumps(state))

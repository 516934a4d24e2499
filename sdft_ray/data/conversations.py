"""Turn the conversation in a record of a file into rows: (history, response).

In: the value of a column of messages, of one of tools, and which form they have. Out: one row for the last response, or
one for each. Messages get one form here, that of chat templates, so that nothing behind this module knows another one:

    messages   {"role": "user", "content": "…"}; a call: {"role": "assistant", "tool_calls": [{"function": {…}}]}
    sharegpt   {"from": "human", "value": "…"};  a call: {"from": "function_call", "value": "{\"name\": …}"}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sdft_ray.core.rows import Given, Message, Row, write_conversation
from sdft_ray.data.text import load_json
from sdft_ray.errors import UserError, nearest, problem
from sdft_ray.spec.sources import Format, Turns

_KEYS: dict[Format, tuple[str, str]] = {"messages": ("role", "content"), "sharegpt": ("from", "value")}
_ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's API has or had this and the next but one for them
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("tool", "function", "ipython", "observation", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bard", "bing", "bot", "ai", "chatbot"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}
"""The names of roles in data sets, in lower case and with _ for -."""
_KEPT = ("name", "tool_call_id", "reasoning_content")  # of a message, beside role, content and calls
_ARGUMENTS = ("arguments", "parameters")  # of a call; one of another name may be null beside it
_BESIDE_ARGUMENTS = ("name", "id", "type", "index", "description")  # of a call
_TEXT_PARTS = ("text", "input_text", "output_text")  # of content, as OpenAI's two APIs name them


def find_conversations(values: Mapping[str, Any]) -> dict[str, Format]:
    """Return the columns of a record that hold the turns of a conversation, and the form of each."""
    found: dict[str, Format] = {}
    for name, value in values.items():
        turns = _unpack(value)
        keys = (
            [turn.keys() for turn in map(_unpack, turns) if isinstance(turn, dict)] if isinstance(turns, list) else []
        )
        for form, pair in _KEYS.items():
            if any({*pair} <= known for known in keys):
                found.setdefault(name, form)
    return found


def is_answered(turns: Any, form: Format) -> bool:
    """Return whether a user asks in a conversation that `find_conversations` found, and its last turn responds."""
    roles = roles_in(turns, form)
    return "user" in roles and roles[-1] in ("assistant", "function_call")


def roles_in(turns: Any, form: Format) -> list[str | None]:
    """Return the role of each turn of a conversation; None where a turn has no known one."""
    key, turns = _KEYS[form][0], _unpack(turns)
    each = [*map(_unpack, turns)] if isinstance(turns, list) else []
    return [_role_of(turn.get(key)) if isinstance(turn, dict) else None for turn in each]


def add_response(turns: Any, response: Any, form: Format, where: str) -> list[Any]:
    """Return the turns of a conversation with its response behind them, which is a text or turns of its own."""
    if not find_conversations({"": response}):
        response = [dict(zip(_KEYS[form], ("assistant", response), strict=True))]
    return [*_as_list(turns, where), *_as_list(response, where)]


def read_conversation(
    turns: Any, tools: Any, system: str | None, form: Format, which: Turns, answer: str | None, where: str
) -> Iterator[Row]:
    """Yield the rows of a conversation: that of its last turn, or of every turn of the assistant.

    A turn that nothing answers gives a row without reference, and so does a response before which no user asks, or a
    turn says nothing, and one whose `weight` is 0, as OpenAI's files write that it is not trained: such rows are left
    out and counted. answer: the final answer of the last response. Raises UserError for another form.
    """
    turns = [_unpack(turn) for turn in _as_list(turns, where)]
    messages = [_read_message(turn, form, f"{where}, turn {i}") for i, turn in enumerate(turns, 1)]
    untrained = [message for turn, message in zip(turns, messages, strict=True) if turn.get("weight") == 0]
    messages = [message for message in messages if message.role != "system" or not _says_nothing(message)]
    if system and system.strip() and messages[:1] != [Message("system", system)]:
        if any(message.role == "system" for message in messages):
            do = "Remove rows.fields.context"
            raise UserError(problem(where, "has a message of the system, and its column of context another", do))
        messages.insert(0, Message("system", system))
    described = _read_tools(tools, where)
    ends = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if not ends or ends[-1] != len(messages) - 1:
        ends.append(len(messages))
    for end in ends if which == "each" else ends[-1:]:
        last = end == ends[-1]
        response = [message for message in messages[end : end + 1] if not any(message is other for other in untrained)]
        yield _row(Given(messages[:end], described), response, answer if last else None, where)


def _row(given: Given, response: Sequence[Message], answer: str | None, where: str) -> Row:
    asked = [message for message in given.messages if message.role == "user"]
    prompt = asked[-1].content if asked else ""
    target = Message("assistant", "")
    if asked and response and not any(map(_says_nothing, given.messages)):
        target = response[0]
    try:
        conversation = write_conversation(given, target.tool_calls)
    except TypeError as error:  # a date or a decimal in a column of a table
        what = f"holds a value in a call or a tool that JSON has no form for ({error})"
        raise UserError(problem(where, what, "Write it as text")) from None
    return Row(prompt, target.content, answer, conversation=conversation)


def _says_nothing(message: Message) -> bool:
    return not (message.content.strip() or message.tool_calls or message.role == "tool")


def _unpack(value: Any) -> Any:
    """Return the value of JSON in a text, also of JSON within JSON; the text where it is none."""
    while isinstance(value, str):
        try:
            value = load_json(value)
        except (ValueError, RecursionError):
            break
    return value


def _as_list(value: Any, where: str, name: str = "messages") -> list[Any]:
    value = _unpack(value)
    if isinstance(value, str):
        raise UserError(problem(where, f"{name} is text, and no JSON list", "Fix this row"))
    if not isinstance(value, list):
        raise UserError(problem(where, f"{name} is no list", "Fix this row"))
    return value


def _read_message(turn: Any, form: Format, where: str) -> Message:
    role_key, content_key = _KEYS[form]
    other = next(pair for name, pair in _KEYS.items() if name != form)
    if not isinstance(turn, dict) or role_key not in turn:
        what, do = f"has no {role_key}", f"Write each turn with the keys {role_key} and {content_key}"
        if isinstance(turn, dict) and {*other} <= turn.keys():
            do = f"Set rows.fields.format: {'sharegpt' if form == 'messages' else 'messages'}"
        raise UserError(problem(where, what, do))
    given, content = turn[role_key], turn.get(content_key)
    role = _role_of(given)
    if role == "function_call":
        return Message("assistant", "", [_read_call(call, where) for call in _calls(content) or [None]])
    if role is None:
        raise UserError(problem(where, f"has the unknown role {given}", nearest(str(given), _ROLES)))
    calls = _unpack(turn.get("tool_calls")) or _calls(turn.get("function_call"))
    if content_key not in turn and not calls:
        what = f"has no {content_key} (its keys: {', '.join(map(str, turn))})"
        raise UserError(problem(where, what, f"Name its text {content_key}"))
    content = _read_content(content, bool(calls), where)
    made = [_read_call(call, where) for call in _as_list(calls, where, "tool_calls")] if calls else None
    return Message(role, content, made, **{key: turn.get(key) for key in _KEPT})


def _role_of(given: Any) -> str | None:
    return _ROLES.get(given.strip().lower().replace("-", "_")) if isinstance(given, str) else None


def _read_content(content: Any, may_lack: bool, where: str) -> str:
    """Return the text of a message, which may be given in parts."""
    if isinstance(content, list):
        parts = [_text_of(part) for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise UserError(problem(where, "has content that is no text", "Leave such conversations out"))
        return "".join(map(str, parts))
    if content is None and may_lack:
        return ""
    if not isinstance(content, str):
        raise UserError(problem(where, "has no text as its content", "Fix this row"))
    return content


def _text_of(part: Any) -> Any:
    """Return the text of a part of a message; None of any other part."""
    if not isinstance(part, dict):
        return part if isinstance(part, str) else None
    return part.get("text") if part.get("type") in _TEXT_PARTS or part.keys() == {"text"} else None


def _calls(content: Any) -> list[Any]:
    """Return the calls in one value: JSON of one of them, or of a list; none where there is no value."""
    value = _unpack(content)  # what stays text is no call
    return value if isinstance(value, list) else [value] if value else []


def _read_call(call: Any, where: str) -> dict[str, Any]:
    """Return a call with its arguments as an object, as chat templates write them."""
    call = _unpack(call)
    function = _unpack(call.get("function") or call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(name := function.get("name"), str):
        raise UserError(problem(where, "calls a function without a name", "Fix this row"))
    given = next((each for name in _ARGUMENTS if (each := function.get(name)) is not None), None)
    others = [key for key in function if key not in _BESIDE_ARGUMENTS]
    if others and not function.keys() & {*_ARGUMENTS}:
        what = f"calls {name} without arguments (its keys: {', '.join(map(str, others))})"
        raise UserError(problem(where, what, "Name them arguments"))
    arguments = _unpack(given or {})
    if not isinstance(arguments, dict):
        what = f"calls {name} with arguments that are no JSON object"
        raise UserError(problem(where, what, "Fix this row"))
    number = call.get("id")
    read = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return read | ({"id": number} if number else {})


def _read_tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    """Return descriptions of functions in the form of chat templates; None where there are none."""
    tools = _unpack(tools)
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return None
    read = []
    for tool in map(_unpack, _as_list(tools, where, "tools")):
        function = _unpack(tool.get("function") or tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(problem(where, "has a tool without a name", "Fix this row"))
        if isinstance(parameters := _unpack(function.get("parameters")), dict):
            function = {**function, "parameters": parameters}
        read.append({"type": "function", "function": function})
    return read or None

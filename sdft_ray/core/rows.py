"""A row: as text, as a conversation, and as the trainer sees it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

PLAIN = '{"plain":true}'
"""The conversation of a plain text, which answers nothing."""


class Message(NamedTuple):
    """A turn, by the names that chat templates read; None is what it does not have."""

    role: str
    content: str
    tool_calls: list[dict[str, Any]] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def plain(self) -> dict[str, Any]:
        """Return it as templates take it."""
        return {name: value for name, value in self._asdict().items() if value is not None}


class Given(NamedTuple):
    """What a model is given before it writes a response."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    """Descriptions of the functions that it may call."""


class Exchange(NamedTuple):
    """What a model is given, and its response."""

    prompt: str
    """The last message of the user."""
    response: str
    conversation: str | None = None
    """JSON of what a single message does not hold: see `write_conversation`."""

    @property
    def is_plain(self) -> bool:
        """Whether it is a text by itself, all of which is trained."""
        return self.conversation == PLAIN

    @property
    def given(self) -> Given:
        """What comes before the response."""
        if self.conversation is None:
            return Given([Message("user", self.prompt)])
        parts = json.loads(self.conversation)
        return Given([Message(**plain) for plain in parts.get("messages", [])], parts.get("tools"))

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The functions that the response calls; mostly none."""
        found = json.loads(self.conversation).get("calls", []) if self.conversation else []
        return list(found)


def write_conversation(given: Given, calls: list[dict[str, Any]] | None = None) -> str | None:
    """Return JSON of what leads to a response, and of what it calls; None where a prompt says it all."""
    if not (given.tools or calls) and given.messages in ([], [Message("user", m.content) for m in given.messages[:1]]):
        return None
    parts = {"messages": [message.plain() for message in given.messages], "tools": given.tools, "calls": calls}
    return json.dumps(
        {name: value for name, value in parts.items() if value},
        ensure_ascii=False,  # and in their order, which templates write them in
        separators=(",", ":"),
    )


class Row(NamedTuple):
    """A prompt with its reference."""

    prompt: str
    """The last message of the user; empty for plain text."""
    reference: str
    answer: str | None = None
    """The final answer; of a raw row what the source has a column for."""
    id: str = ""
    """A hash of the content, once it is decided which rows exist."""
    conversation: str | None = None
    """JSON of what leads to the reference where it is more than the prompt, and of the functions that it calls."""
    origin: int = 0
    """Which of the recipe's sources it is of."""

    @property
    def exchange(self) -> Exchange:
        """The row as it came: what is given, and the reference."""
        return Exchange(self.prompt, self.reference, self.conversation)

    @property
    def is_blank(self) -> bool:
        """Whether nothing is asked, or nothing is responded."""
        if self.conversation is None:
            return not self.prompt.strip() or not self.reference.strip()
        return not (self.reference.strip() or self.exchange.calls)

    @property
    def key(self) -> str:
        """What rows have in common that ask the same: no two of them may exist."""
        if self.conversation is None:
            return " ".join(self.prompt.split())
        parts = json.loads(self.conversation)
        return " ".join(" ".join(_values_in([parts.get("messages", self.reference), parts.get("tools")])).split())

    @property
    def texts(self) -> list[str]:
        """Every text in it, in order; the last one is the reference."""
        if self.conversation is None:
            return [self.prompt, self.reference]
        return [*texts_in(json.loads(self.conversation)), self.reference]

    @property
    def content_id(self) -> str:
        """The content hash that a row is known by everywhere: 16 hex digits."""
        given = self.prompt if self.conversation is None else self.conversation
        return hashlib.sha256(f"{given}\0{self.reference}".encode()).hexdigest()[:16]


def texts_in(value: Any) -> Iterator[str]:
    """Yield every text in plain JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_in(inner)


def _values_in(value: Any) -> Iterator[str]:
    """Yield every name, text, number and other value in plain JSON, as text."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from _values_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _values_in(inner)
    else:
        yield str(value)


@dataclasses.dataclass(frozen=True)
class TrainingRow:
    """A row as the model sees it in training."""

    ids: list[int]
    """Prompt, response and end of turn."""
    trained_from: int
    """Index of the first token that carries loss."""

"""A model behind an OpenAI-compatible endpoint: asked over HTTP, patiently, and never believed blindly.

In: the address, the model's name, and requests of `/completions`. Out: completions; or a reason for one that cannot be
served; or a UserError or StageFailed in one line for an endpoint that cannot be used.
A request is tried again where the server is busy, fails, drops the connection or answers with something else. A server
that is down is waited for, and those tries are not the request's. The key comes from the environment of this process
alone: it is in no recipe, log, file or argument.
"""

from __future__ import annotations

import email.utils
import itertools
import logging
import os
import random
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pydantic import Field, JsonValue, ValidationError, model_validator

from sdft_ray.errors import StageFailed, UserError, nearest, problem
from sdft_ray.spec.sources import KEY_VARIABLE, ServedModel
from sdft_ray.spec.wording import mistakes
from sdft_ray.store.record import Record

if TYPE_CHECKING:
    import httpx2

R = TypeVar("R", bound=Record)
TRIES = 5  # of a request at a server that is up: then it is the request that cannot be served
_STREAK = 16  # requests that were given up without one that was served in between: then it is the server
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds between two tries
_LOOK_SECONDS = 15.0  # for an answer that needs no model
_BUSY = (429, 503)  # what no request is to blame for
_DOWN = (502, 503, 504)  # a gateway says it of a server that starts
_PROBE = "The answer is 42.\n\nÜbung: <|im_end|> 3 x 4 = 12"


class Completion(NamedTuple):
    """What the model wrote."""

    text: str
    finish_reason: str
    prompt_tokens: int | None
    """None where the server does not count."""
    tokens: int | None
    ids: list[int] | None
    """Its tokens, where the server returns them."""


class CannotServe(Exception):
    """One request cannot be served; the message is the endpoint's reason."""


class Stopped(Exception):
    """A request was not made, or not again: its answer is not wanted any more."""


class _Again(Exception):
    """A try failed in a way that may pass."""

    def __init__(self, what: str, after: float | None = None, busy: bool = False, down: bool = False) -> None:
        super().__init__(what)
        self.after, self.busy, self.down = after, busy, down


class _Choice(Record):
    text: str
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _Usage(Record):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Answer(Record):
    model: str
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


class _Model(Record):
    id: str
    max_model_len: int | None = None
    """Of vLLM's servers: tokens of prompt and answer together, at most."""


class _Models(Record):
    data: list[_Model]

    @model_validator(mode="before")
    @classmethod
    def _take_bare_list(cls, value: Any) -> Any:  # of Together's API
        return {"data": value} if isinstance(value, list) else value


class _Tokens(Record):
    tokens: list[int]


class Client:
    """Asks one model behind an endpoint; threads share it."""

    def __init__(
        self, served: ServedModel, requests: int = 1, timeout_seconds: float = 600, patience_seconds: float = 600
    ) -> None:
        import httpx2

        logging.getLogger("httpx2").setLevel(logging.WARNING)  # else it logs every request
        key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (key.isascii() and key.isprintable()):  # the client's own error would repeat it
            raise UserError(problem(KEY_VARIABLE, "holds a character that no key has", "Set it to the key alone"))
        self._served, self._key, self._patience = served, key, patience_seconds
        self._http = httpx2.Client(
            base_url=f"{served.endpoint}/",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(timeout_seconds, connect=_LOOK_SECONDS),
            limits=httpx2.Limits(max_connections=requests, max_keepalive_connections=requests),
        )
        self._lock = threading.Lock()
        self._last_served, self._given_up = time.monotonic(), 0

    def complete(self, body: Mapping[str, JsonValue], stopped: threading.Event) -> Completion:
        """Return what the model writes; raises CannotServe where it is this request that fails.

        stopped: once it is set, Stopped is raised instead of another try; an endpoint that cannot be used sets it.
        """
        try:
            return self._complete(body, stopped)
        except (UserError, StageFailed):
            stopped.set()  # nobody else has to find that out
            raise

    def _complete(self, body: Mapping[str, JsonValue], stopped: threading.Event) -> Completion:
        begun, tries = time.monotonic(), 0
        for pause in _pauses():
            if stopped.is_set():
                raise Stopped
            try:
                completion = self._post(body)
            except _Again as again:
                tries += not again.busy
                if tries == TRIES:
                    self._give_up(str(again))
                if time.monotonic() - max(begun, self._last_served) > self._patience:
                    raise self._unusable(str(again)) from None
                stopped.wait(min(again.after or pause, self._patience))
                if again.down:
                    self._wait_until_up(stopped)
                continue
            self._last_served, self._given_up = time.monotonic(), 0
            return completion
        raise AssertionError("pauses have no end")

    def require_model(self, new_tokens: int = 0) -> None:
        """Raise UserError unless the endpoint is there, lets this process in and serves the model, in whose context so
        many new tokens fit behind a prompt, as far as the server says how long that is."""
        try:
            answer = self._send("GET", "models", timeout=_LOOK_SECONDS)
            served = {model.id: model.max_model_len for model in self._read(_Models, answer).data}
        except _Again as again:
            do = "Start the server, or correct the address"
            raise UserError(problem(self._where("endpoint"), f"{self._served.endpoint} {again}", do)) from None
        if self._served.model not in served:
            what = f"{self._served.model} is not served at {self._served.endpoint}"
            raise UserError(problem(self._where("model"), what, nearest(self._served.model, served)))
        context = served[self._served.model]
        if context is not None and new_tokens >= context:
            what = f"{new_tokens} is more than the context of {context} holds that {self._served.model} is served with"
            do = f"Lower distill.max_new_tokens to {context - 1} or less, or raise the server's --max-model-len"
            raise UserError(problem("distill.max_new_tokens", what, do))

    def require_tokenizer(self, tokenizer: Any) -> None:
        """Raise UserError where the server says that its tokenizer is another one: it would read other prompts."""
        root = self._served.endpoint.removesuffix("/v1")
        body = {"model": self._served.model, "prompt": _PROBE, "add_special_tokens": False}
        try:
            answer = self._send("POST", f"{root}/tokenize", json=body, timeout=_LOOK_SECONDS)
            theirs = self._read(_Tokens, answer).tokens
        except (_Again, CannotServe, UserError):  # only vLLM's server and some others have it
            return
        if theirs and theirs != tokenizer.encode(_PROBE, add_special_tokens=False):  # llama.cpp's reads another field
            what = f"{self._served.model} has another tokenizer than the one that writes its prompts"
            do = "Set distill.teacher.tokenizer to a directory with its own tokenizer"
            raise UserError(problem(self._where("tokenizer"), what, do))

    def _post(self, body: Mapping[str, JsonValue]) -> Completion:
        answer = self._read(_Answer, self._send("POST", "completions", json=body))
        named = answer.model.removeprefix(self._served.model)
        if named == answer.model or (named and self._served.api == "vllm"):  # others may add a version
            what = f"{self._served.endpoint} was asked for {self._served.model} and answers as {answer.model}"
            raise UserError(problem(self._where("model"), what, "Name the model that is to teach"))
        choice, usage = answer.choices[0], answer.usage or _Usage()
        reason = "stop" if choice.finish_reason == "eos" else choice.finish_reason  # Together's API tells them apart
        if reason not in ("stop", "length"):  # `abort`: the server ended
            raise _Again(f"ended a text early ({reason})")
        return Completion(choice.text, reason, usage.prompt_tokens, usage.completion_tokens, choice.token_ids)

    def _send(self, method: str, path: str, **more: Any) -> httpx2.Response:
        """Return the answer 200 of the endpoint; raises what another one means."""
        import httpx2

        try:
            answer = self._http.request(method, path, **more)
        except httpx2.TimeoutException as error:
            raise _Again(f"does not answer in time ({type(error).__name__})", down=True) from None
        except httpx2.RequestError as error:  # refused, reset, closed in the middle
            raise _Again(f"drops the connection or is not there ({error})", down=True) from None
        match answer.status_code:
            case 200:
                return answer
            case 401 | 403:
                what, do = f"{self._served.endpoint} asks for a key", f"Set {KEY_VARIABLE}, on every node"
                if self._key:
                    what, do = f"{self._served.endpoint} refuses the key in {KEY_VARIABLE}", "Set a valid one"
                raise UserError(problem(self._where("endpoint"), what, do))
            case 402:
                raise self._unusable(f"answers 402: {self._said(answer)}")
            case 400 | 413 | 422:
                raise CannotServe(f"{self._said(answer)} ({answer.status_code})")
            case status if status in (408, 425, 429) or status >= 500:
                what = f"answers {status}: {self._said(answer)}"
                raise _Again(what, _retry_after(answer), busy=status in _BUSY, down=status in _DOWN)
        what = f"{self._served.endpoint} answers {answer.status_code} to /{path}: {self._said(answer)}"
        do = "Give the address of an OpenAI-compatible endpoint, mostly one that ends in /v1"
        if answer.status_code == 404 and path != "models":
            do = "See that the endpoint still serves the model, and completions"
        raise UserError(problem(self._where("endpoint"), what, do))

    def _read(self, kind: type[R], answer: httpx2.Response) -> R:
        """Return an answer as what it should be; raises _Again where it is something else."""
        try:
            return kind.model_validate_json(answer.content)
        except ValidationError as error:
            wrong, *_ = mistakes(error)
        place = ".".join(map(str, wrong.loc))
        what = f"something without what it should hold ({place}: {wrong.msg})" if place else "something that is no JSON"
        if "html" in answer.headers.get("content-type", ""):
            what = "something in HTML, not JSON"
        elif place and '"error"' in answer.text:  # some gateways say so with status 200
            what = f"200: {self._said(answer)}"
        raise _Again(f"answers with {what}")

    def _said(self, answer: httpx2.Response) -> str:
        """Return what an answer says of a failure, in one line and without the key."""
        try:
            value = answer.json()
            error = value.get("error", value) if isinstance(value, dict) else value
            text = str(error.get("message") or error.get("detail") or error) if isinstance(error, dict) else str(error)
        except (ValueError, RecursionError):
            text = "HTML" if "<html" in answer.text.lower() else answer.text
        line = " ".join((text.replace(self._key, "***") if self._key else text).split())
        return line[:200].rstrip(".") or "nothing"

    def _give_up(self, what: str) -> None:
        """Raise what a request comes to that failed too often: its own failure, or that of a server that fails all."""
        with self._lock:
            self._given_up += 1
        if self._given_up >= _STREAK:
            raise self._unusable(f"{what} ({self._given_up} requests in a row, {TRIES} times each)")
        raise CannotServe(f"{what} ({TRIES} times)")

    def _unusable(self, what: str) -> StageFailed:
        do = "Correct or start it, and run the same command again: what was generated is kept"
        return StageFailed(problem(self._where("endpoint"), f"{self._served.endpoint} {what}", do))

    def _wait_until_up(self, stopped: threading.Event) -> None:
        """Return once the server answers at all; raises StageFailed where it does not for too long."""
        begun = time.monotonic()
        for pause in _pauses():
            if stopped.is_set():
                raise Stopped
            try:
                self._send("GET", "models", timeout=_LOOK_SECONDS)
                return
            except CannotServe:
                return
            except _Again as again:
                if time.monotonic() - begun > self._patience:
                    raise self._unusable(str(again)) from None
                stopped.wait(min(again.after or pause, self._patience))

    @staticmethod
    def _where(field: str) -> str:
        return f"distill.teacher.{field}"


def _retry_after(answer: httpx2.Response) -> float | None:
    """Return the seconds that the server asks to wait: it gives them, or a date."""
    value = answer.headers.get("retry-after", "").strip()
    try:
        if value.isdecimal():
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _pauses() -> Iterator[float]:
    """Yield growing seconds, each a little at random: else all threads come again at once."""
    for tries in itertools.count():
        yield min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(tries, 10)) * random.uniform(0.75, 1.25)

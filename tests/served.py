"""A server on loopback that answers as an OpenAI-compatible endpoint does, or fails in ways that tests choose."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NAME = "some/teacher"
Reply = tuple[int, dict[str, str], str] | None
"""Status, headers and text; None drops the connection."""


def text_of(body: dict[str, Any]) -> str:
    """Return what the server writes: a function of the prompt and the seed, so that a swapped answer shows."""
    prompt = body["prompt"]
    return f"{sum(prompt) if isinstance(prompt, list) else len(prompt)} by seed {body.get('seed')}"


def completion(body: dict[str, Any], **changes: Any) -> Reply:
    """Return the right answer to a request; changes replace its fields."""
    choice = {"index": 0, "text": text_of(body), "finish_reason": "stop", "token_ids": [1, 2, 3]}
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 3}
    answer = {"id": "cmpl-1", "model": body["model"], "choices": [choice], "usage": usage, **changes}
    return 200, {"content-type": "application/json"}, json.dumps(answer)


def failure(status: int, message: str = "it failed", **headers: str) -> Reply:
    """Return an error as vLLM and OpenAI write it."""
    return status, {"content-type": "application/json", **headers}, json.dumps({"error": {"message": message}})


def page() -> Reply:
    """Return a page for people, as a proxy or a login sends it."""
    return 200, {"content-type": "text/html"}, "<html><body>Please log in</body></html>"


class FakeServer:
    """What the server was asked, and what it answers."""

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any]], Reply] = completion
        self.models: Callable[[], Reply] = lambda: (200, {}, json.dumps({"data": [{"id": NAME}]}))
        self.tokenize: Callable[[dict[str, Any]], Reply] = lambda _: failure(404, "Not Found")
        self.asked: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: list[str | None] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0

    def start(self) -> None:
        """Listen, on the port that it had before."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._reply(outer.models() if self.path == "/v1/models" else failure(404, "Not Found"))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if self.path == "/tokenize":
                    return self._reply(outer.tokenize(body))
                with outer._lock:
                    outer.asked.append(body)
                    outer.times.append(time.monotonic())
                    outer.keys.append(self.headers["authorization"])
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                try:
                    reply = outer.answer(body)
                finally:
                    with outer._lock:
                        outer.at_once -= 1
                return self._reply(reply)

            def _reply(self, reply: Reply) -> None:
                if reply is None or outer._server is not self.server:  # a stopped server answers nothing more
                    self.close_connection = True
                    return
                status, headers, text = reply
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("content-length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Listen no more, and answer nothing that was asked."""
        server, self._server = self._server, None
        if server:
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


@contextlib.contextmanager
def fake_server() -> Iterator[FakeServer]:
    """Run one for the time of a test."""
    server = FakeServer()
    server.start()
    try:
        yield server
    finally:
        server.stop()

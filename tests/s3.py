"""An S3-speaking server on loopback, and a proxy before it that breaks things on demand."""

import http.client
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from bodies import read_body

_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length", "host", "date", "server"}

Fault = Callable[[str, str], tuple[str, int] | None]
"""Of method and path of a request: what to do to it, if anything. ("status", 500) is answered without
asking the server, ("silent", seconds) not for so long, ("slow", seconds) after half of the answer, ("lost", 500) after
the server has done it."""


class Proxy(ThreadingHTTPServer):
    """Passes requests on to a server, but for those that `fault` wants otherwise."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, server: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.fault = server, None
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests: list[tuple[str, str]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @contextmanager
    def broken(self, fault: Fault) -> Iterator[None]:
        self.fault = fault
        try:
            yield
        finally:
            self.fault = None

    def handle_error(self, request, client_address) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def serve(self) -> None:
        body = read_body(self)
        self.server.requests.append((self.command, self.path))
        fault = self.server.fault and self.server.fault(self.command, self.path)
        kind, value = fault or ("", 0)
        if kind == "silent":
            time.sleep(value)
        if kind in ("status", "silent"):
            self._answer(value if kind == "status" else 500, {}, _ERRORS.get(value, b""), 0)
            return
        server = http.client.HTTPConnection(self.server.upstream, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP - {"host"}}
        server.request(self.command, self.path, body, headers)
        answer = server.getresponse()
        data = answer.read()
        if kind == "lost":
            self._answer(value, {}, _ERRORS.get(value, b""), 0)
            return
        kept = {name: given for name, given in answer.getheaders() if name.lower() not in _HOP}
        length = len(data) if self.command != "HEAD" else int(answer.getheader("Content-Length") or 0)
        self._answer(answer.status, kept, data, value if kind == "slow" else 0, length)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = serve

    def _answer(self, status: int, headers: dict, data: bytes, pause: float, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            half = len(data) // 2
            self.wfile.write(data[:half])
            self.wfile.flush()
            time.sleep(pause)
            self.wfile.write(data[half:])


_ERRORS = {
    code: f"<Error><Code>{name}</Code><Message>{text}</Message></Error>".encode()
    for code, name, text in (
        (500, "InternalError", "We encountered an internal error."),
        (507, "QuotaExceeded", "The bucket is full."),
    )
}


@contextmanager
def s3_server() -> Iterator[str]:
    """Run the server for this time; its address as host:port."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
    )
    try:
        for line in process.stderr:
            if "Running on http://" in line:
                address = line.partition("http://")[2].split()[0].strip()
                break
        else:
            raise AssertionError("the server did not start")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # else it blocks on a full pipe
        yield address
    finally:
        process.kill()
        process.wait()

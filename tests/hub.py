"""A server on loopback that speaks the hub's HTTP as far as an upload needs it, and breaks on demand."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from bodies import read_body

KEY = "hf_right"


class Repository:
    def __init__(self, private: bool) -> None:
        self.private = private
        self.files: dict[str, bytes] = {}
        self.commits: list[str] = []


class Answer(NamedTuple):
    status: int
    body: Any = {}  # noqa: RUF012 - never changed


class Hub(ThreadingHTTPServer):
    """Repositories by kind and name, and large files by hash. Owner `me` may write with KEY, nobody as `others`.

    drop: how many uploads of large files lose their connection, after half of their bytes. broken: a kind of repository
    whose commits fail.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.drop = 0
        self.broken: str | None = None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments) -> None:
        pass

    def serve(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        if path.startswith("/lfs/") and self.command == "PUT":
            self.take(path.removeprefix("/lfs/"))
            return
        body = read_body(self)
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            self.answer(Answer(401, {"error": "Invalid username or password."}))
            return
        self.answer(self.route(path, body))

    do_GET = do_PUT = do_POST = serve

    def take(self, oid: str) -> None:
        """Take a large file, or lose the connection."""
        length = int(self.headers.get("Content-Length") or 0)
        if self.server.drop:
            self.server.drop -= 1
            self.rfile.read(length // 2)
            self.connection.shutdown(2)
            self.close_connection = True
            return
        self.server.large[oid] = read_body(self)
        self.answer(Answer(200))

    def answer(self, answer: Answer) -> None:
        data = json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def route(self, path: str, body: bytes) -> Answer:
        data = json.loads(body) if body and "commit" not in path else {}
        if path == "/api/repos/create":
            return self.create(data)
        if path == "/api/validate-yaml":
            return Answer(200, {"errors": [], "warnings": []})
        if path == "/lfs-verify":
            right = len(self.server.large.get(data["oid"], b"")) == data["size"]
            return Answer(200 if right else 404)
        if match := re.fullmatch(r"/(datasets/)?(.+)\.git/info/lfs/objects/batch", path):
            return Answer(200, {"objects": [self.upload(each) for each in data["objects"]]})
        match = re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(preupload|commit)/main)?", path)
        assert match, path
        repository = self.server.repositories.get((match[1], match[2]))
        if repository is None:
            return Answer(404, {"error": "Repository not found"})
        match match[3]:
            case "preupload":
                return Answer(200, {"files": [self.mode(file) for file in data["files"]]})
            case "commit":
                return self.commit(match[1], match[2], repository, body)
            case _:
                files = [{"rfilename": name} for name in repository.files]
                return Answer(200, {"id": match[2], "private": repository.private, "siblings": files, "sha": "0" * 40})

    def create(self, data: dict[str, Any]) -> Answer:
        name = f"{data['organization']}/{data['name']}"
        kind, url = data.get("type", "model"), f"{self.server.url}/{name}"
        if (kind, name) in self.server.repositories:
            return Answer(409, {"error": "You already created this repo", "url": url})
        if data["organization"] != "me":
            return Answer(403, {"error": "You don't have the rights to create a repo under this namespace"})
        self.server.repositories[kind, name] = Repository(
            data.get("visibility") == "private" or bool(data.get("private"))
        )
        return Answer(200, {"url": url})

    def mode(self, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith((".safetensors", ".parquet"))
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": None}

    def upload(self, file: dict[str, Any]) -> dict[str, Any]:
        if file["oid"] in self.server.large:
            return file
        url = self.server.url
        return {
            **file,
            "actions": {"upload": {"href": f"{url}/lfs/{file['oid']}"}, "verify": {"href": f"{url}/lfs-verify"}},
        }

    def commit(self, kind: str, name: str, repository: Repository, body: bytes) -> Answer:
        if not name.startswith("me/"):
            return Answer(403, {"error": "forbidden"})
        if kind == self.server.broken:
            return Answer(500, {"error": "Internal Error"})
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    repository.commits.append(value["summary"])
                case "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    repository.files[value["path"]] = self.server.large[value["oid"]]
                case "deletedFile":
                    del repository.files[value["path"]]
        prefix = "datasets/" if kind == "dataset" else ""
        url = f"{self.server.url}/{prefix}{name}/commit/{len(repository.commits):040}"
        return Answer(200, {"commitUrl": url, "commitOid": f"{len(repository.commits):040}"})

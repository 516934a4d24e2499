"""An object store under one URI: put, get, list and delete whole objects, and a put that only one process wins.

In: `s3://bucket/prefix` (or `gs://`, `az://`), keys below it. Out: bytes and files; every failure is an OSError that
names the object, as for a disk. Everything goes through fsspec: it knows the conditional create that leases (lease.py)
need on each of the three stores, which pyarrow's file systems do not. An object is never partial. The store's library
reads credentials from its usual environment variables, profile or instance.
"""

from __future__ import annotations

import base64
import errno
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from sdft_ray.errors import UserError, problem

SCHEMES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}
_MEANT = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}
_KNOWN = (*SCHEMES, *_MEANT, "file", "hdfs", "http", "https")
_ADDRESS = re.compile(r"([A-Za-z][\w+.-]*)(:[/\\]*|//)(.*)", re.DOTALL)


def read_address(text: str) -> tuple[str, str] | None:
    """Return scheme and path of an address in any spelling; None for a path.

    >>> read_address("S3:/bucket/x"), read_address("file:///data/a%20b"), read_address("results:new/x")
    (('s3', 'bucket/x'), ('file', '/data/a b'), None)
    """
    match = _ADDRESS.fullmatch(text.strip())
    if match is None:
        return None
    scheme, marks, path = match[1].lower(), match[2], match[3]
    if not marks.startswith("://") and scheme not in (SCHEMES if marks == "//" else _KNOWN):
        return None
    if scheme == "file":
        return scheme, unquote(f"/{path}" if "/" in marks else path)
    return _MEANT.get(scheme, scheme), path.strip("/")


def is_store(root: str) -> bool:
    """Return whether a root is an object store, not a directory; raises UserError for a root that is neither."""
    if not root.strip():
        raise UserError(problem("--root", "is empty", "Give a directory, or an s3:// URI"))
    if (address := read_address(root)) is None:
        return False
    scheme, path = address
    if scheme == "file":
        raise UserError(problem("--root", f"{root} is an address, and a directory has a path", f"Write {path}"))
    if scheme not in SCHEMES:
        do = f"Give a directory, or a URI that starts with {', '.join(f'{known}://' for known in SCHEMES)}"
        raise UserError(problem("--root", f"{scheme}:// is an unknown kind of store", do))
    if "@" in path.partition("/")[0]:  # the URI itself is not repeated: it holds a secret
        what = "the URI holds credentials, which would end up in logs"
        raise UserError(problem("--root", what, "Give them by the store's usual environment variables or profile"))
    if not path:
        raise UserError(problem("--root", f"{root} names no bucket", f"Give {scheme}://BUCKET/PREFIX"))
    if root.rstrip("/") != (right := f"{scheme}://{path}"):
        raise UserError(problem("--root", f"{root} is neither a directory nor a URI", f"Write {right}"))
    return True


def is_file(info: Mapping[str, Any]) -> bool:
    """Return whether what fsspec says of a name is of a file."""
    return bool(info["type"] == "file")


def version_of(info: Mapping[str, Any]) -> str:
    """Return what changes with a file's content, by what fsspec says of it; empty where its store tells nothing."""
    keys = ("ETag", "etag", "md5Hash", "checksum", "mtime", "LastModified", "Content-MD5", "Digest", "Last-Modified")
    known = [str(info[key]) for key in keys if info.get(key)]
    return " ".join([str(info.get("size")), *known]) if known else ""


def _md5_of(info: Mapping[str, Any]) -> str:
    """Return the MD5 of an object's content, in hex digits; empty where its store does not give it.

    S3's ETag is one of an object that was put at once, and something else of one that was put in parts or encrypted.
    """
    if in_base64 := info.get("md5Hash"):  # of Google's store
        return base64.b64decode(in_base64).hex()
    tag = str(info.get("ETag") or "").strip('"')
    return tag if re.fullmatch("[0-9a-f]{32}", tag) else ""


class Entry(NamedTuple):
    """An object, as its store lists it."""

    bytes: int
    version: str
    """What changes with its content; empty where the store tells nothing."""
    md5: str
    """Of its content, in hex digits; empty where the store does not give it."""


class Objects:
    """The objects below one URI."""

    def __init__(self, uri: str) -> None:
        assert is_store(uri), f"{uri} is a directory"
        path = uri.partition("://")[2]
        self.uri, self._path = uri.rstrip("/"), path.strip("/")

    @cached_property
    def filesystem(self) -> Any:
        """The fsspec file system."""
        import fsspec

        scheme = self.uri.partition("://")[0]
        try:
            return fsspec.filesystem(scheme, use_listings_cache=False)
        except ImportError:
            library = SCHEMES[scheme]
            raise UserError(problem("--root", f"{scheme}:// needs {library}", f"Do: pip install {library}")) from None

    def path(self, key: str) -> str:
        """Return the path of an object in the file system."""
        return f"{self._path}/{key}" if key else self._path

    def put(self, file: Path, key: str) -> None:
        """Store a file."""
        with self._explain_errors(key, "written"):
            self.filesystem.put_file(str(file), self.path(key))

    def write(self, key: str, data: bytes) -> None:
        """Store bytes."""
        with self._explain_errors(key, "written"):
            self.filesystem.pipe_file(self.path(key), data)

    def create(self, key: str, data: bytes) -> bool:
        """Store bytes where there is no such object, and return whether this call did.

        Of two calls with different bytes at most one returns true.
        """
        with self._explain_errors(key, "written"):
            try:
                self.filesystem.pipe_file(self.path(key), data, mode="create")
                return True
            except Exception as error:
                # The library may have tried again after a lost answer, and met its own object.
                if (stored := self.read(key)) is not None:
                    return stored == data
                raise error

    def read(self, key: str) -> bytes | None:
        """Return an object's bytes, or None where there is none."""
        with self._explain_errors(key, "read"):
            try:
                return bytes(self.filesystem.cat_file(self.path(key)))
            except FileNotFoundError:
                return None

    def get(self, key: str, file: Path) -> None:
        """Copy an object to a file, which is never partial."""
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.tmp")
        with self._explain_errors(key, "read"):
            self.filesystem.get_file(self.path(key), str(temporary))
        temporary.replace(file)

    def list(self, folder: str = "") -> dict[str, Entry]:
        """Return every object below a folder, by its key."""
        with self._explain_errors(folder, "listed"):
            found = self.filesystem.find(self.path(folder), detail=True)
        begin = len(self._path) + 1
        return {
            name[begin:]: Entry(info["size"], version_of(info), _md5_of(info))
            for name, info in found.items()
            if is_file(info)
        }

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; missing ones are no error."""
        for key in keys:
            with self._explain_errors(key, "deleted"):
                try:
                    self.filesystem.rm_file(self.path(key))
                except FileNotFoundError:
                    continue

    @contextmanager
    def _explain_errors(self, key: str, done: str) -> Iterator[None]:
        """Turn exceptions of the libraries into an OSError that names the object, the operation and the reason."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            where = f"{self.uri}/{key}".rstrip("/")
            if isinstance(error, OSError) and error.filename == where:  # already explained
                raise
            if isinstance(error, OSError) and str(error.filename or "").startswith("/"):  # the local disk
                raise
            reason = (str(getattr(error, "strerror", None) or error).strip() or type(error).__name__).splitlines()[0]
            number = getattr(error, "errno", None) or errno.EIO
            raise OSError(number, f"cannot be {done} ({reason.rstrip('.')})", where) from error

"""Read, copy and compare safetensors files as bytes, without building tensors.

In: safetensors files. Out: their headers, copies of some of their tensors under new names, and the proof that these
are the same bytes. A tensor is a range of bytes whatever its dtype, so this module needs no dtypes and
holds a few small buffers; threads overlap because reading, writing and hashing release Python's lock.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from safetensors import SafetensorError, safe_open

from sdft_ray.data.text import first_line
from sdft_ray.errors import UserError, problem

if TYPE_CHECKING:
    from typing_extensions import Buffer

DISK_THREADS = 4  # more do not make a disk faster
BUFFER_BYTES = 1 << 18  # fits the cache of a core; larger ones measure slower


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its kind, and its bytes [start, stop) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.stop - self.start


class _Entry(NamedTuple):
    """What a header says of a tensor."""

    dtype: str
    shape: Sequence[int]
    data_offsets: tuple[int, int]
    """Of its first byte, and behind its last, from the end of the header."""

    def placed(self, begin: int) -> StoredTensor:
        """Return the tensor in a file whose tensors begin at a byte."""
        start, stop = self.data_offsets
        return StoredTensor(self.dtype, tuple(self.shape), begin + start, begin + stop)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file, in the order of their bytes; raises UserError on a damaged one.

    A file is 8 bytes of the header's length, the header in JSON, and the bytes of the tensors without a gap.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin = 8 + length
        if begin > size:
            raise _damaged(path, f"its header ends at byte {begin}, the file at {size}")
        try:
            entries = json.loads(file.read(length)).items()
            tensors = {name: _Entry(**entry).placed(begin) for name, entry in entries if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _damaged(path, "its header is no list of tensors") from None
    tensors = dict(sorted(tensors.items(), key=lambda item: item[1].start))
    end = begin
    for name, tensor in tensors.items():
        if tensor.start != end or tensor.stop < end:
            raise _damaged(path, f"{name} begins at byte {tensor.start}, the tensor before it ends at {end}")
        end = tensor.stop
    if end != size:
        raise _damaged(path, f"its header describes {end} bytes, it has {size}")
    try:
        with safe_open(path, framework="numpy"):  # everything else that the readers of these files ask of a header
            return tensors
    except SafetensorError as error:
        raise _damaged(path, first_line(error)) from None


class Copied(NamedTuple):
    """A file of copied tensors, each of which was read back and compared."""

    sha256: str
    """Of the file."""
    same: frozenset[tuple[Path, StoredTensor, Path, StoredTensor]]
    """What `same_bytes` is true of, because these bytes were compared."""


def copy_tensors(source: Path, target: Path, names: Mapping[str, str]) -> Copied:
    """Write the tensors of `source` that `names` maps to a new name, in the same order, as a safetensors file.

    What is written is read back piece by piece while processor caches hold it. Raises RuntimeError that names a tensor
    whose bytes in the copy are not the source's.
    """
    kept = {names[name]: tensor for name, tensor in read_header(source).items() if name in names}
    same = set()

    def contents() -> Iterator[bytes]:
        with source.open("rb") as file, target.open("rb", buffering=0) as copy:
            copy.seek(8 + int.from_bytes(copy.read(8), "little"))
            for name, tensor in kept.items():
                start = copy.tell()
                for piece in _chunks(file, tensor):
                    yield piece
                    if copy.read(len(piece)) != piece:
                        raise RuntimeError(f"{target}: {name} differs from what {source} holds")
                same.add((source, tensor, target, dataclasses.replace(tensor, start=start, stop=copy.tell())))

    return Copied(write_tensors(target, list(kept.items()), contents()), frozenset(same))


def write_tensors(target: Path, tensors: Sequence[tuple[str, StoredTensor]], contents: Iterable[Buffer]) -> str:
    """Write a safetensors file of tensors by name, whose bytes are `contents`, in order and in pieces of any size.

    Return the sha256 of the new file, computed beside the writing: reading a large file again costs as much as copying
    it. A piece is in the file when the next one is asked for, and may not change before that one was given.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        begin, end = end, end + tensor.bytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors lie aligned
    begin_bytes = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256()
    with target.open("wb") as file, ThreadPoolExecutor(1) as pool:
        hashed = None
        for piece in itertools.chain([begin_bytes], contents):
            if hashed:
                hashed.result()
            hashed = pool.submit(digest.update, piece)
            file.write(piece)
            file.flush()
        written = file.tell()
    assert written == len(begin_bytes) + end, f"{target}: {written - len(begin_bytes)} bytes of tensors, not {end}"
    return digest.hexdigest()


def same_bytes(path: Path, tensor: StoredTensor, other_path: Path, other: StoredTensor) -> bool:
    """Return whether two stored tensors are the same: kind, shape and every byte."""
    if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
        return False
    with path.open("rb") as file, other_path.open("rb") as other_file:
        return all(a == b for a, b in zip(_chunks(file, tensor), _chunks(other_file, other), strict=True))


def _chunks(file: BinaryIO, tensor: StoredTensor) -> Iterator[bytes]:
    file.seek(tensor.start)
    left = tensor.bytes
    while left:
        chunk = file.read(min(left, BUFFER_BYTES))
        assert chunk, f"{file.name} ended {left} bytes early"
        left -= len(chunk)
        yield chunk


def _damaged(path: Path, what: str) -> UserError:
    return UserError(problem(str(path), f"is damaged: {what}", "Download or copy it again"))

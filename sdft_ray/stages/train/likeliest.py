"""The teacher's likeliest tokens on disk, beside the shards of encoded rows that they belong to.

In: a shard of rows as token ids, and what is likeliest at each token that carries loss. Out: two .npy files a shard;
and those of one row. At k = 20 they take 120 bytes a token, 160 for a vocabulary of more than 65,536.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdft_ray.stages.train.encoded import appearing, give_back

if TYPE_CHECKING:
    from sdft_ray.core.soft_targets import Likeliest

Array = np.ndarray[Any, Any]
_AT_ONCE = 1 << 20  # probabilities that are summed, in float64


def write_likeliest(
    folder: Path, shard: str, parts: Iterable[Likeliest], shape: tuple[int, int], vocabulary: int
) -> list[Path]:
    """Write those of one shard, some tokens at a time, and return the files; they appear whole, log_probs last.

    shape: how many tokens carry loss, and k. vocabulary: its size, which decides how many bytes a token id takes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{shard}.{kind}.npy" for kind in ("tokens", "log_probs")]
    kinds = (np.min_scalar_type(vocabulary - 1), np.dtype("<f4"))
    with contextlib.ExitStack() as stack:
        temporaries = [stack.enter_context(appearing(file)) for file in files]
        for stream, kind in zip(temporaries, kinds, strict=True):
            header = {"descr": kind.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)
        for part in parts:
            for stream, kind, values in zip(temporaries, kinds, (part.ids, part.log_probs), strict=True):
                stream.write(values.numpy().astype(kind).tobytes())
    return files


def sum_probabilities(file: Path) -> float:
    """Return the sum over a file of log_probs (tokens, k) of their probabilities, some tokens at a time."""
    log_probs, total = np.load(file, mmap_mode="r"), 0.0
    tokens = max(1, _AT_ONCE // log_probs.shape[1])
    for start in range(0, len(log_probs), tokens):
        total += float(np.exp(log_probs[start : start + tokens], dtype=np.float64).sum())
        give_back(log_probs)
    return total


class LikeliestTokens:
    """What `write_likeliest` wrote in a folder, by shard and row; files are mapped into memory."""

    def __init__(self, folder: Path, name: str) -> None:
        self._tokens = [np.load(file, mmap_mode="r") for file in sorted(folder.glob(f"{name}-*.tokens.npy"))]
        self._log_probs = [np.load(file, mmap_mode="r") for file in sorted(folder.glob(f"{name}-*.log_probs.npy"))]
        self._ends: dict[int, Array] = {}

    def read(self, shard: int, index: Array, place: int) -> Likeliest:
        """Return those (tokens, k) of the row at a place in a shard; index: that of the shard's encoded rows."""
        import torch

        from sdft_ray.core.soft_targets import Likeliest

        if shard not in self._ends:
            lengths = np.diff(index["stop"], prepend=0)
            self._ends[shard] = np.cumsum(lengths - index["trained_from"])
            assert self._ends[shard][-1] == len(self._tokens[shard]), f"shard {shard} is of other rows"
        ends = self._ends[shard]
        piece = slice(ends[place - 1] if place else 0, ends[place])
        ids, log_probs = self._tokens[shard][piece].astype(np.int64), np.array(self._log_probs[shard][piece])
        give_back(self._tokens[shard])
        give_back(self._log_probs[shard])
        return Likeliest(torch.from_numpy(ids), torch.from_numpy(log_probs))

"""Choose the rows of each step and its forward passes, and pack rows into one sequence without padding.

In: encoded rows. Out: tensors for one forward pass. Rows stand one after another in a single sequence, and positions
restart at each row; core/rowwise.py keeps attention and dropout within a row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import torch

from sdft_ray.core.rows import TrainingRow
from sdft_ray.core.soft_targets import Likeliest, SoftRow


@dataclasses.dataclass(frozen=True)
class Packed:
    """Some rows (R) as one sequence of T tokens, K of which are predicted with loss."""

    input_ids: torch.Tensor
    """(1, T)"""
    position_ids: torch.Tensor
    """(1, T), 0 at each row's start."""
    starts: list[int]
    """(R + 1) where each row starts, and T."""
    keep: torch.Tensor
    """(K,) positions whose next token is trained: only they go through the head."""
    targets: torch.Tensor
    """(K,) the next tokens of those positions."""
    likeliest: Likeliest | None = None
    """(K, k) the teacher's likeliest tokens there, where rows have them."""

    def logits(self, model: Any) -> torch.Tensor:
        """Return a model's logits (K, V) at the positions of `keep`: the vocabulary is a small model's widest layer."""
        device = next(model.parameters()).device
        logits: torch.Tensor = model(
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            logits_to_keep=self.keep.to(device),
            use_cache=False,
        ).logits[0]
        return logits


def pack_rows(rows: Sequence[TrainingRow]) -> Packed:
    """Return rows as one sequence.

    Two rows before: ids [5, 6, 7] trained from 1, ids [8, 9] trained from 1. After: input_ids [5, 6, 7, 8, 9],
    position_ids [0, 1, 2, 0, 1], starts [0, 3, 5], keep [0, 1, 3], targets [6, 7, 9].
    """
    ids: list[int] = []
    positions: list[int] = []
    starts: list[int] = [0]
    keep: list[int] = []
    for row in rows:
        assert 0 < row.trained_from < len(row.ids), "a row has tokens with loss and tokens without"
        offset = len(ids)
        # The token at t is predicted from t - 1.
        keep += range(offset + row.trained_from - 1, offset + len(row.ids) - 1)
        positions += range(len(row.ids))
        ids += row.ids
        starts.append(len(ids))
    input_ids, kept = torch.tensor([ids]), torch.tensor(keep)
    given = [row.likeliest for row in rows if isinstance(row, SoftRow)]
    likeliest = Likeliest.join(given) if given else None
    return Packed(input_ids, torch.tensor([positions]), starts, kept, input_ids[0, kept + 1], likeliest)


def in_passes(rows: Iterable[TrainingRow], most: int) -> Iterator[list[TrainingRow]]:
    """Yield rows in their order, as many at a time as `most` tokens hold, or one that is longer."""
    some: list[TrainingRow] = []
    for row in rows:
        if some and sum(len(each.ids) for each in some) + len(row.ids) > most:
            yield some
            some = []
        some.append(row)
    if some:
        yield some


@dataclasses.dataclass(frozen=True)
class Schedule(Sequence[list[int]]):
    """For each optimizer step the numbers of its rows: a pure function, the same for any workers.

    Each epoch is its own permutation; steps run over epoch ends, so only the very last step can be short. An order is
    drawn when a step asks for it: all epochs of ten million rows would be Python numbers by the gigabyte.
    """

    rows: int
    epochs: int
    global_batch_size: int
    seed: int

    def __len__(self) -> int:
        return -(-self.rows * self.epochs // self.global_batch_size)

    @overload
    def __getitem__(self, step: int) -> list[int]: ...
    @overload
    def __getitem__(self, step: slice) -> list[list[int]]: ...
    def __getitem__(self, step: int | slice) -> list[int] | list[list[int]]:
        if isinstance(step, slice):
            return [self[i] for i in range(*step.indices(len(self)))]
        if not 0 <= step < len(self):
            raise IndexError(step)
        first = step * self.global_batch_size
        stop = min(first + self.global_batch_size, self.rows * self.epochs)
        numbers: list[int] = []
        for epoch in range(first // self.rows, -(-stop // self.rows)):
            begin, order = epoch * self.rows, _draw_order(self.rows, self.seed, epoch)
            numbers += order[max(first - begin, 0) : stop - begin].tolist()
        return numbers


@functools.lru_cache(maxsize=2)  # those that meet in a step
def _draw_order(rows: int, seed: int, epoch: int) -> np.ndarray[Any, Any]:
    """Return an epoch's order (rows); numpy draws it as 8 bytes a row, and 4 are kept where they suffice."""
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    return order.astype(np.min_scalar_type(rows))


def assign_passes(lengths: Sequence[int], workers: int, micro_batch: int, pass_tokens: int) -> list[list[list[int]]]:
    """Return, for each worker, its forward passes over rows of these lengths; each pass lists indices of `lengths`.

    A pass holds at most `micro_batch` rows and `pass_tokens` tokens; best-fit decreasing keeps passes few. Every
    worker gets equally many, the last ones maybe empty, and passes that run at the same time are about equally long.

    >>> assign_passes([5, 1, 4, 2], workers=1, micro_batch=4, pass_tokens=7)
    [[[0, 1], [2, 3]]]
    >>> assign_passes([5, 1, 4, 2, 3], workers=2, micro_batch=3, pass_tokens=99)
    [[[0, 3, 1]], [[2, 4]]]
    """
    assert max(lengths) <= pass_tokens, f"a row of {max(lengths)} tokens is longer than a pass of {pass_tokens}"
    passes = _fit(lengths, [], micro_batch, pass_tokens, tight=True)
    assert passes is not None, "best fit opens a new pass where no other has capacity"
    count = -(-len(passes) // workers) * workers
    # The same number of passes, evened out, where that fits: workers wait for the slowest of them.
    passes = _fit(lengths, [[] for _ in range(count)], micro_batch, pass_tokens, tight=False) or passes
    passes = sorted(passes, key=lambda rows: -sum(lengths[i] for i in rows))
    passes += [[] for _ in range(count - len(passes))]
    return [passes[worker::workers] for worker in range(workers)]


def _fit(
    lengths: Sequence[int], passes: list[list[int]], micro_batch: int, pass_tokens: int, tight: bool
) -> list[list[int]] | None:
    """Return rows put into passes, longest first: into the fullest with capacity, else a new one; where not `tight`,
    into the emptiest with capacity, else None."""
    filled = [0] * len(passes)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [n for n, rows in enumerate(passes) if len(rows) < micro_batch and filled[n] + lengths[i] <= pass_tokens]
        if not fits and not tight:
            return None
        if not fits:
            passes.append([])
            filled.append(0)
            fits = [len(passes) - 1]
        chosen = (max if tight else min)(fits, key=lambda n: filled[n])
        passes[chosen].append(i)
        filled[chosen] += lengths[i]
    return passes

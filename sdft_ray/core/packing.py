"""Which rows make up a step, and how rows become one sequence without a token of padding.

In: encoded rows. Out: tensors for one forward pass. Rows stand one after another in a single sequence; positions
restart at each row, which is what tells transformers to keep attention within the row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from sdft_ray.core.prompts import TrainingRow


@dataclasses.dataclass(frozen=True)
class Packed:
    """Some rows as one sequence of T tokens, K of which are predicted with loss."""

    input_ids: torch.Tensor
    """(1, T)"""
    position_ids: torch.Tensor
    """(1, T), 0 at each row's start."""
    keep: torch.Tensor
    """(K,) positions whose next token is trained: only they go through the head."""
    targets: torch.Tensor
    """(K,) those next tokens."""


def pack_rows(rows: Sequence[TrainingRow]) -> Packed:
    """Return rows as one sequence.

    Two rows before: ids [5, 6, 7] trained from 1, ids [8, 9] trained from 1. After: input_ids [5, 6, 7, 8, 9],
    position_ids [0, 1, 2, 0, 1], keep [0, 1, 3], targets [6, 7, 9].
    """
    ids: list[int] = []
    positions: list[int] = []
    keep: list[int] = []
    for row in rows:
        assert 0 < row.trained_from < len(row.ids), "a row has tokens with loss and tokens without"
        offset = len(ids)
        # The token at t is predicted from t - 1.
        keep += range(offset + row.trained_from - 1, offset + len(row.ids) - 1)
        positions += range(len(row.ids))
        ids += row.ids
    input_ids, kept = torch.tensor([ids]), torch.tensor(keep)
    return Packed(input_ids, torch.tensor([positions]), kept, input_ids[0, kept + 1])


def schedule(rows: int, epochs: int, global_batch_size: int, seed: int) -> list[list[int]]:
    """Return, for each optimizer step, the indices of its rows: a pure function, the same for any workers.

    Each epoch is its own permutation; steps run over epoch ends, so only the very last step can be short.
    """
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(rows) for epoch in range(epochs)])
    return [order[i : i + global_batch_size].tolist() for i in range(0, len(order), global_batch_size)]


def share_of(step: Sequence[int], worker: int, workers: int, micro_batch: int) -> list[list[int]]:
    """Return a worker's micro-batches of a step; every worker gets equally many, the last ones maybe empty.

    >>> share_of([3, 1, 4, 1, 5], worker=0, workers=2, micro_batch=2), share_of([3, 1, 4, 1, 5], 1, 2, 2)
    ([[3, 4], [5]], [[1, 1], []])
    """
    count = -(-len(step) // (workers * micro_batch))
    mine = step[worker::workers]
    return [list(mine[i * micro_batch : (i + 1) * micro_batch]) for i in range(count)]

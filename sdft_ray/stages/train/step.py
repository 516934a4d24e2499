"""One optimizer step, and the loss of rows that are not trained on.

A step is exactly the rows that it gets; its loss is the sum over trained tokens divided by the trained tokens of the
whole step, so workers, micro-batches and ZeRO stages do not move it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sdft_ray.core.rows import TrainingRow


@dataclasses.dataclass(frozen=True)
class Losses:
    """The losses of rows (R), over all workers."""

    sums: np.ndarray[Any, Any]
    """(R) over the trained tokens of a row, in nats."""
    tokens: np.ndarray[Any, Any]
    """(R) trained tokens of a row."""

    @property
    def mean(self) -> float:
        """In nats a trained token."""
        return float(self.sums.sum() / self.tokens.sum())

    def by_source(self, sources: np.ndarray[Any, Any]) -> dict[int, float]:
        """Return the mean of each source; sources: (R) the number of each row's."""
        of_each = {source: sources == source for source in np.unique(sources).tolist()}
        return {source: Losses(self.sums[own], self.tokens[own]).mean for source, own in of_each.items()}


def take_step(
    engine: Any, rows: Sequence[TrainingRow], keys: Sequence[str], passes: Sequence[Sequence[int]], max_norm: float
) -> tuple[Losses, float]:
    """Take one optimizer step on exactly these rows; return their losses and the gradient's norm."""
    import torch

    tokens = _trained_tokens(rows)
    sums, scale = torch.zeros(len(rows), dtype=torch.float64), engine.world_size / int(tokens.sum())
    norm = None
    for number, places in enumerate(passes, 1):
        engine.set_gradient_accumulation_boundary(number == len(passes))
        loss = _forward(engine, rows, keys, places, sums)
        # DeepSpeed averages over the workers; what is asked for is the sum, divided by the whole step's trained tokens.
        engine.backward(loss * scale, scale_wrt_gas=False)
        if number == len(passes) and not engine.zero_optimization():
            norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), max_norm)
        engine.step()
    if norm is None:
        norm = engine.get_global_grad_norm()
    # DeepSpeed says -1 for a norm that is no number.
    return Losses(_sum_over_workers(engine, sums), tokens), float(norm) if norm >= 0 else math.nan


def measure_losses(engine: Any, rows: Sequence[TrainingRow], passes: Sequence[Sequence[int]]) -> Losses:
    """Return the losses of rows that are not trained on."""
    import torch

    engine.eval()
    sums = torch.zeros(len(rows), dtype=torch.float64)
    with torch.no_grad():
        for places in passes:
            _forward(engine, rows, [""] * len(rows), places, sums)
    engine.train()
    return Losses(_sum_over_workers(engine, sums), _trained_tokens(rows))


def _forward(engine: Any, rows: Sequence[TrainingRow], keys: Sequence[str], places: Sequence[int], sums: Any) -> Any:
    """Return the summed loss of the rows at some places, and put that of each into `sums`; of none, 0: workers take
    part in every pass."""
    import torch

    from sdft_ray.core.packing import pack_rows

    chosen = places or [min(range(len(rows)), key=lambda i: len(rows[i].ids))]
    portion = [rows[i] for i in chosen]
    losses = engine(pack_rows(portion), [keys[i] for i in chosen])
    if not places:
        return losses.sum() * 0.0
    by_row = losses.detach().double().cpu().split(_trained_tokens(portion).tolist())
    sums[list(places)] = torch.stack([row.sum() for row in by_row])
    return losses.sum()


def compute_logits(engine: Any, rows: Sequence[TrainingRow]) -> Any:
    """Return the logits (K V) of rows, outside training; all workers must call it."""
    import torch

    from sdft_ray.core.packing import pack_rows

    engine.eval()
    with torch.no_grad():
        portions = [rows] if engine.module.packs else [[row] for row in rows]
        logits = [engine(pack_rows(portion), [""] * len(portion), as_logits=True).cpu() for portion in portions]
    engine.train()
    return torch.cat(logits)


def _trained_tokens(rows: Sequence[TrainingRow]) -> np.ndarray[Any, Any]:
    return np.array([len(row.ids) - row.trained_from for row in rows])


def _sum_over_workers(engine: Any, values: Any) -> np.ndarray[Any, Any]:
    import torch.distributed as dist

    whole = values.to(engine.device)
    dist.all_reduce(whole)
    return np.asarray(whole.cpu())

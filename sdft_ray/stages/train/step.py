"""One optimizer step, and the loss of rows that are not trained on.

A step is exactly the rows that it gets; its loss is the sum over trained tokens divided by the trained tokens of the
whole step, so workers, micro-batches and ZeRO stages do not move it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sdft_ray.core.rows import TrainingRow

if TYPE_CHECKING:
    pass


def take_step(
    engine: Any, rows: Sequence[TrainingRow], keys: Sequence[str], passes: Sequence[Sequence[int]], max_norm: float
) -> tuple[float, float]:
    """Take one optimizer step on exactly these rows; return its loss per trained token and its gradient's norm."""
    import torch

    trained = _trained_tokens(rows)
    total = torch.zeros((), dtype=torch.float64)
    norm = None
    for number, places in enumerate(passes, 1):
        engine.set_gradient_accumulation_boundary(number == len(passes))
        loss = _forward(engine, rows, keys, places)
        total += loss.detach().double().cpu()
        # DeepSpeed averages over the workers; what is asked for is the sum, divided by the whole step's trained tokens.
        engine.backward(loss * (engine.world_size / trained), scale_wrt_gas=False)
        if number == len(passes) and not engine.zero_optimization():
            norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), max_norm)
        engine.step()
    if norm is None:
        norm = engine.get_global_grad_norm()
    # DeepSpeed says -1 for a norm that is no number.
    return _sum_over_workers(engine, total) / trained, float(norm) if norm >= 0 else math.nan


def total_loss(engine: Any, rows: Sequence[TrainingRow], passes: Sequence[Sequence[int]]) -> tuple[float, int]:
    """Return the summed loss of rows that are not trained on, and the number of their trained tokens."""
    import torch

    engine.eval()
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for places in passes:
            total += _forward(engine, rows, [""] * len(rows), places).double().cpu()
    engine.train()
    return _sum_over_workers(engine, total), _trained_tokens(rows)


def _forward(engine: Any, rows: Sequence[TrainingRow], keys: Sequence[str], places: Sequence[int]) -> Any:
    """Return the summed loss of the rows at some places; of none, 0: workers take part in every pass."""
    from sdft_ray.core.packing import pack_rows

    chosen = places or [min(range(len(rows)), key=lambda i: len(rows[i].ids))]
    loss = engine(pack_rows([rows[i] for i in chosen]), [keys[i] for i in chosen])
    return loss if places else loss * 0.0


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


def _trained_tokens(rows: Sequence[TrainingRow]) -> int:
    return sum(len(row.ids) - row.trained_from for row in rows)


def _sum_over_workers(engine: Any, value: Any) -> float:
    import torch.distributed as dist

    whole = value.to(engine.device)
    dist.all_reduce(whole)
    return float(whole)

"""How far the rewrites lie from the references, in the base model's own eyes: the shift that the method is about.

In: a model and rows that have both a reference and a kept rewrite. Out: their lengths in tokens and the mean negative
log-likelihood of a token of each, given the prompt without the reference. The rewrites should be the likelier ones.
It is measured on a sample; which rows are in it depends on their ids only.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft_ray.core.prompts import TrainingRow, encode_row

_FORWARD_TOKENS = 2048  # of one forward pass: a few rows of a small model's data, hundreds of MB of logits at most


class Sample:
    """Some of the rows that are offered, drawn without regard to their order."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self._heap: list[tuple[int, str, dict[str, str]]] = []

    def offer(self, row: Mapping[str, Any]) -> None:
        """Take a row in if it is one of the drawn."""
        rank = int.from_bytes(hashlib.sha256(f"shift:{self._seed}:{row['id']}".encode()).digest()[:8], "big")
        heapq.heappush(
            self._heap, (-rank, row["id"], {name: row[name] for name in ("prompt", "reference", "response")})
        )
        if len(self._heap) > self._size:
            heapq.heappop(self._heap)

    @property
    def rows(self) -> list[dict[str, str]]:
        """The drawn rows."""
        return [row for _, _, row in sorted(self._heap, key=lambda item: item[:2], reverse=True)]


def measure(model: Callable[[], Path], dtype: str, device: str, rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Return the mean length and the loss per token of references and of rewrites."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = model()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).to(device).eval()
    found: dict[str, Any] = {"rows": len(rows)}
    for name, column in (("reference", "reference"), ("distilled", "response")):
        encoded = [encode_row(tokenizer, row["prompt"], row[column]) for row in rows]
        tokens = sum(len(row.ids) - row.trained_from for row in encoded)
        found[name] = {"mean_tokens": tokens / len(rows), "nll_per_token": summed_loss(loaded, encoded) / tokens}
    return found


def summed_loss(model: Any, rows: Sequence[TrainingRow]) -> float:
    """Return the negative log-likelihood of all trained tokens of some rows, summed."""
    import torch

    from sdft_ray.core.packing import pack_rows

    total = 0.0
    for some in _portions(rows):
        packed = pack_rows(some)
        with torch.inference_mode():
            logits = model(
                input_ids=packed.input_ids.to(model.device),
                position_ids=packed.position_ids.to(model.device),
                logits_to_keep=packed.keep.to(model.device),
                use_cache=False,
            ).logits  # (1, K, V)
            targets = packed.targets.to(model.device)
            total += torch.nn.functional.cross_entropy(logits[0].float(), targets, reduction="sum").item()
    return total


def _portions(rows: Sequence[TrainingRow]) -> Iterator[list[TrainingRow]]:
    portion: list[TrainingRow] = []
    for row in rows:
        if portion and sum(len(each.ids) for each in [*portion, row]) > _FORWARD_TOKENS:
            yield portion
            portion = []
        portion.append(row)
    if portion:
        yield portion

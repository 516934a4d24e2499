"""Losses of tokens, each piece of them made together with its gradient.

In: logits (K, V) in any precision, and a function that compares some of them with what they are to become. Out: the
losses (K). Autograd would keep the logits once more in float32, their softmax and its gradient: with 128,000 tokens
in a vocabulary that is the largest part of a step's memory. Here the gradient alone is kept, as precise as the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_CACHED, _ON_GPU = 2**19, 64
"""Logits of a piece that stay in a CPU's cache from one operation to the next, and tokens of one that fills a GPU."""

Compare = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]
"""From logits (n, V) in float32, which it leaves as they are, and the places of their tokens, to the losses (n) and the
gradient (n, V) of their sum."""


def tokens_at_once(logits: torch.Tensor) -> int:
    """Return how many of the tokens of logits (K, V) make a piece, whose distributions are small beside the logits."""
    return _ON_GPU if logits.is_cuda else max(1, _CACHED // logits.shape[-1])


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the losses (K) in nats, float32, of logits (K, V) whose next tokens are targets (K)."""

    def compare(piece: torch.Tensor, places: slice) -> tuple[torch.Tensor, torch.Tensor]:
        log_q, next_tokens = piece.log_softmax(-1), targets[places, None]
        losses = -log_q.gather(-1, next_tokens)[:, 0]
        return losses, subtract_one(log_q.exp_(), next_tokens)

    return compare_in_pieces(logits, compare)


def subtract_one(probabilities: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the gradient (n, V) of a cross-entropy, in place; tokens: (n, 1)."""
    return probabilities.scatter_add_(-1, tokens, torch.full_like(probabilities[:, :1], -1.0))


def compare_in_pieces(logits: torch.Tensor, compare: Compare) -> torch.Tensor:
    """Return the losses (K), float32, of logits (K, V)."""
    losses: torch.Tensor = _Pieces.apply(logits, compare)
    return losses


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, compare: Compare) -> torch.Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        size = tokens_at_once(logits)
        for start in range(0, len(logits), size):
            places = slice(start, start + size)
            losses[places], slope = compare(logits[places].float(), places)
            if gradient is not None:
                gradient[places] = slope
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        size = tokens_at_once(gradient)
        for piece, factor in zip(gradient.split(size), outer[0][:, None].split(size), strict=True):
            piece.mul_(factor)  # on a CPU by way of float32
        return gradient, None

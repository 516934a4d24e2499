"""Soft targets: a student is trained towards a teacher's distribution over the next token, not only towards one token.

In: the student's logits (K, V), and of each of the K tokens the teacher's logits, or its likeliest tokens. Out: their
losses, (1 - c) t^2 KL(p || q) + c CE, with p and q the distributions of teacher and student at temperature t
(arXiv 1503.02531 has the factor t^2, which keeps the gradient's size). The divergence is exact, over the whole
vocabulary, or over the likeliest tokens and all others as one outcome: leaving the others out would be biased
(arXiv 2503.16870).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from sdft_ray.core.losses import compare_in_pieces, subtract_one, tokens_at_once
from sdft_ray.core.rows import TrainingRow


@dataclasses.dataclass(frozen=True)
class Likeliest:
    """The teacher's k likeliest next tokens at each of K places."""

    ids: torch.Tensor
    """(K, k)"""
    log_probs: torch.Tensor
    """(K, k) float32, at the temperature of the loss, relative to the whole vocabulary."""

    def __getitem__(self, piece: slice) -> Likeliest:
        return Likeliest(self.ids[piece], self.log_probs[piece])

    def to(self, device: torch.device) -> Likeliest:
        """Return them on a device."""
        return Likeliest(self.ids.to(device), self.log_probs.to(device))

    @classmethod
    def join(cls, parts: Sequence[Likeliest]) -> Likeliest:
        """Return those of several sequences, one behind the other."""
        return cls(torch.cat([part.ids for part in parts]), torch.cat([part.log_probs for part in parts]))


@dataclasses.dataclass(frozen=True)
class SoftRow(TrainingRow):
    """A row whose targets are what is likeliest at each token that carries loss."""

    likeliest: Likeliest


def find_likeliest(logits: torch.Tensor, k: int, temperature: float) -> Likeliest:
    """Return the k likeliest tokens of a teacher's logits (K, V)."""
    pieces = [_at(piece, temperature).topk(k) for piece in logits.split(tokens_at_once(logits))]
    return Likeliest.join([Likeliest(each.indices, each.values) for each in pieces])


def soft_loss(
    logits: torch.Tensor, teacher: torch.Tensor | Likeliest, tokens: torch.Tensor, temperature: float, share: float
) -> torch.Tensor:
    """Return the losses (K) of K tokens, in nats.

    logits: (K, V). teacher: logits (K, V), or likeliest tokens. tokens: (K), what the cross-entropy is of, of
    which the loss has a share.
    """

    def compare(piece: torch.Tensor, places: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return _compare(piece, teacher[places], tokens[places], temperature, share)

    return compare_in_pieces(logits, compare)


def _compare(logits: Any, teacher: Any, tokens: Any, temperature: float, share: float) -> tuple[Any, Any]:
    """Return the losses (n) of some tokens, and the gradient (n, V) of their sum."""
    log_q = (logits / temperature).log_softmax(-1)
    log_p = _fill(teacher, log_q) if isinstance(teacher, Likeliest) else _at(teacher, temperature)
    p, q = log_p.exp(), log_q.exp()
    weight = 1 - share
    # Where p is 0 its logarithm is -inf, and its part of the sum is 0.
    divergence = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1, dtype=torch.float64)
    loss, slope = weight * temperature**2 * divergence, (q - p).mul_(weight * temperature)
    if share:
        log_one = log_q if temperature == 1 else logits.log_softmax(-1)
        loss = loss - share * log_one.gather(-1, tokens[:, None])[:, 0].double()
        slope += share * subtract_one(log_one.exp(), tokens[:, None])
    return loss, slope


def _at(teacher: Any, temperature: float) -> Any:
    return (teacher.float() / temperature).log_softmax(-1)


def _fill(teacher: Likeliest, log_q: Any) -> Any:
    """Return log p (n, V): what the teacher's likeliest tokens leave, spread over the others in the student's own
    proportions.

    So the divergence is that of k + 1 outcomes, the last one all other tokens, and q - p is its exact gradient.
    """
    rest = log_q.scatter(-1, teacher.ids, -torch.inf)
    left = torch.log1p(-teacher.log_probs.double().exp().sum(-1, keepdim=True).clamp(max=1)).float()
    share = torch.where(rest.isneginf(), rest, rest - rest.logsumexp(-1, keepdim=True) + left)
    return share.scatter(-1, teacher.ids, teacher.log_probs)

"""How near a model stays to the base on one text, from the logits of both.

In: logits at the positions that predict a text's tokens. Out: sums over these, which are added up over texts. They need
no right answer, and every token counts: they separate models that accuracy on a few hundred items does not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar, get_args

if TYPE_CHECKING:
    import torch

Kind = Literal["response", "text", "reference"]
"""What the base wrote on a held-out row, a plain text, the reference of a held-out row."""
KINDS: tuple[Kind, ...] = get_args(Kind)


class Probe(NamedTuple):
    """A text as token ids, the last ones of which are predicted."""

    kind: Kind
    id: str
    ids: list[int]
    first: int
    """Index of the first token that is predicted, from 1."""
    bytes: int = 0
    """Of the text that is predicted; 0 where it is not known."""


class Nearness(NamedTuple):
    """Sums over the K predicted tokens of a text."""

    kl: float
    """KL(base || model), in nats."""
    agreed: int
    """Tokens at which base and model find the same token the likeliest."""
    nll: float
    """Negative log-likelihood of the text's own tokens under the model, in nats."""

    def plus(self, other: Nearness) -> Nearness:
        """Return the sums over both."""
        return Nearness(self.kl + other.kl, self.agreed + other.agreed, self.nll + other.nll)


class Measured(NamedTuple):
    """What was measured on a probe."""

    kind: Kind
    id: str
    bytes: int
    tokens: int
    """That were predicted."""
    kl: float
    agreed: int
    nll: float

    @property
    def bits(self) -> float:
        """The negative log-likelihood in bits."""
        return self.nll / math.log(2)


R = TypeVar("R", Probe, Measured)


def write_lines(records: Iterable[R]) -> str:
    """Return records as JSON, one a line."""
    return "".join(json.dumps(record._asdict()) + "\n" for record in records)


def read_lines(text: str, kind: type[R]) -> list[R]:
    """Return the records that `write_lines` wrote."""
    return [kind(**json.loads(line)) for line in text.splitlines()]


def compare(base: torch.Tensor, model: torch.Tensor, targets: torch.Tensor) -> Nearness:
    """Return how near a model's logits (K, V) are to the base's (K, V), and what they say of the targets (K).

    KL = sum over the vocabulary of p (log p - log q), with p of the base and q of the model: in float32 whatever the
    logits are in, added up over tokens in float64. The same logits give exactly 0.
    """
    import torch

    from sdft_ray.core.losses import tokens_at_once

    sums, size = Nearness(0.0, 0, 0.0), tokens_at_once(base)
    for of_base, of_model, tokens in zip(base.split(size), model.split(size), targets.split(size), strict=True):
        p, q = of_base.float().log_softmax(dim=-1), of_model.float().log_softmax(dim=-1)  # (n, V)
        kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1)  # (n,)
        agreed = (of_base.argmax(dim=-1) == of_model.argmax(dim=-1)).sum()
        nll = -q.gather(1, tokens[:, None]).sum(dtype=torch.float64)
        sums = sums.plus(Nearness(float(kl.sum(dtype=torch.float64)), int(agreed), float(nll)))
    return sums

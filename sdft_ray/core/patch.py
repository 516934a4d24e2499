"""A linear patch at a cut: the last projection before it also does, as well as a linear map can, what was removed.

In: hidden states around the removed blocks, some tokens at a time. Out: a matrix T (D, D), and the tensors that it is
folded into. With o (N, D) what the MLP of the last kept block adds to the residual stream, r the stream beside it, and
y the stream behind the removed blocks, T minimises |y - r - o T|^2 + w |T - I|^2 (arXiv 2505.02819 has the idea; there
w pulls towards 0). T acts on o alone, so it folds into the MLP's last projection: nothing else of the model changes.
Pulled towards the identity, a patch from few tokens is near no patch; how hard is chosen on held-back tokens, where no
patch at all is a candidate, too. Of the tokens only sums are kept, two (D, D) in float64.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sdft_ray.core.surgery import BLOCK
from sdft_ray.errors import UserError, problem

if TYPE_CHECKING:
    from torch import Tensor

# Between the MLP and the residual stream these have a norm, which no linear map passes; of opt one size has.
_NORM_BETWEEN = ("exaone4", "gemma2", "gemma3_text", "gemma4_text", "glm4", "olmo2", "olmo3", "olmo_hybrid", "opt")
_TRANSPOSED = ("gpt_oss", "llama4_text")  # their experts are (E, I, D)
# What a block's last part is called, where it is not mlp; several are summed.
_PARTS = {
    "falcon_h1": ("feed_forward",),
    "granitemoehybrid": ("block_sparse_moe", "shared_mlp"),
    "lfm2": ("feed_forward",),
    "llama4_text": ("feed_forward",),
    "mixtral": ("mlp", "block_sparse_moe"),
    "nemotron_h": ("mixer",),  # a block of it is one part
}
_PROJECTION = re.compile(
    r"(mlp|block_sparse_moe|feed_forward|shared_mlp|mixer)\.(.*\.)?"
    r"(down_proj|c_proj|w2|fc2|dense_4h_to_h|output_linear|out_proj|o_proj|fc2_latent_proj)([._](weight|bias))?"
)
_LATENT = "fc2_latent_proj.weight"
"""Of a mixture whose experts work in a smaller space (nemotron_h): the projection out of it."""
WEIGHTS = (*(10.0**power for power in range(-6, 3)), float("inf"))
"""Relative to the mean square of what the MLP adds; infinity is no patch."""
LEAST_ALONE = 0.01
"""The least weight where one corpus is all that chooses. With less, a patch of one kind of text harms others once many
blocks are gone (docs/results.md, 2026-11-30); held-back texts of that kind do not show it."""


def require_foldable(architecture: str, before: int) -> None:
    """Raise UserError for a model or a cut that no patch folds into; before: the block before the removed ones."""
    if architecture in _NORM_BETWEEN:
        what = f"{architecture} has a norm between its MLP and the residual stream, which no linear map passes"
        raise UserError(problem("prune.patch", what, "Set prune.patch: none"))
    if before < 0:
        what = "the cut begins at block 0, and no block before it can do what was removed"
        raise UserError(problem("prune.patch", what, "Set prune.patch: none, or raise prune.protect.first"))


def gaps(removed: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return each run of removed blocks as (the block before it, the block behind it).

    >>> gaps((4, 5, 8))
    [(3, 6), (7, 9)]
    """
    starts = [block for block in removed if block - 1 not in removed]
    ends = [block for block in removed if block + 1 not in removed]
    return [(start - 1, end + 1) for start, end in zip(starts, ends, strict=True)]


@dataclasses.dataclass
class Sums:
    """Sums over tokens, enough for the best map of any weight and for the error of any map."""

    tokens: int
    outer: Tensor
    """o^T o (D, D), float64."""
    cross: Tensor
    """o^T (y - r) (D, D), float64."""
    square: float
    """|y - r|^2."""

    @classmethod
    def none(cls, width: int) -> Sums:
        """Return the sums over no tokens."""
        import torch

        outer, cross = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
        return cls(0, outer, cross, 0.0)

    def add(self, added: Tensor, wanted: Tensor) -> None:
        """Take in tokens: what the MLP adds (N, D), and what it should add, y - r (N, D)."""
        added, wanted = added.double(), wanted.double()
        self.tokens += len(added)
        self.outer += (added.T @ added).cpu()
        self.cross += (added.T @ wanted).cpu()
        self.square += float(wanted.square().sum())

    @classmethod
    def mean(cls, corpora: Sequence[Sums]) -> Sums:
        """Return the sums over corpora, each of which counts the same, whatever its length."""
        whole = cls.none(len(corpora[0].outer))
        for each in corpora:
            whole.tokens += each.tokens
            whole.outer += each.outer / each.tokens
            whole.cross += each.cross / each.tokens
            whole.square += each.square / each.tokens
        return whole

    def error(self, patch: Tensor) -> float:
        """Return the mean squared error of a map (D, D), relative to the mean square of what is wanted."""
        inner = (patch * (self.outer @ patch - 2 * self.cross)).sum()
        return float((inner + self.square) / self.square)


def solve(sums: Sums, weight: float) -> Tensor:
    """Return the map (D, D), float64; weight: of the pull towards the identity, see WEIGHTS."""
    import torch

    identity = torch.eye(len(sums.outer), dtype=torch.float64)
    if weight == float("inf") or not sums.outer.any():  # an MLP that adds nothing leaves a map nothing to work on
        return identity
    ridge = weight * sums.outer.diagonal().mean() * identity
    return identity + torch.linalg.solve(sums.outer + ridge, sums.cross - sums.outer)


def fit(measured: Sequence[Sums], held_back: Sequence[Sums]) -> tuple[Tensor, float, dict[float, float]]:
    """Return the map whose weight has the least error on held-back tokens, that weight, and the error of each; sums: of
    each corpus."""
    fitted, chosen_on = Sums.mean(measured), Sums.mean(held_back)
    least = LEAST_ALONE if len(measured) == 1 else 0.0
    maps = {weight: solve(fitted, weight) for weight in WEIGHTS if weight >= least}
    errors = {weight: chosen_on.error(patch) for weight, patch in maps.items()}
    best = min(errors, key=lambda weight: errors[weight])
    return maps[best], best, errors


def is_patched(name: str, block: int) -> bool:
    """Return whether a tensor belongs to the last projection of a block's MLP, experts and biases among them."""
    match = BLOCK.match(name)
    return match is not None and int(match[1]) == block and _PROJECTION.fullmatch(match[2]) is not None


def find_patched(names: Iterable[str], blocks: Iterable[int]) -> dict[str, int]:
    """Return the tensors of the last projections of the MLPs of some blocks, each with its block. Behind experts that
    work in a smaller space it is the projection out of that, and not theirs."""
    found = {name: block for block in blocks for name in names if is_patched(name, block)}
    latent = {block for name, block in found.items() if name.endswith(_LATENT)}
    return {name: block for name, block in found.items() if ".experts." not in name or block not in latent}


def last_parts(block: Any, architecture: str) -> list[Any]:
    """Return the modules of a block whose outputs, summed, are the last that is added to the residual stream."""
    named = (getattr(block, name, None) for name in _PARTS.get(architecture, ("mlp",)))
    return [part for part in named if part is not None]


def fold(patch: Tensor, name: str, tensor: Tensor, architecture: str) -> Tensor:
    """Return a tensor of the projection after which its outputs are multiplied by the map: in float64, rounded once.

    tensor: a weight (D, I), or those of experts (E, D, I) or (E, I, D); a bias (D) or (E, D).
    """
    if name.endswith("bias") or (tensor.ndim == 3 and architecture in _TRANSPOSED):
        return (tensor.double() @ patch).to(tensor.dtype)
    return (patch.T @ tensor.double()).to(tensor.dtype)

"""Which blocks are removed, and what decides."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from sdft_ray.spec.section import Section
from sdft_ray.spec.sources import Calibration, OneOrSeveral
from sdft_ray.spec.training import OneOfFinalists


class Protect(Section):
    """Blocks that are never removed."""

    first: int = Field(0, ge=0)
    """Blocks at the start."""
    last: int = Field(0, ge=0)
    """Blocks at the end."""


class Target(Section):
    """How small the model becomes."""

    parameters: float = Field(gt=0)
    """The most parameters that it may have; those of tied tensors count once."""


class Prune(Section):
    """Which blocks are removed."""

    blocks: int | None = Field(None, gt=0)
    """Number of blocks to remove. Either this, `target` or `remove` is needed."""
    target: Target | None = None
    """Instead of a number of blocks: remove the fewest after which the model is small enough, whichever are chosen."""
    remove: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Exactly these blocks, counted from 0. Nothing else then chooses, and nothing is measured for a choice."""
    metric: Literal["angular", "influence", "loss", "tail"] = "loss"
    """What decides: the `loss` on the loss texts with the blocks skipped, for the best candidates of both other
    metrics; the `angular` distance between a span's input and output (arXiv 2403.17887); the sum of its Block
    `influence` (arXiv 2403.03853); or nothing that is measured: `tail` takes the last blocks (arXiv 2411.15558)."""
    contiguous: bool = True
    """Whether the blocks stand side by side. If false they stand anywhere: the least influential ones, or by `loss`
    one after the other, each time the one without which the loss is least (each step tries every block)."""
    protect: Protect = Protect()
    candidates: int = Field(5, ge=0)
    """Spans whose loss is measured: this many of the best by distance, and as many by influence; 0 measures none."""
    finalists: OneOfFinalists | None = None
    """Train the best cuts briefly, each patched as the recipe says, and remove the blocks of the one whose loss on the
    loss texts is then least: training can change the order of cuts. One choice serves all arms."""
    patch: Literal["none", "linear"] = "none"
    """What is folded into the block before the cut, fitted on the calibration texts without training: nothing, or the
    `linear` map that stands in best for the removed blocks (after arXiv 2505.02819). Arms are trained from the patched
    model; the pruned one is evaluated beside it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward pass that is measured."""
    calibration: OneOrSeveral = (Calibration(text="boolq"),)
    """A corpus, or a list of corpora that count the same."""

    @field_validator("remove")
    @classmethod
    def _is_in_order(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value == ():
            raise ValueError("names no block. Give at least one")
        if twice := [block for i, block in enumerate(value or ()) if block in (value or ())[:i]]:
            raise ValueError(f"names block {twice[0]} twice. Remove one")
        return value and tuple(sorted(value))

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.blocks is None and self.target is None and self.remove is None:
            raise ValueError("blocks: is missing. Add it, prune.target or prune.remove")
        if self.blocks and self.target:
            raise ValueError("target: decides how many blocks go, and so does prune.blocks. Keep one of them")
        if self.remove:
            named = {name for name in self.model_fields_set if getattr(self, name) is not None}
            for name in ("blocks", "target", "metric", "contiguous", "protect", "candidates", "finalists"):
                if name in named:
                    raise ValueError(f"{name}: decides nothing beside prune.remove. Keep one of them")
            return self
        if not self.contiguous and self.metric in ("angular", "tail"):
            raise ValueError(f"contiguous: false has no use with {self.metric}. Set prune.metric: influence, or loss")
        if self.metric == "loss" and self.contiguous and self.candidates < 2:
            what = f"candidates: {self.candidates} leaves the loss nothing to choose from"
            raise ValueError(f"{what}. Set candidates to 2 or more")
        if self.finalists and (self.metric != "loss" or not self.contiguous):
            raise ValueError("finalists: are the best spans by the loss. Set prune.metric: loss and contiguous: true")
        if self.finalists and self.finalists.count > self.candidates:
            raise ValueError(f"finalists: are more than the {self.candidates} candidates. Raise prune.candidates")
        return self

    @property
    def is_greedy(self) -> bool:
        """Whether blocks are chosen one after the other by the loss."""
        return self.remove is None and self.metric == "loss" and not self.contiguous

    @property
    def is_scored(self) -> bool:
        """Whether distances and influences are measured."""
        return self.remove is None and self.metric != "tail" and not self.is_greedy

    @property
    def reads_texts(self) -> bool:
        """Whether something is measured on the calibration texts."""
        return self.is_scored or self.is_greedy or self.patch != "none"

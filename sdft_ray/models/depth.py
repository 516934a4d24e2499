"""The number of blocks that a stage removes: as the recipe says, or as few as make the base small enough.

In: a stage's settings, and the base's directory. Out: the depth. A recipe with a target has it in place of the depth in
its ids: how many blocks it means shows when the base is there.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from sdft_ray.core.depth import Way, least_depth
from sdft_ray.core.surgery import count_blocks
from sdft_ray.data.readers import read_json
from sdft_ray.errors import UserError, problem
from sdft_ray.models.sizes import sizes_of_directory
from sdft_ray.spec.pruning import Protect, Prune, Target
from sdft_ray.spec.section import Section


class Depth(Section):
    """The part of a stage's settings that says how many blocks go, and which stay."""

    optional: ClassVar[tuple[str, ...]] = ("depth", "target")
    depth: int | None = Field(None, serialization_alias="blocks")
    target: Target | None = None
    protect: Protect

    @property
    def name(self) -> str:
        """How many blocks go, in words."""
        return f"blocks {self.depth}" if self.depth else f"{self._millions} M parameters"

    def slug(self, base: str) -> str:
        """Return the name of what is made of a base."""
        return f"{base}-{self.depth}" if self.depth else f"{base}-to-{self._millions}m"

    @property
    def _millions(self) -> str:
        assert self.target, "a recipe has a number of blocks or a target"
        return f"{self.target.parameters / 1e6:g}"


def depth_settings(prune: Prune) -> Depth:
    """Return the depth of a recipe that names no blocks."""
    return Depth(depth=prune.blocks, target=prune.target, protect=prune.protect)


def settle_depth(settings: Depth, way: Way, base: Path) -> int:
    """Return how many blocks of the model in a directory are removed; raises UserError where that cannot be."""
    protect = settings.protect
    if settings.target:
        return least_depth(sizes_of_directory(base), settings.target.parameters, protect.first, protect.last, way)
    assert settings.depth, "a recipe has a number of blocks or a target"
    require_depth(settings.depth, protect, blocks_in(base))
    return settings.depth


def blocks_in(directory: Path) -> int:
    """Return how many blocks the model in a directory has."""
    return count_blocks(read_json(directory / "config.json"))


def require_depth(depth: int, protect: Protect, blocks: int) -> None:
    """Raise UserError unless `depth` of a model's blocks can be removed while the protected ones stay."""
    if depth >= blocks:
        what = f"{depth} removes every block of a {blocks}-block model"
        raise UserError(problem("prune.blocks", what, f"Give 1 to {blocks - 1}"))
    if depth > (free := max(0, blocks - protect.first - protect.last)):
        what = f"leaves {free} of {blocks} blocks to remove {depth} from"
        raise UserError(problem("prune.protect", what, "Lower prune.protect"))

"""What a recipe removes, or how that is chosen, in one line and before anything is built."""

from __future__ import annotations

from sdft_ray.core.surgery import name_blocks
from sdft_ray.models import sources
from sdft_ray.spec.recipe import Prune, Recipe


def describe(recipe: Recipe) -> str:
    """Return the line about the blocks that go."""
    facts, prune = sources.describe_model(recipe.model), recipe.prune
    of = f" of {facts.blocks}" if facts else ""
    if prune.remove:
        return f"Cut: blocks {name_blocks(prune.remove)}{of}, named by the recipe."
    return f"Cut: {prune.depth}{of} blocks, {_name_choice(prune)}."


def _name_choice(prune: Prune) -> str:
    """Return in words which blocks are chosen."""
    if prune.metric == "loss":
        return f"the span of least loss among the best {prune.candidates} by distance and by influence"
    if prune.metric == "angular":
        return "the span of least angular distance"
    return f"{'the span' if prune.contiguous else 'those'} of least Block Influence"

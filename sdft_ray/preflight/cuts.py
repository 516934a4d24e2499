"""What a recipe removes, or how that is chosen, before anything is built.

In: a recipe, and the sizes of its model where it is on this machine. Out: the number of blocks that go, and one line
for people; or a UserError for a cut that cannot be.
"""

from __future__ import annotations

from collections.abc import Iterable

from sdft_ray.core.depth import Sizes, Way, least_depth, parameters_left
from sdft_ray.core.surgery import name_blocks, require_removable
from sdft_ray.models.depth import require_depth
from sdft_ray.models.sizes import sizes_of
from sdft_ray.spec.pruning import Prune
from sdft_ray.spec.recipe import Recipe


def depth_of(prune: Prune, sizes: Sizes | None) -> int | None:
    """Return how many blocks go; None where a target means a number that is not known before the model is here.

    Raises UserError for a number, or for blocks, that a model of these sizes cannot lose.
    """
    protect = prune.protect
    if prune.target:
        return sizes and least_depth(sizes, prune.target.parameters, protect.first, protect.last, _way(prune))
    if prune.remove:
        if sizes:
            require_removable(prune.remove, len(sizes.blocks), "prune.remove")
        return len(prune.remove)
    assert prune.blocks, "a recipe has a number of blocks, a target, or blocks by name"
    if sizes:
        require_depth(prune.blocks, protect, len(sizes.blocks))
    return prune.blocks


def describe(recipes: Iterable[Recipe]) -> list[str]:
    """Return a line for each different cut of some recipes."""
    different = {(each.model.model_dump_json(), each.prune.model_dump_json()): each for each in recipes}
    return list(dict.fromkeys(_describe(each.prune, sizes_of(each.model)) for each in different.values()))


def _describe(prune: Prune, sizes: Sizes | None) -> str:
    if prune.remove:
        of = f" of {len(sizes.blocks)}" if sizes else ""
        return f"Cut: blocks {name_blocks(prune.remove)}{of}{_name_left(prune, sizes)}, named by the recipe."
    depth = depth_of(prune, sizes)
    amount = f"{depth or 'so many'}{f' of {len(sizes.blocks)}' if sizes else ''} blocks"
    if prune.target:
        amount += f", the fewest for {prune.target.parameters:,.0f} parameters or less"
    return f"Cut: {amount}{_name_left(prune, sizes)}: {_name_choice(prune)}."


def _name_left(prune: Prune, sizes: Sizes | None) -> str:
    """Return in words what is left of a model."""
    depth = depth_of(prune, sizes)
    if sizes is None or depth is None:
        return ""
    most = parameters_left(sizes, prune.protect.first, prune.protect.last, _way(prune))
    left = sizes.total - sum(sizes.blocks[block] for block in prune.remove) if prune.remove else most[depth]
    is_exact = prune.remove or len({*sizes.blocks}) == 1
    return f" ({'' if is_exact else 'at most '}{left:,} of {sizes.total:,} parameters are left)"


def _way(prune: Prune) -> Way:
    """Return which blocks may be chosen together."""
    return "tail" if prune.metric == "tail" else "span" if prune.contiguous else "anywhere"


def _name_choice(prune: Prune) -> str:
    """Return in words which blocks are chosen."""
    if prune.metric == "tail":
        return "the last ones" + (f", but for {prune.protect.last} protected" if prune.protect.last else "")
    if prune.is_greedy:
        return "one after the other, each time the one without which the loss is least"
    if prune.metric == "loss":
        text = f"the span of least loss among the best {prune.candidates} by distance and by influence"
        if tried := prune.finalists:
            text += f"; of the best {tried.count}, each trained on {tried.rows} rows, the one of least loss then"
        return text
    if prune.metric == "angular":
        return "the span of least angular distance"
    return f"{'the span' if prune.contiguous else 'those'} of least Block Influence"

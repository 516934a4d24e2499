"""The disk that models take under a root, estimated before anything is built.

In: recipes with their chains, and headers of their bases. Out: bytes. All else under a root is small beside weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from sdft_ray.models.directory import tensor_places
from sdft_ray.pipeline import Chain
from sdft_ray.preflight import memory
from sdft_ray.preflight.costs import base_of, trained_parameters
from sdft_ray.spec.compute import Compute
from sdft_ray.spec.recipe import Recipe
from sdft_ray.stages.train import Settings as TrainSettings
from sdft_ray.store.storage import Storage

_PRUNED, _TUNED = ("cut", "patch"), ("train", "merge")


@dataclasses.dataclass(frozen=True)
class Disk:
    """Bytes under the root."""

    models: dict[str, int]
    """Of each model, by the id of its stage; without the base where it is the user's own directory, and without other
    forms (`export`)."""
    checkpoints: int
    """Of one training while it goes on: weights that are trained, both moments and the best weights, in float32."""

    def describe(self) -> str:
        """Return it in words."""
        of_each = ", ".join(f"{count} x {size / 1e9:.2f}" for size, count in self.counts().items())
        models = f"Disk under the root, in GB: {sum(self.models.values()) / 1e9:.2f} of models ({of_each})"
        return f"{models}; while a model is trained up to {self.checkpoints / 1e9:.2f} of checkpoints."

    def counts(self) -> dict[int, int]:
        """Return how many models have each size, the largest first."""
        sizes = sorted(self.models.values(), reverse=True)
        return {size: sizes.count(size) for size in sizes}


def estimate(chains: Iterable[tuple[Recipe, Chain]], compute: Compute, storage: Storage) -> Disk | None:
    """Return the disk that one or several recipes take together; None where a base is not on this machine yet."""
    models: dict[str, int] = {}
    checkpoints = 0
    for recipe, chain in chains:
        directory, shape, depth = base_of(recipe, chain, storage)
        if shape is None or depth is None:
            return None
        # A cut and a patch keep the precision of a stored parameter: 2 bytes of a base that is not there yet.
        places = tensor_places(directory).values() if directory else ()
        stored = sum(tensor.bytes for _, tensor in places) or 2 * shape.parameters
        pruned = memory.prune(shape, depth)
        tuned = (4 if recipe.train.dtype == "float32" else 2) * pruned.parameters
        for stage in chain.in_order:
            if stage.location is None and stage.name in ("model", *_PRUNED):
                of = shape if stage.name == "model" else pruned
                models[stage.id] = round(stored * of.parameters / shape.parameters)
            elif stage.location is None and stage.name in _TUNED:
                models[stage.id] = tuned
            if isinstance(own := stage.settings, TrainSettings):
                each = (16 if own.train.keep == "best" else 12) * trained_parameters(pruned, own.train, recipe.prune)
                checkpoints = max(checkpoints, each * compute.train.keep_checkpoints)
    return Disk(models, checkpoints)

"""Find the models for `sdft verify`: from a recipe, an artifact or a directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft_ray import pipeline
from sdft_ray.core.surgery import count_blocks, require_supported
from sdft_ray.data.readers import read_object
from sdft_ray.errors import UserError, problem
from sdft_ray.models.directory import weight_files
from sdft_ray.progress import log
from sdft_ray.spec.loading import load_recipe, names_recipe
from sdft_ray.store.manifest import read_manifest
from sdft_ray.store.storage import Storage

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass
class Model:
    """A model directory to verify, and results of earlier checks for later ones."""

    name: str
    directory: Path
    base: Path | None = None
    no_base: str = "no base is given: --against BASE"
    """The reason for a missing base."""
    kept: list[int] = dataclasses.field(default_factory=list, init=False)
    """For each block, its number in the base."""
    generated: list[tuple[list[int], torch.Tensor]] = dataclasses.field(default_factory=list, init=False)
    """Prompt and greedy continuation, and their logits (T V)."""


# --- what to verify -------------------------------------------------------------------------------------------


def find_models(target: str, against: str | None, storage: Storage) -> list[Model]:
    """Return the models of a directory, an artifact's id or a recipe file, each with its base."""
    if names_recipe(target):
        if against:
            raise UserError(problem("--against", "a recipe names its base itself", "Leave --against out"))
        models = _recipe_models(Path(target), storage)
    else:
        base = None if against is None else storage.find_model(against)
        models = [_one_model(storage.find_model(target), base, storage)]
    for model in models:
        config = _require_model(model.directory)
        if model.base:
            _require_compatible(_require_model(model.base), config, model)
    return models


def _recipe_models(path: Path, storage: Storage) -> list[Model]:
    chain = pipeline.chain(load_recipe(path))
    base = storage.files(chain.base)
    stages = {name: stage for name, stage in chain.models.items() if name != "base" and name not in chain.exported}
    built = {name: stage for name, stage in stages.items() if storage.status(stage) == "done"}
    if not built:
        what = f"none of its models ({', '.join(stages)}) is built under {storage.uri}"
        raise UserError(problem(str(path), what, f"Do: sdft run {path}"))
    for name in stages.keys() - built.keys():
        log(f"{name}: not built, so not verified")
    return [dataclasses.replace(_one_model(storage.files(built[name]), base, storage), name=name) for name in built]


def _one_model(directory: Path, base: Path | None, storage: Storage) -> Model:
    """Return a model with the given base, or the base that its manifest names and the root holds."""
    manifest = read_manifest(directory)
    if manifest is None:
        return Model(directory.resolve().name, directory, base)
    stage, name = manifest.stage, f"{manifest.stage} {manifest.id}"
    if stage not in ("cut", "patch"):
        return Model(name, directory, no_base=f"the weights of a `{stage}` artifact are its own")
    if base is None:
        base_id = manifest.identity.model
        try:
            base = storage.find(base_id)
        except UserError:  # a base that is a directory of the user's own
            return Model(name, directory, no_base=f"its base {base_id} is not under {storage.uri}: --against BASE")
    return Model(name, directory, base)


def _require_model(directory: Path) -> dict[str, Any]:
    """Return config.json of a model directory whose layout is known; raises UserError for other directories."""
    config = read_object(directory / "config.json", missing="is no Hugging Face model directory")
    require_supported(str(config.get("model_type")), str(directory))
    if not weight_files(directory):
        raise UserError(problem(str(directory), "has no weights (expected *.safetensors)", "Check the path"))
    return config


def _require_compatible(base: Mapping[str, Any], config: Mapping[str, Any], model: Model) -> None:
    """Raise UserError for a base from which the model cannot have been cut."""
    do = f"Give the model that {model.directory} was cut from"
    for key in ("model_type", "hidden_size"):
        if base.get(key) != config.get(key):
            raise UserError(problem(str(model.base), f"has {key} {base.get(key)}, expected {config.get(key)}", do))
    if (most := count_blocks(base)) < (least := count_blocks(config)):
        what = f"has {most} blocks, expected {least} or more"
        raise UserError(problem(str(model.base), what, do))

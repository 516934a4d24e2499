"""A small recipe whose rows and texts are files, and the chain of a recipe that a test writes down."""

import json
from pathlib import Path
from typing import Any

import yaml

from sdft_ray import pipeline
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.wording import validate


def write_recipe(folder: Path, model: Path, rows: int = 9, /, *, where: Path | None = None, **sections: Any) -> dict:
    """Write recipe.yaml, so many rows and some texts into a folder and return the recipe, whose sections have these
    fields, too; where: the folder as the recipe names it, else by its whole path."""
    (folder / "rows.jsonl").write_text("".join(json.dumps({"q": f"{i}?", "a": f"{i}"}) + "\n" for i in range(rows)))
    (folder / "texts.txt").write_text("One text.\n\nAnother text.\n\nA third text.")
    named, fields = folder if where is None else where, {"prompt": "q", "response": "a"}
    recipe: dict[str, Any] = {
        "model": {"path": str(model)},
        "rows": {"path": str(named / "rows.jsonl"), "fields": fields, "held_out": 2, "validation": 2},
        "prune": {"blocks": 2, "calibration": {"text": str(named / "texts.txt")}},
        "evaluate": {"tasks": ["held_out"]},
    }
    for name, section in sections.items():
        recipe[name] = recipe.get(name, {}) | section
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return recipe


def chain_of(recipe: dict) -> pipeline.Chain:
    """Return the chain of a recipe, as it stands in a file."""
    return pipeline.chain(validate(Recipe, recipe))

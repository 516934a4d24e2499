"""The disk that `sdft check --compute` says a recipe takes under its root."""

import pytest
from recipes import write_recipe

from sdft_ray import pipeline
from sdft_ray.models.sizes import sizes_of
from sdft_ray.preflight import disk
from sdft_ray.spec.compute import Compute
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.sources import LocalModel
from sdft_ray.spec.wording import validate


@pytest.fixture
def data(tiny_model, tmp_path) -> dict:
    rows = {"limit": 50, "held_out": 5, "validation": 5}
    return write_recipe(tmp_path, tiny_model, 50, rows=rows, evaluate={"tasks": ["arc_easy"]})


@pytest.fixture
def estimate(storage):
    def _estimate(*given: dict, **train) -> disk.Disk:
        recipes = [validate(Recipe, each) for each in given]
        compute = validate(Compute, {"train": train} if train else {})
        found = disk.estimate([(recipe, pipeline.chain(recipe)) for recipe in recipes], compute, storage)
        assert found is not None
        return found

    return _estimate


def without(model, blocks: int) -> float:
    sizes = sizes_of(LocalModel(path=str(model)))
    return 4 * (sizes.total - sum(sizes.blocks[:blocks]))  # float32; its blocks are all of one size


def test_a_recipe_takes_the_cut_and_a_model_an_arm_and_not_the_users_own_base(data, estimate, tiny_model):
    blocks = data["prune"]["blocks"]
    found = estimate(data)
    assert [*found.counts().values()] == [3]
    assert sum(found.models.values()) == pytest.approx(3 * without(tiny_model, blocks), rel=0.05)

    patched = estimate(data | {"prune": data["prune"] | {"patch": "linear"}})
    assert [*patched.counts().values()] == [4], "the cut, the patched one and two arms"
    assert "GB: 0.00 of models (4 x 0.00)" in patched.describe()


def test_a_trained_model_has_the_precision_of_its_training(data, estimate, tiny_model):
    half = without(tiny_model, data["prune"]["blocks"]) / 2
    found = estimate(data | {"train": {"dtype": "bfloat16"}})
    assert sorted(found.counts().values()) == [1, 2]
    assert min(found.counts()) == pytest.approx(half, rel=0.05)


def test_checkpoints_are_of_the_arm_that_trains_most(data, estimate, tiny_model):
    parameters = without(tiny_model, data["prune"]["blocks"]) / 4
    arms = {"arms": {"sft": {}, "distilled": {"method": "full"}}}
    assert estimate(data | arms, keep_checkpoints=1, cpus=1).checkpoints == pytest.approx(12 * parameters)


def test_recipes_of_a_sweep_share_models_and_each_depth_has_its_size(data, estimate, tiny_model):
    other = data | {"prune": data["prune"] | {"blocks": 1}}
    found = estimate(data, data | {"train": {"epochs": 2}}, other)
    blocks = data["prune"]["blocks"]
    sizes = {round(without(tiny_model, 1)): 3, round(without(tiny_model, blocks)): 5}
    assert [*found.counts().values()] == [*sizes.values()]
    assert [*found.counts()] == pytest.approx([*sizes], rel=0.05)


def test_checkpoints_are_of_all_that_are_kept(data, estimate, tiny_model):
    full = data | {"train": {"method": "full"}}
    parameters = without(tiny_model, data["prune"]["blocks"]) / 4
    assert estimate(full, keep_checkpoints=3, cpus=1).checkpoints == pytest.approx(3 * 12 * parameters)
    full["train"]["keep"] = "best"
    assert estimate(full, keep_checkpoints=3, cpus=1).checkpoints == pytest.approx(3 * 16 * parameters)


def test_a_model_of_the_hub_is_not_known_before_it_is_there(data, storage):
    recipe = validate(Recipe, data | {"model": {"repo": "some/one", "revision": "0" * 40}})
    assert disk.estimate([(recipe, pipeline.chain(recipe))], Compute(), storage) is None

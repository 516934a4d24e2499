"""Cuts that are trained before one is chosen: against each of them trained by a recipe of its own."""

import json

import pytest
import torch
from architectures import load
from recipes import chain_of
from tiny import make_tiny_model

from sdft_ray import pipeline
from sdft_ray.errors import UserError
from sdft_ray.preflight import cuts
from sdft_ray.results import Cut, read_candidates
from sdft_ray.spec.compute import load_compute
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.wording import validate
from sdft_ray.stages import finals
from sdft_ray.store.storage import Storage
from sdft_ray.sweep import planning
from sdft_ray.text_pool import read_texts


@pytest.fixture
def recipe(tmp_path) -> dict:
    """A recipe that trains two cuts of a tiny model before it chooses one."""
    base = make_tiny_model(tmp_path / "base")
    (tmp_path / "texts.txt").write_text("\n\n".join(f"Some text about {i} and {i + 1}." for i in range(12)))
    calibration = {"text": str(tmp_path / "texts.txt"), "limit": 8, "held_back": 4}
    return {
        "model": {"path": str(base)},
        "rows": {"gym": "products", "limit": 90, "validation": 2},
        "prune": {"blocks": 2, "protect": {"first": 1}, "patch": "linear", "calibration": calibration}
        | {"finalists": {"count": 2, "rows": 24, "lr": 1e-2}},
        "train": {"global_batch_size": 8, "epochs": 3},
        "arms": {"sft": {}},
        "evaluate": {"tasks": ["arc_easy"]},
    }


def test_the_chosen_cut_has_the_least_loss_of_those_trained_by_recipes_of_their_own(ray_cluster, recipe, tmp_path):
    storage = Storage(str(tmp_path / "root"))
    compute = load_compute({"train": {"workers": 1, "micro_batch": 8}})
    chain = chain_of(recipe)
    pipeline.build([chain.base, chain.rows, *chain.cutting.in_order], compute, storage)
    tried = read_candidates(storage.place(chain.loss))[:2]
    corpora = chain.finals.settings.calibration
    (corpus,) = read_texts(storage.fetch(chain.base), corpora, {})
    losses = {}
    for candidate in tried:
        own = {"remove": candidate.blocks, **{key: recipe["prune"][key] for key in ("patch", "calibration")}}
        train = recipe["train"] | {"epochs": 1, "rows": 24, "lr": 1e-2}
        alone = chain_of(recipe | {"prune": own, "train": train})
        pipeline.build([alone.base, alone.rows, *alone.cutting.in_order, alone.models["sft"]], compute, storage)
        model = load(storage.fetch(alone.models["sft"]))
        with torch.inference_mode():
            each = [model(ids := torch.tensor([t.ids]), labels=ids).loss for t in corpus.loss_texts]
        losses[candidate.blocks] = float(torch.stack(each).mean())
    summary = finals.Summary.of(chain.finals, storage)
    best = min(losses, key=lambda blocks: losses[blocks])
    assert {each.blocks: each.loss for each in summary.finalists} == pytest.approx(losses, rel=1e-4)
    assert [each.blocks for each in summary.finalists] == sorted(losses, key=lambda blocks: losses[blocks])
    assert {each.blocks: each.untrained for each in summary.finalists} == {one.blocks: one.loss for one in tried}
    assert all(abs(each.loss - each.untrained) > 1e-3 for each in summary.finalists), "they were patched and trained"
    cut = Cut.model_validate(storage.manifest(chain.pruned).summary)
    assert (cut.removed, cut.cost) == (best, summary.choice.value)
    assert summary.seconds > 0 and summary.rows == 24


def test_finalists_are_chosen_once_for_all_arms_seeds_and_sizes(recipe, tmp_path):
    chain, plain = chain_of(recipe), chain_of(recipe | {"prune": recipe["prune"] | {"finalists": None}})
    first, *_ = chain.cutting.finalists
    assert first.id == plain.pruned.id != chain.pruned.id, "the best one untrained is that of a recipe without"
    assert chain.pruned.inputs["loss"] is chain.finals and chain.models["patched"].inputs["pruned"] is chain.pruned
    for other in ({"seed": 7}, {"lr": 1e-3}, {"rows": 32}, {"epochs": 9}, {"patience": 2, "keep": "best"}):
        assert chain_of(recipe | {"train": recipe["train"] | other}).pruned.id == chain.pruned.id, other
    for other in ({"scope": "last"}, {"lora": {"rank": 2}}):
        assert chain_of(recipe | {"train": recipe["train"] | other}).pruned.id != chain.pruned.id, other
    short = chain_of(recipe | {"prune": recipe["prune"] | {"finalists": 2}})
    assert short.finals.inputs["finalist"].settings.train.rows == 64 and short.pruned.id != chain.pruned.id
    (line,) = cuts.describe([validate(Recipe, recipe)])
    assert line.endswith("; of the best 2, each trained on 24 rows, the one of least loss then.")


def test_sweep_builds_finalists_before_the_cut_and_once_for_all_sizes(recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    sweep = {"recipe": "recipe.yaml", "axes": {"prune.finalists": [None, 2], "train.rows": [16, 24]}}
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    plan = planning.load_sweep(tmp_path / "sweep.yaml")
    names = [stage.name for stage in plan.shared]
    assert (names.count("finals"), names.count("train"), names.count("cut"), len(plan.trials)) == (1, 2, 3, 4)
    built = set()
    for stage in plan.shared:
        assert {each.id for each in stage.inputs.values()} <= built, stage.name
        built.add(stage.id)


@pytest.mark.parametrize(
    ("prune", "line"),
    [
        ({"metric": "influence"}, "prune.finalists: are the best spans by the loss. Set prune.metric: loss"),
        ({"contiguous": False}, "prune.finalists: are the best spans by the loss. Set prune.metric: loss"),
        ({"finalists": 9}, "prune.finalists: are more than the 5 candidates. Raise prune.candidates"),
    ],
)
def test_finalists_with_a_mistake_say_where_what_and_how_to_fix_it(recipe, prune, line):
    with pytest.raises(UserError, match=line):
        validate(Recipe, recipe | {"prune": recipe["prune"] | prune})


def test_finalists_that_need_more_rows_than_there_are_are_refused_before_anything_is_built(recipe):
    from sdft_ray.preflight.checks import check

    many = recipe | {"prune": recipe["prune"] | {"finalists": {"count": 2, "rows": 100}}}
    with pytest.raises(UserError, match=r"^prune\.finalists\.rows: 100 is more than the 48 training rows"):
        check(validate(Recipe, many), load_compute())

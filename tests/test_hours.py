"""The hours that `sdft check --compute` shows, by stated rates and by finished stages."""

import json

import pytest
from recipes import write_recipe
from tiny import make_tiny_model

from sdft_ray import pipeline
from sdft_ray.preflight import costs, hours
from sdft_ray.spec.compute import Compute
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.wording import validate
from sdft_ray.store.storage import Storage
from sdft_ray.sweep import planning

TRAINED = {"steps": 5, "training_seconds": 40.0}


@pytest.fixture
def data(tiny_model, tmp_path) -> dict:
    rows = {"limit": 50, "held_out": 6, "validation": 4}
    evaluate = {"tasks": ["arc_easy", "sciq"], "limit": 20, "retention": {"rows": 5, "texts": 7}}
    return write_recipe(tmp_path, tiny_model, 50, rows=rows, train={"epochs": 2}, evaluate=evaluate)


def estimate(data: dict, storage: Storage, **compute) -> dict[str, costs.Cost]:
    recipe = validate(Recipe, data)
    settled = {name: {"cpus": 1} | compute.pop(name, {}) for name in ("score", "distill", "train", "evaluate")}
    given = validate(Compute, settled | compute)
    return {c.stage: c for c in costs.estimate_stages(recipe, given, pipeline.chain(recipe), storage)}


def told(found: dict[str, costs.Cost]) -> str:
    return hours.describe({name: cost.rate for name, cost in found.items()})


def finish(storage: Storage, stage, summary: dict, seconds: float) -> None:
    storage.scratch(stage).mkdir(parents=True, exist_ok=True)
    storage.commit(stage, summary, seconds)


def test_stated_hours_are_the_work_divided_by_what_all_processes_do(data, storage):
    stated = {"distill": 0.5, "train": 2, "evaluate": 10, "retention": 0.1}
    found = estimate(data, storage, train={"workers": 4}, distill={"actors": 2}, throughput=stated)
    assert {name: cost.amount for name, cost in found.items()} == {
        "score": 64,  # texts
        "distill": 40,
        "train (sft)": 80,  # of two epochs
        "train (distilled)": 80,
        "retention": 4 * (2 * 5 + 7),
        "evaluate": 4 * 2 * 20,
    }
    assert found["distill"].hours == pytest.approx(40 / (0.5 * 2) / 3600)
    assert found["train (sft)"].hours == found["train (distilled)"].hours == pytest.approx(80 / (2 * 4) / 3600)
    for name in ("evaluate", "retention"):
        each = found[name]
        assert each.hours == pytest.approx(each.amount / (stated[name] * each.processes) / 3600)
    assert found["score"].hours is None and found["score"].rate is None
    assert told(found) == (
        "Hours, of all work of a recipe and as if nothing were done: by compute.throughput of distill, train (sft), "
        "train (distilled), retention, evaluate."
    )


def test_work_without_a_known_bound_has_no_hours(data, storage):
    stated = {"evaluate": 10, "train": 1, "distill": 1}
    whole = data | {"evaluate": {"tasks": ["arc_easy"]}, "rows": data["rows"] | {"limit": None}}
    found = estimate(whole, storage, throughput=stated)
    assert {cost.hours for cost in found.values()} == {None}
    assert hours.describe({name: cost.rate for name, cost in found.items()}).startswith(
        "Hours: not known. State compute.throughput"
    )

    published = data | {"evaluate": {"preset": "openllm_v1", "tasks": ["winogrande", "gsm8k", "held_out"]}}
    assert estimate(published, storage)["evaluate"].amount == 4 * (1267 + 1319 + 6)


def test_measured_hours_are_those_of_the_longest_finished_stage_like_it(data, storage):
    """Of the same base, in the same precision and the same arm: a short one found its rows in the ledger."""
    few = pipeline.chain(validate(Recipe, data | {"train": {"epochs": 1, "rows": 10}}))
    finish(storage, few.distilled, {"generations": 10}, 100)
    other = pipeline.chain(validate(Recipe, data | {"train": {"rows": 9}, "distill": {"dtype": "float32"}}))
    assert few.distilled.settings.dtype != "float32"
    finish(storage, other.distilled, {"generations": 9}, 900)
    own = pipeline.chain(validate(Recipe, data))
    finish(storage, own.distilled, {"generations": 40}, 2)
    finish(storage, few.models["sft"], TRAINED, 1)

    found = estimate(data, storage)
    assert found["distill"].hours == pytest.approx(40 / (10 / 100) / 3600)
    assert found["train (sft)"].hours == pytest.approx(80 / (5 * 16 / 40) / 3600)
    assert (found["distill"].rate, found["train (sft)"].rate) == ("measured", "measured")
    assert found["train (distilled)"].hours is None, "no training of this arm is done"
    assert "with its processes: distill, train (sft)." in hours.describe(
        {name: cost.rate for name, cost in found.items()}
    )
    stated = estimate(data, storage, throughput={"distill": 1})["distill"]
    assert (stated.hours, stated.rate) == (pytest.approx(40 / 3600), "stated")


def test_measured_hours_of_evaluations_need_all_tasks_and_are_shared_by_those_at_once(data, storage):
    chain = pipeline.chain(validate(Recipe, data))
    finish(storage, chain.evaluations["base", "arc_easy"], {"n": 20, "seconds": 30.0}, 99)
    assert estimate(data, storage)["evaluate"].hours is None
    finish(storage, chain.evaluations["pruned", "sciq"], {"n": 20, "seconds": 10.0, "bits_per_byte": 4.9}, 99)
    cost = estimate(data, storage)["evaluate"]
    assert cost.hours == pytest.approx(160 / (40 / 40) / cost.processes / 3600)

    kept = {"seconds": 12.0, "responses": {"texts": 5}, "texts": {"texts": 7}, "bits_per_byte": {"n": 5}}
    finish(storage, chain.retention["base"], kept, 99)
    cost = estimate(data, storage)["retention"]
    assert cost.hours == pytest.approx(68 / (17 / 12) / cost.processes / 3600)


def test_items_are_those_that_a_limit_leaves_of_each_part_and_all_checked_held_out_rows(data, storage):
    """lm-eval limits each task of a group; held-out rows of a source without weight or without answers are no items."""
    evaluate = {"preset": "openllm_v1", "tasks": ["mmlu", "gsm8k", "held_out"], "limit": 5}
    assert estimate(data | {"evaluate": evaluate}, storage)["evaluate"].amount == 4 * (57 * 5 + 5 + 6)
    written = data | {"evaluate": evaluate | {"preset": "generative", "tasks": ["mmlu_pro", "ifeval"], "limit": 1000}}
    assert estimate(written, storage)["evaluate"].amount == 4 * (12032 + 541)
    unused, unchecked = data["rows"] | {"weight": 0}, data["rows"] | {"answer": "none", "held_out": 9}
    several = data | {"rows": [data["rows"] | {"weight": 1}, unused, unchecked | {"weight": 1}]}
    assert estimate(several | {"evaluate": evaluate}, storage)["evaluate"].amount == 4 * (57 * 5 + 5 + 6)


def test_rows_of_conversations_are_not_known_before_they_are_read(data, storage):
    """A limit is of conversations, each response of which is a row."""
    fields = {"fields": {"messages": "messages"}, "turns": "each", "answer": "none"}
    found = estimate(data | {"rows": data["rows"] | fields}, storage, throughput={"train": 1, "distill": 1})
    assert {cost.amount for name, cost in found.items() if name.startswith(("train", "distill"))} == {None}


def test_retention_is_of_no_more_rows_than_are_held_out(data, storage):
    evaluate = data["evaluate"] | {"retention": {"rows": 64, "texts": 7}}
    assert estimate(data | {"evaluate": evaluate}, storage)["retention"].amount == 4 * (2 * 6 + 7)


def test_rewriting_is_shown_where_an_arm_needs_it_and_of_each_set_of_rows(data, storage):
    assert "distill" not in estimate(data | {"arms": {"sft": {}}}, storage)
    other = {"rows": data["rows"] | {"limit": 30, "held_out": 0, "validation": 0}}
    found = estimate(data | {"merge": {"others": {"more": other}, "linear": {}}}, storage, throughput={"distill": 1})
    assert (found["distill"].amount, found["distill (more)"].amount) == (40, 30)
    assert found["distill (more)"].hours == pytest.approx(30 / 3600)


def test_what_an_earlier_command_did_is_no_part_of_a_measured_rate(data, storage):
    """Of a stage that was stopped, or found its rows in the ledger, the seconds are those of the last command."""
    few = pipeline.chain(validate(Recipe, data | {"train": {"rows": 10}}))
    finish(storage, few.distilled, {"generations": 10, "asked": 4}, 100)
    own = pipeline.chain(validate(Recipe, data))
    finish(storage, own.distilled, {"generations": 40, "asked": 0}, 500)
    found = estimate(data, storage)
    assert found["distill"].hours == pytest.approx(40 / (4 / 100) / 3600)


def test_measured_rate_of_a_task_is_not_that_of_other_shots(data, storage):
    shown = data["evaluate"] | {"tasks": ["arc_challenge"], "preset": "openllm_v1"}
    chain = pipeline.chain(validate(Recipe, data | {"evaluate": shown}))
    finish(storage, chain.evaluations["base", "arc_challenge"], {"n": 20, "seconds": 30.0}, 99)
    offline = data | {"evaluate": shown | {"preset": "offline"}}
    assert estimate(offline, storage)["evaluate"].hours is None
    assert estimate(data | {"evaluate": shown}, storage)["evaluate"].hours is not None


def test_evaluations_of_several_actors_each_are_fewer_at_a_time(data, storage, monkeypatch):
    monkeypatch.setattr(costs, "cores", lambda: 6)
    chain = pipeline.chain(validate(Recipe, data))
    for task in ("arc_easy", "sciq"):
        finish(storage, chain.evaluations["base", task], {"n": 20, "seconds": 10.0}, 99)
    of_one = estimate(data, storage)["evaluate"]
    of_three = estimate(data, storage, evaluate={"actors": 3})["evaluate"]
    assert (of_one.processes, of_three.processes) == (6, 6)
    assert of_one.hours == pytest.approx(160 / (2 * 6) / 3600)
    assert of_three.hours == pytest.approx(160 / (2 * 2) / 3600), "two models, of three actors each"


def test_hours_of_a_sweep_are_those_of_its_slowest_recipe(data, storage, tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(data | {"evaluate": {"tasks": ["arc_easy"]}}))
    axes = {"distill.dtype": ["bfloat16", "float32"]}
    (tmp_path / "sweep.yaml").write_text(json.dumps({"recipe": "recipe.yaml", "axes": axes}))
    plan = planning.load_sweep(tmp_path / "sweep.yaml")
    compute = validate(Compute, {name: {"cpus": 1} for name in ("score", "distill", "train", "evaluate")})
    fast, slow = (pipeline.chain(cell.recipe).distilled for cell in plan.cells)

    def hours() -> float | None:
        return {cost.stage: cost.hours for cost in costs.estimate_sweep(plan, compute, storage)}["distill"]

    finish(storage, fast, {"generations": 40}, 40)
    assert hours() is None, "the other is not known"
    finish(storage, slow, {"generations": 40}, 400)
    assert hours() == pytest.approx(400 / 3600)


def test_an_artifact_of_others_that_cannot_be_read_keeps_no_recipe_from_its_hours(data, storage):
    finish(storage, pipeline.chain(validate(Recipe, data)).distilled, {"generations": 40}, 10)
    for name, text in (("damaged-0123456789ab", "{"), ("newer-0123456789ac", '{"format": 99}')):
        place = storage.root / "distill" / name
        place.mkdir()
        (place / "manifest.json").write_text(text)
    assert estimate(data, storage)["distill"].hours == pytest.approx(10 / 3600)


def test_a_finished_stage_of_another_model_says_nothing_of_this_one(data, storage, tmp_path):
    other = pipeline.chain(validate(Recipe, data | {"model": {"path": str(make_tiny_model(tmp_path, "qwen3"))}}))
    finish(storage, other.distilled, {"generations": 40}, 10)
    assert estimate(data, storage)["distill"].hours is None

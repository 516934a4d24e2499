"""Identity: what moves an id and what must not. Nothing is built here but rows, and a stage of a test's own."""

import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import pin
import pytest

from sdft_ray import pipeline
from sdft_ray.errors import UserError
from sdft_ray.preflight import limits, precision
from sdft_ray.report import terminal
from sdft_ray.spec.compute import Compute, load_compute
from sdft_ray.spec.loading import leaves, load_recipe
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.wording import validate
from sdft_ray.stages import rows
from sdft_ray.store.storage import Storage

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def recipe(tiny_model, tmp_path) -> dict:
    """A complete recipe as plain data, every default written out."""
    rows = tmp_path / "rows.0.jsonl"
    rows.write_text("".join(json.dumps({"q": f"{i}?", "a": f"{i}"}) + "\n" for i in range(9)))
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"Some text {i}.", "other": f"Other {i}."}) + "\n" for i in range(3)))
    short = {
        "model": {"path": str(tiny_model)},
        "rows": {
            "path": str(rows),
            "fields": {"prompt": "q", "response": "a"},
            "limit": 8,
            "held_out": 2,
            "validation": 2,
            "decontaminate": ["arc_easy"],
        },
        "prune": {"blocks": 2, "metric": "loss", "calibration": {"text": str(texts)}},
        "evaluate": {"tasks": ["arc_easy", "held_out"], "limit": 3},
    }
    return validate(Recipe, short).model_dump(mode="json")


# A second value for leaves where adding one or flipping would not be valid.
OTHER = {
    "model.part": "text",
    "rows.0.answer": "none",
    "rows.0.decontaminate": ["sciq"],
    "rows.0.fields.prompt": "p",
    "rows.0.fields.response": "r",
    "rows.0.fields.context": "c",
    "rows.0.fields.answer": "a",
    "prune.dtype": "bfloat16",
    "prune.patch": "linear",
    "prune.finalists": 2,
    "prune.metric": "angular",
    "train.scope": "last",
    "prune.calibration.0.field": "other",
    "prune.calibration.0.positions": "all",
    "distill.dtype": "float32",
    "distill.teacher": {"endpoint": "http://127.0.0.1:1/v1", "model": "some/teacher"},
    "distill.seeds": "engine",
    "distill.lookup": {"tokens": 3},
    "distill.template": "{prompt} {reference}",
    "rows.0.template": "{reference} {prompt}",
    "rows.0.filters": {"too_long": 2.0},
    "distill.filters.leak_phrases": ["given text"],
    "distill.filters.refusal_phrases": ["no puedo"],
    "train.method": "full",
    "train.lora.targets": ["q_proj"],
    "train.schedule": "linear",
    "train.too_long": "truncate",
    "train.keep": "best",
    "train.dtype": "bfloat16",
    "evaluate.tasks": ["arc_easy"],
    "evaluate.dtype": "float32",
    "evaluate.engine": "vllm",
    "train.rows": 4,
}
# Only one value exists, or the other needs another source.
FIXED = {
    # Of conversations.
    *(f"rows.0.fields.{name}" for name in ("messages", "tools", "format")),
    "rows.0.weight",  # of a mixture
    "rows.0.turns",
    "rows.0.plain",
    "evaluate.preset",
    "model.path",
    "rows.0.path",
    "prune.contiguous",
    "prune.target",  # either this, remove or blocks; tested below
    "prune.remove",
    "prune.calibration.0.text",
    "prune.calibration.0.rows",
    "evaluate.speed",  # measures beside the evaluations
    "evaluate.retention",  # measures beside the evaluations; what its own leaves move is tested with it
    "evaluate.pass_at",  # samples beside the evaluations; what its own leaves move is tested with it
    "draft",  # measures beside the evaluations
    "export",  # makes further models
    "merge",  # makes further models; what its own leaves move is tested with it
}


# What moves no number: gates, which finished counts are compared with, and how many rows a diagnostic looks at.
GATES = {"distill.max_failed_fraction", "distill.max_attempts", "train.max_too_long_fraction"}
DIAGNOSTICS = {"distill.shift_rows": "nll"}


def final_ids(data: dict) -> list[str]:
    return [stage.id for stage in pipeline.chain(validate(Recipe, data)).in_order if stage.name == "evaluate"]


def all_ids(data: dict) -> set[tuple[str, str]]:
    return {(stage.name, stage.id) for stage in pipeline.chain(validate(Recipe, data)).in_order}


def with_leaf(data: dict, path: str, value) -> dict:
    changed = json.loads(json.dumps(data))
    *parents, last = path.split(".")
    at = changed
    for parent in parents:
        at = at[int(parent) if parent.isdigit() else parent]
    at[last] = value
    return changed


@pytest.mark.heavy
def test_every_recipe_leaf_that_can_change_a_number_moves_a_final_id(recipe):
    original, moved = final_ids(recipe), 0
    for path, value in leaves(recipe):
        if path in FIXED | GATES | {*DIAGNOSTICS} or path.startswith("arms."):
            continue
        if path == "rows.0.answer":  # held_out needs checkable rows
            changed = with_leaf(with_leaf(recipe, path, "none"), "evaluate.tasks", ["arc_easy"])
            assert final_ids(changed)[-1] not in original, path
            continue
        if path in OTHER:
            other = OTHER[path]
        elif isinstance(value, bool):
            other = not value
        else:
            other = value * 0.5 if isinstance(value, float) and value else (value or 0) + 1
        if isinstance(value, float) and not value:
            other = 0.5
        assert final_ids(with_leaf(recipe, path, other)) != original, path
        moved += 1
    assert moved > 35


@pytest.mark.parametrize("path", sorted(GATES))
def test_a_gate_moves_no_id_and_goes_with_its_stage(recipe, path):
    name, _, field = path.partition(".")
    changed = with_leaf(recipe, path, 1)
    assert all_ids(changed) == all_ids(recipe)
    settings = [stage.settings for stage in pipeline.chain(validate(Recipe, changed)).in_order if stage.name == name]
    gates = [each.train if name == "train" else each for each in settings]
    assert gates and all(getattr(each, field) == 1 for each in gates)
    assert field not in json.dumps([each.hashed() for each in settings])


@pytest.mark.parametrize(("path", "stage"), DIAGNOSTICS.items())
def test_a_diagnostic_moves_its_own_stage_alone_which_nothing_depends_on(recipe, path, stage):
    more, none = all_ids(with_leaf(recipe, path, 65)), all_ids(with_leaf(recipe, path, 0))
    assert {name for name, _ in more ^ all_ids(recipe)} == {name for name, _ in none ^ all_ids(recipe)} == {stage}
    assert stage not in {name for name, _ in none}


def test_every_way_to_choose_blocks_has_its_own_ids(recipe):
    ways = [
        {"metric": metric, "contiguous": contiguous, "candidates": candidates}
        for metric, contiguous, candidates in [
            ("angular", True, 5), ("influence", True, 5), ("influence", False, 5), ("loss", True, 5), ("loss", True, 6),
            ("loss", False, 5), ("tail", True, 5)
        ]
    ]  # fmt: skip
    plans = [pipeline.chain(validate(Recipe, recipe | {"prune": recipe["prune"] | way})).in_order for way in ways]
    ids = [{stage.name: stage.id for stage in plan} for plan in plans]
    assert len({each["cut"] for each in ids}) == len(ways)
    assert len({each["score"] for each in ids if "score" in each}) == 1, "one pass serves every way"


def test_losses_of_candidates_are_measured_where_asked_for_and_bear_on_the_cut_only_where_they_choose(recipe):
    def cut_of(**prune):
        plan = pipeline.chain(validate(Recipe, recipe | {"prune": recipe["prune"] | prune})).in_order
        return [stage.name for stage in plan].count("loss"), next(s.id for s in plan if s.name == "cut")

    assert cut_of(metric="angular", candidates=0)[0] == 0
    assert cut_of(metric="angular", candidates=0)[1] == cut_of(metric="angular", candidates=5)[1]
    assert cut_of(metric="angular", candidates=5)[0] == cut_of(metric="loss", candidates=5)[0] == 1


def plan_of(recipe, **prune) -> dict[str, str]:
    """Return the id of a stage of each kind in the plan of a recipe with this section."""
    return {stage.name: stage.id for stage in pipeline.chain(validate(Recipe, recipe | {"prune": prune})).in_order}


def test_named_blocks_are_cut_without_a_measurement(recipe):
    nowhere = {"calibration": {"text": "no/such/file.txt"}}
    found = plan_of(recipe, remove=[3, 1], **nowhere)
    assert not {"score", "loss"} & found.keys()
    assert found == plan_of(recipe, remove=[1, 3], dtype="bfloat16", **nowhere), "their order is no difference"
    assert found["cut"] != plan_of(recipe, remove=[1, 2])["cut"]


def test_blocks_that_go_one_after_the_other_need_no_distances(recipe):
    two, three = (plan_of(recipe, blocks=depth, contiguous=False) for depth in (2, 3))
    assert "loss" in two and "score" not in two
    assert {name for name in two if two[name] != three[name]} == {"loss", "cut", "train", "evaluate"}
    assert two == plan_of(recipe, blocks=2, contiguous=False, candidates=0), "every block is a candidate"


def test_the_last_blocks_are_cut_without_a_measurement(recipe):
    found = plan_of(recipe, blocks=2, metric="tail", calibration={"text": "no/such/file.txt"})
    assert not {"score", "loss"} & found.keys()
    assert found["cut"] != plan_of(recipe, blocks=2, metric="tail", protect={"last": 1})["cut"]


def test_a_target_moves_the_cut_and_neither_scoring_nor_generation(recipe):
    six, same, seven = (plan_of(recipe, target={"parameters": size}) for size in (6e9, 6_000_000_000, 7e9))
    assert six == same
    assert {name for name in six if six[name] != seven[name]} == {"loss", "cut", "train", "evaluate"}
    deep = plan_of(recipe, blocks=2)
    assert {name for name in six if six[name] != deep[name]} == {"loss", "cut", "train", "evaluate"}


def test_named_blocks_with_a_patch_read_its_texts_and_are_not_scored(recipe):
    found = plan_of(recipe, remove=[1, 3], patch="linear", calibration={"rows": "own"})
    assert "patch" in found and not {"score", "loss"} & found.keys()
    assert found["cut"] == plan_of(recipe, remove=[1, 3])["cut"]


@pytest.mark.parametrize("several", [False, True])
def test_calibration_on_chat_rows_scores_after_their_rows_stage(recipe, tmp_path, several):
    other = tmp_path / "other.jsonl"
    other.write_text('{"q": "1?", "a": "1"}\n')
    chats = [{"rows": "own"}, {"rows": {"path": str(other), "fields": {"prompt": "q", "response": "a"}}}]
    corpora = [*chats, {"text": recipe["prune"]["calibration"][0]["text"]}] if several else chats[0]
    plan = pipeline.chain(validate(Recipe, recipe | {"prune": recipe["prune"] | {"calibration": corpora}})).in_order
    names = [stage.name for stage in plan]
    assert names.count("rows") == (2 if several else 1)
    scored = plan[names.index("score")]
    assert all(stage in plan[: names.index("score")] for stage in scored.inputs.values())
    assert len(scored.settings.calibration) == (3 if several else 1)


def test_an_arm_override_moves_only_that_arm(recipe):
    before = {
        stage.slug: stage.id for stage in pipeline.chain(validate(Recipe, recipe)).in_order if stage.name == "train"
    }
    changed = with_leaf(recipe, "arms.distilled.lr", 1e-5)
    after = {
        stage.slug: stage.id for stage in pipeline.chain(validate(Recipe, changed)).in_order if stage.name == "train"
    }
    assert [name for name in before if before[name] != after[name]] == [name for name in before if "distilled" in name]


def test_an_arm_with_soft_targets_stands_beside_the_others_and_stores_them_where_asked_for(recipe):
    def plan(**soft):
        stages = pipeline.chain(validate(Recipe, with_leaf(recipe, "arms.logits", soft))).in_order
        return {(stage.name, stage.slug): stage for stage in stages}

    def soft_arm(stages):
        return next(stage for (name, slug), stage in stages.items() if name == "train" and "logits" in slug)

    before = {(stage.name, stage.slug): stage for stage in pipeline.chain(validate(Recipe, recipe)).in_order}
    online, stored = plan(), plan(likeliest=8)
    for changed in (online, stored):
        assert all(changed[key].id == stage.id for key, stage in before.items() if key[0] != "evaluate")
    assert {name for name, _ in stored} - {name for name, _ in online} == {"targets"}
    assert (
        {"model", "teacher", "rows", "distilled"}
        == {*soft_arm(online).inputs}
        == {*soft_arm(stored).inputs} - {"targets"}
    )
    others = [plan(), plan(temperature=2.0), plan(cross_entropy=0.5), plan(lr=1e-5), stored, plan(likeliest=9)]
    assert len({soft_arm(each).id for each in others}) == len(others)

    def targets(stages):
        return next(stage.id for (name, _), stage in stages.items() if name == "targets")

    assert targets(stored) == targets(plan(likeliest=8, lr=1e-5)), "they do not depend on how the student learns"
    names = [name for name, _ in stored]
    assert names.index("distill") < names.index("targets") < names.index("train")


def test_exports_are_further_models_that_move_no_other_id(recipe):
    exports = {"formats": ["q8_0", "int8"], "models": ["base", "sft"]}
    more = all_ids(recipe | {"export": exports}) - all_ids(recipe)
    assert all_ids(recipe) < all_ids(recipe | {"export": exports})
    assert Counter(name for name, _ in more) == {"export": 4, "evaluate": 8}
    engines = recipe | {"export": exports, "evaluate": {**recipe["evaluate"], "engine": "vllm"}}
    measured = pipeline.chain(validate(Recipe, engines)).evaluations
    assert {name for (name, _), stage in measured.items() if stage.settings.engine == "transformers"} == {
        "base q8_0",
        "sft q8_0",
    }
    with pytest.raises(UserError, match=r"^export\.models: this recipe makes no sfd\. Did you mean sft\?"):
        all_ids(recipe | {"export": exports | {"models": ["sfd"]}})


def test_only_the_arm_with_soft_targets_alone_generates_too(recipe):
    alone = recipe | {"arms": {"logits": {}}}
    assert "distill" in {stage.name for stage in pipeline.chain(validate(Recipe, alone)).in_order}
    assert "distill" not in {
        stage.name for stage in pipeline.chain(validate(Recipe, recipe | {"arms": {"sft": {}}})).in_order
    }


def test_no_compute_leaf_is_part_of_any_identity(recipe):
    names = {path.rpartition(".")[2] for path, _ in leaves(Compute())} - {"tensor_parallel_size"}
    for stage in pipeline.chain(validate(Recipe, recipe)).in_order:
        keys = {path.rpartition(".")[2] for path, _ in leaves(stage.identity["settings"])}
        assert not keys & (names - {"max_tokens"}), stage.name


def test_depth_moves_neither_scoring_nor_generation(recipe):
    two, three = (
        {
            stage.name: stage.id
            for stage in pipeline.chain(validate(Recipe, with_leaf(recipe, "prune.blocks", n))).in_order
        }
        for n in (2, 3)
    )
    assert {name for name in two if two[name] != three[name]} == {"loss", "cut", "train", "evaluate"}


def test_a_moved_file_keeps_its_identity(recipe, tmp_path):
    original = final_ids(recipe)
    moved = tmp_path / "elsewhere.jsonl"
    Path(recipe["rows"][0]["path"]).rename(moved)
    assert final_ids(with_leaf(recipe, "rows.0.path", str(moved))) == original


def test_storage_root_and_cwd_are_in_no_identity(recipe, tmp_path):
    text = json.dumps([stage.lineage for stage in pipeline.chain(validate(Recipe, recipe)).in_order])
    assert str(tmp_path) not in text


def test_ids_of_shipped_recipes_and_sweeps_are_the_pinned_ones():
    assert pin.read_ids() == pin.plan_ids(), "an id moved: say so in CHANGELOG.md, and do: python -m tests.pin"


def test_no_identity_holds_a_sentence(recipe):
    harness = with_leaf(with_leaf(recipe, "evaluate.preset", "harness"), "evaluate.tasks", ["arc_easy", "held_out"])
    for stage in pipeline.chain(validate(Recipe, harness)).in_order:
        for path, value in leaves(stage.identity):
            assert not isinstance(value, str) or " " not in value, (stage.name, path)


def test_every_shipped_config_loads_and_plans(tmp_path):
    recipes = sorted((CONFIGS / "recipes").glob("*.yaml"))
    computes = sorted((CONFIGS / "compute").glob("*.yaml"))
    assert len(recipes) >= 3 and len(computes) >= 2
    for path in computes:
        load_compute(path)
    for path in recipes:
        plan = pipeline.chain(load_recipe(path)).in_order
        chain = ("model", "rows", "score", "loss", "cut", "distill", "train")
        assert tuple(dict.fromkeys(stage.name for stage in plan if stage.name in chain)) == chain
        assert {line.status for line in pipeline.describe(plan, Storage(str(tmp_path)))} <= {"missing", "done"}
        assert not list(tmp_path.iterdir()), "planning writes nothing under the root"


# What a new kind of stage is: a file, and an entry in `pipeline.MODULES`.
LONGEST = '''
"""Stage `longest`: the longest prompts of the training rows."""

import json

from sdft_ray import stages
from sdft_ray.core.rows import Row
from sdft_ray.results import read_split
from sdft_ray.spec.section import Section
from sdft_ray.store.identity import Stage

VERSION, NEEDS, UNIT = 1, None, "rows"


class Settings(Section):
    """How many, and where nobody looks."""

    unhashed = ("note",)
    count: int
    note: str = ""


class Summary(stages.Summary):
    longest: int
    read: int


def stage(count, rows, note=""):
    return Stage("longest", f"{rows.slug}-{count}", VERSION, Settings(count=count, note=note), {"rows": rows})


def build(work):
    prompts = sorted((row.prompt for row in read_split(work.input("rows"), "train", Row)), key=len, reverse=True)
    (work.directory / "longest.json").write_text(json.dumps(prompts[: work.settings.count]))
    return Summary(longest=len(prompts[0]), read=len(prompts))
'''


@pytest.fixture
def longest(tmp_path, monkeypatch):
    """The module of a stage that the package does not know, entered where it looks its stages up."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "longest.py").write_text(LONGEST)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    module = importlib.import_module("longest")
    monkeypatch.setitem(pipeline.MODULES, "longest", module)
    yield module
    del sys.modules["longest"]


def test_pieces_that_a_kill_left_of_a_finished_stage_go_with_the_next_command(recipe, tmp_path):
    rows, compute, storage = (
        pipeline.chain(validate(Recipe, recipe)).rows,
        load_compute(),
        Storage(str(tmp_path / "root")),
    )
    pipeline.build([rows], compute, storage)
    (storage.resumable(rows) / "checkpoint").write_text("1")
    assert pipeline.build([rows], compute, storage).reused == (rows,)
    assert not any((storage.root / "resumable").glob("*/*"))
    assert storage.status(rows) == "done"


def test_a_stage_of_its_own_file_and_an_entry_is_built_into_an_artifact(recipe, tmp_path, longest, capsys):
    chain = pipeline.chain(validate(Recipe, recipe))
    compute, storage = load_compute(), Storage(str(tmp_path / "root"))
    added = longest.stage(2, chain.rows, note="/a/path")
    assert added.id == longest.stage(2, chain.rows).id != longest.stage(3, chain.rows).id
    built = pipeline.build([chain.rows, added], compute, storage)
    assert [stage.name for stage in built.new] == ["rows", "longest"]
    manifest = storage.manifest(added)
    assert (manifest.stage, manifest.id, manifest.identity.plain()) == ("longest", added.id, added.identity)
    assert manifest.identity.settings == {"count": 2}
    assert manifest.identity.inputs == {"rows": chain.rows.id}
    assert manifest.summary == {"longest": 2, "read": 4}
    assert [file.path for file in manifest.files] == ["longest.json"]
    assert len(json.loads((storage.place(added) / "longest.json").read_text())) == 2
    assert pipeline.build([chain.rows, added], compute, storage).reused == (chain.rows, added)
    assert [line.status for line in pipeline.describe([chain.rows, added], storage)] == ["done", "done"]
    assert precision.half_fields([added], compute) == {}
    terminal.show_artifact(storage.place(added), manifest)
    assert f"longest {added.id}" in capsys.readouterr().out


def test_rows_of_a_gym_are_built_from_the_plan(tiny_model, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("Some text.\n\nMore text.\n\nA third text.")
    recipe = validate(
        Recipe,
        {
            "model": {"path": str(tiny_model)},
            "rows": {"gym": "products", "options": {"max_terms": 2}, "limit": 30, "held_out": 3, "validation": 3},
            "prune": {"blocks": 2, "calibration": {"text": str(texts)}},
            "evaluate": {"tasks": ["held_out"]},
        },
    )
    storage = Storage(str(tmp_path / "root"))
    pipeline.run(recipe, load_compute(), storage, until="rows")
    counts = rows.Summary.of(pipeline.chain(recipe).rows, storage)
    assert counts.read == 30 == sum(counts.rows.plain().values()) + counts.duplicate_prompts


def test_retention_moves_no_other_id_and_is_moved_by_each_of_its_leaves(recipe, tmp_path):
    (tmp_path / "plain.jsonl").write_text(
        "".join(json.dumps({"text": f"{i}.", "other": f"{i}!"}) + "\n" for i in range(9))
    )
    wanted = {"rows": 2, "texts": 3, "text": str(tmp_path / "plain.jsonl"), "field": "text", "max_tokens": 9}
    with_it = with_leaf(recipe, "evaluate.retention", wanted)
    assert all_ids(recipe) < all_ids(with_it)
    added = pipeline.chain(validate(Recipe, with_it))
    assert {name for name, _ in all_ids(with_it) - all_ids(recipe)} == {"probes", "retention"}
    assert [*added.retention] == [*added.models] and added.in_order[-1].name == "evaluate"
    before = {stage.id for stage in added.retention.values()}
    (tmp_path / "others.jsonl").write_text(json.dumps({"text": "Another file."}) + "\n")
    for leaf, value in {
        "rows": 1,
        "texts": 4,
        "max_tokens": 8,
        "field": "other",
        "text": str(tmp_path / "others.jsonl"),
    }.items():
        changed = pipeline.chain(validate(Recipe, with_leaf(with_it, f"evaluate.retention.{leaf}", value)))
        assert not before & {stage.id for stage in changed.retention.values()}, leaf
    known, moved = all_ids(with_it), tmp_path / "moved.jsonl"
    (tmp_path / "plain.jsonl").rename(moved)
    assert all_ids(with_leaf(with_it, "evaluate.retention.text", str(moved))) == known


def test_pass_at_moves_the_held_out_evaluations_alone_and_is_moved_by_each_of_its_leaves_but_k(recipe):
    wanted = {"k": [1, 2], "samples": 4, "temperature": 0.5, "top_p": 0.5, "seed": 1}
    with_it = with_leaf(recipe, "evaluate.pass_at", wanted)
    chains = [pipeline.chain(validate(Recipe, data)) for data in (recipe, with_it)]
    moved = {key for key, stage in chains[0].evaluations.items() if stage.id != chains[1].evaluations[key].id}
    assert moved == {(model, "held_out") for model in chains[0].models}
    for leaf, value in {"samples": 5, "temperature": 0.6, "top_p": 0.6, "seed": 2}.items():
        assert all_ids(with_leaf(with_it, f"evaluate.pass_at.{leaf}", value)) != all_ids(with_it), leaf
    assert all_ids(with_leaf(with_it, "evaluate.pass_at.k", [3])) == all_ids(with_it)


def test_retention_passes_over_what_calibration_reads(recipe):
    (corpus,) = recipe["prune"]["calibration"]
    same = with_leaf(recipe, "evaluate.retention", {"text": corpus["text"]})
    chain = pipeline.chain(validate(Recipe, same))
    texts = chain.retention["base"].inputs["probes"].settings.texts
    assert texts.skip == corpus["limit"] + corpus["held_back"]
    with pytest.raises(UserError, match=r"evaluate\.retention\.text: .* has no text behind the 96 that"):
        limits.require_texts(validate(Recipe, same), len)


def test_retention_on_texts_that_are_trained_on_is_refused(recipe):
    rows = recipe["rows"][0]["path"]
    with pytest.raises(UserError, match=r"evaluate\.retention\.text: .* is trained on as rows"):
        pipeline.chain(validate(Recipe, with_leaf(recipe, "evaluate.retention", {"text": rows, "field": "a"})))


@pytest.mark.parametrize("wanted", [{"texts": 0}, {"texts": 0, "rows": 0}])
def test_retention_without_rows_and_texts_is_one_clear_line(recipe, wanted):
    bare = with_leaf(with_leaf(recipe, "evaluate.tasks", ["arc_easy"]), "rows.0.held_out", 0)
    with pytest.raises(UserError) as error:
        validate(Recipe, with_leaf(bare, "evaluate.retention", wanted))
    assert error.value.problems == (
        "evaluate.retention: has neither held-out rows nor texts to measure on. "
        "Raise rows.held_out or evaluate.retention.texts.",
    )


def test_retention_of_texts_alone_needs_no_rows(recipe, tmp_path):
    (tmp_path / "plain.txt").write_text("One.\n\nTwo.")
    bare = with_leaf(with_leaf(recipe, "evaluate.tasks", ["arc_easy"]), "rows.0.held_out", 0)
    chain = pipeline.chain(
        validate(Recipe, with_leaf(bare, "evaluate.retention", {"text": str(tmp_path / "plain.txt")}))
    )
    stage = chain.retention["base"].inputs["probes"]
    assert set(stage.inputs) == {"model"} and stage.settings.rows == 0

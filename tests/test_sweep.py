"""A sweep file: what it expands to, what its cells share, every mistake in it said in one line. Nothing is built."""

import json
import math
import sys
from pathlib import Path

import pytest
import yaml
from command import sdft
from recipes import write_recipe
from refusals import complaint

from sdft_ray import overlap
from sdft_ray.core import searching
from sdft_ray.core.recovery import Estimate
from sdft_ray.errors import UserError
from sdft_ray.preflight import savings
from sdft_ray.progress import Progress
from sdft_ray.spec.compute import load_compute
from sdft_ray.spec.sweep import Axis, Goal
from sdft_ray.stages import Work, distill
from sdft_ray.stages.distill.draws import instruction_templates
from sdft_ray.stages.evaluate.presets import OPENLLM_V1
from sdft_ray.store.storage import Storage
from sdft_ray.sweep import goal, notes, planning, trials


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A directory with a good recipe, whose sweep file a test writes."""
    evaluate = {"tasks": ["arc_easy", "held_out"], "limit": 3}
    write_recipe(tmp_path, tiny_model, 40, arms={"sft": {}, "distilled": {"epochs": 2}}, evaluate=evaluate)
    return tmp_path


def load(folder: Path, axes, **more) -> planning.Plan:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"recipe": "recipe.yaml", "axes": axes, **more}))
    return planning.load_sweep(path)


def names(stages) -> list[str]:
    return [stage.name for stage in stages]


def test_sweep_of_depths_and_sizes_shares_everything_but_the_trials(folder):
    plan = load(folder, {"prune.blocks": [2, 3, 4], "train.rows": [16, 32]})
    assert len(plan.cells) == 6 and len(plan.trials) == 12
    shared = names(plan.shared)
    assert {name: shared.count(name) for name in dict.fromkeys(shared)} == {
        "model": 1, "rows": 1, "score": 1, "loss": 3, "cut": 3, "distill": 2, "nll": 2, "evaluate": 2 * (1 + 3)
    }  # fmt: skip
    for trial in plan.trials:
        assert names(trial.evaluations.values()) == ["evaluate", "evaluate"]
        assert [*trial.evaluations] == ["arc_easy", "held_out"]
        assert trial.stages == (trial.train, *trial.evaluations.values())
    everything = planning.stages_of(plan)
    assert len({stage.id for stage in everything}) == len(everything)


def test_sweep_of_sizes_generates_at_the_largest_first(folder):
    def sizes(*rows):
        plan = load(folder, {"train.rows": list(rows)})
        return [stage.settings.rows for stage in plan.shared if stage.name == "distill"]

    assert sizes(8, 32, 16) == [32, 16, 8]
    assert sizes(8, None, 16) == [None, 16, 8], "all rows are the most"


def test_sweep_builds_inputs_before_what_needs_them(folder):
    plan = load(folder, {"prune.blocks": [3, 2], "train.rows": [16, 32]})
    there: set[str] = set()
    for stage in planning.stages_of(plan):
        assert {each.id for each in stage.inputs.values()} <= there, stage.name
        there.add(stage.id)


def test_sweep_over_an_arms_own_field_trains_the_other_arm_once(folder):
    plan = load(folder, {"arms.distilled.lr": [1e-4, 2e-4], "prune.blocks": [2, 3]})
    assert [trial.arm for trial in plan.trials].count("sft") == 2
    assert [trial.arm for trial in plan.trials].count("distilled") == 4
    assert {trial.name for trial in plan.trials if trial.arm == "sft"} == {"sft, blocks 2", "sft, blocks 3"}


def test_checking_a_sweep_opens_its_row_file_as_often_for_many_cells_as_for_one(folder):
    opened = 0
    rows, counting = str(folder / "rows.jsonl"), True

    def count(event: str, arguments: tuple) -> None:
        nonlocal opened
        opened += counting and event == "open" and str(arguments[0]) == rows

    def count_for(**axes: list) -> int:
        nonlocal opened
        plan, opened = load(folder, {"prune.blocks": [2], **axes}), 0
        planning.check(plan, load_compute())
        return opened

    sys.addaudithook(count)  # for the rest of this process
    try:
        one, many = count_for(), count_for(**{"train.rows": [8, 16], "train.seed": [0, 1, 2, 3]})
    finally:
        counting = False
    assert one == many > 0


def test_sweep_of_several_grids_is_all_that_any_of_them_makes(folder):
    grid = {"prune.blocks": [2, 3], "train.rows": [16]}
    plan = load(folder, [grid, {"prune.blocks": [2], "train.rows": [16], "train.seed": [0, 1, 2]}])
    assert len(plan.cells) == 5
    assert len(plan.trials) == 2 * (2 + 2), "seed 0 is the recipe's own"


def test_sweep_draws_the_same_numbers_for_every_combination_of_lists(folder):
    axes = {"prune.blocks": [2, 3], "train.lr": {"from": 1e-5, "to": 1e-3, "scale": "log"}}
    plan = load(folder, axes, samples=4)
    drawn = {
        blocks: [cell.values["train.lr"] for cell in plan.cells if cell.values["prune.blocks"] == blocks]
        for blocks in (2, 3)
    }
    assert drawn[2] == drawn[3] and len(set(drawn[2])) == 4
    assert all(1e-5 <= lr <= 1e-3 and lr == float(f"{lr:.3g}") for lr in drawn[2])
    assert [cell.recipe.train.lr for cell in plan.cells] == drawn[2] * 2
    assert load(folder, axes, samples=4, seed=1).cells[0].values != plan.cells[0].values
    more = load(folder, axes | {"train.warmup_fraction": {"from": 0.0, "to": 0.5}}, samples=4)
    assert [cell.values["train.lr"] for cell in more.cells] == drawn[2] * 2, "another axis moves no other's numbers"


def test_sweep_draws_whole_numbers_between_whole_numbers(folder):
    plan = load(folder, {"train.lora.rank": {"from": 2, "to": 64, "scale": "log"}}, samples=5)
    assert all(isinstance(cell.recipe.train.lora.rank, int) for cell in plan.cells)


@pytest.mark.parametrize(("low", "high"), [(1004, 1996), (0.9981, 0.9999)])
def test_axis_draws_no_number_beyond_its_range(low, high):
    drawn = [number for seed in range(50) for number in Axis(**{"from": low, "to": high}).draw(4, str(seed))]
    assert all(low <= number <= high and type(number) is type(low) for number in drawn)


@pytest.mark.parametrize(
    ("axes", "more", "line"),
    [
        ({"train.lrr": [1]}, {}, "axes.train.lrr: unknown key. Did you mean lr?"),
        ({"train.lr": ["fast"]}, {}, 'axes.train.lr: got "fast"; expected a number. Change this value.'),
        ({"prune.blocks": [2, 2.5]}, {}, "axes.prune.blocks: got 2.5; expected a whole number. Change this value."),
        ({"prune.blocks": []}, {}, "axes.prune.blocks: has no values. Give at least one."),
        ({"prune.blocks": [2, 2]}, {}, "axes.prune.blocks: names a value twice. Remove one."),
        ({}, {}, "axes: names no field. Give at least one."),
        ({"train..lr": [1]}, {}, "axes: 'train..lr' is the path of no field. Write for example train.lr."),
        ({"": [1]}, {}, "axes: '' is the path of no field. Write for example train.lr."),
        ({"prune.blocks.x": [1]}, {}, "axes.prune.blocks.x: blocks has no keys below it. Check the dotted path."),
        (
            {"train.epochs": [1, 2]},
            {},
            "axes.train.epochs: the arm distilled has its own epochs. Sweep arms.distilled.epochs instead.",
        ),
        (
            {"evaluate.limit": [1]},
            {},
            "axes.evaluate.limit: every trial has the same evaluations. Set it in the recipe.",
        ),
        (
            {"train.lr": {"from": 1e-5, "to": 1e-3}},
            {},
            "samples: is missing. Set samples to the number of values to draw of train.lr.",
        ),
        (
            {"train.lr": [1e-5]},
            {"samples": 3},
            "samples: has no range to draw from. Remove samples.",
        ),
        (
            {"train.lr": {"from": 1e-3, "to": 1e-5}},
            {"samples": 3},
            "axes.train.lr: from 0.001 is not below to 1e-05. Lower from.",
        ),
        (
            {"train.lr": {"from": 0, "to": 1e-5, "scale": "log"}},
            {"samples": 3},
            "axes.train.lr: from 0 has no logarithm. Set scale: linear.",
        ),
        ({"train.lr": {"fro": 1, "to": 2}}, {"samples": 3}, "axes.train.lr.fro: unknown key. Did you mean from?"),
        ({"train.lr": {"to": 2}}, {"samples": 3}, "axes.train.lr: gives no values. List them."),
        ({"train.lr": [1e-5]}, {"axis": 1}, "axis: unknown key. Did you mean axes?"),
        ({"train.lr": [1, 1.0]}, {}, "axes.train.lr: names a value twice. Remove one."),
        ({"train.lr": 3}, {}, "axes.train.lr: 3 is neither a list of values nor a range. Write [3]."),
        ({"train.lr": None}, {}, "axes.train.lr: null is neither a list of values nor a range. Write [null]."),
        (
            {"train.lr": {"values": [1], "to": 2}},
            {},
            "axes.train.lr: gives values and a range. Keep one of them.",
        ),
        ([], {}, "axes: names no field. Give at least one."),
        ({"train.lr": [1]}, {"recipe": []}, "recipe: got []; expected at least 1 item. Change this value."),
        ({"train.lr": [1]}, {"recipe": 2 * ["recipe.yaml"]}, "recipe: has a name twice. Remove one."),
        (
            {"prune": [{"remove": [1, 2]}, {"remove": [2, 1]}]},
            {},
            "axes.prune: {'remove': [1, 2]} and {'remove': [2, 1]} make the same recipe. Remove one.",
        ),
        (
            {"prune.metric": ["tail"], "prune.candidates": [4, 8]},
            {},
            "axes.prune.candidates: moves no number of a trial. Remove it.",
        ),
        (
            {"prune.metric": ["tail"], "prune.calibration.limit": [4, 8], "prune.blocks": [1, 2]},
            {},
            "axes.prune.calibration.limit: moves no number of a trial. Remove it.",
        ),
        (
            {"train.method": ["full"], "train.lora.rank": [4, 8]},
            {},
            "axes.train.lora.rank: no arm is trained with method lora. Remove it.",
        ),
        (
            {"prune.blocks": [1, 2], "distill.seed": [0, 1]},
            {"goal": {"recovery": 90, "arm": "sft"}},
            "axes.distill.seed: moves no number of a trial. Remove it.",
        ),
        ({"export.formats": [["f16"]]}, {}, "axes.export.formats: trials have no export. Remove axes.export.formats."),
        (
            {"rows.held_out": [1, 2]},
            {},
            "axes.rows.held_out: gives trials other held-out rows, so their scores do not "
            "compare. Set it in the recipe.",
        ),
        ({"prune.blocks": [1, 2]}, {"goal": {"recovery": 0.95}}, "goal.recovery: 0.95 is in percent. Write 95."),
    ],
)
def test_sweep_with_a_mistake_says_where_what_and_how_to_fix_it(folder, axes, more, line):
    with pytest.raises(UserError) as error:
        load(folder, axes, **more)
    assert error.value.problems == (line,)


def test_sweep_without_validation_rows_cannot_choose_a_learning_rate(folder):
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("validation: 2", "validation: 0"))
    load(folder, {"prune.blocks": [2, 3], "train.seed": [0, 1]})
    with pytest.raises(UserError, match="without validation rows no loss compares values of train"):
        load(folder, {"train.lr": [1e-4, 2e-4]})


def test_sweep_of_a_recipe_that_writes_whole_models_is_refused(folder):
    (folder / "recipe.yaml").write_text(
        (folder / "recipe.yaml").read_text().replace("model:\n", "model:\n  part: all\n")
    )
    with pytest.raises(UserError, match=r"^recipe: recipe\.yaml puts .* Set model\.part: text in recipe\.yaml"):
        load(folder, {"train.rows": [16]})


def test_sweep_of_a_recipe_with_a_mistake_says_the_recipes_own(folder):
    (folder / "recipe.yaml").write_text((folder / "recipe.yaml").read_text().replace("blocks: 2", "blcks: 2"))
    with pytest.raises(UserError) as error:
        load(folder, {"train.rows": [16]})
    assert "prune.blcks: unknown key. Did you mean blocks?" in error.value.problems


@pytest.mark.parametrize("path", ["distill.max_failed_fraction", "distill.shift_rows", "train.max_too_long_fraction"])
def test_sweep_over_what_moves_no_number_of_a_trial_is_refused(folder, path):
    with pytest.raises(UserError, match=rf"axes.{path}: moves no number of a trial. Set it in the recipe\."):
        load(folder, {path: [0, 1]})


def test_sweep_whose_finished_training_is_over_a_stricter_gate_stops_before_it_builds_anything(folder):
    plan, storage = load(folder, {"prune.blocks": [2]}), Storage(str(folder / "root"))
    training = plan.trials[0].train
    storage.scratch(training)
    storage.commit(training, {"rows": 30, "rows_left_out": 6, "rows_too_long": 6}, 0.1)
    assert complaint(trials.run, plan, load_compute(), storage) == (
        "train.max_tokens: 6 of 36 rows are longer than 1024 tokens (got 16.67%; expected at most 1.00%). "
        "Raise it, or raise train.max_too_long_fraction."
    )
    assert [path.name for path in storage.root.iterdir() if path.name not in ("scratch", "locks")] == ["train"]


def test_check_of_a_sweep_counts_what_is_shared_and_touches_nothing(folder):
    load(folder, {"prune.blocks": [2, 3, 4], "train.rows": [16, 32]})
    before = sorted(folder.rglob("*"))
    done = sdft("check", "sweep.yaml", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["recipes"], found["trials"], found["done"]) == (6, 12, 0)
    counts = {kind["stage"]: (kind["alone"], kind["sweep"]) for kind in found["stages"]}
    assert counts == {
        "rows": (6, 1), "score": (6, 1), "loss": (6, 3), "cut": (6, 3), "distill": (6, 2), "train": (12, 12),
        "nll": (6, 2), "evaluate": (6 * 8, 8 + 24),
    }  # fmt: skip
    shown = sdft("check", "sweep.yaml", cwd=folder).stdout
    assert "Recipes: 6, trials: 12, stages: 56 instead of 96 (58%), 0 of them done." in shown
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (["check", "sweep.yaml"], "axes.prune.blocks: 6 removes every block of a 6-block model. Give 1 to 5."),
        (["run", "sweep.yaml"], "sweep.yaml: is a sweep, not a recipe. Do: sdft sweep sweep.yaml."),
        (["sweep", "recipe.yaml"], "recipe.yaml: is a recipe, not a sweep. Do: sdft run recipe.yaml."),
        (["report", "sweep.yaml", "--set", "train.lr=1"], "--set: is for recipes. Change sweep.yaml."),
        (["report", "recipe.yaml", "--csv", "a.csv"], "--csv: recipe.yaml is a recipe, not a sweep. Use --json."),
        (["sweep", "nowhere.yaml"], "nowhere.yaml: cannot be read (No such file or directory). Check the path."),
    ],
)
def test_sweep_commands_with_a_mistake_end_in_one_line(folder, command, line):
    load(folder, {"prune.blocks": [2, 6]})
    done = sdft(*command, cwd=folder)
    assert (done.returncode, done.stderr) == (2, line + "\n")
    assert done.stdout == ""


def test_report_of_a_sweep_that_has_not_begun_says_what_to_do(folder):
    load(folder, {"prune.blocks": [2, 3]})
    done = sdft("report", "sweep.yaml", cwd=folder)
    assert done.returncode == 2
    what = f"has nothing to compare with under {folder / 'artifacts'} (missing: cut, evaluate, rows, score)"
    assert done.stderr == f"sweep.yaml: {what}. Do: sdft sweep sweep.yaml.\n"


@pytest.mark.heavy
def test_every_shipped_sweep_plans_and_saves(tmp_path):
    files = sorted((Path(__file__).parents[1] / "configs" / "sweeps").glob("*.yaml"))
    assert [file.name for file in files] == [
        "depth.yaml", "draft.yaml", "goal.yaml", "paper.yaml", "small.yaml", "study-start.yaml", "study.yaml"
    ]  # fmt: skip
    for file in files:
        plan = planning.load_sweep(file)
        found = savings.measure(plan, Storage(str(tmp_path)))
        assert found.sweep < found.alone * 0.8
        counts = {kind.stage: kind.sweep for kind in found.stages}
        assert (counts["model"], counts["score"]) == (1, 1)
        if file.stem.startswith("study"):  # what docs/study.md registers
            seeds = [trial.values["train.seed"] for trial in plan.trials]
            assert seeds == ([0, 0, 0, 1, 1, 1, 2, 2, 2] if file.stem == "study" else [0] * 6)
    assert not list(tmp_path.iterdir()), "planning writes nothing under the root"


def test_check_of_the_paper_sweep_with_a_compute_file_estimates_what_each_stage_takes():
    root = Path(__file__).parents[1]
    words = ["check", "configs/sweeps/paper.yaml", "--compute", "configs/compute/gpu8.yaml", "--json"]
    done = sdft(*words, cwd=root)
    assert done.returncode == 0, done.stderr
    costs = json.loads(done.stdout)["estimates"]
    assert [cost["stage"] for cost in costs] == ["score", "distill", "train (sft)", "train (distilled)", "evaluate"]


def test_paper_sweep_is_the_papers_setting():
    plan = planning.load_sweep(Path(__file__).parents[1] / "configs" / "sweeps" / "paper.yaml")
    assert len(plan.trials) == 5 * 4 * 2
    assert {cell.recipe.prune.blocks for cell in plan.cells} == {2, 4, 6, 8, 10}
    assert {cell.recipe.rows[0].repo for cell in plan.cells} == {
        "openai/gsm8k", "databricks/databricks-dolly-15k", "tatsu-lab/alpaca", "nvidia/OpenMathInstruct-2"
    }  # fmt: skip
    for cell in plan.cells:
        assert set(cell.recipe.evaluate.tasks) == set(OPENLLM_V1) and cell.recipe.evaluate.limit is None
    assert [stage.name for stage in plan.shared].count("distill") == 4
    compute = load_compute(Path(__file__).parents[1] / "configs" / "compute" / "gpu8.yaml")
    planning.check(plan, compute)


def test_sweep_of_several_recipes_has_the_same_evaluations_for_all(folder):
    text = (folder / "recipe.yaml").read_text()
    (folder / "other.yaml").write_text(text.replace("limit: 3", "limit: 4"))
    (folder / "same.yaml").write_text(text)
    load(folder, {"prune.blocks": [2]}, recipe=["recipe.yaml", "same.yaml"])
    with pytest.raises(
        UserError, match=r"recipe: other.yaml has other evaluations than recipe.yaml, so their means do not"
    ):
        load(folder, {"prune.blocks": [2]}, recipe=["recipe.yaml", "other.yaml"])


def test_sweep_of_two_recipes_of_one_name_tells_them_apart(folder):
    text = (folder / "recipe.yaml").read_text()
    (folder / "more").mkdir()
    (folder / "more" / "recipe.yaml").write_text(text.replace("rows: 16", "rows: 8"))
    plan = load(folder, {"prune.blocks": [2]}, recipe=["recipe.yaml", "more/recipe.yaml"])
    assert {cell.values["recipe"] for cell in plan.cells} == {"recipe", "recipe-2"}


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"prune.blocks": [2, 3], "train.rows": [16, 32]}, "asha: no two trials have arm, depth and size in common"),
        (
            {"train.lr": [1e-4, 2e-4], "train.rows": [16]},
            r"asha\.grace_steps: no training has more than 2 steps, so none is stopped\. Lower it below 2\.",
        ),
        ({"train.lr": [1e-4, 2e-4], "train.seed": [0, 1]}, "axes.train.seed: asha would keep the lucky seeds"),
    ],
)
def test_sweep_with_asha_where_losses_do_not_compare_is_refused(folder, axes, said):
    with pytest.raises(UserError, match=said):
        load(folder, axes, asha={"grace_steps": 2})


def test_sweep_with_asha_compares_within_arm_depth_and_size(folder):
    axes = {"prune.blocks": [2, 3], "arms.sft.lr": [1e-4, 2e-4], "arms.distilled.lr": [1e-4, 2e-4]}
    groups = [trial.compares_with for trial in load(folder, axes, asha={"grace_steps": 2}).trials]
    assert sorted(map(groups.count, set(groups))) == [2, 2, 2, 2]


def test_sweep_trains_to_the_end_what_another_asha_stopped(folder, storage):
    """Without asha all are trained; with other steps the trials that were stopped may be better."""
    axes = {"train.lr": [1e-4, 2e-4], "arms.distilled.epochs": [4]}
    stopping = load(folder, axes, asha={"grace_steps": 2})
    stopped = stopping.trials[0]
    notes.keep_stopped(storage, stopping.name, stopped.train, [(2, 3.5)])
    for asha, still_open in (({"grace_steps": 2}, 3), ({"grace_steps": 4}, 4), (None, 4)):
        plan = load(folder, axes, asha=asha)
        assert [trial.train.id for trial in plan.trials] == [trial.train.id for trial in stopping.trials]
        assert len(trials.open_trials(plan, storage)) == still_open, asha


def test_axis_takes_every_character(folder):
    template = "Rewrite 😀 ü 日本\u2028\x85\x7f\t: # '\"\\\n\n {prompt} {reference} " + "long " * 40
    (cell,) = load(folder, {"distill.template": [template]}).cells
    assert cell.recipe.distill.template == template


@pytest.fixture
def mixture(folder):
    """The directory with a recipe of two sources."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "more.jsonl").write_text("".join(json.dumps({"q": f"{i}!", "a": f"{i}"}) + "\n" for i in range(60)))
    more = {**recipe["rows"], "path": str(folder / "more.jsonl")}
    sources = [recipe["rows"] | {"weight": 1}, more | {"weight": 1}]
    (folder / "recipe.yaml").write_text(json.dumps(recipe | {"rows": sources}))
    return folder


def test_sweep_of_weights_shares_rows_and_evaluations_and_generates_into_one_ledger(mixture):
    plan = load(mixture, {"rows.0.weight": [1, 2, 4], "train.rows": [12, 24]}, asha={"grace_steps": 1})
    shared = names(plan.shared)
    assert {name: shared.count(name) for name in ("rows", "mix", "distill")} == {"rows": 2, "mix": 3, "distill": 6}
    assert shared.count("evaluate") == 2 * 2, "of base and pruned model, whatever the weights"
    works = [
        Work(stage, Storage(str(mixture)), load_compute(), Progress("distill"))
        for stage in plan.shared
        if stage.name == "distill"
    ]
    templates = [instruction_templates(work.settings) for work in works]
    ledgers = {distill.ledger_id(work.stage, one) for work, some in zip(works, templates, strict=True) for one in some}
    assert len(ledgers) == 1
    assert len({trial.compares_with for trial in plan.trials}) == 2 * 2, "by arm and size: validation rows are the same"
    planning.check(plan, load_compute())


def test_what_cuts_and_generation_begin_from_is_built_before_both(mixture):
    """Of a mixture not only the rows of its sources, but what mixes them."""
    plan = load(mixture, {"prune.blocks": [1, 2]})
    (generating,) = overlap.pairs(plan.shared)
    assert {stage.name for stage in generating.beside} == {"score", "loss", "cut"}
    assert {stage.name for stage in generating.first} == {"model", "rows", "mix"}


def test_sweep_of_weights_with_0_is_refused_where_trials_would_not_compare(mixture):
    with pytest.raises(UserError, match=r"^axes\.rows\.0\.weight: 0 leaves out its held-out and validation rows"):
        load(mixture, {"rows.0.weight": [0, 1]})


def test_sweep_of_sizes_beyond_a_mixture_is_refused(mixture):
    plan = load(mixture, {"rows.0.weight": [1, 8], "train.rows": [60]})
    with pytest.raises(UserError, match=r"^axes\.train\.rows: 60 is more than the 4. training rows of the mixture"):
        planning.check(plan, load_compute())


# --- a goal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deepest", range(10))  # 0: none keeps enough
@pytest.mark.parametrize("depths", [(1, 2), (1, 2, 3), (1, 3, 4, 5, 6, 8, 9)])
@pytest.mark.parametrize("signals", [None, (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4), (2.0,) * 7])
def test_goal_finds_the_deepest_cut_that_keeps_enough_with_few_trainings(folder, monkeypatch, depths, deepest, signals):
    """Against trying every depth; whatever was tried before, the way there is the same."""
    cells = tuple(planning.Cell({"prune.blocks": depth}, None) for depth in depths)
    trials = tuple(planning.Trial(None, {}, cell, cell.values) for cell in cells)
    whole = planning.Plan(cells, (), trials, goal=Goal(recovery=95))
    trained = set()

    def judge(_goal, blocks, _trials, _storage):
        kept = 97.0 - 4 * (blocks - deepest) if blocks > deepest else 97.0
        return goal.Tried(blocks, Estimate(kept, kept, kept, 1), 1, blocks <= deepest)

    monkeypatch.setattr(goal, "read_signals", lambda plan, storage: signals and signals[: len(depths)])
    monkeypatch.setattr(goal, "is_done", lambda trial, storage: trial.values["prune.blocks"] in trained)
    monkeypatch.setattr(goal, "_judge", judge)
    while (search := goal.replay(whole, None)).following is not None:
        assert search.chosen is None and search.following not in trained
        trained.add(search.following)
    expected = max((depth for depth in depths if depth <= deepest), default=None)
    assert (search.chosen.blocks if search.chosen else None) == expected
    most = searching.most_trainings(len(depths)) if signals else math.ceil(math.log2(len(depths) + 1))
    assert len(trained) == len(search.tried) <= most


@pytest.mark.parametrize("enough", range(1, 10))  # 9: none is
def test_goal_of_a_size_trains_the_least_depth_alone(folder, monkeypatch, enough):
    depths = (1, 2, 3, 5, 6, 7, 8)
    cells = tuple(planning.Cell({"prune.blocks": depth}, None) for depth in depths)
    trials = tuple(planning.Trial(None, {}, cell, cell.values) for cell in cells)
    whole = planning.Plan(cells, (), trials, goal=Goal(parameters=100 - enough))
    measured, trained, kept = set(), set(), Estimate(90, 89, 91, 1)
    monkeypatch.setattr(goal, "_chains", lambda plan: depths)
    monkeypatch.setattr(goal, "_size", lambda _goal, depth, _storage: 100.0 - depth if depth in measured else None)
    monkeypatch.setattr(goal, "_judge", lambda _goal, blocks, _trials, _storage: goal.Tried(blocks, kept, 2, False))
    monkeypatch.setattr(goal, "is_done", lambda trial, storage: trial.values["prune.blocks"] in trained)
    while (search := goal.replay(whole, None)).following is not None:
        assert search.chosen is None
        (trained if search.is_training else measured).add(search.following)
    expected = min((depth for depth in depths if depth >= enough), default=None)
    assert (search.chosen.blocks if search.chosen else None) == expected
    assert len(measured) <= 3 and trained == ({expected} if expected else set())
    if search.chosen:
        blocks = "1 block" if expected == 1 else f"{expected} blocks"
        said = f"{blocks}: {100 - expected} parameters, which meets {100 - enough} parameters or fewer; "
        assert goal.describe(whole, search.chosen) == said + "recovery 90.0 % [89.0, 91.0]"
    else:
        with pytest.raises(
            UserError, match=r"^goal: no depth reaches it, not even the deepest \(8 blocks: 92 parameters"
        ):
            goal.tried_part(whole, search)


def test_goal_of_a_speed_measures_the_pruned_model_of_one_depth(folder):
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["evaluate"]["speed"] = True
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    plan = load(folder, {"prune.blocks": [1, 2, 3]}, goal={"tokens_per_second": 1.2})
    storage = Storage(str(folder / "artifacts"))
    search = goal.replay(plan, storage)
    assert (search.following, search.is_training) == (2, False)
    assert names(goal._sizing(plan, 2)) == ["model", "score", "loss", "cut", "speed"]
    assert goal.describe_search(plan).startswith("Goal: at most 2 of 3 depths are cut and measured, one is trained.")


def test_goal_trains_its_arm_alone_and_one_depth_at_a_time(folder):
    axes = {"prune.blocks": [1, 2, 3], "train.seed": [0, 1]}
    plan = load(folder, axes, goal={"recovery": 90})
    assert {trial.arm for trial in plan.trials} == {"distilled"} and len(plan.trials) == 6
    search = goal.replay(plan, Storage(str(folder / "artifacts")))
    assert (search.tried, search.following, search.chosen) == ((), 2, None)
    part = goal.at_depths(plan, [2])
    assert len(part.trials) == 2 and names(part.shared).count("cut") == 1
    assert part.name == plan.name, "trackers show the trainings of all depths as one sweep"
    assert {trial.train.id for trial in part.trials} <= {trial.train.id for trial in plan.trials}


@pytest.mark.parametrize(
    ("axes", "more", "line"),
    [
        ({"train.lr": [1e-4, 1e-3]}, {}, "goal: has no depths to choose from. List two or more in axes.prune.blocks."),
        ({"prune.blocks": [1]}, {}, "goal: has no depths to choose from. List two or more in axes.prune.blocks."),
        (
            {"prune.blocks": [1, 2], "train.lr": [1e-4, 1e-3]},
            {},
            "goal: looks for a depth, not for train.lr. Remove axes.train.lr.",
        ),
        (
            {"prune.blocks": [1, 2]},
            {"asha": {"grace_steps": 1}},
            "asha: stops trials that a goal needs whole. Remove asha.",
        ),
        (
            [{"prune.blocks": [1, 2]}, {"prune.blocks": [3]}],
            {},
            "goal: is of one recipe and one set of axes. Remove the others.",
        ),
        (
            {"prune.blocks": [1, 2]},
            {"goal": {"tokens_per_second": 1.2}},
            "goal.tokens_per_second: is not measured by the recipe. Set evaluate.speed: true in it.",
        ),
        (
            {"prune.blocks": [1, 2]},
            {"goal": {"recovery": 90, "parameters": 1e6}},
            "goal: names none or several. Give one of recovery, parameters, tokens_per_second.",
        ),
        (
            {"prune.blocks": [1, 2]},
            {"goal": {"recovery": 90, "arm": "logits"}},
            "goal.arm: the recipe does not train logits. Add arms.logits: {} to it.",
        ),
    ],
)
def test_goal_with_a_mistake_says_where_what_and_how_to_fix_it(folder, axes, more, line):
    assert complaint(load, folder, axes, **({"goal": {"recovery": 90}} | more)) == line

"""What the report of a sweep says of artifacts whose scores are known; the artifacts are written by hand."""

import csv
import io
import json
import statistics
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from sdft_ray import pipeline
from sdft_ray.core.speculation import worth
from sdft_ray.report import page, plots, sweep, table, terminal
from sdft_ray.store.files import write_atomically
from sdft_ray.store.storage import Storage
from sdft_ray.sweep import notes, planning

ITEMS = 20


@pytest.fixture
def plan(tiny_model, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"q": f"{i}?", "a": f"{i}"}) + "\n" for i in range(40)))
    (tmp_path / "texts.txt").write_text("One text.\n\nAnother text.\n\nA third text.")
    recipe = {
        "model": {"path": str(tiny_model)},
        "rows": {"path": str(tmp_path / "rows.jsonl"), "fields": {"prompt": "q", "response": "a"}, "held_out": 1},
        "prune": {"blocks": 2, "calibration": {"text": str(tmp_path / "texts.txt")}},
        "train": {"rows": 16},
        "draft": {"tokens": [1, 2], "prompts": 1},
        "evaluate": {"tasks": ["arc_easy", "sciq"], "limit": ITEMS},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    axes = [
        {"prune.blocks": [2, 3]},
        {"prune.blocks": [2], "train.seed": [0, 1, 2]},
        {"prune.blocks": [2], "arms.sft.lr": [1e-3]},
    ]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"recipe": "recipe.yaml", "axes": axes}))
    return planning.load_sweep(tmp_path / "sweep.yaml")


def write(storage: Storage, stage, summary: dict, files: dict[str, str]) -> None:
    for name, text in files.items():
        write_atomically(storage.scratch(stage) / name, text)
    storage.scratch(stage)
    storage.commit(stage, summary, 10.0)


def write_evaluation(storage: Storage, stage, right: int) -> None:
    """Write an evaluation in which the first `right` items are right."""
    values = [float(i < right) for i in range(ITEMS)]
    summary = {
        "metric": "acc",
        "value": statistics.fmean(values),
        "stderr": 0.1,
        "n": ITEMS,
        "chance": 0.25,
        "limited": True,
    }
    items = "".join(json.dumps({"id": str(i), "value": value}) + "\n" for i, value in enumerate(values))
    write(storage, stage, summary, {"items.jsonl": items})


def gone_of(stage) -> int:
    """Return how many blocks a cut removes."""
    return len(getattr(stage.settings, "remove", ())) or stage.settings.depth


def write_shared(plan: planning.Plan, storage: Storage, tiny_model: Path) -> None:
    """Write what all trials need; the base is right on 16 of 20 items, a model without n blocks on 16 - 2 n."""
    config = json.loads((tiny_model / "config.json").read_text())
    for stage in plan.shared:
        match stage.name:
            case "rows":
                write(storage, stage, {"rows": {"train": 24}, "read": 24}, {})
            case "score":
                write(storage, stage, {}, {"distances.json": json.dumps({"blocks": 6, "corpora": [], "choices": {}})})
            case "cut":
                gone = gone_of(stage)
                smaller = {**config, "num_hidden_layers": 6 - gone}
                if "layer_types" in smaller:
                    smaller["layer_types"] = smaller["layer_types"][gone:]
                summary = {"removed": list(range(gone)), "metric": "loss", "cost": 1.0, "agreement": 0.5}
                summary |= {"blocks": 6 - gone, "parameters": 1}
                write(storage, stage, summary, {"config.json": json.dumps(smaller)})
            case "evaluate":
                cut = stage.inputs["model"]
                write_evaluation(storage, stage, 16 - (2 * gone_of(cut) if cut.name == "cut" else 0))


COUNTS = ("rows", "rows_too_long", "rows_left_out", "validation_rows", "steps", "planned_steps", "best_step")
COUNTS += ("tokens_per_epoch", "trained_tokens_per_epoch", "workers", "trainable_parameters", "parameters")
LOSSES = ("training_seconds", "peak_memory_gb", "logits_differ_by", "first_loss", "final_loss")
TRAINED = {**dict.fromkeys(COUNTS, 1), **dict.fromkeys(LOSSES, 1.0), "arm": "sft", "adapters_on": []}
TRAINED |= {"example": {"without_loss": "1?", "with_loss": "1"}}


def write_trial(trial: planning.Trial, storage: Storage, right: int, validation_loss: float) -> None:
    write(storage, trial.train, {**TRAINED, "validation_loss": validation_loss}, {})
    for evaluation in trial.evaluations.values():
        write_evaluation(storage, evaluation, right)


def write_draft(storage: Storage, stage, accepted: int) -> None:
    """Write a draft that was twice as fast as the base with one drafted token, and slower than it with two."""
    counts = {1: [accepted], 2: [accepted, accepted // 2]}
    measured = [
        {"tokens": k, "target_tokens_per_second": 10.0, "tokens_per_second": 20.0 / k**2, "speedup": 2.0 / k**2}
        | {"speedup_min": 1.5 / k**2, "speedup_max": 3.0 / k**2, "drafts": 100, "accepted": counts[k]}
        | vars(worth(100, counts[k], 0.5))
        for k in counts
    ]
    texts = {"greedy": {"measured": measured, "counted": []}, "sampled": {"measured": measured, "counted": []}}
    write(storage, stage, {"engine": "vllm", "method": "draft_model", "prompts": 1, "cost": 0.5, **texts}, {})


def seed_of(trial: planning.Trial) -> int:
    return trial.train.settings.train.seed


@pytest.fixture
def collected(plan, tiny_model, tmp_path):
    """A sweep of 9 trials: 2 arms at 2 depths, 2 more seeds of each, and another learning rate of sft that is worse."""
    storage = Storage(str(tmp_path / "artifacts"))
    write_shared(plan, storage, tiny_model)
    for trial in plan.trials:
        if "arms.sft.lr" in trial.values:
            write_trial(trial, storage, right=20, validation_loss=9.0)
        elif trial.cell.recipe.prune.blocks == 3 and trial.arm == "distilled":
            notes.keep_failure(storage, trial.train, "train: it broke")
        elif trial.cell.recipe.prune.blocks == 2:
            write_trial(trial, storage, (12 if trial.arm == "sft" else 14) + seed_of(trial), 2.0)
    trained = {trial.train.id: trial for trial in plan.trials}
    for stage in plan.drafts:
        model = stage.inputs["draft"]
        if model.name == "cut":
            write_draft(storage, stage, 40)
        elif model.settings.arm == "distilled" and storage.status(model) == "done":
            write_draft(storage, stage, 60 + 10 * seed_of(trained[model.id]))
        elif model.settings.arm == "sft" and "arms.sft.lr" in trained[model.id].values:
            notes.keep_failure(storage, stage, "draft: it broke")
    return sweep.collect(plan, "sweep.yaml", storage)


def test_report_takes_seeds_together_with_their_spread(collected):
    groups = {(group.arm, *group.values): group for group in collected.groups}
    sft, distilled = groups["sft",], groups["distilled",]
    assert (len(sft.trials), len(distilled.trials)) == (3, 3)
    assert sft.recovery == pytest.approx(100 * 13 / 16) and distilled.recovery == pytest.approx(100 * 15 / 16)
    assert sft.recovery_sd == pytest.approx(100 / 16)


def test_report_chooses_by_validation_loss_and_never_by_score(collected):
    other = next(group for group in collected.groups if group.values)
    assert other.values == {"arms.sft.lr": 1e-3}
    assert other.recovery > 100 and not other.chosen
    assert all(group.chosen for group in collected.groups if group is not other)


def test_report_compares_chosen_arms_item_by_item_over_seeds(collected):
    (entry,) = collected.comparisons
    assert (entry.blocks, entry.rows, entry.seeds) == (2, 16, {"sft": 3, "distilled": 3})
    mean = entry.compared.mean
    assert entry.compared.tasks["arc_easy"].value == pytest.approx(2 / ITEMS) == mean.value
    assert 0 <= mean.low < mean.value < mean.high


def test_report_lists_every_trial_with_its_state_and_reason(collected):
    states = [(trial.status, trial.reason) for trial in collected.trials if trial.blocks == 3]
    assert states == [("missing", None), ("failed", "train: it broke")]
    lines = list(csv.DictReader(io.StringIO(table.as_csv(collected))))
    assert len(lines) == len(collected.trials) == 9
    assert {line["status"] for line in lines} == {"done", "missing", "failed"}


def test_report_on_the_terminal_names_what_did_not_end(collected):
    console = Console(width=200, record=True, file=io.StringIO())
    terminal.show_sweep(collected, console)
    text = console.export_text()
    for said in ("failed: 3 blocks, 16 rows, distilled: train: it broke", "(not chosen)", "±6.2", "+10.0 ["):
        assert said in text


def test_report_of_drafts_counts_tokens_of_seeds_together_and_takes_the_best_measured_speed(collected):
    drafts = [(draft.arm, draft.blocks, draft.drafts) for draft in collected.drafts]
    assert drafts == [("pruned", 2, 1), ("distilled", 2, 3), ("pruned", 3, 1)]
    pruned, distilled, _ = (draft.worth.greedy for draft in collected.drafts)
    assert pruned.acceptance == pytest.approx(60 / 140)
    assert distilled.acceptance == pytest.approx((60 + 70 + 80 + 30 + 35 + 40) / (300 + 60 + 70 + 80))
    assert 0 < distilled.acceptance_error < pruned.acceptance_error
    assert (distilled.tokens, distilled.speedup, distilled.speedup_max) == (1, 2.0, 3.0)
    assert distilled.expected_speedup == pytest.approx(1.7 / 1.5) and distilled.break_even_cost == 0.7


def test_report_of_drafts_stands_on_terminal_csv_and_page_with_what_failed(collected, tmp_path):
    console = Console(width=200, record=True, file=io.StringIO())
    terminal.show_sweep(collected, console)
    failed = "draft sft, lr 0.001, blocks 2: draft: it broke"
    for said in ("as drafts of the base", "0.62 ±0.02", "2.00 (1.50 to 3.00)", f"failed: {failed}"):
        assert said in console.export_text(clear=False), said
    lines = list(csv.DictReader(io.StringIO(table.as_csv(collected))))
    first = next(line for line in lines if line["arm"] == "distilled")
    assert (first["draft.cost"], first["draft.sampled.tokens"], lines[-1]["draft.cost"]) == ("0.5", "1", "")
    drafts = plots.draft_lines(collected, "acceptance", "a"), plots.draft_lines(collected, "speedup", "speed")
    assert all("distilled, sampled" in figure and "(not chosen)" not in figure for figure in drafts)


def test_report_of_named_blocks_has_their_number_and_no_map(plan, tiny_model, tmp_path):
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    recipe |= {"prune": {"remove": [0]}, "arms": {"sft": {}}}
    recipe["rows"]["validation"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    axes = {"prune.remove": [[0, 1], [0, 1, 2]]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"recipe": "recipe.yaml", "axes": axes}))
    storage, named = Storage(str(tmp_path / "named")), planning.load_sweep(tmp_path / "sweep.yaml")
    assert "score" not in {stage.name for stage in named.shared}
    write_shared(named, storage, tiny_model)
    for trial in named.trials:
        write_trial(trial, storage, right=14, validation_loss=1.0)
    report = sweep.collect(named, "sweep.yaml", storage)
    assert [(trial.blocks, trial.values["prune.remove"]) for trial in report.trials] == [(2, [0, 1]), (3, [0, 1, 2])]
    assert [(group.blocks, group.chosen) for group in report.groups] == [(2, True), (3, True)]
    assert report.maps == []
    console = Console(record=True, width=200, file=io.StringIO())
    terminal.show_sweep(report, console)
    assert "remove [0, 1]" in console.export_text()
    assert "sft" in table.as_csv(report) and "<html" in page.render_sweep(report, tmp_path)


def test_report_of_depths_has_each_pruned_model_with_its_blocks(collected):
    models = {model.blocks: model for model in collected.models}
    assert models[0].quality.recovery == 100
    assert models[2].quality.recovery == pytest.approx(75) and models[3].quality.recovery == pytest.approx(62.5)
    assert models[3].cost.parameters < models[2].cost.parameters < models[0].cost.parameters
    assert (models[2].cut.removed, models[3].cut.removed) == ((0, 1), (0, 1, 2))


def test_report_of_a_sweep_prints_what_is_inside_an_entry_among_its_own_fields(collected):
    plain = collected.plain()
    done = next(trial for trial in plain["trials"] if trial["status"] == "done")
    assert {"arm", "id", "validation_loss", "tasks", "recovery", "parameters", "draft"} <= done.keys()
    missing = next(trial for trial in plain["trials"] if trial["status"] == "missing")
    assert "recovery" not in missing and missing["draft"] is None
    assert plain["models"][1]["removed"] == [0, 1] and "removed" not in plain["models"][0]
    assert plain["comparisons"][0]["mean"]["n"] == 2 * ITEMS and "maps" not in plain


def test_pipeline_of_a_sweeps_cell_needs_nothing_but_the_sweeps_stages(plan):
    known = {stage.id for stage in planning.stages_of(plan)}
    for cell in plan.cells:
        assert {stage.id for stage in pipeline.chain(cell.recipe).in_order} <= known

"""A sweep whose scores are known: its artifacts are written by hand."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from recipes import write_recipe

from sdft_ray.core.speculation import worth
from sdft_ray.report import sweep
from sdft_ray.store.files import write_atomically
from sdft_ray.store.storage import Storage
from sdft_ray.sweep import notes, planning

ITEMS = 20


@pytest.fixture
def plan(tiny_model, tmp_path):
    return write_sweep(tmp_path, tiny_model)


def write_sweep(folder: Path, tiny_model: Path) -> planning.Plan:
    """Write sweep.yaml and what it needs into a folder; return its plan."""
    evaluate = {"tasks": ["arc_easy", "sciq"], "limit": ITEMS, "retention": {"texts": 0}}
    sections = {"train": {"rows": 16}, "draft": {"tokens": [1, 2], "prompts": 1}, "evaluate": evaluate}
    write_recipe(folder, tiny_model, 40, rows={"held_out": 1, "validation": 16}, **sections)
    axes = [
        {"prune.blocks": [2, 3]},
        {"prune.blocks": [2], "train.seed": [0, 1, 2]},
        {"prune.blocks": [2], "arms.sft.lr": [1e-3]},
    ]
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"recipe": "recipe.yaml", "axes": axes}))
    return planning.load_sweep(folder / "sweep.yaml")


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


def write_retention(storage: Storage, stage, kl: float) -> None:
    """Write a retention of responses alone."""
    kept = {"texts": 1, "tokens": 9}
    figures = {"kl": kl, "agreement": 1 - kl}
    kept |= {name: {"value": value, "low": value, "high": value, "n": 1} for name, value in figures.items()}
    write(storage, stage, {"responses": kept, "seconds": 1.0}, {})


def gone_of(stage) -> int:
    """Return how many blocks a cut removes."""
    return len(getattr(stage.settings, "remove", ())) or stage.settings.depth


@pytest.fixture
def write_all(tiny_model):
    """Return what writes all that trials of a plan need, and the trials, each with more in its summary."""

    def write_each(
        plan: planning.Plan, storage: Storage, more: Callable[[planning.Trial], dict] = lambda _: {}
    ) -> None:
        write_shared(plan, storage, tiny_model)
        for trial in plan.trials:
            write_trial(trial, storage, **{"right": 14, "validation_loss": 1.0, **more(trial)})

    return write_each


def write_shared(plan: planning.Plan, storage: Storage, tiny_model: Path) -> None:
    """Write what all trials need; the base is right on 16 of 20 items, a model without n blocks on 16 - 2 n."""
    config = json.loads((tiny_model / "config.json").read_text())
    for stage in plan.shared:
        match stage.name:
            case "rows" | "mix":
                write(storage, stage, {"rows": {"held_out": 1, "validation": 1, "train": 24}, "read": 24}, {})
            case "distill" if stage.settings.sources:
                write(storage, stage, rewrites_of(stage.settings.sources), {})
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
            case "retention":
                cut = stage.inputs["model"]
                write_retention(storage, stage, 0.25 * gone_of(cut) if cut.name == "cut" else 0.0)
            case "evaluate":
                cut = stage.inputs["model"]
                write_evaluation(storage, stage, 16 - (2 * gone_of(cut) if cut.name == "cut" else 0))


def rewrites_of(sources) -> dict:
    """Return the summary of rewrites of which one source kept three of four, and every other one all."""
    reasons = [{"kept": 3, "leak": 1}, *({"kept": 4} for _ in sources[1:])]
    each = [
        {"name": source.name, "rows": 4, "kept": own["kept"], "reasons": own}
        for source, own in zip(sources, reasons, strict=True)
    ]
    counts = {"rows": 8, "kept": 7, "generations": 8, "generated_tokens": 8}
    return {**counts, "acceptance": 7 / 8, "reasons": {}, "mean_generated_tokens": 1.0, "by_source": each}


COUNTS = ("rows", "rows_too_long", "rows_left_out", "validation_rows", "steps", "planned_steps", "best_step")
COUNTS += ("tokens_per_epoch", "trained_tokens_per_epoch", "workers", "trainable_parameters", "parameters")
LOSSES = ("training_seconds", "peak_memory_gb", "logits_differ_by", "first_loss", "final_loss")
TRAINED = {**dict.fromkeys(COUNTS, 1), **dict.fromkeys(LOSSES, 1.0), "arm": "sft", "adapters_on": []}
TRAINED |= {"example": {"without_loss": "1?", "with_loss": "1"}}


def write_trial(trial: planning.Trial, storage: Storage, right: int, validation_loss: float, **more) -> None:
    write(storage, trial.train, {**TRAINED, "validation_loss": validation_loss, **more}, {})
    if trial.retention:
        write_retention(storage, trial.retention, 0.1 + 0.01 * right)
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


@pytest.fixture(scope="session")
def finished(tiny_model, tmp_path_factory):
    """The folder and the report of a sweep of 9 trials: 2 arms at 2 depths, 2 more seeds of each, and another learning
    rate of sft that is worse."""
    folder = tmp_path_factory.mktemp("finished")
    plan, storage = write_sweep(folder, tiny_model), Storage(str(folder / "artifacts"))
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
    return folder, sweep.collect(plan, "sweep.yaml", storage)


@pytest.fixture
def collected(finished):
    return finished[1]

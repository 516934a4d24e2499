"""A root with a base, a cut of it, a trained model, its rewrites and their evaluations, as a run leaves them."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from tiny import make_tiny_rows

from sdft_ray.results import DistilledRow
from sdft_ray.spec.pruning import Protect
from sdft_ray.spec.recipe import Distill
from sdft_ray.stages import cut, distill, model
from sdft_ray.stages.cut import remove_blocks
from sdft_ray.stages.distill import card
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage

REMOVED = (1, 3)
SECRET = "the-path-of-my-machine"


class Root(NamedTuple):
    """Where they are, and the ids of what can be handed on."""

    storage: Storage
    base: str
    cut: str
    trained: str
    distilled: str
    rows: str


def make_root(tiny_model: Path, folder: Path) -> Root:
    """Write the root; its trained model has the cut's weights."""
    storage = Storage(str(folder / "root"))
    base = Stage("model", "tiny", 1, model.HubSettings(repo="some/tiny", revision="0" * 40))
    shutil.copytree(tiny_model, storage.scratch(base), dirs_exist_ok=True)
    storage.commit(base, {"from": "some/tiny", "architecture": "llama", "blocks": 6}, 0.1)
    rows = make_tiny_rows(storage)
    pruned = Stage(
        "cut", "tiny-2", 3, cut.Settings(metric="loss", depth=2, contiguous=False, protect=Protect()), {"model": base}
    )
    parameters = remove_blocks(storage.fetch(base), storage.scratch(pruned), REMOVED).after
    storage.commit(pruned, _cut_summary(parameters), 0.1)
    rewritten = _distilled(storage, base, rows)
    trained = Stage(
        "train",
        "tiny-2-distilled",
        4,
        {"arm": "distilled", "train": {"lr": 0.1}},
        {"model": pruned, "rows": rows, "distilled": rewritten},
    )
    _train(storage, pruned, trained, parameters)
    for name, stage, values in (("base", base, [1, 1, 0, 1]), ("distilled", trained, [1, 0, 0, 1])):
        _evaluate(storage, name, stage, values)
    return Root(storage, base.id, pruned.id, trained.id, rewritten.id, rows.id)


def _cut_summary(parameters: int) -> dict[str, Any]:
    return cut.Summary(
        removed=REMOVED, metric="loss", cost=2.5, agreement=0.75, blocks=4, parameters=parameters
    ).plain()


def _distilled(storage: Storage, base: Stage[Any], rows: Stage[Any]) -> Stage[Any]:
    import pyarrow.parquet as pq

    settings = distill.Settings(**dict(Distill()), answer="number", rows=1)
    stage = Stage("distill", rows.slug, 3, settings, {"model": base, "rows": rows})
    row = DistilledRow("r", "1 + 1?", "2", None, "It is 2.", "distilled", "kept", 0, "It is 2.", "stop", 3, 3, 1)
    pq.write_table(card.table([row]), storage.scratch(stage) / "train.parquet")
    card.write(storage.scratch(stage), stage, {"kept": 1}, {"kept": row})
    storage.commit(stage, {"rows": 1}, 0.1)
    return stage


def _train(storage: Storage, pruned: Stage[Any], trained: Stage[Any], parameters: int) -> None:
    scratch = storage.scratch(trained)
    shutil.copytree(storage.fetch(pruned), scratch, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
    for name, text in {
        "adapter/adapter_config.json": json.dumps({"r": 4, "base_model_name_or_path": f"/{SECRET}/cut"}),
        "adapter/adapter_model.safetensors": "weights",
        "adapter/README.md": f"base_model: /{SECRET}/cut",
        f"tensorboard/events.{SECRET}": "events",
        "losses.json": "[]",
    }.items():
        (scratch / name).parent.mkdir(exist_ok=True)
        (scratch / name).write_text(text)
    figures = dict.fromkeys(
        ("rows", "rows_too_long", "rows_left_out", "validation_rows", "steps", "planned_steps", "best_step"), 3
    )
    figures |= dict.fromkeys(("tokens_per_epoch", "trained_tokens_per_epoch", "workers", "trainable_parameters"), 5)
    losses = dict.fromkeys(("training_seconds", "peak_memory_gb", "logits_differ_by", "first_loss", "final_loss"), 0.5)
    example = {"without_loss": "1 + 1?", "with_loss": "2"}
    summary = {"arm": "distilled", **figures, **losses, "validation_loss": 1.25, "adapters_on": ["q_proj"]}
    storage.commit(trained, {**summary, "parameters": parameters, "example": example}, 0.1)


def _evaluate(storage: Storage, name: str, model: Stage[Any], values: list[float]) -> None:
    settings = {"task": "arc_easy", "limit": 4, "dtype": "float32"}
    stage = Stage("evaluate", f"arc_easy-{name}", 2, settings, {"model": model})
    items = "".join(json.dumps({"id": str(i), "value": value}) + "\n" for i, value in enumerate(values))
    (storage.scratch(stage) / "items.jsonl").write_text(items)
    mean = sum(values) / len(values)
    score = {"metric": "acc_norm", "value": mean, "stderr": 0.25, "n": len(values), "chance": 0.25, "limited": True}
    storage.commit(stage, score, 0.1)

"""Rewriting a mixture on real Ray Data, with a fake engine: each row once, as its source says, whatever the weights."""

import json
from collections import Counter

import pytest
from test_distill import fake_engine, logged

from sdft_ray import pipeline
from sdft_ray.progress import Progress
from sdft_ray.results import DistilledRow, read_split
from sdft_ray.spec.compute import Compute, Distill, load_compute
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.wording import validate
from sdft_ray.stages import Work, distill
from sdft_ray.store.storage import Storage

PLAN = Compute(distill=Distill(cpus=1, batch_rows=8, piece_rows=2))
SUMS = "Say it anew: {prompt}\n{reference}\nNow."


@pytest.fixture
def make_recipe(tiny_model, tmp_path):
    """Return what makes a recipe of sums, whose answers are checked, and of chats; each may have a template."""
    for name, start in (("sums", 0), ("chats", 100)):
        lines = ({"q": f"What is {i} + {i}?", "a": f"#### {2 * i}"} for i in range(start, start + 24))
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (tmp_path / "texts.txt").write_text("One text.\n\nTwo texts.\n\nThree texts.")

    def source(name: str, **settings) -> dict:
        fields = {"prompt": "q", "response": "a"}
        return {"path": str(tmp_path / f"{name}.jsonl"), "fields": fields, "held_out": 2, "validation": 2, **settings}

    def make(*weights: float, **settings) -> Recipe:
        sources = [source("sums", template=SUMS), source("chats", answer="none")]
        rows = [{**each, "weight": weight} for each, weight in zip(sources, weights, strict=True)]
        recipe = {
            "model": {"path": str(tiny_model)},
            "prune": {"blocks": 2, "calibration": {"text": str(tmp_path / "texts.txt")}},
            "distill": {"max_new_tokens": 16, "dtype": "float32", "shift_rows": 0},
            "evaluate": {"tasks": ["sciq"]},
        }
        return validate(Recipe, {**recipe, "rows": rows, **settings})

    return make


def test_distill_of_mixtures_generates_each_row_once_with_the_template_of_its_source(
    ray_cluster, make_recipe, tiny_model, tmp_path
):
    from transformers import AutoTokenizer

    storage, log = Storage(str(tmp_path / "root")), tmp_path / "log"

    def build(*weights: float, **settings) -> tuple[list[DistilledRow], distill.Summary]:
        chain = pipeline.chain(make_recipe(*weights, **settings))
        data = chain.data[""]
        pipeline.build([*data.read, data.rows], load_compute(), storage)
        work = Work(chain.distilled, storage, PLAN, Progress("distill", "rows"), engine=fake_engine(log))
        summary = distill.build(work)
        return read_split(work.directory, "train", DistilledRow), summary

    rows, summary = build(3, 1, train={"rows": 16})
    assert Counter(row.origin for row in rows) == {0: 12, 1: 4}
    assert all(row.reason == "kept" for row in rows)
    assert [(each.name, each.rows, each.kept) for each in summary.by_source] == [("sums", 12, 12), ("chats", 4, 4)]
    asked = {row_id: AutoTokenizer.from_pretrained(tiny_model).decode(ids) for row_id, ids, _ in logged(log)}
    assert {row.id: "Say it anew" in asked[row.id] for row in rows} == {row.id: row.origin == 0 for row in rows}
    assert len(list((tmp_path / "root" / "ledger").iterdir())) == 2, "one for each template"
    rows, _ = build(1, 3, train={"rows": 16})
    assert Counter(row.origin for row in rows) == {0: 4, 1: 12}
    assert len(logged(log)) == 16 + 8, "only what the other mixture did not have"
    build(1, 0, train={"rows": 12})
    assert len(logged(log)) == 16 + 8, "nor does a source alone generate its rows again"
    assert len({row_id for row_id, _, _ in logged(log)}) == 24

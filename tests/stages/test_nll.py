"""The likelihood of references and rewrites: which rows it is measured on, and that the measure is the usual loss."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdft_ray import pipeline
from sdft_ray.progress import Progress
from sdft_ray.report import lines
from sdft_ray.results import Likelihood
from sdft_ray.spec import compute
from sdft_ray.stages import Work, nll
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage

torch.set_num_threads(1)

ROWS = [nll.Rewritten(f"What is {i}?", f"It is {i}." * (1 + i % 3), f"{i}, simply.") for i in range(40)]


def test_draw_rows_depends_on_the_rows_and_not_on_their_order_and_takes_only_kept_ones():
    mixed = [nll.Judged(f"{i:016x}", "kept" if i % 4 else "leak", i) for i in range(40)]
    drawn = [
        nll.draw_rows([order[:7], order[7:]], 5, seed=0)
        for order in (mixed, random.Random(0).sample(mixed, len(mixed)))
    ]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 5
    assert nll.draw_rows([mixed], 3, seed=0) == drawn[0][:3] != nll.draw_rows([mixed], 3, seed=1)
    assert sorted(row.place for row in nll.draw_rows([mixed], 40, seed=0)) == [i for i in range(40) if i % 4]


@pytest.fixture
def make_stage(tiny_model, tmp_path):
    """Return the stage on distilled rows with these reasons, which are there already, and the storage."""

    def make(reasons: list[str]) -> tuple[Stage, Storage]:
        storage = Storage(str(tmp_path / "root"))
        distilled = Stage("distill", "sums", 1, {"reasons": reasons})
        rows = [
            {"id": f"{i:016x}", "reason": reason, **row._asdict()}
            for i, (row, reason) in enumerate(zip(ROWS, reasons, strict=True))
        ]
        pq.write_table(pa.Table.from_pylist(rows), storage.scratch(distilled) / "train.parquet")
        storage.commit(distilled, {}, 0.0)
        base = Stage("model", "tiny", 1, {}, location=tiny_model)
        settings = nll.Settings(rows=64, dtype="float32", seed=0)
        return Stage("nll", "sums", nll.VERSION, settings, {"model": base, "distilled": distilled}), storage

    return make


def test_nll_equals_the_models_own_loss_row_by_row(ray_cluster, tiny_model, make_stage):
    stage, storage = make_stage(["kept"] * len(ROWS))
    pipeline.build([stage], compute.load_compute(), storage)
    found = json.loads((storage.fetch(stage) / "nll.json").read_text())
    assert found == storage.manifest(stage).summary == nll.Summary.of(stage, storage).plain()
    assert found["rows"] == len(ROWS)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    for name, column in (("reference", "reference"), ("distilled", "response")):
        total = tokens = 0
        for row in ROWS:
            prompt = f"<|im_start|>user\n{row.prompt}<|im_end|>\n<|im_start|>assistant\n"
            before = len(tokenizer(prompt)["input_ids"])
            ids = torch.tensor([tokenizer(f"{prompt}{getattr(row, column)}<|im_end|>")["input_ids"]])
            labels = ids.clone()
            labels[0, :before] = -100
            with torch.inference_mode():
                loss = model(input_ids=ids, labels=labels).loss.item()
            total += loss * (ids.shape[1] - before)
            tokens += ids.shape[1] - before
        assert found[name]["nll_per_token"] == pytest.approx(total / tokens, abs=1e-4)
        assert found[name]["mean_tokens"] == tokens / len(ROWS)


def test_nll_where_no_rewrite_was_kept_measures_nothing(make_stage):
    stage, storage = make_stage(["leak"] * len(ROWS))
    work = Work(stage, storage, compute.Compute(), Progress("nll", "texts"))
    summary = nll.build(work)
    assert summary == nll.Summary(rows=0) and summary.plain() == {"rows": 0}


def test_nll_line_of_a_report_names_both_with_their_lengths():
    found = nll.Summary(
        rows=64,
        reference=Likelihood(mean_tokens=126.4, nll_per_token=0.81234),
        distilled=Likelihood(mean_tokens=201.6, nll_per_token=0.21),
    )
    assert lines.nll_line(found) == (
        "Negative log-likelihood a token under the base, 64 kept rows: rewrites 0.210 (202 tokens), "
        "references 0.812 (126 tokens)."
    )


def test_likelihoods_of_each_source_are_those_of_its_rows_alone(tiny_model):
    mixed = [row._replace(origin=i % 2) for i, row in enumerate(ROWS[:9])]

    def measure(rows):
        portions: dict[str, list] = {}
        for name, portion in nll.measure(lambda: tiny_model, "float32", "cpu", rows):
            portions.setdefault(name, []).append(portion)
        return portions

    together = measure(mixed)
    for origin in (0, 1):
        rows = [row for row in mixed if row.origin == origin]
        alone = nll._likelihoods(measure([row._replace(origin=0) for row in rows]), rows)
        ours = nll._likelihoods(together, rows, origin)
        assert ours["rows"] == len(rows)
        for side in ("reference", "distilled"):
            assert ours[side].nll_per_token == pytest.approx(alone[side].nll_per_token, rel=1e-5)
    assert sum(portion.rows for portion in together["reference"]) == 9

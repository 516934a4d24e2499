"""Retention, generated and sampled answers in the report of a recipe: tables, sentences, JSON, page."""

import io

import pytest
from rich.console import Console

from sdft_ray.core.recovery import Estimate
from sdft_ray.generated import Habits, Sampled
from sdft_ray.report import lines, page, table
from sdft_ray.report.entries import Cost, ModelEntry, Quality, Report, Retention, RetentionComparison
from sdft_ray.stages.retention import Kept


def entry(name: str, kl: float, ended: float | None) -> ModelEntry:
    kept = Kept(
        texts=9,
        tokens=1234,
        kl=Estimate(kl, kl - 0.01 if kl else kl, kl + 0.01 if kl else kl, 9),
        agreement=Estimate(1 - kl / 2, 1 - kl, 1.0, 9),
    )
    return ModelEntry(
        model=name,
        id="0" * 12,
        quality=Quality(tasks={}, mean=0.5, recovery=100.0, recovery_over_chance=None, limited=False),
        cost=Cost(parameters=1, flops_per_token=2.0),
        retention=Retention(texts=kept, bits_per_byte=Estimate(1.25, 1.0, 1.5, 7)),
        generated=Habits(answers=40, ended=ended, repeated=0.25, empty=0.0, refused=0.05, characters=100 * (1 + kl)),
        pass_at={2: Sampled(share=Estimate(0.5, 0.25, 0.75, 9), over_base=Estimate(-kl, -kl, 0.0, 9) if kl else None)},
    )


@pytest.fixture
def report() -> Report:
    models = (entry("base", 0.0, 1.0), entry("sft", 0.5, None))
    compared = RetentionComparison(
        first="distilled", second="sft", figures={"kl_texts": Estimate(-0.1, -0.2, -0.05, 9)}
    )
    return Report.model_construct(recipe="r", flops_tokens=256, models=models, retention=(compared,))


def test_tables_show_figures_with_intervals_and_what_is_not_known_as_a_dash(report):
    assert table.retention_columns(report) == ["model", "KL, texts", "agreement, texts", "bits/byte, references"]
    assert table.retention_rows(report) == [
        ["base", "0.000", "100.0", "1.250 [1.000, 1.500]"],
        ["sft", "0.500 [0.490, 0.510]", "75.0 [50.0, 100.0]", "1.250 [1.000, 1.500]"],
    ]
    assert table.generated_rows(report) == [
        ["base", "100.0", "25.0", "0.0", "5.0", "100", "100%"],
        ["sft", "-", "25.0", "0.0", "5.0", "150", "150%"],
    ]
    assert table.pass_at_rows(report) == [
        ["base", "2", "50.0 [25.0, 75.0]", ""],
        ["sft", "2", "50.0 [25.0, 75.0]", "-50.0 [-50.0, +0.0]"],
    ]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table.retention_table(report), table.generated_table(report), table.pass_at_table(report))
    text = console.export_text()
    assert "9 plain texts (1234 tokens)" in text and "responses of the base" not in text


def test_line_names_the_difference_of_the_arms(report):
    assert lines.retention_line(report.retention[0]) == (
        "distilled - sft on the same texts, with 95 % intervals: KL, texts -0.100 [-0.200, -0.050]."
    )


def test_json_of_an_entry_has_all(report):
    plain = report.models[1].plain()
    assert plain["retention"]["texts"]["kl"] == {"value": 0.5, "low": 0.49, "high": 0.51, "n": 9}
    assert plain["generated"]["repeated"] == 0.25
    assert plain["pass_at"]["2"]["share"]["low"] == 0.25


def test_a_report_without_any_shows_none(report):
    bare = [model.model_copy(update={"retention": None, "generated": None, "pass_at": None}) for model in report.models]
    without = report.model_copy(update={"models": tuple(bare)})
    assert not table.retention_columns(without) and not table.retention_rows(without)
    assert not table.generated_rows(without) and not table.pass_at_rows(without)
    assert lines.retention_caption(without)
    assert page._template("page.html.jinja")

"""The table of a report for several sources of rows: what is not known is a dash, never a zero."""

import pytest

from sdft_ray.report import sources
from sdft_ray.report.entries import MixedSource, Report, Rewrites, SourceEntry, SourceNll
from sdft_ray.results import Counts, Likelihood


def make_report(*sources: SourceEntry) -> Report:
    fields = {"recipe": "mixture", "flops_tokens": 256, "models": (), "comparison": None, "speed": None, "merges": {}}
    return Report.model_construct(**fields, drafts={}, sources=sources)


@pytest.fixture
def entry() -> SourceEntry:
    counts = Counts(held_out=2, validation=2, train=30)
    return SourceEntry(mixed=MixedSource(name="sums", rows=counts, held_elsewhere=1, duplicates=2, unused=7))


def test_source_table_of_everything_measured_shows_it(entry):
    sides = {
        side: Likelihood(mean_tokens=9, nll_per_token=nll) for side, nll in (("reference", 2.5), ("distilled", 1.25))
    }
    whole = entry.model_copy(
        update={
            "rewrites": Rewrites(name="sums", rows=20, kept=15, reasons={"kept": 15, "leak": 5}),
            "nll": SourceNll(name="sums", rows=8, **sides),
            "exact_match": {"base": 0.5, "pruned": 0.025},
            "loss": {"sft": 1.5},
            "validation_loss": {"sft": 1.75},
        }
    )
    report = make_report(whole, entry)
    columns = ["loss, sft", "validation loss, sft", "exact match, base", "exact match, pruned"]
    assert sources.columns(report)[-4:] == columns
    assert sources.rows(report) == [
        ["sums", "30", "7", "1", "2", "75%", "1.250", "2.500", "1.500", "1.750", "50.0", "2.5"],
        ["sums", "30", "7", "1", "2", *"-------"],
    ]
    assert sources.table(report).row_count == 2
    texts = entry.model_copy(update={"rewrites": Rewrites(name="texts", rows=9, kept=0, reasons={"plain": 9})})
    assert sources.rows(make_report(texts))[0][5] == "-", "there was nothing to rewrite"


def test_source_table_without_held_out_rows_has_no_columns_of_models(entry):
    assert sources.columns(make_report(entry)) == [*sources.COLUMNS]

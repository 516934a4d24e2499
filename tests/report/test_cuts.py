"""What reports say of cuts that no distance chose."""

import io

import pytest
from rich.console import Console

from sdft_ray.core.choice import Choice
from sdft_ray.core.passes import count_passes
from sdft_ray.report import lines, page, table
from sdft_ray.report.entries import Cost, Details, Greedy, ModelEntry, Pruned, Quality, Report
from sdft_ray.stages import finals
from sdft_ray.stages.loss import Taken
from sdft_ray.store.manifest import Provenance

GREEDY = Greedy(
    texts={"boolq": 4, "own": 3},
    base_loss=3.0,
    steps=(
        Taken(
            block=4,
            loss=3.25,
            losses={"boolq": 3.0, "own": 3.5},
            runner_up=1,
            runner_up_loss=3.5,
            agreement=0.9,
        ),
        Taken(
            block=2,
            loss=3.5,
            losses={"boolq": 3.25, "own": 3.75},
            runner_up=None,
            runner_up_loss=None,
            agreement=1.0,
        ),
    ),
    choice=Choice((2, 4), 3.5, None, 0.9),
    cost=count_passes(6, 2),
)
ONE_BY_ONE = Pruned(removed=(2, 4), metric="loss", cost=3.5, agreement=0.9, blocks=4, parameters=5)
NAMED = Pruned(removed=(2, 4), metric="remove", blocks=4, parameters=5)
TAIL = Pruned(removed=(4, 5), metric="tail", target=6e6, blocks=4, parameters=5)


@pytest.mark.parametrize(
    ("cut", "line"),
    [
        (NAMED, "Cut: blocks 2, 4, named by the recipe."),
        (TAIL, "Cut: blocks [4, 6), the fewest for 6,000,000 parameters or less, the last ones that may go."),
        (
            ONE_BY_ONE,
            "Cut: blocks 2, 4, loss on the loss texts 3.500 (3.000 with nothing removed); 90% of bootstrap samples "
            "choose the same.",
        ),
    ],
)
def test_cut_line_says_what_chose_the_blocks(cut, line):
    assert lines.cut_line(cut, GREEDY) == line


def report_of(cut: Pruned, greedy: Greedy | None) -> Report:
    quality = Quality(tasks={}, mean=0.5, recovery=None, recovery_over_chance=None, limited=False)
    base = ModelEntry(model="base", id="0", quality=quality, cost=Cost(parameters=1, flops_per_token=1.0))
    details = Details.model_construct(
        **dict.fromkeys(("distances", "losses", "selection", "nll")),
        greedy=greedy,
        cut=cut,
        examples=[],
        trainings={},
        seconds={},
        provenance=Provenance(),
        artifacts=[],
        settings={},
    )
    common = {"recipe": "r", "flops_tokens": 1, "models": (base,), "comparison": None, "speed": None}
    return Report.model_construct(**common, merges={}, drafts={}, sources=(), details=details)


def test_report_of_finalists_says_what_training_changed_and_what_it_took():
    each = [
        finals.Finalist(blocks=(2, 3), untrained=4.0, loss=3.0, losses={"boolq": 3.0}),
        finals.Finalist(blocks=(1, 2), untrained=3.5, loss=3.25, losses={"boolq": 3.25}),
    ]
    made = finals.Summary(finalists=tuple(each), choice=Choice((2, 3), 3.0, (1, 2), 0.9), rows=64, seconds=91.6)
    report = report_of(ONE_BY_ONE, None)
    assert lines.finals_line(report.details) is None
    report = report.model_copy(update={"details": report.details.model_copy(update={"finals": made})})
    line = lines.finals_line(report.details)
    assert line == (
        "Finalists, the loss before and after training: [2, 4) 4.000 to 3.000, [1, 3) 3.500 to 3.250 nats a token "
        "after 64 rows, in 92 s."
    )
    assert line in page.render(report)


def test_page_of_blocks_that_went_one_after_the_other_has_every_step():
    html = page.render(report_of(ONE_BY_ONE, GREEDY))
    assert "blocks 2, 4 of\n  6 removed" in html
    assert "11 candidates in 2 steps took the work of 6 passes over the loss texts (10 without shared states)" in html
    for cells in (["4", "3.250", "1", "3.500", "90%", "3.000", "3.500"], ["2", "3.500", "-", "-", "100%"]):
        assert "</td><td>".join(cells[1:]) in html
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(table.greedy_table(GREEDY))
    assert "3.250" in console.export_text()


def test_page_of_named_blocks_has_neither_map_nor_steps():
    html = page.render(report_of(NAMED, None))
    assert "named by the recipe" in html
    assert "Choices at other depths" not in html and "next best" not in html

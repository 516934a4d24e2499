"""Selection is a function of what was generated: other checks select again, nothing is generated."""

import pytest

from sdft_ray.core.prompts import CHECKABLE, OPEN
from sdft_ray.core.rows import Row
from sdft_ray.progress import Progress
from sdft_ray.spec.compute import Compute
from sdft_ray.spec.sources import Filters
from sdft_ray.stages import Work, distill
from sdft_ray.stages.distill.draws import Settings, Source, instruction_template, instruction_templates, select_rows
from sdft_ray.store.identity import Stage
from sdft_ray.store.ledger import Line
from sdft_ray.store.storage import Storage

SETTINGS = Settings(answer="number", rows=None)
TEXTS = ["It is 2.", "<think>2</think>In my own words: 4.", "I cannot help with 6.", "It is 9.", ""]
ROWS = [Row(f"{i} + {i}?", f"#### {2 * i}", str(2 * i), f"r{i}") for i in range(1, 6)]


def generated(row_id: str, *texts: str) -> list[Line]:
    return [Line(row_id, i, text, "stop", prompt_tokens=9, tokens=3, sampling_seed=i) for i, text in enumerate(texts)]


GENERATIONS = {row.id: generated(row.id, text) for row, text in zip(ROWS, TEXTS, strict=True)}


def changed(**fields) -> Settings:
    return SETTINGS.model_copy(update=fields)


def with_filters(**filters) -> Settings:
    return changed(filters=SETTINGS.filters.model_copy(update=filters))


def test_select_rows_has_each_row_once_in_order_with_its_reason():
    selected = select_rows(ROWS, GENERATIONS, SETTINGS)
    assert [row.id for row in selected] == [row.id for row in ROWS]
    assert [row.reason for row in selected] == ["kept", "leak", "refusal", "wrong_answer", "empty"]
    assert [row.response for row in selected] == ["It is 2.", *(row.reference for row in ROWS[1:])]


def test_select_rows_with_a_filter_off_keeps_more_of_the_same_generations():
    selected = select_rows(ROWS, GENERATIONS, with_filters(leak=False, refusal=False))
    assert [row.response for row in selected][:3] == [
        "It is 2.",
        "In my own words: 4.",
        "I cannot help with 6.",
    ]
    assert [row.reason for row in selected].count("kept") == 3


def test_select_rows_unchecked_keeps_other_answers():
    selected = select_rows(ROWS, GENERATIONS, changed(answer="none"))
    assert [row.reason for row in selected].count("kept") == 2


def test_select_rows_keeps_the_first_sample_that_passes_and_tells_its_seed():
    samples = {**GENERATIONS, "r4": generated("r4", "It is 9.", "It is 8.", "8 it is.")}
    row = select_rows(ROWS, samples, SETTINGS)[3]
    assert (row.response, row.reason, row.sampling_seed) == ("It is 8.", "kept", 1)


@pytest.mark.parametrize(
    ("change", "moves"),
    [
        ({"filters": Filters(leak=False)}, False),
        ({"strip_thinking": False}, False),
        ({"answer": "math"}, False),
        ({"template_options": {"enable_thinking": True}}, True),
    ],
)
def test_ledger_is_another_one_only_where_other_text_would_be_generated(tmp_path, change, moves):
    def name(settings: Settings) -> str:
        stage = Stage("distill", "sums", 1, settings, {"model": Stage("model", "tiny", 1, {})})
        work = Work(stage, Storage(str(tmp_path)), Compute(), Progress("distill", "rows"))
        return distill.ledger_id(work.stage, instruction_template(settings))

    assert (name(changed(**change)) != name(SETTINGS)) is moves


def test_select_rows_judges_a_row_as_its_source_says():
    sources = [Source(name="sums", answer="number", template=None), Source(name="chats", answer="none", template=None)]
    settings = Settings(answer=None, rows=None, sources=tuple(sources))
    rows = [row._replace(origin=i % 2) for i, row in enumerate(ROWS)]
    texts = {row.id: generated(row.id, "It is 99.") for row in rows}
    assert [row.reason for row in select_rows(rows, texts, settings)] == [
        "wrong_answer" if row.origin == 0 else "kept" for row in rows
    ]
    assert [row.origin for row in select_rows(rows, texts, settings)] == [0, 1, 0, 1, 0]
    assert instruction_templates(settings) == [CHECKABLE, OPEN]
    strict = Filters(leak_phrases=("It is 99",))
    both = settings.model_copy(
        update={"filters": strict, "sources": (sources[0].model_copy(update={"filters": Filters()}), sources[1])}
    )
    reasons = ["wrong_answer", "leak", "wrong_answer", "leak", "wrong_answer"]
    assert [row.reason for row in select_rows(rows, texts, both)] == reasons, "its own filters, else the common ones"


def test_settings_of_one_source_hash_as_they_did():
    assert {*Settings(answer="none", rows=None).hashed()} >= {"answer", "rows", "template"}
    assert "sources" not in Settings(answer="none", rows=None).hashed()

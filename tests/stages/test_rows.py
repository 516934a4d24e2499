"""Which rows exist, in which order, and what each is for."""

import itertools
import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter
from refusals import complaint

from sdft_ray import pipeline
from sdft_ray.core.rows import Row
from sdft_ray.data import benchmarks
from sdft_ray.errors import UserError
from sdft_ray.results import SPLITS, read_split
from sdft_ray.spec.compute import load_compute
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.sources import RowSource
from sdft_ray.spec.wording import validate
from sdft_ray.stages.rows import LeftOut, Summary, split_rows, write_splits
from sdft_ray.store.storage import Storage


def raw_rows(count: int) -> list[Row]:
    return [Row(f"{i} + {i}?", f"So {2 * i}.") for i in range(count)]


def split(raw, held_out=3, validation=2, seed=0, checker="number"):
    return split_rows(raw, checker, seed, held_out, validation)


def in_order(splits) -> list[str]:
    return [row.prompt for rows in splits for row in rows]


def test_split_rows_gives_each_row_to_one_split():
    splits, counts = split(raw_rows(20))
    assert [len(rows) for rows in splits] == [3, 2, 15]
    assert sorted(in_order(splits)) == sorted(row.prompt for row in raw_rows(20))
    assert counts == LeftOut(blank=0, duplicate_prompts=0, without_answer=0)


def test_split_rows_reads_the_answer_and_keeps_the_reference():
    raw = [*raw_rows(6), Row("with a column", "a long story", "1,234.5")]
    splits, _ = split(raw)
    rows = {row.prompt: row for rows in splits for row in rows}
    assert (rows["3 + 3?"].reference, rows["3 + 3?"].answer) == ("So 6.", "6")
    assert rows["with a column"].answer == "2469/2"


def test_split_rows_with_one_prompt_twice_keeps_the_first_and_counts_the_other():
    raw = [*raw_rows(10), Row(" 3 +\n 3?", "So 7."), raw_rows(10)[4]]
    splits, counts = split(raw)
    assert counts.duplicate_prompts == 2
    assert sorted(in_order(splits)) == sorted(row.prompt for row in raw_rows(10))
    assert "So 7." not in [row.reference for rows in splits for row in rows]


def test_split_rows_without_a_checkable_answer_leaves_the_row_out_and_counts_it():
    raw = [*raw_rows(10), Row("why?", "because")]
    splits, counts = split(raw)
    assert counts.without_answer == 1
    assert "why?" not in in_order(splits)


def test_split_rows_of_choices_reads_the_letter():
    raw = [Row(f"{i}?", "They need light, so (B).") for i in range(9)]
    splits, _ = split([*raw, Row("why?", "because", "c")], checker="choice")
    assert {row.prompt: row.answer for rows in splits for row in rows} == {
        **{f"{i}?": "B" for i in range(9)},
        "why?": "C",
    }


def test_split_rows_of_open_ended_rows_keeps_all_with_no_answer():
    raw = [*raw_rows(10), Row("why?", "because")]
    splits, counts = split(raw, checker="none")
    assert counts.without_answer == 0
    assert len(in_order(splits)) == 11
    assert {row.answer for rows in splits for row in rows} == {None}


def test_split_rows_does_not_depend_on_the_order_of_the_source():
    raw = raw_rows(30)
    shuffled = random.Random(1).sample(raw, len(raw))
    assert split(shuffled)[0] == split(raw)[0]


def test_split_rows_order_is_the_same_whatever_the_sizes_of_the_splits():
    orders = [
        in_order(split(raw_rows(30), held_out, validation)[0]) for held_out, validation in [(3, 2), (0, 0), (9, 1)]
    ]
    assert orders[0] == orders[1] == orders[2]


def test_split_rows_of_a_longer_source_keeps_the_order_of_the_rows_it_had():
    short, grown = (in_order(split(raw_rows(count))[0]) for count in (20, 50))
    assert [prompt for prompt in grown if prompt in set(short)] == short


def test_split_rows_order_moves_with_the_seed_and_is_not_the_source_order():
    orders = [in_order(split(raw_rows(30), seed=seed)[0]) for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert orders[0] != [row.prompt for row in raw_rows(30)]
    assert orders[0] == in_order(split(raw_rows(30), seed=0)[0])


def test_split_rows_ids_stand_for_prompt_and_reference():
    ids = {row.prompt: row.id for rows in split(raw_rows(20))[0] for row in rows}
    assert len(set(ids.values())) == 20
    changed = [row._replace(reference="Now 0." if row.prompt == "4 + 4?" else row.reference) for row in raw_rows(20)]
    moved = {row.prompt: row.id for rows in split(changed)[0] for row in rows}
    assert {prompt for prompt in ids if ids[prompt] != moved[prompt]} == {"4 + 4?"}


@pytest.mark.parametrize(
    ("raw", "usable", "lost"),
    [
        (raw_rows(5), 5, ""),
        (raw_rows(3), 3, ""),
        ([*raw_rows(5), *raw_rows(5)], 5, "; 5 prompts came before"),
        (
            [*raw_rows(2), Row("why?", " ")],
            2,
            "; 1 rows had a blank prompt or response",
        ),
        ([], 0, ""),
    ],
)
def test_split_rows_that_leave_none_to_train_on_say_why(raw, usable, lost):
    assert complaint(split, raw) == (
        f"rows: {usable} usable rows (of {len(raw)}{lost}) leave none to train on after 3 held-out and 2 validation "
        "rows. Give more rows or hold out fewer."
    )


@pytest.mark.parametrize(
    ("checker", "answers", "what"),
    [
        ("choice", [*"012345"], "6 answers were no letters"),
        ("number", ["yes", "no", "maybe", "so", "or", "not"], "6 answers were no numbers"),
    ],
)
def test_split_rows_whose_answers_are_of_another_kind_say_so_and_what_to_set(checker, answers, what):
    raw = [Row(f"{i}?", "(B) y", answer) for i, answer in enumerate(answers)]
    with pytest.raises(UserError, match=rf"^rows: 0 usable rows \(of 6; {what}\) leave none .*Set rows\.answer to"):
        split(raw, checker=checker)


def test_split_rows_counts_what_decontamination_left_out_among_the_reasons():
    with pytest.raises(UserError, match=r"^rows: 2 usable rows \(of 9; 7 rows held items of a benchmark\)"):
        split_rows(raw_rows(2), "number", 0, 3, 2, decontaminated=7)


def test_write_splits_reads_back_as_it_was_also_where_a_split_is_empty(tmp_path):
    splits, _ = split(raw_rows(12), validation=0, checker="none")
    write_splits(tmp_path, splits)
    assert tuple(read_split(tmp_path, name, Row) for name in SPLITS) == splits
    assert splits.validation == []


def make_recipe(tmp_path, tiny_model, source: dict) -> Recipe:
    texts = tmp_path / "texts.txt"
    texts.write_text("Some text.\n\nMore text.\n\nA third text.")
    return validate(
        Recipe,
        {
            "model": {"path": str(tiny_model)},
            "rows": source,
            "prune": {"blocks": 2, "calibration": {"text": str(texts)}},
            "evaluate": {"tasks": ["sciq"]},
        },
    )


def build_rows(tmp_path, tiny_model, raw: list[Row], **rows) -> tuple[Summary, Path]:
    """Build the rows stage of a recipe on these rows; return its summary and where it lies."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row._asdict()) + "\n" for row in raw))
    source = {"path": str(file), "fields": {"prompt": "prompt", "response": "reference"}, "held_out": 2, **rows}
    recipe = make_recipe(tmp_path, tiny_model, {**source, "validation": 2, "answer": "none"})
    storage = Storage(str(tmp_path / "root"))
    pipeline.run(recipe, load_compute(), storage, until="rows")
    stage = pipeline.chain(recipe).rows
    return Summary.of(stage, storage), storage.place(stage)


def gsm8k_test(count: int) -> list[Row]:
    documents = benchmarks.read_documents(benchmarks.offline_items_file("gsm8k"))
    return [Row(doc["question"], doc["answer"]) for doc in itertools.islice(documents, count)]


def test_rows_leave_out_the_items_of_a_task_and_list_them(tmp_path, tiny_model):
    items = gsm8k_test(50)
    summary, directory = build_rows(tmp_path, tiny_model, raw_rows(20) + items, decontaminate=["gsm8k", "sciq"])
    assert (summary.read, summary.decontaminated) == (70, 50)
    assert summary.decontaminated_by_task == {"gsm8k": 50, "sciq": 0}
    kept = [row.prompt for name in SPLITS for row in read_split(directory, name, Row)]
    assert sorted(kept) == sorted(row.prompt for row in raw_rows(20))
    listed = pq.read_table(directory / "decontaminated.parquet").to_pylist()
    assert {line["task"] for line in listed} == {"gsm8k"}
    assert len({line["row"] for line in listed}) == len(listed) == 50
    assert all(8 <= len(line["ngram"].split()) <= 13 for line in listed)


def test_rows_with_a_task_answer_inside_are_left_out(tmp_path, tiny_model):
    item = gsm8k_test(1)[0]
    raw = [*raw_rows(20), Row("Tell me a story.", f"Once: {item.prompt} The end.")]
    summary, _ = build_rows(tmp_path, tiny_model, raw, decontaminate=["gsm8k"])
    assert summary.decontaminated == 1


def test_rows_without_tasks_leave_out_none_and_keep_their_identity(tmp_path, tiny_model):
    summary, directory = build_rows(tmp_path, tiny_model, raw_rows(20) + gsm8k_test(5))
    assert summary.decontaminated == 0
    assert sum(summary.rows.plain().values()) == 25
    assert pq.read_table(directory / "decontaminated.parquet").num_rows == 0
    _, same = build_rows(tmp_path, tiny_model, raw_rows(20) + gsm8k_test(5), ngram=8)
    assert same == directory


@pytest.mark.parametrize("kind", ["path", "gym", "repo"])
def test_rows_stage_holds_its_settings_once_beside_the_place_of_a_file(tmp_path, tiny_model, kind):
    file = tmp_path / "rows.jsonl"
    file.write_text("{}")
    fields = {"prompt": "q", "response": "a", "context": "c"}
    source = {
        "path": {"path": str(file), "fields": fields, "answer": "choice"},
        "gym": {"gym": "chain_sum", "options": {"max_terms": 2}, "limit": 60},
        "repo": {"repo": "a/b", "revision": "0" * 40, "split": "test", "fields": fields, "limit": 60},
    }[kind]
    recipe = make_recipe(tmp_path, tiny_model, {**source, "held_out": 3, "validation": 1, "seed": 7})
    settings = pipeline.chain(recipe).rows.settings
    assert settings.origin == recipe.rows[0]
    hashed = settings.hashed()
    content = {key: value for key, value in hashed["source"].items() if key not in ("sha256", "version")}
    place = {"path": str(file)} if kind == "path" else {}
    held = json.dumps({**content, **place, **hashed["split"]})
    assert TypeAdapter(RowSource).validate_json(held) == recipe.rows[0], "the place is all that is not hashed"
    assert str(tmp_path) not in json.dumps(hashed)


def test_rows_of_an_unknown_task_is_one_clear_line(tmp_path, tiny_model):
    assert complaint(build_rows, tmp_path, tiny_model, raw_rows(20), decontaminate=["gsm8"]) == (
        "rows.decontaminate: no offline files for gsm8; only evaluate.preset: harness reads tasks of a hub. "
        "Did you mean gsm8k?"
    )

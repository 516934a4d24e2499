"""Stage `mix`: rows of several sources in one order, each row once, in the shares that the recipe gives."""

import json

import pyarrow.parquet as pq
import pytest

from sdft_ray import pipeline
from sdft_ray.core.mixture import interleave
from sdft_ray.core.rows import Row
from sdft_ray.errors import UserError
from sdft_ray.preflight.checks import check
from sdft_ray.results import read_held_out, read_split
from sdft_ray.spec.compute import load_compute
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.wording import validate
from sdft_ray.stages import mix
from sdft_ray.store.storage import Storage

FIELDS = {"prompt": "q", "response": "a"}


@pytest.fixture
def make_source(tmp_path):
    """Return what writes a file of problems and returns it as a source of rows."""

    def write(name: str, numbers, **settings) -> dict:
        lines = (json.dumps({"q": f"{i} + {i}?", "a": f"{name}: {2 * i}"}) for i in numbers)
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        path = str(tmp_path / f"{name}.jsonl")
        return {"path": path, "fields": FIELDS, "held_out": 2, "validation": 2, **settings}

    return write


@pytest.fixture
def make_recipe(tiny_model, tmp_path):
    """Return what makes a recipe of sources."""
    (tmp_path / "texts.txt").write_text("One text.\n\nTwo texts.\n\nThree texts.")

    def make(*sources: dict, **sections) -> Recipe:
        plain = {
            "model": {"path": str(tiny_model)},
            "rows": list(sources),
            "prune": {"blocks": 2, "calibration": {"text": str(tmp_path / "texts.txt")}},
            "distill": {"max_new_tokens": 32},
            "evaluate": {"tasks": ["sciq"]},
            **sections,
        }
        return validate(Recipe, plain)

    return make


def build(recipe: Recipe, storage: Storage):
    """Build the rows of a recipe; return the stages of its sources and their mixture."""
    data = pipeline.chain(recipe).data[""]
    pipeline.build([*data.read, data.rows], load_compute(), storage)
    return data.read, data.rows


def rows_of(stage, storage: Storage, split: str = "train") -> list[Row]:
    return read_split(storage.place(stage), split, Row)


def test_mix_without_weights_has_every_row_in_proportion_and_each_source_in_its_order(
    make_recipe, make_source, storage
):
    sources = make_source("few", range(14)), make_source("many", range(100, 134))
    read, mixed = build(make_recipe(*sources), storage)
    rows = rows_of(mixed, storage)
    for number, stage in enumerate(read):
        own = rows_of(stage, storage)
        assert [row for row in rows if row.origin == number] == [row._replace(origin=number) for row in own]
    assert [row.origin for row in rows] == list(interleave([10, 30], [10, 30]))
    summary = mix.Summary.of(mixed, storage)
    assert summary.rows.plain() == {"held_out": 4, "validation": 4, "train": 40} and summary.ended_by is None
    assert [source.name for source in summary.sources] == ["few", "many"]


def test_mix_of_weights_ends_with_the_first_source_that_has_run_out_and_says_so(
    make_recipe, make_source, storage, capsys
):
    first, second = make_source("first", range(14), weight=1), make_source("second", range(100, 134), weight=1)
    _, mixed = build(make_recipe(first, second), storage)
    summary = mix.Summary.of(mixed, storage)
    assert [row.origin for row in rows_of(mixed, storage)] == [0, 1] * 10
    assert [(source.rows.train, source.unused) for source in summary.sources] == [(10, 0), (10, 20)]
    assert summary.ended_by == summary.sources[0].name
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mix: ") and "run out" in line]
    assert f"{summary.ended_by} has run out, so the mixture ends at 20 training rows; unused: 20 of " in line
    assert f"Lower the weight of {summary.ended_by}" in line and "train.rows" in line


def test_mix_goes_through_more_rows_than_a_batch_in_their_order(make_recipe, make_source, storage, monkeypatch):
    monkeypatch.setattr(mix, "_BATCH_ROWS", 7)
    sources = [make_source(name, range(start, start + 54), weight=weight) for name, start, weight in
               (("a", 0, 3), ("b", 100, 1), ("c", 200, 2))]  # fmt: skip
    _, mixed = build(make_recipe(*sources), storage)
    assert [row.origin for row in rows_of(mixed, storage)] == list(interleave([50] * 3, [3, 1, 2]))
    assert pq.ParquetFile(storage.place(mixed) / "train.parquet").num_row_groups > 1


def test_mix_keeps_a_row_of_two_sources_in_the_earlier_one(make_recipe, make_source, storage):
    alone = {"held_out": 0, "validation": 0}
    first, second = make_source("first", range(20), **alone), make_source("second", range(15, 40), **alone)
    _, mixed = build(make_recipe(first, second), storage)
    rows = rows_of(mixed, storage)
    assert len(rows) == len({row.key for row in rows}) == 40
    assert {row.origin for row in rows if row.reference.startswith("first")} == {0}
    assert sum(row.origin == 0 for row in rows) == 20
    sources = mix.Summary.of(mixed, storage).sources
    assert [(source.duplicates, source.held_elsewhere) for source in sources] == [(0, 0), (5, 0)]


def test_mix_trains_on_no_row_that_any_source_holds_out_or_validates_on(make_recipe, make_source, storage):
    first = make_source("first", range(30), held_out=0, validation=0)
    second = make_source("second", range(20, 50), held_out=12, validation=6)
    third = make_source("third", range(20, 50), held_out=6, validation=12, seed=5)
    read, mixed = build(make_recipe(first, second, third), storage)
    splits = {split: rows_of(mixed, storage, split) for split in ("held_out", "validation", "train")}
    keys = {split: [row.key for row in rows] for split, rows in splits.items()}
    assert all(len(some) == len({*some}) for some in keys.values())
    held, validated = (
        {row.key for stage in read for row in rows_of(stage, storage, split)} for split in ("held_out", "validation")
    )
    assert {*keys["held_out"]} == held and {*keys["validation"]} == validated - held
    assert not {*keys["train"]} & (held | validated)
    everything = {row.key for stage in read for split in splits for row in rows_of(stage, storage, split)}
    assert {key for some in keys.values() for key in some} == everything, "no row is lost"
    sources = mix.Summary.of(mixed, storage).sources
    in_first = [row.key for row in rows_of(read[0], storage)]
    assert sources[0].held_elsewhere == sum(key in held | validated for key in in_first) > 0
    assert splits["held_out"] == read_held_out([storage.place(stage) for stage in read]), "as evaluations read them"


def test_mix_of_a_source_whose_rows_are_all_of_another_is_refused_with_weights(make_recipe, make_source, storage):
    alone = {"held_out": 0, "validation": 0, "weight": 1}
    first, second = make_source("first", range(20), **alone), make_source("second", range(20), **alone)
    with pytest.raises(UserError, match=r"^rows: second.* has no training rows that no other source has.*weight to 0"):
        build(make_recipe(first, second), storage)


def ids(recipe: Recipe, kind: str = "") -> set[str]:
    return {f"{stage.name}-{stage.id}" for stage in pipeline.chain(recipe).in_order if stage.name.startswith(kind)}


def test_list_of_one_source_is_that_source(make_recipe, make_source):
    source = make_source("only", range(20))
    alone = ids(make_recipe(rows=source))
    assert ids(make_recipe(source)) == ids(make_recipe({**source, "weight": 7})) == alone
    assert ids(make_recipe({**source, "weight": 1}, make_source("left", range(9), weight=0))) == alone


def test_template_of_the_only_source_is_the_one_of_distill(make_recipe, make_source):
    source, template = make_source("only", range(20)), "{reference} to {prompt}"
    own = ids(make_recipe({**source, "template": template}))
    assert own == ids(make_recipe(source, distill={"max_new_tokens": 32, "template": template}))
    assert own != ids(make_recipe(source))


def test_filters_of_a_source_move_the_rewrites_alone_and_only_where_they_differ(make_recipe, make_source):
    first, second = make_source("first", range(20)), make_source("second", range(30, 50))
    strict = {"leak_phrases": ["given text"]}
    assert ids(make_recipe({**first, "filters": strict})) == ids(
        make_recipe(first, distill={"max_new_tokens": 32, "filters": strict})
    )
    common = ids(make_recipe(first, second))
    assert ids(make_recipe({**first, "filters": {"leak": True}}, second)) == common
    moved = ids(make_recipe({**first, "filters": strict}, second)) ^ common
    assert {name.rpartition("-")[0] for name in moved} == {"distill", "nll", "train", "evaluate"}


def test_ids_of_a_mixture_depend_on_the_proportions_and_each_source_keeps_its_own(make_recipe, make_source):
    first, second = make_source("first", range(20)), make_source("second", range(30, 60))
    one, same, other = (
        make_recipe({**first, "weight": a}, {**second, "weight": b}, evaluate={"tasks": ["held_out"]})
        for a, b in ((1, 2), (0.5, 1), (2, 1))
    )
    assert ids(one) == ids(same) != ids(other)
    assert ids(one, "rows") == ids(other, "rows") == ids(make_recipe(first), "rows") | ids(make_recipe(second), "rows")
    chains = pipeline.chain(one), pipeline.chain(other)
    bases = [chain.evaluations["base", "held_out"].id for chain in chains]
    assert bases[0] == bases[1], "held-out rows are the same: the base is evaluated once"
    assert chains[0].distilled.id != chains[1].distilled.id


def test_mixture_in_another_model_that_is_merged_is_read_alike(make_recipe, make_source):
    first, second, third = (make_source(name, range(i, i + 20)) for i, name in enumerate(("a", "b", "c")))
    merge = {"others": {"chats": {"rows": [second, third]}}, "slerp": {}}
    chain = pipeline.chain(make_recipe(first, merge=merge))
    mixed = chain.data["chats"].rows
    assert mixed.name == "mix" and mixed in chain.models["chats"].inputs.values()
    assert [*mixed.inputs.values()] == [*chain.data["chats"].read]
    order = [stage.id for stage in chain.in_order]
    assert all(order.index(stage.id) < order.index(mixed.id) for stage in chain.data["chats"].read)


def test_sources_of_one_name_are_numbered(make_recipe, make_source, tmp_path):
    first, second = make_source("rows", range(20)), make_source("rows", range(20), seed=1)
    assert [*pipeline.chain(make_recipe(first, second)).own.sources] == ["rows", "rows-2"]


# --- before anything is built ---------------------------------------------------------------------------------


def test_check_refuses_more_training_rows_than_the_mixture_has(make_recipe, make_source):
    first, second = make_source("first", range(14), weight=1), make_source("second", range(100, 134), weight=1)
    check(make_recipe(first, second, train={"rows": 20, "max_tokens": 512}), load_compute())
    with pytest.raises(UserError, match=r"^train\.rows: 21 is more than the 20 training rows of the mixture.*weight"):
        check(make_recipe(first, second, train={"rows": 21, "max_tokens": 512}), load_compute())
    second["weight"] = None
    first["weight"] = None
    check(make_recipe(first, second, train={"rows": 40, "max_tokens": 512}), load_compute())


@pytest.mark.parametrize("weights", [(None, None), (1, 2)])
def test_check_counts_rows_that_sources_share_once_as_the_mixture_does(make_recipe, make_source, storage, weights):
    first, second = (
        make_source("first", range(14), weight=weights[0]),
        make_source("second", range(7, 40), weight=weights[1]),
    )
    _, mixed = build(make_recipe(first, second), storage)
    rows = len(rows_of(mixed, storage))
    check(make_recipe(first, second, train={"rows": rows, "max_tokens": 512}), load_compute())
    with pytest.raises(UserError, match=rf"^train\.rows: {rows + 1} is more than the {rows} training rows"):
        check(make_recipe(first, second, train={"rows": rows + 1, "max_tokens": 512}), load_compute())


def test_check_names_the_source_that_has_a_mistake(make_recipe, make_source):
    short = make_source("short", range(3))
    with pytest.raises(UserError) as error:
        check(make_recipe(make_source("first", range(20)), short), load_compute())
    assert error.value.problems[0].where == "rows.1"


def test_check_reads_each_row_with_the_template_of_its_source(make_recipe, make_source):
    first, second = make_source("first", range(20)), make_source("second", range(50, 70))
    long = {**second, "template": "{prompt} {reference}" + "x" * 2100}
    check(make_recipe(first, second), load_compute())
    with pytest.raises(UserError, match=r"distill\.max_new_tokens"):
        check(make_recipe(first, long), load_compute())

"""The distill stage on real Ray Data, with a fake engine at the one boundary where a fake may stand."""

import dataclasses
import itertools
import json
import os
import re
import signal
import types
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard
from ray.exceptions import RayActorError
from tiny import make_tiny_model, rows_settings
from transformers import AutoTokenizer

from sdft_ray import pipeline
from sdft_ray.cluster import below_ray, last_line
from sdft_ray.core.rows import PLAIN, Given, Message, Row, write_conversation
from sdft_ray.core.selection import Generation
from sdft_ray.engine import EngineFactory, VllmEngine
from sdft_ray.errors import StageFailed, UserError
from sdft_ray.models.generation import sampling_seed
from sdft_ray.progress import Progress
from sdft_ray.results import read_split, training_batches
from sdft_ray.spec import compute
from sdft_ray.spec.wording import validate
from sdft_ray.stages import Work, distill, rows
from sdft_ray.stages.distill import spread
from sdft_ray.stages.distill.draws import instruction_template
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage

SETTINGS = {
    "temperature": 1.0,
    "top_p": 1.0,
    "max_new_tokens": 16,
    "dtype": "float32",
    "seed": 0,
    "template": None,
    "template_options": {"enable_thinking": False},
    "strip_thinking": True,
    "filters": {"leak": True, "refusal": True, "repeated": True, "too_long": 4.0},
    "samples": 1,
    "max_attempts": 3,
    "max_failed_fraction": 0.5,
    "answer": "number",
    "rows": None,
}
PLAN = compute.Compute(distill=compute.Distill(cpus=1, batch_rows=8, piece_rows=2, piece_seconds=0))


def fake_engine(
    log: Path,
    kill_after: int | None = None,
    error_on: str = "never",
    die_on: str = "never",
    raise_on: str = "never",
    right_from: int = 0,
):
    """Return an engine class: answers `<reference number> is it`, logs each row, and can err, raise, die or be wrong.

    It dies once after so many rows, or each time at a prompt with certain words. To a prompt with `What is 1` only its
    samples from `right_from` on are right.
    """

    class FakeEngine:
        def __init__(self, model, settings, options, alone):
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(model)

        def generate(self, requests):
            for request in requests:
                with log.open("a") as lines:
                    lines.write(json.dumps([request.id, request.prompt_ids, request.sampling_seed]) + "\n")
                seen = log.read_text().count("\n")
                if kill_after is not None and seen == kill_after:
                    os.kill(os.getpid(), signal.SIGKILL)
                text = self.tokenizer.decode(request.prompt_ids)
                if die_on in text:
                    os.kill(os.getpid(), signal.SIGKILL)
                if raise_on in text:
                    raise RuntimeError("the engine is broken")
                if error_on in text:
                    yield request, Generation("prompt refused", "error")
                    continue
                answer = text.partition("#### ")[2].split("\n")[0].removesuffix("<|im_end|>")
                if "What is 1" in text and request.sample < right_from:
                    answer = "no number"
                yield request, Generation(f"{answer} is it", "stop", len(request.prompt_ids), 3)

    return FakeEngine


def make_work(
    root: Path,
    model: Path,
    count: int,
    max_failures: int = 10,
    slug: str = "sums",
    engine: EngineFactory = VllmEngine,
    raw: list[Row] | None = None,
    **settings,
) -> Work:
    """Return the distill stage's work on `count` training rows, its inputs being there already; `slug` is what people
    call model and rows; `raw` rows instead of sums are all training rows."""
    splits = rows.Splits([], [], [row._replace(id=row.content_id) for row in raw or ()])
    sums = [Row(f"What is {i} + {i}?", f"It is {2 * i}.\n#### {2 * i}") for i in range(max(40, count + 4))]
    if raw is None:
        splits, _ = rows.split_rows(sums, "number", 0, 2, 2)
    storage = Storage(str(root))
    base = Stage("model", slug, 1, {}, location=model)
    rows_stage = Stage("rows", slug, 1, rows_settings())
    if storage.status(rows_stage) != "done":
        directory = storage.scratch(rows_stage)
        rows.write_splits(directory, splits)
        storage.commit(rows_stage, {}, 0.0)
    wanted = validate(distill.Settings, SETTINGS | {"rows": count} | settings)
    stage = Stage("distill", slug, 1, wanted, {"model": base, "rows": rows_stage})
    plan = PLAN.distill.model_copy(update={"max_failures": max_failures})
    plans = PLAN.model_copy(update={"distill": plan})
    return Work(stage, storage, plans, Progress("distill", "rows"), engine=engine)


def rows_of(work: Work) -> list[Row]:
    batches = training_batches(work.input("rows"), work.settings.rows, Row)
    return list(itertools.chain.from_iterable(batches))


def test_distill_refuses_a_template_without_a_training_sequence_before_it_generates(tmp_path):
    model = make_tiny_model(tmp_path / "model")
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(template.replace("assistant\n", "assistant\n<think>\n"))
    work = make_work(tmp_path / "root", model, 4)
    with pytest.raises(UserError, match=r"^model: its chat template's generation prompt ends in .*<think>"):
        distill.build(work)
    assert not list((tmp_path / "root" / "ledger").glob("*"))


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
HISTORY = [Message("user", "Hello?"), Message("assistant", "Hi.")]


def talk(prompt: str, reference: str, calls: list | None = None) -> Row:
    """Return a row of three turns."""
    given = Given([*HISTORY, Message("user", prompt)])
    return Row(prompt, reference, conversation=write_conversation(given, calls))


def test_distill_refuses_conversations_that_the_template_cannot_write_before_it_generates(tiny_model, tmp_path):
    work = make_work(tmp_path / "root", tiny_model, 2, raw=[talk("3 + 3?", "6"), talk("4 + 4?", "", [CALL])])
    with pytest.raises(UserError, match=r"does not write the call of add of the conversation at '4 \+ 4"):
        distill.build(work)
    assert not list((tmp_path / "root" / "ledger").glob("*"))


def test_distill_rewrites_a_response_in_its_history_and_leaves_calls_and_plain_texts(ray_cluster, tmp_path):
    model, log = make_tiny_model(tmp_path / "model"), tmp_path / "log"
    template = (model / "chat_template.jinja").read_text()
    content = "message['content']"
    calls = "(message['tool_calls'] | tojson if message['tool_calls'] else '')"
    (model / "chat_template.jinja").write_text(template.replace(content, f"{content} + {calls}"))
    plain = Row("", "Once upon a time.", conversation=PLAIN)
    raw = [talk("3 + 3?", "It is\n#### 6"), talk("4 + 4?", "", [CALL]), plain]
    work = make_work(tmp_path / "root", model, 3, engine=fake_engine(log), raw=raw, answer="none")
    summary = distill.build(work)
    assert {reason: count for reason, count in summary.reasons.items() if count} == {
        "kept": 1,
        "tool_call": 1,
        "plain": 1,
    }
    rewritten, call, text = pq.read_table(work.directory / "train.parquet").to_pylist()
    assert (rewritten["response"], rewritten["source"]) == ("6 is it", "distilled")
    assert [turn["role"] for turn in rewritten["messages"]] == ["user", "assistant", "user", "assistant"]
    assert [(row["response"], row["source"]) for row in (call, text)] == [
        ("", "reference"),
        ("Once upon a time.", "reference"),
    ]
    ((_, prompt_ids, _),) = logged(log)
    asked = AutoTokenizer.from_pretrained(model).decode(prompt_ids)
    assert asked.startswith(
        "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\n"
    )
    assert "3 + 3?" in asked and "#### 6" in asked and asked.endswith("<|im_start|>assistant\n")


def logged(log: Path) -> list[list]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def written(work: Work) -> list[dict]:
    return pq.read_table(work.directory / "train.parquet").to_pylist()


def test_distill_every_row_kept_has_the_rewrite(ray_cluster, tiny_model, tmp_path):
    engine = fake_engine(tmp_path / "log")
    work = make_work(tmp_path, tiny_model, 20, engine=engine)
    summary = distill.build(work)
    assert summary.rows == summary.kept == 20
    for row in written(work):
        assert row["response"] == f"{row['answer']} is it"
        assert row["source"] == "distilled"
        assert [turn["content"] for turn in row["messages"]] == [row["prompt"], row["response"]]
    card = DatasetCard.load(work.directory / "README.md")
    assert card.data.license == "unknown" and "| kept | 20 |" in card.text
    for loaded in (
        load_dataset("parquet", data_files=str(work.directory / "train.parquet"), cache_dir=str(tmp_path / "cache")),
        load_dataset(str(work.directory), cache_dir=str(tmp_path / "cache")),
    ):
        assert loaded["train"]["id"] == [row["id"] for row in written(work)]


def test_distill_growing_the_rows_generates_only_the_missing(ray_cluster, tiny_model, tmp_path):
    log = tmp_path / "log"
    engine = fake_engine(log)
    distill.build(make_work(tmp_path, tiny_model, 10, engine=engine))
    first = [row for row, _, _ in logged(log)]
    grown = make_work(tmp_path, tiny_model, 30, engine=engine)
    summary = distill.build(grown)
    assert (summary.generations, summary.asked) == (30, 20)
    everything = [row for row, _, _ in logged(log)]
    assert len(first) == 10
    assert len(everything) == len(set(everything)) == 30
    assert [row["id"] for row in written(grown)][:10] == [
        row.id for row in read_split(grown.input("rows"), "train", Row)[:10]
    ]


def test_distill_a_killed_actor_loses_no_row_and_doubles_none(ray_cluster, tiny_model, tmp_path):
    calm_log, log = tmp_path / "calm.log", tmp_path / "killed.log"
    engine = fake_engine(calm_log)
    calm = make_work(tmp_path / "calm", tiny_model, 20, engine=engine)
    distill.build(calm)
    engine = fake_engine(log, kill_after=6)
    killed = make_work(tmp_path / "killed", tiny_model, 20, engine=engine)
    distill.build(killed)
    # The same rows, prompts, seeds and counts as without the kill.
    assert written(killed) == written(calm)
    assert {json.dumps(line) for line in logged(log)} == {json.dumps(line) for line in logged(calm_log)}
    # 5 rows were finished, 4 of them in durable pieces of 2: only the fifth and the killed one come again.
    again = Counter(row for row, _, _ in logged(log))
    assert sum(count - 1 for count in again.values()) == 2
    (ledger,) = (killed.storage.root / "ledger").iterdir()
    pieces = [row["id"] for path in ledger.glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    assert len(pieces) == len(set(pieces)) == 20


def test_distill_rows_that_error_keep_their_reference_and_are_tried_again(ray_cluster, tiny_model, tmp_path):
    engine = fake_engine(tmp_path / "log", error_on="What is 1")
    work = make_work(tmp_path, tiny_model, 36, engine=engine)
    summary = distill.build(work)
    failed = [row for row in written(work) if row["prompt"].startswith("What is 1")]
    assert summary.reasons["error"] == len(failed) > 0
    assert summary.rows == 36 == summary.kept + len(failed)
    assert all(row["response"] == row["reference"] for row in failed)
    work = dataclasses.replace(work, engine=fake_engine(tmp_path / "log2"))
    assert distill.build(work).kept == 36
    assert len(logged(tmp_path / "log2")) == len(failed)


def test_distill_a_batch_of_nothing_but_errors_is_tried_again(ray_cluster, tiny_model, tmp_path):
    engine = fake_engine(tmp_path / "log", error_on="What is")
    work = make_work(tmp_path, tiny_model, 8, max_failed_fraction=1.0, engine=engine)
    assert distill.build(work).reasons["error"] == 8
    work = dataclasses.replace(work, engine=fake_engine(tmp_path / "log2"))
    assert distill.build(work).kept == 8


def test_distill_more_samples_are_drawn_only_where_none_before_passed(ray_cluster, tiny_model, tmp_path):
    log = tmp_path / "log"
    engine = fake_engine(log, right_from=2)
    one = make_work(tmp_path, tiny_model, 36, engine=engine)
    summary = distill.build(one)
    wrong = {row["id"] for row in written(one) if row["source"] == "reference"}
    assert len(wrong) == summary.reasons["no_answer"] == 36 - summary.kept > 0
    three = make_work(tmp_path, tiny_model, 36, samples=4, engine=engine)
    assert distill.build(three).kept == 36
    assert {row["id"]: row["sample"] for row in written(three)} == {
        row["id"]: 2 if row["id"] in wrong else 0 for row in written(one)
    }
    again = [(row, seed) for row, _, seed in logged(log)][36:]
    assert sorted(again) == sorted((row, sampling_seed(row, 0, sample)) for row in wrong for sample in (1, 2))
    # Fewer samples again: the ledger has them all.
    assert distill.build(make_work(tmp_path, tiny_model, 36, samples=2, engine=engine)).kept == summary.kept
    assert len(logged(log)) == 36 + 2 * len(wrong)


def test_distill_a_row_that_errors_is_tried_a_bounded_number_of_times(ray_cluster, tiny_model, tmp_path):
    log = tmp_path / "log"
    engine = fake_engine(log, error_on="What is 11")
    work = make_work(tmp_path, tiny_model, 36, engine=engine)
    assert distill.build(work).reasons["error"] == 1
    assert len(logged(log)) == 35 + 3, "three attempts in one run"
    distill.build(work)
    assert len(logged(log)) == 35 + 4, "a later run tries once: the cause may have been fixed"


def test_distill_a_row_that_kills_its_engine_is_found_and_set_aside(ray_cluster, tiny_model, tmp_path):
    engine = fake_engine(tmp_path / "log", die_on="What is 11")
    work = make_work(tmp_path, tiny_model, 36, engine=engine)
    summary = distill.build(work)
    (failed,) = (row for row in written(work) if row["source"] == "reference")
    assert failed["prompt"] == "What is 11 + 11?" and failed["reason"] == "error"
    assert summary.rows == 36 == summary.kept + 1


def test_distill_an_engine_that_refuses_to_start_ends_the_stage_with_its_own_line(ray_cluster, tiny_model, tmp_path):
    """And not with a dead actor's trace: Ray gives no more of one that raises in its constructor."""

    def refuse(*_):
        raise UserError("model: is in int8. Take a GPU.")

    with pytest.raises(UserError) as error:
        distill.build(make_work(tmp_path, tiny_model, 4, engine=refuse))
    assert str(below_ray(error.value)) == "model: is in int8. Take a GPU."


@pytest.mark.parametrize("started", [True, False])
def test_distill_a_dead_actor_names_its_rows_but_one_whose_engine_did_not_start_its_error(
    tmp_path, monkeypatch, started
):
    def die(**_):
        raise RayActorError("1", "The actor died:\nTraceback\nMemoryError: no GPU is free", not started)

    monkeypatch.setattr(distill, "_rewritten", lambda *_: types.SimpleNamespace(iter_batches=die))
    work = make_work(tmp_path, tmp_path, 4)
    with pytest.raises(StageFailed if started else RayActorError) as error:
        distill._generate(work, None, work.storage.ledger("sums-0123456789ab"))
    assert ("What was generated is kept in" in str(error.value)) == started
    if not started:
        assert last_line(error.value) == "RayActorError: MemoryError: no GPU is free"


def test_distill_an_engine_that_always_breaks_ends_the_stage_and_keeps_the_rest(ray_cluster, tiny_model, tmp_path):
    engine = fake_engine(tmp_path / "log", raise_on="What is 11")
    work = make_work(tmp_path, tiny_model, 36, max_failures=1, engine=engine)
    rows = [row.prompt for row in rows_of(work)]
    with pytest.raises(StageFailed) as failure:
        distill.build(work)
    start, stop = map(int, re.search(r"on rows (\d+) to (\d+) of the training rows", str(failure.value)).groups())
    assert start <= rows.index("What is 11 + 11?") <= stop
    assert "the engine is broken" in str(failure.value)
    work = dataclasses.replace(work, engine=fake_engine(tmp_path / "log2"))
    assert distill.build(work).kept == 36
    assert 0 < len(logged(tmp_path / "log2")) < 36


def test_distill_over_its_gate_stops_in_one_line_keeps_the_rows_and_asks_for_failed_ones_again(
    ray_cluster, tiny_model, tmp_path
):
    engine = fake_engine(tmp_path / "log", error_on="What is 1")
    work = make_work(tmp_path, tiny_model, 36, max_failed_fraction=0.01, engine=engine)
    with pytest.raises(StageFailed) as failure:
        distill.build(work)
    failed = sum(row["reason"] == "error" for row in written(work))
    assert str(failure.value) == (
        f"distill.max_failed_fraction: {failed} of 36 rows failed in the engine, mostly with: prompt refused "
        f"(got {failed / 36:.2%}; expected at most 1.00%). Raise it; what was generated is kept."
    )
    work = dataclasses.replace(work, engine=fake_engine(tmp_path / "log2"))
    assert distill.build(work).kept == 36
    assert len(logged(tmp_path / "log2")) == failed


def test_distill_over_its_gate_is_finished_at_once_by_a_looser_one_and_stopped_by_a_stricter_one_later(
    ray_cluster, tiny_model, tmp_path
):
    engine = fake_engine(tmp_path / "log", error_on="What is 1")
    strict = make_work(tmp_path, tiny_model, 36, max_failed_fraction=0.01)
    plan = compute.load_compute().model_copy(update={"distill": PLAN.distill})
    with pytest.raises(StageFailed) as failure:
        pipeline.build([strict.stage], plan, strict.storage, engine=engine)
    asked = len(logged(tmp_path / "log"))
    loose = make_work(tmp_path, tiny_model, 36, max_failed_fraction=0.9)
    assert loose.stage.id == strict.stage.id
    pipeline.build([loose.stage], plan, loose.storage, engine=engine)
    assert len(logged(tmp_path / "log")) == asked, "no engine was needed"
    summary = distill.Summary.of(loose.stage, loose.storage)
    assert summary.reasons["error"] > 0 and summary.asked == 0
    with pytest.raises(StageFailed) as again:
        pipeline.build([strict.stage], plan, strict.storage, engine=engine)
    assert str(again.value) == str(failure.value)


def test_distill_in_many_ranges_makes_what_it_makes_in_one(ray_cluster, tiny_model, tmp_path, monkeypatch):
    def build(root: Path) -> tuple[Work, distill.Summary]:
        engine = fake_engine(tmp_path / "log", error_on="What is 11", right_from=2)
        work = make_work(root, tiny_model, 20, samples=2, engine=engine)
        distill.build(work)
        grown = make_work(root, tiny_model, 36, samples=3, engine=engine)
        return grown, distill.build(grown)

    here, summary = build(tmp_path / "one")
    monkeypatch.setattr(spread, "RANGE_ROWS", 7)
    there, in_ranges = build(tmp_path / "many")
    assert in_ranges == summary and summary.reasons["error"] == 1 and summary.kept == 35
    assert pq.read_table(there.directory / "train.parquet").equals(pq.read_table(here.directory / "train.parquet"))
    assert (there.directory / "README.md").read_text() == (here.directory / "README.md").read_text()
    asked = Counter(json.dumps(line) for line in logged(tmp_path / "log"))
    assert len(asked) > 36 and all(times % 2 == 0 for times in asked.values()), "both asked for the same"


def test_distill_finds_its_ledger_after_the_model_and_the_rows_got_other_names(ray_cluster, tiny_model, tmp_path):
    engine = fake_engine(tmp_path / "log")
    first = distill.build(make_work(tmp_path, tiny_model, 10, engine=engine))
    renamed = make_work(tmp_path, tiny_model, 20, slug="renamed", engine=engine)
    second = distill.build(renamed)
    assert second.ledger == first.ledger and second.kept == 20
    assert len(logged(tmp_path / "log")) == 20, "only the ten new rows were asked for"


def test_distill_asks_another_teacher_in_its_own_template_and_names_it(ray_cluster, tiny_model, tmp_path):
    other, log = make_tiny_model(tmp_path / "other"), tmp_path / "log"
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text("{{ 'Speak. ' }}" + template)
    work = make_work(tmp_path, tiny_model, 6, engine=fake_engine(log), seeds="engine")
    teacher = Stage("model", "big-teacher", 1, {"other": True}, location=other)
    work = dataclasses.replace(
        work, stage=dataclasses.replace(work.stage, inputs=work.stage.inputs | {"teacher": teacher})
    )
    summary = distill.build(work)
    assert (summary.kept, summary.teacher) == (6, "big-teacher") and summary.ledger.startswith("big-teacher-")
    tokenizer = AutoTokenizer.from_pretrained(other)
    assert all(tokenizer.decode(ids).startswith("Speak. <|im_start|>user\n") for _, ids, _ in logged(log))
    assert {seed for _, _, seed in logged(log)} == {row["sampling_seed"] for row in written(work)} == {None}
    card = DatasetCard.load(work.directory / "README.md")
    assert card.data.tags == ["data-distillation"] and "has its own seed" not in card.text
    assert "rewritten by big-teacher" in card.text and "this is no self-distillation" in card.text
    assert distill.Summary.model_validate(summary.plain()) == summary


def test_ledger_moves_with_sampling_but_not_with_rows_names_or_checks(tmp_path, tiny_model):
    def name_of(work):
        return distill.ledger_id(work.stage, instruction_template(work.settings))

    name = name_of(make_work(tmp_path, tiny_model, 10))
    assert name_of(make_work(tmp_path, tiny_model, 20)) == name
    assert name_of(make_work(tmp_path, tiny_model, 20, slug="renamed")) == name
    assert name_of(make_work(tmp_path, tiny_model, 10, max_failed_fraction=0.2)) == name
    for change in ({"temperature": 0.5}, {"seed": 1}, {"dtype": "bfloat16"}, {"template": "{prompt}{reference}"}):
        assert name_of(make_work(tmp_path, tiny_model, 10, **change)) != name


def test_sampling_seed_depends_on_row_and_recipe_seed_only():
    assert sampling_seed("a", 0) == sampling_seed("a", 0)
    assert len({sampling_seed(row, seed, n) for row in "abc" for seed in (0, 1) for n in (0, 1, 2)}) == 18
    assert sampling_seed("a", 0) == 2649998842, "ledgers hold what was drawn with it"

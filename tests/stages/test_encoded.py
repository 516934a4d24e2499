"""Encoded rows: by number they are what was encoded, whatever shards, processes and inputs they came through."""

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from events import read_events
from tiny import make_tiny_model, make_tokenizer
from transformers import AutoModelForCausalLM

from sdft_ray import pipeline
from sdft_ray.cluster import below_ray
from sdft_ray.core.rows import PLAIN, Exchange, Given, Message, Row, TrainingRow, write_conversation
from sdft_ray.data.chat import encode_rows
from sdft_ray.errors import UserError
from sdft_ray.progress import Progress
from sdft_ray.results import count_rows, read_history, read_range
from sdft_ray.spec import compute
from sdft_ray.spec.training import Train
from sdft_ray.spec.wording import validate
from sdft_ray.stages import Work, rows, train
from sdft_ray.stages.nll import summed_loss
from sdft_ray.stages.train.encoded import EncodedRow, EncodedRows, write_shard
from sdft_ray.stages.train.prepare import Job, encode_split, find_ids, plan_parts
from sdft_ray.stages.train.rows import Counts, add, require_some
from sdft_ray.store.identity import Stage, numbered
from sdft_ray.store.storage import Storage

SHORT, LONG = "4", "four " * 20  # of 45 and about 150 tokens with their prompts
FATES = ("leave_out", "truncate")


def make_rows(source: int, lengths: str) -> list[Row]:
    """Return a row for each letter: short (s) or long (l); every third one is of another origin."""
    return [
        Row(f"{source}: {i}?", LONG if kind == "l" else SHORT, None, f"{source}-{i}", None, i % 3 // 2)
        for i, kind in enumerate(lengths)
    ]


# The second shard of five rows holds nothing that is left.
INPUTS = [make_rows(0, "sslsslllllllls"), make_rows(1, "sls"), make_rows(2, "ssssssss")]


def make_work(root: Path | str, model: Path, inputs: list[list[Row]] = INPUTS, **settings) -> Work:
    """Return the work of training on several inputs, each with two of its rows for validation."""
    storage = Storage(str(root))
    stages = {"model": Stage("cut", "tiny", 1, {}, location=model)}
    for i, raw in enumerate(inputs):
        stage = stages[numbered("rows", i)] = Stage("rows", f"sums{i}", 1, {"i": i})
        rows.write_splits(storage.scratch(stage), rows.Splits([], raw[-2:], raw))
        storage.commit(stage, {}, 0.0)
    usual = {"max_tokens": 70, "max_too_long_fraction": 1.0, "global_batch_size": 8, "validate_every_steps": 1}
    chosen = train.Settings(arm="sft", train=validate(Train, usual | settings))
    plan = validate(compute.Train, {"workers": 1, "cpus": 1})
    whole = compute.load_compute().model_copy(update={"train": plan})
    return Work(Stage("train", "tiny", 1, chosen, stages), storage, whole, Progress("train"))


def encode_by_hand(raw: list[Row], limit: int, fate: str) -> list[tuple[int, TrainingRow]]:
    """Return the rows that are left, with their numbers."""
    left = []
    for number, row in enumerate(encode_rows(make_tokenizer(), [row.exchange for row in raw])):
        if len(row.ids) <= limit:
            left.append((number, row))
        elif fate == "truncate" and row.trained_from < limit:
            left.append((number, TrainingRow(row.ids[:limit], row.trained_from)))
    return left


@pytest.mark.parametrize("fate", FATES)
def test_encoded_rows_of_several_shards_and_inputs_are_the_rows_encoded_directly(tiny_model, tmp_path, fate):
    work = make_work(tmp_path, tiny_model, too_long=fate)
    job = Job(work.storage, work.stage, work.settings.train, "train", Row)
    raw = [row for own in INPUTS for row in own]
    expected = encode_by_hand(raw, 70, fate)
    parts = plan_parts({numbered("rows", i): len(own) for i, own in enumerate(INPUTS)}, 5)
    tally = job.encode(make_tokenizer(), work.input(parts[-1].key), parts[-1])
    for part in parts[-2::-1]:  # in whatever order they end
        tally = add(job.encode(make_tokenizer(), work.input(part.key), part), tally)
    encoded = EncodedRows(work.resumable / "encoded", "train")
    assert [(encoded.number_of(i), encoded[i]) for i in range(len(encoded))] == expected
    assert tally.rows == len(encoded) == len(expected)
    assert (tally.rows_too_long, tally.rows_left_out) == (10, 25 - len(expected))
    assert tally.tokens == sum(len(row.ids) for _, row in expected)
    assert tally.trained_tokens == sum(len(row.ids) - row.trained_from for _, row in expected)
    assert tally.largest_id == max(max(row.ids) for _, row in expected)
    assert tally.first_rows == dict(expected[:2])
    origins = [raw[number].origin for number, _ in expected]
    assert tally.rows_by_source == {0: origins.count(0), 1: origins.count(1)}
    assert find_ids(work, range(len(expected))) == [raw[number].id for number, _ in expected]
    assert [encoded.source_of(i) for i in range(len(encoded))] == origins and encoded.sources() == {0, 1}


def test_encode_split_takes_the_first_rows_of_each_input_in_one_process(tiny_model, tmp_path):
    work = make_work(tmp_path, tiny_model, rows=3)
    tally = encode_split(work, make_tokenizer(), "train")
    taken = [row for own in INPUTS for row in own[:3]]
    encoded = EncodedRows(work.resumable / "encoded", "train")
    assert list(encoded) == [row for _, row in encode_by_hand(taken, 70, "leave_out")]
    assert (tally.rows, tally.rows_left_out) == (7, 2)
    with pytest.raises(UserError, match=r"train.rows: 4 is more than the 3 training rows"):
        encode_split(make_work(tmp_path / "more", tiny_model, rows=4), make_tokenizer(), "train")


def test_plain_texts_of_one_token_are_left_out_and_not_counted_as_too_long(tiny_model, tmp_path):
    plain = [Row("", text, None, f"plain-{text}", PLAIN) for text in ("4", "4 and 4", "4" * 99)]
    work = make_work(tmp_path, tiny_model, [[*plain, *make_rows(0, "s")]])
    tally = encode_split(work, make_tokenizer(), "train")
    encoded = EncodedRows(work.resumable / "encoded", "train")
    assert [encoded.number_of(i) for i in range(len(encoded))] == [1, 3]
    assert all(row.trained_from < len(row.ids) for row in encoded)
    assert (tally.rows, tally.rows_left_out, tally.rows_too_long) == (2, 2, 1)
    with pytest.raises(UserError, match=r"^rows: all 5 are plain texts of one token"):
        require_some(Counts(rows=0, rows_too_long=0, rows_left_out=5), work.settings.train)


def test_encoded_rows_are_mapped_and_read_only(tmp_path):
    write_shard(tmp_path, "train", 0, [EncodedRow(TrainingRow([5, 6, 7], 1), 0, 0, 3)])
    encoded = EncodedRows(tmp_path, "train")
    assert encoded[0] == TrainingRow([5, 6, 7], 1)
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert sorted(Path(line.split()[-1]).name for line in maps) == ["train-00000.ids.npy", "train-00000.index.npy"]
    assert all(line.split()[1].startswith("r--") for line in maps)


def test_encoded_rows_without_a_shard_or_a_row_are_empty(tmp_path):
    assert list(EncodedRows(tmp_path, "train")) == []
    write_shard(tmp_path, "train", 0, [])
    encoded = EncodedRows(tmp_path, "train")
    assert (list(encoded), encoded.largest_id(), encoded[:2]) == ([], -1, [])
    with pytest.raises(IndexError):
        encoded[0]


def test_write_shard_that_fails_leaves_no_file(tmp_path):
    def fail():
        yield EncodedRow(TrainingRow([5, 6], 1), 0, 0, 2)
        raise UserError("some row")

    with pytest.raises(UserError):
        write_shard(tmp_path, "train", 0, fail())
    assert list(tmp_path.iterdir()) == []


def test_read_range_is_that_slice_whatever_the_row_groups(tmp_path):
    table = pa.table({"id": [str(i) for i in range(10)], "prompt": ["?"] * 10, "reference": ["!"] * 10})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=3)
    assert count_rows(tmp_path, "train") == 10
    for start in range(11):
        for stop in range(start, 11):
            found = [row.id for batch in read_range(tmp_path, "train", start, stop, Row) for row in batch]
            assert found == [str(i) for i in range(start, stop)]


REFUSING = "{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif -%}"
SYSTEM = [Message("system", "Be brief."), Message("user", "3?")]


@pytest.fixture(scope="module")
def refusing_model(tmp_path_factory) -> Path:
    """A model whose template writes no system messages."""
    model = make_tiny_model(tmp_path_factory.mktemp("refusing") / "model")
    template = model / "chat_template.jinja"
    template.write_text(REFUSING + template.read_text())
    return model


def with_system() -> list[Row]:
    """Return rows of which the third has a system message."""
    raw = make_rows(0, "s" * 12)
    raw[2] = raw[2]._replace(prompt="3?", conversation=write_conversation(Given(SYSTEM)))
    assert Exchange(*raw[2].exchange).given.messages == SYSTEM
    return raw


def test_train_a_conversation_that_the_template_cannot_write_is_one_line(refusing_model, tmp_path):
    work = make_work(tmp_path, refusing_model, [with_system()])
    with pytest.raises(UserError, match=r"^model: its chat template cannot write the conversation at '3\?' \(System"):
        train.build(work)


def test_encoded_rows_in_an_object_store_are_brought_by_other_nodes(s3, tiny_model, tmp_path, monkeypatch):
    work = make_work(s3, tiny_model)
    encode_split(work, make_tokenizer(), "train")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    other = dataclasses.replace(work, storage=Storage(s3))
    assert find_ids(other, [0, 5]) == ["0-0", "1-0"]
    folder = other.resumable / "encoded"
    assert not list(folder.glob("*.ids.npy")), "numbers are looked up without the token ids"
    other.storage.bring(other.resumable, "encoded/*")
    assert list(EncodedRows(folder, "train")) == list(EncodedRows(work.resumable / "encoded", "train"))


def test_encode_split_by_tasks_gives_what_one_process_gives(ray_cluster, tiny_model, refusing_model, tmp_path):
    here, apart = (make_work(tmp_path / name, tiny_model) for name in ("here", "apart"))
    expected = encode_split(here, make_tokenizer(), "train")
    assert encode_split(apart, make_tokenizer(), "train", shard_rows=5) == expected
    one, many = (EncodedRows(work.resumable / "encoded", "train") for work in (here, apart))
    assert (list(one), one.column("number").tolist()) == (list(many), many.column("number").tolist())
    assert [len(list((work.resumable / "encoded").glob("train-*.ids.npy"))) for work in (here, apart)] == [3, 6]
    with pytest.raises(Exception, match="System role not supported") as error:
        encode_split(make_work(tmp_path / "bad", refusing_model, [with_system()]), None, "train", shard_rows=5)
    cause = below_ray(error.value)
    assert isinstance(cause, UserError) and str(cause).startswith(
        "model: its chat template cannot write the conversation"
    )
    assert "\n" not in str(cause)


def test_train_rows_of_two_sources_are_counted_and_measured_apart(ray_cluster, tiny_model, tmp_path):
    raw = make_rows(0, "s" * 12)
    work = make_work(tmp_path, tiny_model, [raw], lr=1e-3, global_batch_size=16)
    pipeline.build([work.stage], work.compute, work.storage)
    summary = train.Summary.of(work.stage, work.storage)
    assert summary.rows_by_source == {0: 8, 1: 4}
    (last,) = read_history(work.storage.fetch(work.stage))
    model, untrained = AutoModelForCausalLM.from_pretrained(tiny_model), {}
    for source in (0, 1):
        own = list(encode_rows(make_tokenizer(), [row.exchange for row in raw if row.origin == source]))
        untrained[source] = summed_loss(model, own) / sum(len(row.ids) - row.trained_from for row in own)
    assert summary.final_loss_by_source == last.loss_by_source == pytest.approx(untrained, rel=1e-5)
    assert last.validation_loss_by_source and set(last.validation_loss_by_source) == {0, 1}
    assert summary.validation_loss_by_source == last.validation_loss_by_source
    # The two validation rows have equally many trained tokens.
    assert sum(last.validation_loss_by_source.values()) / 2 == pytest.approx(last.validation_loss, rel=1e-6)
    folder = work.storage.fetch(work.stage) / "tensorboard"
    shown = {event.step: value for event, value in read_events(folder, "train/validation_loss_of_source_1")}
    assert shown[last.step] == pytest.approx(last.validation_loss_by_source[1], rel=1e-6)

"""Rows meet their lines: what ranges are dealt is what a plain dictionary has, and what is made of it is the same."""

import hashlib
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import make_tokenizer

from sdft_ray.core.prompts import rewrite_instruction
from sdft_ray.core.rows import Row
from sdft_ray.data.chat import render_prompt
from sdft_ray.results import training_batches
from sdft_ray.stages.distill import dealing, requests, spread
from sdft_ray.stages.distill.draws import Settings, instruction_template
from sdft_ray.stages.distill.instructions import prompts_of
from sdft_ray.store import ledger as ledgers
from sdft_ray.store.identity import Stage
from sdft_ray.store.ledger import Line
from sdft_ray.store.storage import Storage

SETTINGS = Settings(answer="none", rows=None, samples=3)


def row_id(number: int) -> str:
    return hashlib.sha256(f"{number}".encode()).hexdigest()[:16]


def make_rows(count: int) -> list[Row]:
    return [Row(f"What is {i}?", f"It is {i}.", None, row_id(i)) for i in range(count)]


def make_lines(rows: int, chance: random.Random) -> list[Line]:
    """Return lines of several samples, some of them errors, some twice, and some of rows that nobody asks for."""
    lines = []
    for i in range(-rows // 2, rows):
        for sample in range(chance.choice((0, 0, 1, 2))):
            for _ in range(chance.choice((1, 1, 1, 3))):
                reason = chance.choice(("stop", "length", "error"))
                text = chance.choice((f"So {i}.", "", "As an AI language model, no."))
                lines.append(Line(row_id(i), sample, text, reason, 5, 3, chance.randrange(2**32)))
    chance.shuffle(lines)
    return lines


@pytest.fixture
def join(tmp_path, monkeypatch):
    """Return what joins rows with lines in ranges of 7 rows: the folder, their ranges, and what was dealt to them."""
    monkeypatch.setattr(spread, "RANGE_ROWS", 7)
    for module in (dealing, requests):
        monkeypatch.setattr(module, "spread", lambda function, items, here: map(function, items))

    def join(rows: list[Row], lines: list[Line]):
        storage = Storage(str(tmp_path))
        folder = spread.Folder(storage, Stage("distill", "sums", 1, {}), "made")
        ledger = storage.ledger("ledger-0")
        for batch, start in enumerate(range(0, len(lines), 11)):
            ledgers.write_piece(ledger, f"batch{batch}", lines[start : start + 11])
        ranges = spread.ranges_of(len(rows))
        return folder, ranges, dealing.deal(folder, ledger, ranges, lambda: [rows[:9], rows[9:]])

    return join


@pytest.mark.parametrize("seed", range(6))
def test_deal_gives_each_range_the_lines_of_its_rows(join, seed):
    chance = random.Random(seed)
    rows = make_rows(chance.choice((1, 7, 40)))
    rows += chance.sample(rows, len(rows) // 3)  # a row that is there twice, in one range or in two
    lines = make_lines(len(rows), chance)
    _, ranges, dealt = join(rows, lines)
    assert [row for some in ranges for row in range(some.start, some.stop)] == list(range(len(rows)))
    for some in ranges:
        ids = [row.id for row in rows[some.start : some.stop]]
        oracle = {row_id: sorted(line for line in lines if line.id == row_id) for row_id in ids}
        assert {row_id: sorted(found) for row_id, found in dealt.lines_of(some.number, ids).items()} == oracle


def test_deal_writes_next_to_nothing_for_ranges_without_lines(join):
    lines = [Line(row_id(0), sample, "It is 0.", "stop", 5, 3, sample) for sample in range(3000)]
    folder, ranges, _ = join(make_rows(700), [])
    ledgers.write_piece(ledger := folder.storage.ledger("ledger-1"), "batch", lines)
    dealt = dealing.deal(folder, ledger, ranges, lambda: [make_rows(700)])
    assert len(ranges) == 100 and len(dealt.lines_of(0, [row_id(0)])[row_id(0)]) == 3000
    assert (folder.path / dealt.files[0]).stat().st_size < 300_000, "the offsets alone of 3,000 texts are 12,000 bytes"


def test_deal_keeps_the_order_in_which_the_ledger_has_the_lines_of_a_row(join):
    rows = make_rows(20)
    lines = [Line(row.id, 0, f"text {i}", "error", 5, 3, 1) for row in rows for i in range(4)]
    _, _, dealt = join(rows, lines)
    with_pieces = {row.id: [] for row in rows}
    for part in ledgers.parts_of(dealt.folder.storage.ledger("ledger-0"), 1):
        for line in ledgers.to_lines(ledgers.read_part(dealt.folder.storage.ledger("ledger-0"), part)):
            with_pieces[line.id].append(line)
    assert dealt.lines_of(1, (row.id for row in rows[7:14])) == {row.id: with_pieces[row.id] for row in rows[7:14]}


@pytest.mark.parametrize("seed", range(3))
def test_requests_are_the_rows_without_a_passing_sample_and_are_read_by_their_places(join, tmp_path, seed):
    chance = random.Random(seed)
    rows = make_rows(40)
    lines = make_lines(len(rows), chance)
    folder, ranges, dealt = join(rows, lines)
    pq.write_table(pa.Table.from_pylist([row._asdict() for row in rows]), tmp_path / "train.parquet", row_group_size=9)
    written = requests.write_requests(folder, lambda: tmp_path, ranges, dealt, SETTINGS, instruction_template(SETTINGS))
    oracle = []
    for position, row in enumerate(rows):
        for sample in range(3):
            mine = [line for line in lines if (line.id, line.sample) == (row.id, sample)]
            complete = [line for line in mine if line.finish_reason != "error"]
            if not complete:
                oracle.append((row, position, sample, len(mine)))
                break
            first = dealt.lines_of(position // 7, [each.id for each in rows[position // 7 * 7 :][:7]])[row.id]
            first = next(line for line in first if line.sample == sample and line.finish_reason != "error")
            if first.finish_reason == "stop" and first.text.startswith("So"):
                break
    assert sum(written.counts) == len(oracle) > 5
    assert written.read(0, len(oracle)) == oracle
    for start in range(len(oracle) - 3):
        assert written.read(start, start + 3) == oracle[start : start + 3]


@pytest.mark.parametrize(("start", "stop"), [(0, 40), (0, 5), (8, 9), (9, 18), (17, 40), (39, 40), (40, 40)])
def test_training_batches_reads_any_range(tmp_path, start, stop):
    rows = make_rows(40)
    pq.write_table(pa.Table.from_pylist([row._asdict() for row in rows]), tmp_path / "train.parquet", row_group_size=9)
    assert [row for batch in training_batches(tmp_path, stop, Row, start) for row in batch] == rows[start:stop]


def test_prompts_of_many_rows_are_those_of_each_alone():
    tokenizer = make_tokenizer()
    rows = [
        *make_rows(5),
        Row("Say <|im_end|> twice.", "<|im_end|>", None, "x"),
        Row("{reference}", "{prompt}", None, "y"),
    ]
    settings = Settings(answer="none", rows=None, template="Q: {prompt} A: {reference}")
    alone = [
        render_prompt(tokenizer, rewrite_instruction(row.prompt, row.reference, "Q: {prompt} A: {reference}"))
        for row in rows
    ]
    assert prompts_of(tokenizer, rows, settings) == alone
    assert prompts_of(tokenizer, [], settings) == []

"""Rows through sorted runs: what comes out is what the plain way in memory gives, however small the parts are."""

import dataclasses
import errno
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from row_files import find_overlaps, save

from sdft_ray.core.rows import Row
from sdft_ray.data import benchmarks, parts, readers
from sdft_ray.errors import UserError
from sdft_ray.progress import Progress
from sdft_ray.results import SPLITS, read_split
from sdft_ray.spec.compute import load_compute
from sdft_ray.spec.sources import FileRows, RowSource
from sdft_ray.spec.wording import validate
from sdft_ray.stages import Work, rows
from sdft_ray.stages.rows import Sizes, Splits, split_rows
from sdft_ray.store.storage import Storage

TINY = Sizes(part=200, run=700, range=1000)  # a few rows each
FIELDS = {"prompt": "q", "response": "a"}
ITEM = "Which of these gases do green plants take in from the air around them?"


def make_source(path: Path | str, **settings) -> FileRows:
    return validate(FileRows, {"path": str(path), "fields": FIELDS, "held_out": 3, "validation": 2, **settings})


def work_on(source: RowSource, root: Path) -> Work[rows.Settings]:
    return Work(rows.stage(source, "offline"), Storage(str(root)), load_compute(), Progress("rows"))


def build(source: RowSource, root: Path, sizes: Sizes = TINY) -> tuple[rows.Summary, Splits, list[dict]]:
    """Return what the stage makes: its summary, its splits, and what was decontaminated."""
    work = work_on(source, root)
    summary = rows.build(work, sizes)
    assert not [*work.resumable.iterdir()], "runs are left"
    listed = pq.read_table(work.directory / "decontaminated.parquet").to_pylist()
    return summary, Splits(*(read_split(work.directory, name, Row) for name in SPLITS)), listed


def plainly(source: RowSource) -> tuple[rows.Summary, Splits, list[dict]]:
    """Return the same, computed in memory."""
    raw = readers.read_rows(source)
    texts = {task: benchmarks.read_task_texts(task, None) for task in source.decontaminate}
    overlaps = find_overlaps({row.content_id: row.texts for row in raw}, texts, source.ngram)
    held = {overlap.row for overlap in overlaps}
    clean = [row for row in raw if row.content_id not in held]
    lost = len(raw) - len(clean)
    splits, left_out = split_rows(clean, source.answer, source.seed, source.held_out, source.validation, lost)
    by_task = Counter(overlap.task for overlap in overlaps)
    summary = rows.Summary(
        rows=rows.Counts(**{name: len(some) for name, some in splits._asdict().items()}),
        read=len(raw),
        **left_out._asdict(),
        decontaminated=lost,
        decontaminated_by_task={task: by_task[task] for task in texts},
    )
    return summary, splits, [dataclasses.asdict(overlap) for overlap in overlaps]


def outcome(make, *arguments):
    """Return what a call gives, or the lines of its UserError."""
    try:
        return make(*arguments)
    except UserError as error:
        return error.problems


RECORDS = st.fixed_dictionaries(
    {
        "q": st.sampled_from(["", " ", ITEM, f"So: {ITEM} Oxygen, or is it carbon dioxide after all?"])
        | st.integers(0, 12).map(lambda n: f"{n}  + {n}?" if n % 3 else f" {n} + {n}? ")
        | st.text("xyé\u2028", max_size=4),
        "a": st.sampled_from(["", "no number", "4", "#### 12", "so (B)."]) | st.integers(0, 99).map("#### {}".format),
    }
)
NAMES = st.sampled_from(["a.jsonl", "b.jsonl", "b.jsonl.gz", "c.json", "d.csv", "e.parquet", "f.jsonl.zst", "g.arrow"])


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    files=st.dictionaries(NAMES, st.lists(RECORDS, min_size=1, max_size=30), min_size=1, max_size=4),
    sizes=st.builds(
        Sizes, large=st.just(1 << 40), part=st.integers(1, 600), run=st.integers(1, 3000), range=st.integers(1, 3000)
    ),
    seed=st.integers(0, 2),
    answer=st.sampled_from(["number", "choice", "none"]),
    limit=st.none() | st.integers(1, 40),
    tasks=st.sampled_from([(), ("sciq",), ("piqa", "sciq")]),
)
def test_rows_are_what_memory_gives(files, sizes, seed, answer, limit, tasks):
    items = {"sciq": [ITEM], "piqa": [f"{ITEM} Oxygen, or is it carbon dioxide after all?"]}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", folder)
        for module in (benchmarks, rows):
            patch.setattr(module, "read_task_texts", lambda task, file: items[task])
        for name, records in files.items():
            save(records, Path(folder, "data", name))
        source = make_source(Path(folder, "data"), seed=seed, answer=answer, limit=limit, decontaminate=tasks)
        assert outcome(build, source, Path(folder, "root"), sizes) == outcome(plainly, source)


def test_rows_of_a_table_cut_by_row_groups_are_those_of_the_whole(tmp_path):
    table = pa.Table.from_pylist([{"q": f"{i} + {i}?", "a": f"#### {2 * i}"} for i in range(50)])
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=7)
    source = make_source(tmp_path / "rows.parquet")
    assert len(parts.find_parts(source, 100)) > 3
    assert build(source, tmp_path / "root") == plainly(source)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("size", [1, 7, 40, 64, 10_000])
def test_parts_of_lines_hold_every_line_once_and_name_its_number(tmp_path, size, end):
    """Also where lines are empty, longer than a part, or the last one has no end."""
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"q": f"{i}?" + "x" * (i % 5 * 30), "a": "b"}) for i in range(20)]
    lines[3:3], lines[9:9] = [""], [" ", ""]
    path.write_bytes(end.join(lines).encode())
    source = make_source(path)
    pieces = parts.find_parts(source, size)
    assert [row for part in pieces for row in parts.read_part(part, source)] == readers.read_rows(source)
    for wrong in (0, 7, len(lines) - 1):
        path.write_bytes(end.join([*lines[:wrong], "{" + "y" * 50, *lines[wrong + 1 :]]).encode())
        with pytest.raises(UserError) as expected:
            readers.read_rows(source)
        assert outcome(build, source, tmp_path / "root", Sizes(part=size)) == expected.value.problems
        assert f"{path}:{wrong + 1}:" in str(expected.value)


def test_rows_with_two_mistakes_name_the_first(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        records = [json.dumps({"q": f"{name} {i}?", "a": f"#### {i}"}) for i in range(40)]
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_text("\n".join([*records[:30], '{"q": 7, "a": "b"}', *records[30:]]))
    with pytest.raises(UserError, match=r"a\.jsonl:31: q is a number, not text"):
        build(make_source(tmp_path / "data"), tmp_path / "root")


def test_rows_with_a_mistake_name_it_also_where_workers_still_write_what_is_deleted(tmp_path, monkeypatch):
    path = save([{"q": f"{i} + {i}?", "a": f"#### {2 * i}"} for i in range(60)], tmp_path / "rows.jsonl")
    good = path.read_text()
    path.write_text(good + '{"q": 7, "a": "b"}\n')

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"rows\.jsonl:61: q is a number, not text"):
        patch.setattr(os, "rmdir", refuse)
        build(make_source(path), tmp_path / "root")
    path.write_text(good)
    build(make_source(path), tmp_path / "root")


def test_rows_of_a_killed_run_are_read_again_and_none_is_doubled(tmp_path):
    path = save([{"q": f"{i} + {i}?", "a": f"#### {2 * i}"} for i in range(60)], tmp_path / "rows.jsonl")
    source = make_source(path)
    left = work_on(source, tmp_path / "root").resumable / "runs-abc" / "rows"
    left.mkdir(parents=True)
    (left / "000000-000000").write_text("torn")
    assert build(source, tmp_path / "root") == plainly(source)


def test_rows_read_by_ray_are_those_read_here(tmp_path, ray_cluster, monkeypatch):
    monkeypatch.chdir(tmp_path)  # workers are elsewhere
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        save([{"q": f"{i % 70} + {i}?" * (i % 3 + 1), "a": f"#### {2 * i}"} for i in range(90)], Path("data", name))
    source = make_source("data", decontaminate=["sciq"])
    by_ray, here = (build(source, tmp_path / str(large), TINY._replace(large=large)) for large in (1, 1 << 40))
    assert by_ray == here
    with Path("data", "a.jsonl").open("a") as file:
        file.write("\n{\n")
    with pytest.raises(UserError, match=r"^data/a\.jsonl:92: is not JSON"):
        build(source, tmp_path / "root", TINY._replace(large=1))

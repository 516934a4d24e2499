"""Files of rows of every kind, alone, in a directory or by a glob: the same rows, the right id, or one clear line."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from row_files import ONE_FILE, pack, save

from sdft_ray.core.rows import Row
from sdft_ray.data import files, readers, records
from sdft_ray.errors import UserError
from sdft_ray.spec.sources import FileRows, HubRows
from sdft_ray.store.files import hash_file

FIELDS = {"prompt": "question", "response": "answer"}
GSM = [{"question": f'What is "{i}",\nif not {i}?', "answer": f"#### {i}"} for i in range(5)]
ROWS = [Row(row["question"], row["answer"], None) for row in GSM]


pytestmark = pytest.mark.usefixtures("own_cache")


def source(path, **settings) -> FileRows:
    return FileRows.model_validate({"path": str(path), "fields": FIELDS, **settings})


def read(path, **settings) -> list[Row]:
    return readers.read_rows(source(path, **settings))


def sha256(path) -> str:
    return readers.rows_content(source(path)).hashed()["sha256"]


def complaint(path, **settings) -> str:
    with pytest.raises(UserError) as error:
        read(path, **settings)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize("name", ONE_FILE)
def test_rows_are_the_same_from_every_kind_of_file_and_known_by_its_bytes(tmp_path, name):
    path = save(GSM, tmp_path / name)
    assert read(path) == ROWS
    assert read(path, limit=3) == ROWS[:3]
    assert sha256(path) == hash_file(path)


@pytest.mark.parametrize("name", ONE_FILE)
def test_a_missing_column_names_the_file_and_the_nearest_column(tmp_path, name):
    path = save([{**row, "qestion": row["question"]} for row in GSM], tmp_path / name)
    line = complaint(path, fields={"prompt": "kestion", "response": "answer"})
    place = f"the header {path}:1" if records.kind(path) == ".csv" else f"{path}:1"
    assert line == f"rows.fields.prompt: {place} has no kestion. Did you mean qestion?"


# --- directories and globs ------------------------------------------------------------------------------------


def save_parts(folder: Path) -> Path:
    """Write the rows as files of several kinds, whose order is that of their names, with what may lie beside them."""
    save(GSM[:2], folder / "part-0.parquet")
    save(GSM[2:3], folder / "part-1.jsonl.gz")
    save(GSM[3:], folder / "part-2.csv")
    for name in ("README.md", "LICENSE", ".gitattributes", "notes.md", "dataset_infos.json"):
        (folder / name).write_text("no rows")
    (folder / ".cache").mkdir()
    return folder


@pytest.mark.parametrize("pattern", ["", "*", "part-*", "part-[0-9].*", "../*/part-?.*", "**/part*"])
def test_a_directory_or_glob_is_read_in_the_order_of_its_names(tmp_path, pattern):
    folder = save_parts(tmp_path / "data")
    assert read(folder / pattern) == ROWS
    assert read(folder / pattern, limit=3) == ROWS[:3]
    assert sha256(folder / pattern) == sha256(folder)


def test_several_files_are_known_by_their_contents_in_order_and_not_by_their_names(tmp_path):
    folder = save_parts(tmp_path / "data")
    first = sha256(folder)
    moved = folder.rename(tmp_path / "moved")
    assert sha256(moved) == first
    (moved / "part-0.parquet").rename(moved / "a.parquet")
    (moved / "README.md").write_text("other words")
    assert sha256(moved) == first
    (moved / "a.parquet").rename(moved / "z.parquet")
    assert sha256(moved) != first
    save(GSM[:1], moved / "part-1.jsonl.gz")
    assert len({first, sha256(moved), sha256(moved / "*.csv"), sha256(moved / "part-2.csv")}) == 4


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("rows.jsonl", "rows"),
        ("my.rows.jsonl", "my.rows"),
        ("rows.csv.gz", "rows"),
        ("data.v2", "data.v2"),
        ("data.v2/*.jsonl", "data.v2"),
        ("data.v2/**/part-*.csv.zst", "data.v2"),
    ],
)
def test_name_of_rows_is_that_of_the_file_or_directory(tmp_path, monkeypatch, path, name):
    (tmp_path / "data.v2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert files.name_of(path) == name
    monkeypatch.chdir(tmp_path / "data.v2")
    assert files.name_of(".") == files.name_of("*.csv") == "data.v2"


def test_an_existing_name_with_marks_of_a_glob_is_that_name(tmp_path):
    folder = save_parts(tmp_path / "data[1]")
    assert read(folder / "*") == ROWS
    assert read(save(GSM, tmp_path / "rows[2].jsonl")) == ROWS


def test_a_dataset_saved_to_disk_is_read_through_its_own_files(tmp_path):
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(GSM).save_to_disk(folder, num_shards=3)
    (folder / "cache-0123.arrow").write_bytes(b"a cache of datasets")
    assert read(folder) == ROWS
    first = sha256(folder)
    (folder / "cache-0123.arrow").unlink()
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "_fingerprint": "0"}))
    assert sha256(folder.rename(tmp_path / "moved")) == first
    (tmp_path / "moved" / "data-00001-of-00003.arrow").unlink()
    assert complaint(tmp_path / "moved") == (
        f"rows.path: {tmp_path / 'moved'} lacks data-00001-of-00003.arrow, which its state.json names. Copy it, too."
    )


@pytest.mark.parametrize("named", [[{"x": 1}], "abc", [1]])
def test_a_dataset_saved_to_disk_with_a_damaged_state_is_named(tmp_path, named):
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": named}))
    assert (
        complaint(tmp_path)
        == f"rows.path: {tmp_path}/state.json names no files in _data_files. Save the data set again."
    )


def test_a_table_that_names_a_column_twice_is_refused(tmp_path):
    table = pa.table([["a"], ["b"]], names=["q", "q"])
    pq.write_table(table, tmp_path / "rows.parquet")
    assert complaint(tmp_path / "rows.parquet").endswith("rows.parquet: names the column q twice. Rename one of them.")


def test_datasets_saved_together_say_to_give_one(tmp_path):
    one = datasets.Dataset.from_list(GSM)
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "saved")
    line = complaint(tmp_path / "saved")
    assert line.startswith(f"rows.path: {tmp_path / 'saved'} holds several splits (")
    assert read(line.rpartition(" ")[2].removesuffix(".")) == ROWS


def test_a_directory_without_row_files_says_what_to_give(tmp_path):
    (tmp_path / "README.md").write_text("no rows")
    line = f"rows.path: {tmp_path} is a directory without a file of a known kind. Give one with .json, .jsonl, .csv, "
    assert complaint(tmp_path).startswith(line)


@pytest.mark.parametrize("stray", ["notes.docx", "rows.tsv", "part-3.parquet.gz", "Makefile"])
@pytest.mark.parametrize("pattern", ["", "/*"])
def test_a_stray_file_is_named(tmp_path, stray, pattern):
    save_parts(tmp_path / "data")
    (tmp_path / "data" / stray).write_text("no rows")
    place = f"{tmp_path / 'data'}{pattern}"
    line = f"rows.path: {place} holds {stray}, which is no file of a known kind. Remove {stray} from there."
    assert complaint(place) == line


def test_a_directory_of_directories_says_to_give_a_glob(tmp_path):
    save(GSM[:2], tmp_path / "2024" / "rows.jsonl")
    (tmp_path / "README.md").write_text("no rows")
    assert complaint(tmp_path) == f"rows.path: {tmp_path} holds the directory 2024. Give {tmp_path}/2024."
    save(GSM[2:], tmp_path / "2025" / "rows.jsonl")
    line = f"rows.path: {tmp_path} holds the directory 2024. Give a glob of all files, such as {tmp_path}/**/*.jsonl."
    assert complaint(tmp_path) == line
    assert read(tmp_path / "**" / "*.jsonl") == ROWS


@pytest.mark.parametrize("pattern", ["*.jsonl", "none/*.csv", "sub*"])
def test_a_glob_that_matches_no_file_says_so(tmp_path, pattern):
    (tmp_path / "sub").mkdir()
    assert complaint(tmp_path / pattern) == f"rows.path: {tmp_path / pattern} matches no file. Check the pattern."


def test_the_file_of_several_that_lacks_a_column_is_named(tmp_path):
    save(GSM, tmp_path / "a.jsonl")
    lacking = save([{"question": "q", "output": "a"}], tmp_path / "b.parquet")
    line = f"rows.fields.response: {lacking}:1 has no answer. Known: output, question."
    assert complaint(tmp_path) == line


# --- damage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ONE_FILE if name.endswith((".gz", ".zst"))])
@pytest.mark.parametrize("kept", [0, 7, 0.5, -1])
def test_a_packed_file_that_is_cut_off_says_so(tmp_path, name, kept):
    path = save(GSM * 50, tmp_path / name)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept == 0.5 else kept])
    assert complaint(path) == f"{path}: is cut off. Copy or download it again."


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.zst"])
def test_a_packed_file_of_other_bytes_says_so(tmp_path, name):
    (tmp_path / name).write_text(json.dumps(GSM[0]))
    line = f"{tmp_path / name}: is not packed, in spite of its {Path(name).suffix}. Rename it to rows.jsonl."
    assert complaint(tmp_path / name) == line


@pytest.mark.parametrize(
    ("content", "name", "do"),
    [
        (b"\x1f\x8b\x08", "rows.jsonl", "Rename it to rows.jsonl.gz."),
        (b"\x28\xb5\x2f\xfd", "rows.csv", "Rename it to rows.csv.zst."),
        (b"PAR1", "rows.jsonl", "Rename it to rows.parquet."),
        (b"PAR1", "rows.arrow", "Rename it to rows.parquet."),
        (b"ARROW1", "rows.parquet", "Rename it to rows.arrow."),
        (b"PK\x03\x04", "rows.json", "Unpack it, or save it in another format."),
    ],
)
def test_a_file_of_another_format_than_its_name_says_which(tmp_path, content, name, do):
    (tmp_path / name).write_bytes(content)
    line = complaint(tmp_path / name)
    assert line.startswith(f"{tmp_path / name}: is ") and line.endswith(do)


def test_a_zst_file_that_begins_with_a_frame_without_data_is_read(tmp_path):
    path = save(GSM, tmp_path / "rows.jsonl.zst")
    path.write_bytes(b"\x50\x2a\x4d\x18\x04\0\0\0size" + path.read_bytes())  # as pzstd writes it
    assert read(path) == ROWS


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("record", ['{"question": "q", "answer": "a", "answer": "b"}', '{"x": {"k": 1, "k": 2}}'])
def test_a_key_that_stands_twice_is_refused(tmp_path, name, record):
    (tmp_path / name).write_text(f"[{record}]" if name == "rows.json" else f"\n{record}\n")
    assert " twice). Fix this " in complaint(tmp_path / name)


def test_columns_without_a_name_may_be_several(tmp_path):
    (tmp_path / "rows.csv").write_text(",,question,answer\n1,2,q,a\n")
    assert read(tmp_path / "rows.csv") == [Row("q", "a", None)]


def test_a_directory_of_splits_that_names_end_in_is_refused(tmp_path):
    for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl", "latest.jsonl"):
        save(GSM, tmp_path / name)
    do = f"Give one of them, such as {tmp_path}/gsm8k_train*."
    assert complaint(tmp_path) == f"rows.path: {tmp_path} holds several splits (test, train). {do}"
    (tmp_path / "gsm8k_test.jsonl").unlink()
    assert [file.name for file in files.find_files(str(tmp_path))] == ["gsm8k_train.jsonl", "latest.jsonl"]


def test_a_directory_of_several_splits_is_refused(tmp_path):
    for name in ("train-0.jsonl", "test-0.jsonl", "training_notes.jsonl"):
        save(GSM, tmp_path / name)
    line = f"rows.path: {tmp_path} holds several splits (test, train). Give one of them, such as {tmp_path}/train*."
    assert complaint(tmp_path) == line


def test_a_directory_of_splits_in_directories_is_refused(tmp_path):
    for name in ("train", "test"):
        save(GSM, tmp_path / name / "rows.jsonl")
    line = f"rows.path: {tmp_path} holds several splits (test, train). Give one of them, such as {tmp_path}/train."
    assert complaint(tmp_path) == line


def test_rows_whose_file_is_named_like_a_licence_are_read(tmp_path):
    save(GSM[:2], tmp_path / "license_plates.jsonl")
    save(GSM[2:], tmp_path / "readme_questions.csv")
    (tmp_path / "LICENSE.txt").write_text("no rows")
    assert read(tmp_path) == ROWS


@pytest.mark.parametrize("kind", [pa.float32(), pa.float16()])
def test_an_answer_of_few_bits_is_the_number_that_people_see(tmp_path, kind):
    table = pa.table(
        {"question": ["q"], "answer": ["a"], "final": pa.array([0.5 if kind == pa.float16() else 0.1], kind)}
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    [row] = read(tmp_path / "rows.parquet", fields={**FIELDS, "answer": "final"})
    assert float(row.answer) == (0.5 if kind == pa.float16() else 0.1)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"[1]\n", "is a JSON list, not one object a line. Rename it to end in .json."),
        ('{"question": "q"}'.encode("utf-16"), "is UTF-16 text. Save it as UTF-8."),
    ],
)
def test_text_inside_a_packed_file_is_checked_as_any_other(tmp_path, content, what):
    pack(tmp_path / "rows.jsonl.gz", content)
    assert complaint(tmp_path / "rows.jsonl.gz") == f"{tmp_path / 'rows.jsonl.gz'}: {what}"


def test_a_bad_line_of_a_packed_file_is_named(tmp_path):
    pack(tmp_path / "rows.jsonl.zst", b'{"question": "q", "answer": "a"}\n\nnot JSON\n')
    assert complaint(tmp_path / "rows.jsonl.zst").startswith(f"{tmp_path / 'rows.jsonl.zst'}:3: is not JSON (")


@pytest.mark.parametrize("name", ["rows.parquet", "stream.arrow", "file.arrow"])
@pytest.mark.parametrize("kept", [0, 10, 0.5])
def test_a_table_that_is_cut_off_is_one_line(tmp_path, name, kept):
    path = save(GSM * 50, tmp_path / name)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept == 0.5 else kept])
    form = "Parquet" if name.endswith(".parquet") else "Arrow"
    assert complaint(path).startswith(f"{path}: cannot be read as {form} (")


# --- CSV ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        (
            'question,answer\n"two\nlines",a\nq,a,b\n',
            "{path}:4: has another number of values than the header (got 3; expected 2). ",
        ),
        (
            "question,answer\n\nq\n",
            "{path}:3: has another number of values than the header (got 1; expected 2). ",
        ),
        ("question,answer,answer\nq,a,b\n", "{path}:1: names the column answer twice. Rename one of them."),
        ("What is 1?,1\nWhat is 2?,2\n", "rows.fields.prompt: the header {path}:1 has no question. Known: 1, What is"),
        ("question;answer\nq;a\n", "{path}:1: has one column, and ; in its name. Save the file with commas"),
        ("question\tanswer\nq\ta\n", "{path}:1: has one column, and a tab in its name. Save the file with commas"),
        (
            " question ,answer\nq,a\n",
            "rows.fields.prompt: the header {path}:1 has no question. Did you mean ' question '?",
        ),
        ('question,answer\nq,a\nq,"open\nto the end\n', "{path}:3: is not CSV (unexpected end of data). Fix this line"),
        ('question,answer\nq,"a" b\n', "{path}:2: is not CSV ("),
        (b"question,answer\nq,a\ncaf\xe9,a\n", "{path}:3: is not UTF-8 text. Save the file as UTF-8."),
        ("question,answer\nq,a\n".encode("utf-16"), "{path}: is UTF-16 text. Save it as UTF-8."),
    ],
)
def test_a_bad_csv_names_file_and_line(tmp_path, lines, line):
    path = tmp_path / "rows.csv"
    path.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    assert complaint(path).startswith(line.format(path=path))


def test_values_of_a_csv_are_text_and_empty_ones_too(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbfquestion,context,answer,final\r\n007,,1e3,4.50\r\n\r\nq,Before.,a,\r\n")
    fields = {**FIELDS, "context": "context", "answer": "final"}
    assert read(path, fields=fields) == [Row("007", "1e3", "4.50"), Row("Before.\n\nq", "a", "")]


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz"])
@pytest.mark.parametrize("content", [b"", b"\n\n", b"question,answer\n"])
def test_a_csv_without_rows_is_none(tmp_path, name, content):
    pack(tmp_path / name, content)
    assert read(tmp_path / name) == []


# --- values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "stream.arrow", "file.arrow"])
def test_a_column_that_is_sometimes_null_is_missing_there(tmp_path, name):
    rows = [{**row, "final": None if i % 2 else i} for i, row in enumerate(GSM)]
    path = save(rows, tmp_path / name)
    fields = {**FIELDS, "answer": "final"}
    assert [row.answer for row in read(path, fields=fields)] == ["0", None, "2", None, "4"]
    save([*GSM, {"question": None, "answer": "a"}], path)
    assert complaint(path) == f"{path}:6: question is empty, not text. Fix this row."


@pytest.mark.parametrize("key", ["context", "answer"])
def test_a_line_of_json_may_lack_what_is_optional_and_no_table_may(tmp_path, key):
    rows = [GSM[0], {**GSM[1], "more": "8"}]
    fields = {**FIELDS, key: "more"}
    assert read(save(rows, tmp_path / "rows.jsonl"), fields=fields)[0] == ROWS[0]
    line = f"rows.fields.{key}: {tmp_path / 'rows.jsonl'}:1 has no mroe. Known: answer, question."
    assert complaint(tmp_path / "rows.jsonl", fields={**FIELDS, key: "mroe"}) == line
    lacking = save(rows[:1], tmp_path / "b.parquet")
    assert complaint(tmp_path, fields=fields) == f"rows.fields.{key}: {lacking}:1 has no more. Known: answer, question."


def test_a_column_that_none_of_many_lines_has_is_refused_before_the_others_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "FIRST_RECORDS", 2)
    path = save([*GSM[:2], {"bad": 1}], tmp_path / "rows.jsonl")
    assert "rows.jsonl:1 has no more" in complaint(path, fields={**FIELDS, "context": "more"})
    path = save([*GSM[:4], {**GSM[4], "more": "4"}], path)
    monkeypatch.setattr(readers, "FIRST_RECORDS", 5)
    assert len(read(path, fields={**FIELDS, "answer": "more"})) == 5


@pytest.mark.parametrize("name", ["disk", "rows.parquet"])
def test_values_of_several_kinds_that_datasets_writes_as_json_are_what_they_were(tmp_path, name):
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "4 + 4?"}]},
        {"role": "assistant", "content": "It is 8."},
    ]
    kinds = {"role": datasets.Value("string"), "content": datasets.Json()}
    features = datasets.Features({"turns": datasets.List(kinds), "final": datasets.Json()})
    saved = datasets.Dataset.from_list([{"turns": turns, "final": 8}, {"turns": turns, "final": "9"}], features)
    saved.save_to_disk(tmp_path / "disk")
    saved.to_parquet(tmp_path / "rows.parquet")
    rows = read(tmp_path / name, fields={"messages": "turns", "answer": "final"})
    assert rows == [Row("4 + 4?", "It is 8.", "8"), Row("4 + 4?", "It is 8.", "9")]


# --- hub datasets ---------------------------------------------------------------------------------------------


def hub_rows(**fields) -> list[Row]:
    settings = {"repo": "owner/name", "revision": "0" * 40, "fields": fields}
    return readers.read_rows(HubRows.model_validate(settings))


def test_rows_of_a_hub_dataset_are_those_of_the_same_table_in_a_file(tmp_path, monkeypatch):
    calls = [{"name": "f", "arguments": {"city": "Rome"}}, {"name": "g", "arguments": {"a": 1}}]
    turns = [[{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}] for call in calls]
    columns = {"turns": turns, "final": pa.array([0.1, None], pa.float32())}
    fields = {"messages": "turns", "answer": "final"}
    pq.write_table(pa.table(columns), path := tmp_path / "rows.parquet")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset(pa.table(columns)))
    rows = hub_rows(**fields)
    assert rows == read(path, fields=fields)
    assert [row.exchange.calls[0]["function"] for row in rows] == calls
    assert [row.answer for row in rows] == ["0.1", None]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError("Dataset scripts are no longer supported"),
            "owner/name: Dataset scripts are no longer supported.",
        ),
        (
            datasets.exceptions.DatasetGenerationError("generating"),
            "owner/name: cannot be read as one table (generating).",
        ),
    ],
)
def test_a_hub_dataset_that_datasets_cannot_read_is_one_line(monkeypatch, error, line):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError) as said:
        hub_rows(**FIELDS)
    assert str(said.value).startswith(line)


@pytest.mark.full
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.jsonl.zst"])
def test_a_line_of_200_megabytes_is_read_and_no_text_of_that_length(tmp_path, name):
    path = save([{**GSM[0], "notes": ""}, {**GSM[1], "notes": "long " * 40_000_000}], tmp_path / name)
    assert read(path) == ROWS[:2]
    line = complaint(path, fields={"prompt": "question", "response": "notes"})
    number = 4 if name.endswith(".csv") else 2
    what = "holds a text of 200000000 characters (expected at most 4194304)"
    assert line == f"{path}:{number}: {what}. Split or remove it."


def test_a_text_that_no_tokenizer_can_hold_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MOST_CHARACTERS", 20)
    path = save([{"question": "short", "answer": "a"}, {"question": "?" * 21, "answer": "a"}], tmp_path / "rows.jsonl")
    assert complaint(path).startswith(f"{path}:2: holds a text of 21 characters (expected at most 20). ")


def test_a_value_longer_than_python_allows_a_csv_is_read(tmp_path):
    path = save([{"question": "long " * 100_000, "answer": "a"}], tmp_path / "rows.csv")
    assert [len(row.prompt) for row in read(path)] == [500_000]


def test_files_are_read_no_further_than_the_limit(tmp_path, monkeypatch):
    save(GSM, tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text("not JSON\n")
    assert read(tmp_path, limit=5) == ROWS
    assert complaint(tmp_path, limit=6).startswith(f"{tmp_path / 'b.jsonl'}:1: is not JSON")

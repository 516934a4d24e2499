"""Whatever stands in a recipe, a manifest or a row file: a result or a UserError, and nothing outside the root."""

import copy
import hashlib
import json
import math
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from row_files import save

from sdft_ray.data import readers
from sdft_ray.errors import UserError
from sdft_ray.models import directory
from sdft_ray.spec.compute import load_compute
from sdft_ray.spec.loading import load_recipe
from sdft_ray.spec.sources import FileRows
from sdft_ray.store import files
from sdft_ray.store.identity import Stage
from sdft_ray.store.manifest import MANIFEST
from sdft_ray.store.storage import Storage

pytestmark = pytest.mark.heavy

# The same examples every time: a suite that fails by chance teaches nobody. Fixtures are directories that every
# example writes anew.
fuzzed = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

RECIPE = {
    "model": {"path": "model"},
    "rows": {"path": "rows.jsonl", "fields": {"prompt": "q", "response": "a"}, "held_out": 2, "validation": 2},
    "prune": {"blocks": 2, "calibration": [{"text": "texts.txt"}, {"rows": "own", "positions": "response"}]},
    "train": {"lr": 1e-4, "lora": {"rank": 8, "targets": ["q_proj"]}},
    "arms": {"sft": {}, "distilled": {"lr": 1e-5}},
    "merge": {"others": {"math": {"rows": {"gym": "products", "limit": 9}}}, "slerp": {"t": 0.5}},
    "evaluate": {"tasks": ["held_out"]},
}
COMPUTE = {
    "ray": {"address": "auto", "largest_node": {"cpus": 4}},
    "distill": {"actors": {"min": 1, "max": 2}, "cpus": 1, "engine": {"block_size": 16}},
    "train": {"workers": 2, "cpus": 1},
}
STAGE = Stage("score", "tiny", 1, {"n": 1})
GOOD_MANIFEST = {
    "format": 1,
    "stage": STAGE.name,
    "id": STAGE.id,
    "slug": STAGE.slug,
    "identity": STAGE.identity,
    "lineage": STAGE.lineage,
    "summary": {"rows": 1},
    "files": [{"path": "data.txt", "bytes": 4, "sha256": hashlib.sha256(b"four").hexdigest()}],
    "provenance": {"created": "2026-11-25T00:00:00Z", "wall_seconds": 0.1},
}
FIELDS = {"prompt": "q", "response": "a", "context": "c", "answer": "n"}

text = st.text(max_size=12)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | text
nested = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3))
names = st.text(alphabet=string.ascii_letters + "./\\~\0 é", max_size=20) | st.just("../../outside")


def places(value, path=()):
    """Yield the path of every value in nested dictionaries and lists."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*path, key))


@st.composite
def spoilt(draw, good):
    """Good data with one value replaced, removed or added."""
    data = copy.deepcopy(good)
    *parents, last = draw(st.sampled_from(list(places(data))[1:]))
    holder = data
    for key in parents:
        holder = holder[key]
    match draw(st.sampled_from(["replace", "remove", "add"])):
        case "remove":
            del holder[last]
        case "add" if isinstance(holder, dict):
            holder[draw(text)] = draw(nested)
        case _:
            holder[last] = draw(nested | names)
    return data


def attempt(call, *arguments):
    """Return what a call returns, or None where it says what the user did wrong; anything else is a failure."""
    try:
        return call(*arguments)
    except UserError as error:
        assert all(line.strip() for line in error.problems)
        return None


@pytest.mark.parametrize(("load", "good"), [(load_recipe, RECIPE), (load_compute, COMPUTE)], ids=["recipe", "compute"])
def test_unspoilt_files_are_taken(load, good, tmp_path):
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(good))
    assert load(tmp_path / "good.yaml")


@fuzzed
@given(data=spoilt(RECIPE))
def test_recipe_with_one_value_spoilt_is_taken_or_refused(tmp_path, data):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    attempt(load_recipe, tmp_path / "recipe.yaml")


@fuzzed
@given(data=spoilt(COMPUTE))
def test_compute_file_with_one_value_spoilt_is_taken_or_refused(tmp_path, data):
    (tmp_path / "compute.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    attempt(load_compute, tmp_path / "compute.yaml")


@fuzzed
@given(
    content=st.binary(max_size=60) | st.text(alphabet="ab:{}[]-&*!<>|%@`'\"\n\t #?,01.e~", max_size=40).map(str.encode)
)
@example(b"model: !!python/object/apply:os.system ['true']")
@example(b"a: &a [*a]")
@example(b"rows: 2026-13-41")
@example(b"[" * 9999)
def test_recipe_of_any_bytes_is_refused(tmp_path, content):
    (tmp_path / "recipe.yaml").write_bytes(content)
    assert attempt(load_recipe, tmp_path / "recipe.yaml") is None


@fuzzed
@given(
    override=st.text(max_size=30)
    | st.builds("{}={}".format, st.sampled_from(["train.lr", "rows", "model.path.x"]), text)
)
def test_override_of_any_text_is_taken_or_refused(tmp_path, override):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    attempt(load_recipe, tmp_path / "recipe.yaml", [override])


@pytest.fixture
def artifact(tmp_path):
    """The directory of a finished artifact, and the root that it lies in."""
    storage = Storage(str(tmp_path / "root"))
    (storage.scratch(STAGE) / "data.txt").write_text("four")
    return storage.commit(STAGE, {"rows": 1}, 0.1), storage.uri


@fuzzed
@given(manifest=spoilt(GOOD_MANIFEST))
@example(GOOD_MANIFEST)
@example({**GOOD_MANIFEST, "files": [{"path": None, "bytes": 4, "sha256": ""}]})
@example({**GOOD_MANIFEST, "files": [{"path": "../../../outside", "bytes": 4, "sha256": ""}]})
def test_manifest_with_one_value_spoilt_is_taken_or_refused_and_nothing_is_written(artifact, tmp_path, manifest):
    place, root = artifact
    (place / MANIFEST).write_text(json.dumps(manifest))
    before = sorted(tmp_path.rglob("*"))
    for look in (Storage.status, Storage.fetch, Storage.manifest):
        found = attempt(look, Storage(root), STAGE)
        assert manifest != GOOD_MANIFEST or found
    attempt(Storage(root).find, STAGE.id)
    assert sorted(tmp_path.rglob("*")) == before


@fuzzed
@given(content=st.binary(max_size=40) | nested.map(lambda value: json.dumps(value).encode()))
def test_manifest_of_any_bytes_is_refused(artifact, content):
    place, root = artifact
    (place / MANIFEST).write_bytes(content)
    assert attempt(Storage(root).status, STAGE) is None


@fuzzed
@given(name=names | text)
@example("a/../../b")
@example("/etc/passwd")
def test_name_in_a_manifest_stays_in_its_directory(tmp_path, name):
    if (path := attempt(files.inside, tmp_path, name)) is not None:
        assert path.resolve().is_relative_to(tmp_path.resolve())


def read(path: Path) -> None:
    rows = attempt(readers.read_rows, FileRows.model_validate({"path": str(path), "fields": FIELDS}))
    for row in rows or ():
        (row.prompt + row.reference).encode()
        assert row.answer is None or isinstance(row.answer, str)


records = st.fixed_dictionaries(dict.fromkeys("qacn", scalars)) | st.dictionaries(text, nested, max_size=4)


@fuzzed
@given(
    lines=st.lists(
        records.map(json.dumps).map(str.encode) | nested.map(json.dumps).map(str.encode) | st.binary(max_size=20)
    )
)
@example([b'{"q": "\\ud800", "a": "", "c": null, "n": 1}'])
@example([b"[" * 100_000])
@example([b'{"q": ' + b"9" * 5000 + b"}"])
def test_jsonl_of_any_lines_is_read_or_refused(tmp_path, lines):
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    read(tmp_path / "rows.jsonl")
    (tmp_path / "rows.json").write_bytes(b"[" + b",".join(lines) + b"]")
    read(tmp_path / "rows.json")


@fuzzed
@given(lines=st.lists(text.map(str.encode) | st.sampled_from([b"q,a,c,n", b'"x\n,y",,z,1']) | st.binary(max_size=20)))
@example([b"q,a,c,n", b'"' + b"x" * 200_000 + b'",a,,'])
@example([b"q,a,c,n", b"\0,\r,,\x85"])
def test_csv_of_any_lines_is_read_or_refused(tmp_path, lines):
    (tmp_path / "rows.csv").write_bytes(b"\n".join(lines))
    read(tmp_path / "rows.csv")


@fuzzed
@given(draw=st.data(), name=st.sampled_from(["rows.jsonl.gz", "rows.csv.zst", "file.arrow", "stream.arrow"]))
def test_other_files_with_any_damage_are_read_or_refused(tmp_path, draw, name):
    rows = [{"q": f"{i}?", "a": f"#### {i}", "c": None, "n": str(i)} for i in range(20)]
    content = bytearray(save(rows, tmp_path / name).read_bytes())
    for _ in range(draw.draw(st.integers(1, 4))):
        content[draw.draw(st.integers(0, len(content) - 1))] = draw.draw(st.integers(0, 255))
    (tmp_path / name).write_bytes(
        content[: draw.draw(st.integers(0, len(content)))] if draw.draw(st.booleans()) else content
    )
    read(tmp_path / name)


@fuzzed
@given(
    columns=st.dictionaries(st.sampled_from("qacn") | text, st.lists(scalars, min_size=2, max_size=2)), draw=st.data()
)
def test_parquet_of_any_columns_and_with_any_damage_is_read_or_refused(tmp_path, columns, draw):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def as_column(values):
        same = {type(value) for value in values} - {type(None)}
        fits = len(same) < 2 and all(abs(value) < 2**62 for value in values if type(value) is int)
        return values if fits else [repr(value) for value in values]

    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({name: as_column(values) for name, values in columns.items()}), path)
    read(path)
    content = bytearray(path.read_bytes())
    for _ in range(draw.draw(st.integers(1, 4))):
        content[draw.draw(st.integers(0, len(content) - 1))] = draw.draw(st.integers(0, 255))
    path.write_bytes(content[: draw.draw(st.integers(0, len(content)))] if draw.draw(st.booleans()) else content)
    read(path)


@fuzzed
@given(name=st.sampled_from(["config.json", "tokenizer_config.json", "model.safetensors.index.json"]), value=nested)
@example("config.json", [])
@example("config.json", {"quantization_config": "4 bits"})
@example("tokenizer_config.json", {"auto_map": []})
@example("model.safetensors.index.json", {"weight_map": {"w": "../../outside"}})
@example("config.json", math.nan)
def test_model_directory_with_any_json_is_described_or_refused(tiny_model, tmp_path, name, value):
    for file in tiny_model.iterdir():
        if not (tmp_path / file.name).exists():
            (tmp_path / file.name).symlink_to(file)
    there = tmp_path / name
    there.unlink(missing_ok=True)
    there.write_text(json.dumps(value))
    attempt(directory.describe_directory, tmp_path)
    there.unlink()

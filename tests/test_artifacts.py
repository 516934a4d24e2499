"""Identity of an artifact, its manifest, and the proof that its files are whole."""

import decimal
import hashlib
import json
import os
from pathlib import Path

import pytest
from refusals import complaint

from sdft_ray.spec.section import Section
from sdft_ray.store.files import hash_file, hash_source, remember_hash
from sdft_ray.store.identity import Stage, canonical_json, short_id, slugify
from sdft_ray.store.manifest import MANIFEST, check_files, list_files, read_manifest, write_manifest


@pytest.fixture
def finished(tmp_path):
    """A directory with two files and its manifest."""
    directory = tmp_path / "finished"
    (directory / "inner").mkdir(parents=True)
    (directory / "data.txt").write_text("four")
    (directory / "inner" / "manifest.json").write_text("{}")
    write_manifest(directory, Stage("score", "tiny", 1, {"a": 1}), {"rows": 3}, 1.234)
    return directory


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize(
    "value",
    [
        (1, 2),
        {1, 2},
        b"bytes",
        Path("a"),
        decimal.Decimal(1),
        object(),
        float("nan"),
        float("inf"),
        {1: "a"},
        {"a": {"b": [{"c": (1,)}]}},
        [{None: 1}],
    ],
)
def test_canonical_json_of_what_is_not_plain_json_is_refused(value):
    with pytest.raises((TypeError, ValueError)):
        canonical_json(value)


def test_canonical_json_has_one_spelling_for_equal_values():
    assert canonical_json({"b": [1, 0.5, None, True], "a": {"d": "é", "c": ""}}) == (
        '{"a":{"c":"","d":"é"},"b":[1,0.5,null,true]}'
    )


@pytest.mark.parametrize(("one", "other"), [(1, True), (0, False), (0, None), ("1", 1), ([], {}), ("", None)])
def test_canonical_json_tells_unlike_values_apart(one, other):
    assert canonical_json(one) != canonical_json(other)


def test_stage_id_is_the_hash_of_name_version_settings_and_inputs():
    model = Stage("model", "tiny", 1, {"sha256": "ab"})
    assert model.id == _digits('{"inputs":{},"settings":{"sha256":"ab"},"stage":"model","version":1}')
    score = Stage("score", "tiny", 2, {"b": 1, "a": None}, {"model": model})
    spelled = f'{{"inputs":{{"model":"{model.id}"}},"settings":{{"a":null,"b":1}},"stage":"score","version":2}}'
    assert score.id == _digits(spelled)
    assert score.directory_name == f"tiny-{score.id}"


def _digits(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def test_stage_id_moves_with_what_can_change_a_number():
    model, other = Stage("model", "tiny", 1, {"sha256": "ab"}), Stage("model", "tiny", 1, {"sha256": "cd"})
    stages = [
        Stage("score", "tiny", 1, {"n": 1}, {"model": model}),
        Stage("cut", "tiny", 1, {"n": 1}, {"model": model}),
        Stage("score", "tiny", 2, {"n": 1}, {"model": model}),
        Stage("score", "tiny", 1, {"n": 2}, {"model": model}),
        Stage("score", "tiny", 1, {"n": 1}, {"model": other}),
        Stage("score", "tiny", 1, {"n": 1}, {"base": model}),
        Stage("score", "tiny", 1, {"n": 1}),
    ]
    assert len({stage.id for stage in stages}) == len(stages)


class Placed(Section):
    """Settings of which one says only where something is."""

    unhashed = ("texts",)
    b: int
    a: int
    texts: str


def test_stage_id_stays_where_only_names_and_places_differ(tmp_path):
    stage = Stage("score", "tiny", 1, {"a": 1, "b": 2})
    same = Stage("score", "other-slug", 1, Placed(b=2, a=1, texts="/a/path"), location=tmp_path)
    assert same.id == stage.id
    assert "/a/path" not in str(same.lineage)


def test_stage_lineage_holds_the_settings_of_all_that_came_before():
    model = Stage("model", "tiny", 1, {"sha256": "ab"})
    cut = Stage("cut", "tiny", 1, {}, {"score": Stage("score", "tiny", 1, {"n": 1}, {"model": model})})
    assert cut.lineage["inputs"]["score"]["inputs"]["model"]["settings"] == {"sha256": "ab"}


def test_short_id_is_twelve_hex_digits():
    assert short_id({}) == hashlib.sha256(b"{}").hexdigest()[:12]


@pytest.mark.parametrize(
    ("text", "slug"),
    [
        ("a/B c", "a-b-c"),
        ("../../etc/passwd", "etc-passwd"),
        ("数", "artifact"),
        ("x" * 99, "x" * 48),
        ("", "artifact"),
    ],
)
def test_slugify_is_safe_as_a_directory_name(text, slug):
    assert slugify(text) == slug


def test_write_manifest_lists_every_file_but_itself(finished):
    manifest = read_manifest(finished)
    assert [(file.path, file.bytes, file.sha256) for file in manifest.files] == [
        ("data.txt", 4, hashlib.sha256(b"four").hexdigest()),
        ("inner/manifest.json", 2, hashlib.sha256(b"{}").hexdigest()),
    ]
    stage = Stage("score", "tiny", 1, {"a": 1})
    assert (manifest.id, manifest.identity.plain(), manifest.summary) == (stage.id, stage.identity, {"rows": 3})
    assert manifest.provenance.wall_seconds == 1.23


def test_write_manifest_leaves_no_other_file_behind(finished):
    assert sorted(path.name for path in finished.iterdir()) == ["data.txt", "inner", MANIFEST]


def test_write_manifest_that_cannot_be_written_leaves_an_unfinished_directory(tmp_path):
    (tmp_path / "data.txt").write_text("four")
    with pytest.raises((TypeError, ValueError)):
        write_manifest(tmp_path, Stage("score", "tiny", 1, {}), {"rows": float("nan")}, 1.0)
    assert read_manifest(tmp_path) is None


def test_read_manifest_of_an_unfinished_directory_is_none(tmp_path):
    (tmp_path / "data.txt").write_text("four")
    assert read_manifest(tmp_path) is None
    assert read_manifest(tmp_path / "absent") is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"', b"{}", b'{"id": 1, "files": []}', b"\xff\xfe"])
def test_read_manifest_that_is_damaged_is_one_clear_line(tmp_path, content):
    (tmp_path / MANIFEST).write_bytes(content)
    do = f"If {tmp_path} is an artifact, delete it to build it again."
    assert complaint(read_manifest, tmp_path) == f"{tmp_path / MANIFEST}: is damaged, or not of sdft_ray. {do}"


def test_check_files_of_a_whole_artifact_passes(finished):
    check_files(finished, read_manifest(finished), hashes=True)


def test_check_files_names_a_missing_file_and_the_remedy(finished):
    (finished / "inner" / "manifest.json").unlink()
    assert _complaint(finished, hashes=False) == (
        f"{finished / 'inner/manifest.json'}: is missing. Restore it, or delete {finished} to build it again."
    )


def test_check_files_names_a_short_file_and_the_remedy(finished):
    (finished / "data.txt").write_text("fou")
    assert _complaint(finished, hashes=False) == (
        f"{finished / 'data.txt'}: is damaged (got 3 bytes; expected 4). "
        f"Restore it, or delete {finished} to build it again."
    )


def test_check_files_sees_an_altered_file_by_its_hash_only(finished):
    (finished / "data.txt").write_text("five")
    check_files(finished, read_manifest(finished), hashes=False)
    assert _complaint(finished, hashes=True) == (
        f"{finished / 'data.txt'}: is altered (its sha256 is not the manifest's). "
        f"Restore it, or delete {finished} to build it again."
    )


def _complaint(directory: Path, hashes: bool) -> str:
    return complaint(check_files, directory, read_manifest(directory), hashes)


def test_hash_source_of_a_file_is_its_sha256_and_moves_with_its_content(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("one")
    assert hash_source(path) == hashlib.sha256(b"one").hexdigest()
    path.write_text("three")
    assert hash_source(path) == hashlib.sha256(b"three").hexdigest()
    path.write_text("seven")
    os.utime(path, ns=(1, 1))  # the same size at another time
    assert hash_source(path) == hashlib.sha256(b"seven").hexdigest()


def test_hash_source_of_a_directory_moves_with_content_and_names_and_not_with_its_place(tmp_path):
    def directory(name: str, files: dict[str, str]) -> str:
        for file, text in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return hash_source(tmp_path / name)

    first = directory("a", {"config.json": "{}", "inner/x": "1"})
    assert directory("b", {"config.json": "{}", "inner/x": "1"}) == first
    assert directory("c", {"config.json": "{}", "inner/y": "1"}) != first
    assert directory("d", {"config.json": "{}", "inner/x": "22"}) != first
    assert directory("e", {"config.json": "{}", "inner/x": "1", "z": ""}) != first
    assert directory("f", {"config.json": "{}", "inner/x": "1", ".cache/z": "1", ".hidden": "2"}) == first


def test_hash_source_leaves_out_what_it_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    first = hash_source(tmp_path, without=["*.md", "*licen[cs]e*"])
    for name in ("README.md", "LICENCE.txt"):
        (tmp_path / name).write_text("words")
        assert hash_source(tmp_path, without=["*.md", "*licen[cs]e*"]) == first != hash_source(tmp_path)


@pytest.mark.parametrize("memory", ["not JSON", "[]", "{}"])
def test_hash_source_does_not_need_its_memory(tmp_path, memory):
    path = tmp_path / "rows.jsonl"
    path.write_text("one")
    remembered = Path(os.environ["XDG_CACHE_HOME"]) / "sdft_ray" / "hashes.json"
    remembered.parent.mkdir()
    remembered.write_text(memory)
    assert hash_source(path) == hashlib.sha256(b"one").hexdigest()
    assert hash_source(path) in json.loads(remembered.read_text()).values()


def test_list_files_hashes_a_file_again_that_changed_since_its_hash_was_remembered(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    remember_hash(path, hash_file(path))
    assert list_files(tmp_path)[0].sha256 == hash_file(path)
    path.write_bytes(b"after and longer")
    assert list_files(tmp_path)[0].sha256 == hash_file(path)

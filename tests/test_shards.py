"""Weight files as bytes, against the safetensors library."""

import json

import pytest
import torch
from refusals import complaint
from safetensors.torch import load_file, save_file

from sdft_ray.models import shards
from sdft_ray.models.shards import copy_tensors, read_header, same_bytes
from sdft_ray.store.files import hash_file

torch.set_num_threads(1)

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.arange(5, dtype=torch.bfloat16),
    "c": torch.arange(3, dtype=torch.float32).to(torch.float8_e4m3fn),
    "d": torch.arange(3, dtype=torch.int8),
    "e": torch.zeros(0, 4),
    "f": torch.tensor(2.5),
}


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def test_read_header_tells_shapes_and_sizes(shard):
    held = read_header(shard)
    assert {name: tensor.shape for name, tensor in held.items()} == {n: tuple(t.shape) for n, t in TENSORS.items()}
    assert {name: tensor.bytes for name, tensor in held.items()} == {n: t.nbytes for n, t in TENSORS.items()}
    assert {name: tensor.elements for name, tensor in held.items()} == {n: t.numel() for n, t in TENSORS.items()}


@pytest.mark.parametrize("names", [{"a": "a"}, {"b": "x", "d": "b", "f": "f"}, {name: name + "2" for name in TENSORS}])
def test_copy_tensors_of_every_dtype_are_what_the_library_reads(shard, tmp_path, names):
    target = tmp_path / "copy.safetensors"
    copy_tensors(shard, target, names)
    found = load_file(target)
    assert found.keys() == set(names.values())
    for name, new in names.items():
        assert found[new].dtype == TENSORS[name].dtype
        assert (
            found[new]
            .view(torch.uint8 if found[new].dim() else found[new].dtype)
            .equal(TENSORS[name].view(torch.uint8 if found[new].dim() else found[new].dtype))
        )


def test_copy_tensors_larger_than_a_buffer_are_whole(tmp_path):
    tensors = {"a": torch.randn(300_001), "b": torch.randn(7)}
    save_file(tensors, tmp_path / "a.safetensors")
    sha256 = copy_tensors(tmp_path / "a.safetensors", tmp_path / "b.safetensors", {"a": "a"}).sha256
    assert sha256 == hash_file(tmp_path / "b.safetensors")
    assert torch.equal(load_file(tmp_path / "b.safetensors")["a"], tensors["a"])


def test_copy_tensors_tells_which_places_it_compared(shard, tmp_path):
    target = tmp_path / "copy.safetensors"
    copied, held = copy_tensors(shard, target, {"b": "x", "c": "c", "f": "f"}), read_header(shard)
    written = read_header(target)
    assert copied.same == {
        (shard, held[old], target, written[new]) for old, new in (("b", "x"), ("c", "c"), ("f", "f"))
    }


@pytest.mark.parametrize("piece", [1, 3])
def test_copy_tensors_that_are_not_written_as_they_were_read_name_the_tensor(tmp_path, monkeypatch, piece):
    source, target, write = tmp_path / "a.safetensors", tmp_path / "b.safetensors", shards.write_tensors
    save_file({"a": torch.randn(7), "b": torch.randn(300_001)}, source)  # "b", which comes first, is several pieces

    def spoil(path, tensors, contents):
        write(path, tensors, (bytes(len(c)) if i == piece else c for i, c in enumerate(contents)))

    monkeypatch.setattr(shards, "write_tensors", spoil)
    with pytest.raises(RuntimeError, match=f"{target}: b differs from what {source} holds"):
        copy_tensors(source, target, {"a": "a", "b": "b"})


@pytest.mark.parametrize("place", [0, 150_000, 300_000])
def test_same_bytes_sees_one_other_byte_anywhere(tmp_path, place):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    tensor = torch.randn(300_001)
    save_file({"x": tensor}, paths[0])
    tensor[place] += 1
    save_file({"x": tensor}, paths[1])
    a, b = (read_header(path)["x"] for path in paths)
    assert same_bytes(paths[0], a, paths[0], a)
    assert not same_bytes(paths[0], a, paths[1], b)


def test_same_bytes_of_other_kinds_are_not_the_same(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(2, 3), "y": torch.zeros(3, 2), "z": torch.zeros(2, 3, dtype=torch.int32)}, path)
    held = read_header(path)
    assert not same_bytes(path, held["x"], path, held["y"])
    assert not same_bytes(path, held["x"], path, held["z"])


def header(entries) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "its header ends at byte 8, the file at 0"),
        (b"abc", "the file at 3"),
        (b"\xff" * 64, "the file at 64"),
        ((9).to_bytes(8, "little") + b"not JSON.", "its header is no list of tensors"),
        ((2).to_bytes(8, "little") + b"[]", "its header is no list of tensors"),
        (header({"x": {"dtype": "F32"}}), "its header is no list of tensors"),
        (header({"x": {**ENTRY, "data_offsets": [0]}}), "its header is no list of tensors"),
        (header({"x": ENTRY}), "its header describes "),
        (header({"x": ENTRY}) + b"12345", "its header describes "),
        (header({"x": ENTRY, "y": {**ENTRY, "data_offsets": [6, 10]}}) + bytes(10), "y begins at byte "),
        (header({"x": {**ENTRY, "data_offsets": [4, 0]}}) + bytes(4), "x begins at byte "),
        (header({"x": {**ENTRY, "data_offsets": [0.0, 4.0]}}) + bytes(4), "deserializing header: "),
        (header({"x": {**ENTRY, "shape": [2]}}) + bytes(4), "invalid shape, data type, or offset"),
        (header({"x": {**ENTRY, "shape": [-1]}}) + bytes(4), "deserializing header: "),
        (header({"x": {**ENTRY, "dtype": "Q4"}}) + bytes(4), "deserializing header: "),
        (header({"x": ENTRY, "__metadata__": [1]}) + bytes(4), "deserializing header: "),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "its header ends at byte "),
    ],
)
def test_read_header_of_a_damaged_file_says_what_and_where(tmp_path, content, what):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    line = complaint(read_header, path)
    assert line.startswith(f"{path}: is damaged: ") and what in line
    assert line.endswith(". Download or copy it again.")

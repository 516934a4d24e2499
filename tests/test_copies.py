"""Row files behind an address: what is copied, when again, and what a broken store says."""

import functools
import gzip
import json
import os
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import boto3
import pytest

from sdft_ray.data import calibration, copies, files, readers
from sdft_ray.errors import UserError
from sdft_ray.spec.sources import Calibration, FileRows
from sdft_ray.spec.wording import validate

FIELDS = {"prompt": "q", "response": "a"}
ROWS = [{"q": f"{i}?", "a": f"It is {i}."} for i in range(4)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(autouse=True)
def asked_anew():
    copies.local_path.cache_clear()
    yield
    copies.local_path.cache_clear()


@pytest.fixture
def bucket(s3):
    """Put objects into a bucket of its own; gives the bucket's address."""
    address = s3.rpartition("/some/")[0]
    client = boto3.client("s3")

    def put(**objects):
        for name, data in objects.items():
            key = name.replace("__", "/").replace("_", ".")
            client.put_object(Bucket=address.removeprefix("s3://"), Key=key, Body=data)
        copies.local_path.cache_clear()
        return address

    return put


def source(path):
    return validate(FileRows, {"path": path, "fields": FIELDS})


def prompts(path):
    return [row.prompt for row in readers.read_rows(source(path))]


def complaint(path):
    with pytest.raises(UserError) as error:
        prompts(path)
    return copies.name_addresses(str(error.value))


def test_rows_of_an_address_are_those_of_the_same_files_on_a_disk(bucket, tmp_path):
    address = bucket(
        data__a_jsonl=lines(ROWS[:2]), data__b_jsonl_gz=gzip.compress(lines(ROWS[2:])), data__README_md=b"No rows."
    )
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines(ROWS[:2]))
    (folder / "b.jsonl.gz").write_bytes((files.path_of(f"{address}/data") / "b.jsonl.gz").read_bytes())
    for there, here in (
        ("/data/a.jsonl", "a.jsonl"),
        ("/data", ""),
        ("/data/*.jsonl*", "*.jsonl*"),
        ("/**/*.jsonl", "*.jsonl"),
    ):
        local = str(folder / here) if here else str(folder)
        assert prompts(address + there) == prompts(local)
        if "**" not in there:
            assert readers.rows_content(source(address + there)) == readers.rows_content(source(local))
            assert files.name_of(address + there) == files.name_of(local)


def test_copy_of_an_unchanged_file_is_not_fetched_again_and_of_a_changed_one_is(bucket, s3_proxy):
    address = bucket(a_jsonl=lines(ROWS[:1]), b_jsonl=lines(ROWS[1:2])) + "/*.jsonl"
    assert prompts(address) == ["0?", "1?"]

    def fetched():
        return [path for method, path in s3_proxy.requests if method == "GET" and path.endswith(".jsonl")]

    s3_proxy.requests.clear()
    copies.local_path.cache_clear()
    assert prompts(address) == ["0?", "1?"] and not fetched()
    bucket(b_jsonl=lines(ROWS[3:]))
    assert prompts(address) == ["0?", "3?"]
    assert len(fetched()) == 1


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass


@pytest.mark.usefixtures("own_cache")
def test_copy_of_a_changed_file_behind_http_is_fetched_again(tmp_path):
    file = tmp_path / "rows.jsonl"
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/rows.jsonl"
    for seconds, row in ((1, ROWS[0]), (2, ROWS[1])):  # of one size; the server tells when it was written last
        file.write_bytes(lines([row]))
        os.utime(file, (seconds, seconds))
        copies.local_path.cache_clear()
        assert prompts(address) == prompts(f"{address}?download=true") == [row["q"]]
    file.write_bytes(b"x")
    copies.local_path.cache_clear()
    assert complaint(address).startswith(f"{address}:1: is not JSON")
    server.shutdown()


def test_copy_that_breaks_off_counts_for_nothing(bucket, s3_proxy):
    address = bucket(a_jsonl=lines(ROWS)) + "/a.jsonl"
    with s3_proxy.broken(lambda method, path: ("status", 500) if method == "GET" and "a.jsonl" in path else None):
        assert complaint(address).startswith(f"rows.path: {address} cannot be read (")
    assert prompts(address) == [row["q"] for row in ROWS]


def test_mistake_in_a_file_of_an_address_names_address_and_line(bucket):
    address = bucket(data__a_jsonl=lines(ROWS) + b"{\n") + "/data/*.jsonl"
    assert complaint(address).startswith(f"{address.removesuffix('*.jsonl')}a.jsonl:5: is not JSON")


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("/none.jsonl", "does not exist, or is empty. Check the address."),
        ("/data", "does not exist, or is empty. Check the address."),
        ("/*.csv", "matches no file. Check the address."),
    ],
)
def test_address_of_nothing_is_one_line(bucket, path, what):
    address = bucket(a_jsonl=lines(ROWS)) + path
    assert complaint(address) == f"rows.path: {address} {what}"


def test_address_of_a_bucket_that_is_not_there_or_closed_is_one_line(bucket, monkeypatch):
    bucket()
    assert "s3://no-such-bucket/rows.jsonl" in complaint("s3://no-such-bucket/rows.jsonl")
    assert "unknownstore" in complaint("unknownstore://bucket/rows.jsonl")


def test_address_of_a_directory_with_a_stray_file_names_it(bucket):
    address = bucket(data__a_jsonl=lines(ROWS), data__b_bin=b"?") + "/data"
    assert (
        complaint(address)
        == f"rows.path: {address} holds b.bin, which is no file of a known kind. Remove b.bin from there."
    )


@pytest.mark.parametrize(
    ("path", "do"),
    [
        ("s3:/bucket/rows.jsonl", "Write s3://bucket/rows.jsonl"),
        ("S3://bucket/rows.jsonl", "Write s3://bucket/rows.jsonl"),
        ("file:///data/rows.jsonl", "Write /data/rows.jsonl"),
        ("s3://", "Write s3://BUCKET/PATH"),
        ("s3://key:secret@bucket/rows.jsonl", "Give them by the environment"),
    ],
)
def test_address_that_is_spelled_wrong_says_the_right_one(path, do):
    with pytest.raises(UserError) as error:
        source(path)
    assert do in str(error.value) and "key:secret" not in str(error.value)


def test_calibration_texts_of_an_address_are_read(bucket):
    address = bucket(texts_txt=b"One text.\n\nTwo texts.") + "/texts.txt"
    (corpus,) = calibration.describe_corpora((Calibration(text=address),), (None,))
    assert (corpus.name, corpus.sha256) == ("texts", files.hash_content([files.path_of(address)], address))
    assert calibration.read_calibration(calibration.calibration_file(address), "text", 9) == ["One text.", "Two texts."]

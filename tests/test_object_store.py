"""A root in an object store: what is whole, what a fault leaves, who may build, and what other nodes see."""

import dataclasses
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading

import pytest
import s3fs
from refusals import complaint

from sdft_ray.errors import StageFailed
from sdft_ray.store import lease
from sdft_ray.store.identity import Stage
from sdft_ray.store.manifest import MANIFEST
from sdft_ray.store.objects import Objects
from sdft_ray.store.storage import Storage, probe
from sdft_ray.sweep import notes

STAGE = Stage("train", "tiny", 1, {"n": 1})
RENAMED = dataclasses.replace(STAGE, slug="renamed-model")
FILES = {"model.bin": "m" * 9000, "inner/config.json": "{}"}


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Make storage as another node has it: the same root, a disk of its own."""

    def make(root: str, name: str = "other") -> Storage:
        with monkeypatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
            return Storage(root)

    return make


def build(storage: Storage, stage: Stage = STAGE) -> None:
    for name, text in FILES.items():
        path = storage.scratch(stage) / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    storage.commit(stage, {"rows": 1}, 0.1)


def read(storage: Storage, stage: Stage = STAGE) -> dict[str, str]:
    place = storage.fetch(stage)
    return {name: (place / name).read_text() for name in FILES}


def test_artifact_is_whole_for_every_node_and_goes_through_every_status(s3, elsewhere):
    here, there = Storage(s3), elsewhere(s3)
    assert here.status(STAGE) == "missing"
    piece = here.resumable(STAGE) / "checkpoint"
    piece.write_text("1")
    here.publish(piece)
    assert there.status(STAGE) == "partial"
    build(here)
    assert there.status(STAGE) == here.status(STAGE) == "done"
    assert there.fetch(STAGE) != here.fetch(STAGE)
    assert read(there) == read(here) == FILES
    assert there.manifest(STAGE).summary == {"rows": 1}
    assert there.where(STAGE) == f"{s3}/train/{STAGE.directory_name}"
    assert Objects(s3).list().keys() == {f"train/{STAGE.directory_name}/{name}" for name in (*FILES, MANIFEST)}
    assert pickle.loads(pickle.dumps(here)).fetch(STAGE) == here.fetch(STAGE)


def test_artifact_and_pieces_of_work_are_found_by_their_ids_on_any_node(s3, elsewhere):
    here, there = Storage(s3), elsewhere(s3)
    ledger, resumable = here.ledger("tiny-0123456789ab"), here.resumable(STAGE)
    for piece in (ledger / "part-1", resumable / "checkpoint"):
        piece.write_text("1")
        here.publish(piece)
    assert there.status(RENAMED) == "partial"
    for folder, name in ((there.ledger("renamed-0123456789ab"), "part-1"), (there.resumable(RENAMED), "checkpoint")):
        there.bring(folder)
        assert (folder / name).read_text() == "1"
    build(here)
    assert there.status(RENAMED) == "done" and read(there, RENAMED) == FILES
    assert there.where(RENAMED) == f"{s3}/train/{STAGE.directory_name}"
    assert pickle.loads(pickle.dumps(here)).fetch(RENAMED) == here.fetch(STAGE)


def test_commit_under_another_name_ends_what_another_node_had_begun_to_store(s3, elsewhere):
    Objects(s3).write(f"train/{STAGE.directory_name}/old.bin", b"of a commit that was cut short")
    build(elsewhere(s3), RENAMED)
    assert Objects(s3).list().keys() == {f"train/{STAGE.directory_name}/{name}" for name in (*FILES, MANIFEST)}
    assert read(Storage(s3)) == FILES


def test_survey_of_many_stages_lists_each_folder_of_a_store_once(s3, s3_proxy, elsewhere):
    build(Storage(s3))
    stages = [STAGE, *(Stage("train", "tiny", 1, {"n": n}) for n in range(2, 12))]
    storage = elsewhere(s3)
    s3_proxy.requests.clear()
    with storage.survey():
        assert [storage.status(stage) for stage in stages] == ["done"] + ["missing"] * 10
        assert len({storage.where(stage) for stage in stages}) == 11
    assert len(s3_proxy.requests) < len(stages), "two folders and one manifest, however many stages"


def test_file_of_an_artifact_is_brought_alone_and_once(s3, s3_proxy, elsewhere):
    build(Storage(s3))
    place = elsewhere(s3).files(STAGE, "*.json")
    assert (place / "inner/config.json").is_file() and not (place / "model.bin").exists()
    assert read(elsewhere(s3)) == FILES
    s3_proxy.requests.clear()
    assert read(elsewhere(s3)) == FILES
    assert [method for method, path in s3_proxy.requests if "model.bin" in path] == []


def test_artifact_that_was_deleted_and_built_again_is_not_mixed_with_its_old_copy(s3, elsewhere):
    build(Storage(s3))
    assert read(elsewhere(s3)) == FILES
    Objects(s3).delete(Objects(s3).list())
    again = elsewhere(s3, "third")
    path = again.scratch(STAGE) / "model.bin"
    path.write_text("n" * 9000)
    again.commit(STAGE, {}, 0.1)
    assert (elsewhere(s3).fetch(STAGE) / "model.bin").read_text() == "n" * 9000


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda objects, key: objects.delete([key]), "is missing"),
        (lambda objects, key: objects.write(key, b"short"), "is damaged (got 5 bytes; expected 9000)"),
        (lambda objects, key: objects.write(key, b"x" * 9000), "is altered (its sha256 is not the manifest's)"),
    ],
    ids=["missing", "short", "altered"],
)
def test_damaged_artifact_is_an_error_that_names_the_object_and_nothing_of_it_is_kept(s3, elsewhere, damage, what):
    build(Storage(s3))
    key = f"train/{STAGE.directory_name}/model.bin"
    damage(Objects(s3), key)
    line = complaint(lambda: (elsewhere(s3).status(STAGE), elsewhere(s3).fetch(STAGE)))
    where = f"{s3}/train/{STAGE.directory_name}"
    assert line == f"{where}/model.bin: {what}. Restore it, or delete {where} to build it again."
    assert not (elsewhere(s3).root / key).exists()


def test_manifest_in_a_store_cannot_name_a_file_outside_of_its_directory(s3, tmp_path):
    build(Storage(s3))
    key = f"train/{STAGE.directory_name}/{MANIFEST}"
    manifest = json.loads(Objects(s3).read(key))
    manifest["files"][0]["path"] = "../../../outside"
    Objects(s3).write(key, json.dumps(manifest).encode())
    assert "names a file outside of it" in complaint(Storage(s3).status, STAGE)
    assert not list(tmp_path.rglob("outside"))


def fails_writes(status: int):
    return lambda method, path: ("status", status) if method in ("PUT", "POST") else None


@pytest.mark.parametrize("broken_at", [0, 1, 2], ids=["first file", "second file", "manifest"])
def test_commit_into_a_full_bucket_is_one_clear_line_and_no_artifact(s3, s3_proxy, elsewhere, broken_at):
    storage, writes = Storage(s3), itertools.count()
    full = fails_writes(507)
    fault = lambda *request: full(*request) if full(*request) and next(writes) >= broken_at else None  # noqa: E731
    with s3_proxy.broken(fault), pytest.raises(OSError) as error:
        build(storage)
    assert "cannot be written" in error.value.strerror and "The bucket is full" in error.value.strerror
    assert error.value.filename.startswith(f"{s3}/train/{STAGE.directory_name}/")
    assert elsewhere(s3).status(STAGE) == "missing" and storage.status(STAGE) == "partial"
    build(storage)
    assert read(elsewhere(s3)) == FILES


def test_answers_500_that_pass_on_the_second_try_lose_nothing(s3, s3_proxy, elsewhere):
    tried = set()
    fault = lambda *request: ("status", 500) if request not in tried and not tried.add(request) else None  # noqa: E731
    with s3_proxy.broken(fault):
        build(Storage(s3))
        assert read(elsewhere(s3)) == FILES


def test_slow_reads_arrive_and_silent_ones_end_in_one_line(s3, s3_proxy, elsewhere, monkeypatch):
    build(Storage(s3))
    with s3_proxy.broken(lambda method, path: ("slow", 0.5) if "model.bin" in path else None):
        assert read(elsewhere(s3)) == FILES
    silent = elsewhere(s3, "third")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    fault = lambda method, path: ("silent", 3) if "model.bin" in path else None  # noqa: E731
    with s3_proxy.broken(fault), pytest.raises(OSError) as error:
        silent.fetch(STAGE)
    assert "cannot be read" in error.value.strerror and "\n" not in error.value.strerror
    assert not (silent.root / "train" / STAGE.directory_name / "model.bin").exists()
    assert read(silent) == FILES


def test_create_is_won_once_even_where_the_answer_gets_lost(s3, s3_proxy):
    objects = Objects(s3)
    won: list[int] = []
    threads = [
        threading.Thread(target=lambda i=i: objects.create("one", b"%d" % i) and won.append(i)) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [objects.read("one")] == [b"%d" % i for i in won]
    with s3_proxy.broken(lambda method, path: ("lost", 500) if method == "PUT" else None):
        assert objects.create("two", b"mine")
    assert not objects.create("two", b"theirs")


def test_lease_of_another_node_is_waited_for_until_it_is_let_go(s3, elsewhere, capsys):
    entered = threading.Event()

    def second():
        with elsewhere(s3).lock("train-1"):
            entered.set()

    thread = threading.Thread(target=second)
    with Storage(s3).lock("train-1"):
        thread.start()
        assert not entered.wait(3)
    assert entered.wait(20)
    thread.join()
    assert "train-1: another command works on it" in capsys.readouterr().err


def test_lease_that_is_not_renewed_runs_out_and_its_late_holder_cannot_commit(s3, elsewhere, monkeypatch):
    monkeypatch.setattr(lease, "EXPIRE_SECONDS", 2.0)
    monkeypatch.setattr(lease, "BEAT_SECONDS", 1000.0)  # the holder sleeps
    late = Storage(s3)
    with late.lock(f"train-{STAGE.id}"):
        other = elsewhere(s3)
        with other.lock(f"train-{STAGE.id}"):
            assert "another command may have taken over" in complaint(build, late, kind=StageFailed)
            build(other)
    assert read(elsewhere(s3, "third")) == FILES


HOLDER = """
import sys
from sdft_ray.store.storage import Storage
with Storage(sys.argv[1]).lock("train-1"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_lease_of_a_killed_driver_on_this_node_is_free_at_once(s3):
    command = [sys.executable, "-c", HOLDER, s3]
    owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ)
    assert owner.stdout.readline() == "held\n"
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdin.close()
    owner.stdout.close()
    with Storage(s3).lock("train-1"):
        assert lease.EXPIRE_SECONDS > 30, "it was not waited for"


def test_pieces_of_work_are_brought_to_another_node_and_gone_ones_go(s3, elsewhere):
    here, there = Storage(s3), elsewhere(s3)
    ledger = here.ledger("words")
    for name in ("part-a-1", "part-a-2", "part-b-1"):
        (ledger / name).write_text(name)
        here.publish(ledger / name)
    copy = there.ledger("words")
    there.bring(copy, "part-a-*")
    assert sorted(path.name for path in copy.iterdir()) == ["part-a-1", "part-a-2"]
    for path in ledger.iterdir():
        path.unlink()
    (ledger / "part-merged").write_text("all")
    here.mirror(ledger)
    assert {key: entry.bytes for key, entry in Objects(s3).list().items()} == {"ledger/words/part-merged": 3}
    here.drop(ledger)
    assert Objects(s3).list() == {} and not ledger.exists()


def test_piece_that_was_written_again_with_as_many_bytes_replaces_its_copy_on_either_side(s3, s3_proxy, elsewhere):
    def transfers(call, *arguments) -> list[str]:
        s3_proxy.requests.clear()
        call(*arguments)
        return [method for method, path in s3_proxy.requests if path.partition("?")[0].endswith("words/part")]

    here, there = Storage(s3), elsewhere(s3)
    piece, copy = here.ledger("words") / "part", there.ledger("words") / "part"
    for text in ("old", "new"):
        piece.write_text(text)
        here.publish(piece)
        assert transfers(there.bring, copy.parent) == ["GET"] and copy.read_text() == text
    assert transfers(there.bring, copy.parent) == []
    assert transfers(here.bring, piece.parent) == [], "what this node put itself is not brought"
    piece.write_text("own")
    assert transfers(here.mirror, piece.parent) == ["PUT"] and transfers(here.mirror, piece.parent) == []
    assert transfers(elsewhere(s3).bring, copy.parent) == ["GET"] and copy.read_text() == "own"


def test_piece_that_was_put_in_parts_is_brought_and_put_once(s3, s3_proxy, elsewhere):
    here, there = Storage(s3), elsewhere(s3)
    objects, piece = Objects(s3), here.ledger("words") / "part"
    for letter in (b"a", b"b"):
        content = letter * (6 << 20)
        with objects.filesystem.open(objects.path("ledger/words/part"), "wb", block_size=5 << 20) as file:
            file.write(content)
        assert objects.list()["ledger/words/part"].md5 == "", "its store gives no hash of it"
        for node in (here, there):
            node.bring(node.ledger("words"))
            assert (node.ledger("words") / "part").read_bytes() == content
    s3_proxy.requests.clear()
    here.mirror(piece.parent)
    there.bring(there.ledger("words"))
    assert {method for method, path in s3_proxy.requests if path.partition("?")[0].endswith("words/part")} == set()


def test_find_and_failures_of_a_store(s3, elsewhere):
    build(Storage(s3))
    place = elsewhere(s3).find(STAGE.id[:6], MANIFEST)
    assert [path.name for path in place.iterdir()] == [MANIFEST]
    assert f"is no artifact under {s3}" in complaint(elsewhere(s3).find, "0" * 12)
    notes.keep_failure(Storage(s3), STAGE, "no room")
    assert notes.read_failure(elsewhere(s3), STAGE) == "no room"
    notes.forget_failure(elsewhere(s3), STAGE)
    assert notes.read_failure(Storage(s3), STAGE) is None


def test_probe_says_in_one_line_what_a_root_cannot_do(s3, s3_proxy):
    probe(s3)
    assert Objects(s3).list() == {}
    line = complaint(probe, "s3://no-such-bucket/x")
    assert "cannot be written (The specified bucket does not exist)" in line and "\n" not in line
    with s3_proxy.broken(lambda *request: ("status", 403)):
        assert "Check bucket, endpoint, network and credentials" in complaint(probe, s3)


def test_secrets_stay_out_of_everything_that_is_written(s3, tmp_path, s3_proxy):
    build(Storage(s3))
    Storage(s3).fetch(STAGE)
    objects = Objects(s3)
    with s3_proxy.broken(lambda *request: ("status", 403)):
        line = complaint(probe, s3)
    written = [line, *(objects.read(key).decode() for key in objects.list())]
    written += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 6 and not any("planted" in text for text in written)

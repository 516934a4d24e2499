"""How far a stage is, what a kill leaves, and who may build."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from refusals import complaint

from sdft_ray.errors import UserError
from sdft_ray.store import manifest as manifests
from sdft_ray.store.identity import Stage
from sdft_ray.store.manifest import FORMAT, MANIFEST, read_manifest
from sdft_ray.store.storage import Storage

STAGE = Stage("score", "tiny", 1, {"n": 1})
RENAMED = dataclasses.replace(STAGE, slug="renamed-model")

# Says when it holds the lock and what the holder before it had made by then; then waits for its end of input.
HOLDER = """
import sys
from pathlib import Path
from sdft_ray.store.storage import Storage
with Storage(sys.argv[1]).lock("score-1"):
    print("held", (Path(sys.argv[1]) / "made").exists(), flush=True)
    sys.stdin.read()
"""


def build(storage: Storage, stage: Stage = STAGE, text: str = "four"):
    (storage.scratch(stage) / "data.txt").write_text(text)
    return storage.commit(stage, {"rows": 1}, 0.1)


def test_status_goes_from_missing_over_partial_to_done(storage):
    assert storage.status(STAGE) == "missing"
    (storage.scratch(STAGE) / "data.txt").write_text("four")
    assert storage.status(STAGE) == "partial"
    storage.commit(STAGE, {}, 0.1)
    assert storage.status(STAGE) == "done"


def test_status_with_pieces_to_go_on_from_is_partial(storage):
    storage.resumable(STAGE)
    assert storage.status(STAGE) == "partial"


@pytest.mark.parametrize("left", ["data.txt", ".nfs000000000001"])
def test_artifact_that_was_deleted_in_part_is_built_again(storage, left):
    """Also where NFS keeps a file that somebody reads: its directory stays, too."""
    place = build(storage)
    (place / MANIFEST).unlink()
    (place / "data.txt").rename(place / left)
    again = Storage(str(storage.root))
    assert again.status(STAGE) == "missing"
    assert build(again, text="five") == place
    assert {path.name for path in place.iterdir()} == {"data.txt", MANIFEST}
    assert (place / "data.txt").read_text() == "five" and again.status(STAGE) == "done"
    assert not [*(storage.root / "scratch" / "score").iterdir()]


def test_artifact_on_a_node_that_does_not_see_the_root_names_it_and_the_node(storage):
    """What a worker gets there, with and without a look at the hashes."""
    place, bring = build(storage), storage.handle(STAGE)
    assert bring() == place
    shutil.rmtree(place)  # as on a node with a disk of its own
    for there in (bring, lambda: Storage(str(storage.root)).fetch(STAGE), lambda: storage.files(STAGE)):
        with pytest.raises(UserError) as error:
            there()
        assert str(error.value).startswith(f"--root: {place} is not on {socket.gethostname()}. Give a directory that")


def test_an_empty_name_is_not_the_artifact_that_the_command_is_run_in(storage, monkeypatch):
    monkeypatch.chdir(build(storage))
    with pytest.raises(UserError, match=r"^an empty name: is no artifact under"):
        storage.find("")


def test_finished_artifact_is_never_replaced(storage):
    place = build(storage)
    with pytest.raises(OSError, match="not empty"):
        build(storage, text="five")
    assert (place / "data.txt").read_text() == "four"


def test_artifact_is_finished_where_git_is_not_installed(storage, monkeypatch):
    """As in the image of jobs/Dockerfile."""
    manifests._read_versions.cache_clear()
    monkeypatch.setenv("PATH", "")
    build(storage)
    assert storage.manifest(STAGE).provenance.git_commit is None
    manifests._read_versions.cache_clear()


def test_commit_of_the_code_is_not_that_of_a_repository_around_its_environment(tmp_path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, check=True)
        return done.stdout.decode().strip()

    own, foreign = tmp_path / "own.py", tmp_path / "venv" / "foreign.py"
    foreign.parent.mkdir()
    own.touch(), foreign.touch()
    git("init")
    git("add", "own.py")
    git("commit", "-m", "first")
    assert manifests._read_commit(own) == git("rev-parse", "HEAD")
    assert manifests._read_commit(foreign) is None


def test_status_of_another_identity_is_missing(storage):
    build(storage)
    assert storage.status(Stage("score", "tiny", 1, {"n": 2})) == "missing"


def test_status_of_a_users_own_directory_is_done_and_it_lies_where_it_is(storage, tmp_path):
    own = Stage("model", "own", 1, {"sha256": "ab"}, location=tmp_path)
    assert storage.status(own) == "done"
    assert storage.place(own) == storage.fetch(own) == tmp_path


def test_artifact_is_found_by_its_id_whatever_the_model_or_file_is_called_now(storage):
    place = build(storage)
    for each in (storage, Storage(str(storage.root))):
        assert each.status(RENAMED) == "done"
        assert each.place(RENAMED) == each.fetch(RENAMED) == place and each.where(RENAMED) == str(place)
        assert each.manifest(RENAMED).slug == "tiny"
    (place / "data.txt").unlink()
    assert f"{place / 'data.txt'}: is missing" in complaint(Storage(str(storage.root)).status, RENAMED)


def test_work_in_progress_is_found_by_its_id_and_ends_where_it_was_begun(storage):
    (storage.scratch(STAGE) / "half.txt").write_text("half")
    (storage.resumable(STAGE) / "checkpoint").write_text("1")
    ledger = storage.ledger("tiny-0123456789ab")
    (ledger / "part-1").write_text("rows")
    again = Storage(str(storage.root))
    assert again.status(RENAMED) == "partial"
    assert (again.scratch(RENAMED) / "half.txt").read_text() == "half"
    assert (again.resumable(RENAMED) / "checkpoint").read_text() == "1"
    assert again.ledger("renamed-model-0123456789ab") == ledger
    assert again.ledger("renamed-model-0123456789cd") != ledger
    place = again.commit(RENAMED, {}, 0.1)
    assert storage.status(STAGE) == "done" and storage.fetch(STAGE) == place
    left = [path for name in ("scratch", "resumable") for path in (storage.root / name).rglob("*") if path.is_file()]
    assert left == []


def test_two_finished_directories_of_one_id_are_one_artifact(storage):
    place = build(storage)
    other = place.with_name(f"a-{STAGE.id}")  # as roots have them from when artifacts were found by name
    shutil.copytree(place, other)
    assert storage.place(STAGE) == place
    third = Storage(str(storage.root))
    assert third.status(RENAMED) == "done" and third.place(RENAMED) == third.find(STAGE.id) == other
    (other / MANIFEST).unlink()
    assert Storage(str(storage.root)).place(RENAMED) == Storage(str(storage.root)).find(STAGE.id) == place


def test_survey_lists_each_folder_once_and_nothing_listed_outlives_it(storage, monkeypatch):
    stages = [Stage("score", "tiny", 1, {"n": n}) for n in range(50)]
    for stage in stages[:20]:
        build(storage, dataclasses.replace(stage, slug="before"))
    seen: list[str] = []
    look = os.scandir
    fresh, other = Storage(str(storage.root)), Storage(str(storage.root))
    with monkeypatch.context() as patch, fresh.survey():
        patch.setattr(os, "scandir", lambda path=".": seen.append(str(path)) or look(path))
        patch.setattr(os, "listdir", lambda path=".": seen.append(str(path)) or [entry.name for entry in look(path)])
        status = [fresh.status(stage) for stage in stages]
        places = [fresh.where(stage) for stage in stages]
    assert status == ["done"] * 20 + ["missing"] * 30
    assert places[0] == str(storage.root / "score" / f"before-{stages[0].id}")
    assert seen.count(str(storage.root / "score")) == 1
    build(other, stages[30])
    assert fresh.status(stages[30]) == "done"


def test_scratch_is_found_again_as_it_was_left(storage):
    (storage.scratch(STAGE) / "half.txt").write_text("half")
    assert (Storage(str(storage.root)).scratch(STAGE) / "half.txt").read_text() == "half"


def test_commit_moves_the_files_into_place_and_leaves_nothing_of_the_work(storage):
    (storage.resumable(STAGE) / "checkpoint").write_text("1")
    place = build(storage)
    assert place == storage.root / "score" / f"tiny-{STAGE.id}"
    assert (place / "data.txt").read_text() == "four"
    assert read_manifest(place).summary == {"rows": 1}
    left = [path for name in ("scratch", "resumable") for path in (storage.root / name).rglob("*") if path.is_file()]
    assert left == []


def test_commit_drops_what_a_torn_write_left(storage):
    scratch = storage.scratch(STAGE)
    (scratch / "inner").mkdir()
    for torn in (scratch / ".data.txt.123.tmp", scratch / "inner" / ".x.9.tmp"):
        torn.write_text("ha")
    place = build(storage)
    assert [file.path for file in read_manifest(place).files] == ["data.txt"]
    assert sorted(path.name for path in place.rglob("*") if path.is_file()) == ["data.txt", MANIFEST]


def test_fetch_returns_the_directory_of_a_whole_artifact(storage):
    place = build(storage)
    assert Storage(str(storage.root)).fetch(STAGE) == place


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_text("fou"), "is damaged (got 3 bytes; expected 4)"),
        (lambda path: path.write_text(""), "is damaged (got 0 bytes; expected 4)"),
    ],
    ids=["missing", "short", "empty"],
)
def test_status_of_a_damaged_artifact_is_an_error_that_names_file_and_remedy(storage, damage, what):
    place = build(storage)
    damage(place / "data.txt")
    line = f"{place / 'data.txt'}: {what}. Restore it, or delete {place} to build it again."
    assert complaint(storage.status, STAGE) == line
    assert complaint(Storage(str(storage.root)).fetch, STAGE) == line


def test_fetch_of_an_altered_artifact_is_an_error_that_names_file_and_remedy(storage):
    place = build(storage)
    (place / "data.txt").write_text("five")
    assert complaint(Storage(str(storage.root)).fetch, STAGE) == (
        f"{place / 'data.txt'}: is altered (its sha256 is not the manifest's). "
        f"Restore it, or delete {place} to build it again."
    )


def test_status_of_a_deleted_damaged_artifact_is_missing_again(storage):
    place = build(storage)
    for path in place.iterdir():
        path.unlink()
    place.rmdir()
    assert storage.status(STAGE) == "missing"
    assert build(storage) == place


def test_find_takes_an_id_the_start_of_one_or_a_path(storage):
    place = build(storage)
    build(storage, Stage("score", "tiny", 1, {"n": 2}))
    for name in (STAGE.id, STAGE.id[:6], str(place)):
        assert storage.find(name) == place


def test_find_takes_what_other_commands_print_of_an_artifact(storage):
    place = build(storage)
    for name in (STAGE.id.upper(), place.name, f"score/{place.name}/"):
        assert storage.find(name) == place


@pytest.mark.parametrize("root", ["file", "file/below", "loop", "a\0b", "~nobody-of-this-name/x", "x" * 300])
def test_root_that_can_be_no_directory_is_one_clear_line(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    line = complaint(Storage, root)
    assert line.startswith("--root: ") and line.endswith(" Give a directory.") and "\n" not in line


def test_find_of_nothing_is_one_clear_line(storage):
    build(storage)
    for name in ("0" * 12, STAGE.id[:3], "score"):
        assert complaint(storage.find, name) == (
            f"{name}: is no artifact under {storage.root}. Run `sdft check RECIPE` to list them."
        )


def test_find_of_an_unfinished_artifact_is_nothing(storage):
    storage.scratch(STAGE)
    assert "is no artifact" in complaint(storage.find, STAGE.id)


def test_find_of_several_names_them(storage):
    shared: dict[str, Stage] = {}
    stage = None
    for n in range(5000):  # until two ids begin alike
        stage = Stage("score", "tiny", 1, {"n": n})
        if stage.id[:4] in shared:
            break
        shared[stage.id[:4]] = stage
    other = shared[stage.id[:4]]
    for each in (stage, other):
        build(storage, each)
    line = complaint(storage.find, stage.id[:4])
    assert line.startswith(f"{stage.id[:4]}: means 2 artifacts. Give more digits: ")
    assert stage.directory_name in line
    assert other.directory_name in line


@pytest.fixture
def start_holder(storage):
    """Start processes that want the lock; none outlives the test."""
    started = []

    def start() -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(storage.root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_lock_that_is_held_makes_the_second_wait_visibly_until_the_first_is_done(storage, start_holder):
    with storage.lock("score-1"):
        second = start_holder()
        line = second.stderr.readline()
        assert line == "score-1: another command works on it; waiting\n"
        (storage.root / "made").write_text("by the first")
    assert second.stdout.readline() == "held True\n"


def test_lock_of_a_killed_owner_is_free(storage, start_holder, capsys):
    owner = start_holder()
    assert owner.stdout.readline() == "held False\n"
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with storage.lock("score-1"):
        assert capsys.readouterr().err == "", "it waited"


def test_lock_of_another_stage_is_free(storage, start_holder, capsys):
    assert start_holder().stdout.readline() == "held False\n"
    with storage.lock("score-2"):
        assert capsys.readouterr().err == "", "it waited"


@pytest.mark.parametrize(
    ("root", "what"),
    [
        ("", "--root: is empty"),
        ("ftp://host/x", "ftp:// is an unknown kind of store"),
        ("s3:/bucket/x", "s3:/bucket/x is neither a directory nor a URI. Write s3://bucket/x."),
        ("s3:bucket/x/", "Write s3://bucket/x."),
        ("s3//bucket/x", "Write s3://bucket/x."),
        ("s3:///bucket/x", "Write s3://bucket/x."),
        ("S3://bucket/X", "Write s3://bucket/X."),
        (" s3://bucket/x", "Write s3://bucket/x."),
        ("s3a://bucket/x", "Write s3://bucket/x."),
        ("gs:/bucket/x", "Write gs://bucket/x."),
        ("GCS://bucket/x", "Write gs://bucket/x."),
        ("az:container/x", "Write az://container/x."),
        ("file:///tmp/a%20b", "Write /tmp/a b."),
        ("file:/tmp/x", "Write /tmp/x."),
        ("s3://", "names no bucket"),
        ("s3://key:secret@bucket/x", "the URI holds credentials"),
        ("s3:/key:secret@bucket/x", "the URI holds credentials"),
    ],
)
def test_storage_at_a_uri_that_cannot_be_a_root_is_refused(root, what):
    line = complaint(Storage, root)
    assert what in line and "secret" not in line


@pytest.mark.parametrize("name", ["s3", "run:1", "results:new/x", "a//b", "at@home"])
def test_storage_in_a_directory_whose_name_looks_like_an_address_is_that_directory(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Storage(name).root == tmp_path / name


def test_manifest_of_a_newer_format_is_refused_and_one_without_is_of_the_first(storage):
    place = build(storage)
    manifest = read_manifest(place).plain()
    assert manifest["format"] == FORMAT == 1
    (place / MANIFEST).write_text(json.dumps(manifest | {"format": FORMAT + 1}))
    assert complaint(storage.status, STAGE) == (
        f"{place / MANIFEST}: is of format 2, which is newer than this version of sdft_ray (it reads up to 1). "
        "Upgrade sdft_ray."
    )
    del manifest["format"]
    (place / MANIFEST).write_text(json.dumps(manifest))
    assert storage.status(STAGE) == "done"


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "a/../../b"])
def test_manifest_that_lists_a_file_outside_of_its_directory_is_refused(storage, name):
    place = build(storage)
    manifest = read_manifest(place).plain()
    manifest["files"][0]["path"] = name
    (place / MANIFEST).write_text(json.dumps(manifest))
    assert "names a file outside of it" in complaint(storage.status, STAGE)


def test_storage_root_may_be_relative_or_of_the_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Storage("./artifacts").root == tmp_path / "artifacts"
    assert Storage("~/artifacts").root == tmp_path / "home" / "artifacts"


def test_commit_files_are_readable_by_whoever_may_read_the_directory(storage):
    scratch = storage.scratch(STAGE)
    scratch.chmod(0o755)
    (scratch / "private.bin").write_text("x")
    (scratch / "private.bin").chmod(0o600)
    place = build(storage)
    assert (place / "private.bin").stat().st_mode & 0o044 == 0o044

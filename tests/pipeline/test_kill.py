"""The whole command is killed, or told to end, at points that matter; the end is the same as of a run left alone."""

import fnmatch
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable

import pyarrow.parquet as pq
import pytest
from faked import count_asked, fill_disk, finish, kill, make_folder, outcome, require_same, start, wait_for

from sdft_ray.store.manifest import check_files, read_manifest
from sdft_ray.store.objects import Objects
from sdft_ray.store.storage import Storage

RUN = ("run", "recipe.yaml", "--until", "train")
PIECE, CHECKPOINT = "ledger/*/part-*.parquet", "resumable/train/*/ray_train*/checkpoint_*/progress.json"


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """A directory with the recipe and the command, whose engine is slow enough to be caught at work."""
    compute = {
        "distill": {"cpus": 1, "batch_rows": 16, "piece_rows": 4},
        "train": {"workers": 1, "cpus": 1, "micro_batch": 2, "checkpoint_every_steps": 4},
    }
    return make_folder(
        tmp_path_factory.mktemp("kill"),
        tiny_model,
        compute,
        prune={"blocks": 2, "calibration": {"text": "texts.txt", "limit": 3}},
        distill={},
        train={"global_batch_size": 4, "epochs": 3, "lr": 1e-3, "validate_every_steps": 5},
        arms={"distilled": {}},
    )


def test_killed_while_generating_and_while_training_ends_as_if_left_alone(folder, alone, record_property):
    artifacts, asked = folder / "artifacts", count_asked(folder)
    wait_for(first := start(folder, *RUN), lambda: list(artifacts.glob(PIECE)))
    kill(first)
    assert not list((artifacts / "distill").glob("*")), "nothing half-done stands in an artifact's place"
    assert list(artifacts.glob(PIECE)), "what was generated is kept"

    second = start(folder, *RUN)
    wait_for(second, lambda: list(artifacts.glob(CHECKPOINT)))
    kill(second)
    record_property("generating: rows asked for again", again := count_asked(folder) - asked - 48)
    assert again <= 2 * 5, "a piece, and a row that was not finished, of each engine"
    ledger = [row for path in artifacts.glob("ledger/*/part-*") for row in pq.read_table(path)["id"].to_pylist()]
    assert len(ledger) == len(set(ledger)) == 48, "no row lost, none twice"
    assert not list((artifacts / "train").glob("*"))

    finish(start(folder, *RUN))
    require_same(outcome(artifacts), alone)


@pytest.fixture(scope="module")
def alone(folder) -> dict:
    """The outcome of a run that nothing interrupts."""
    finish(start(folder, *RUN, "--root", "alone"))
    return outcome(folder / "alone")


@pytest.mark.parametrize(
    ("number", "at"),
    [
        (signal.SIGTERM, PIECE),
        pytest.param(signal.SIGTERM, CHECKPOINT, marks=pytest.mark.full),
        pytest.param(signal.SIGINT, CHECKPOINT, marks=pytest.mark.full),
    ],
    ids=["SIGTERM-generating", "SIGTERM-training", "SIGINT-training"],
)
def test_stopped_by_a_signal_ends_in_one_line_and_keeps_what_was_finished(folder, tmp_path, number, at):
    process = start(folder, *RUN, "--root", str(tmp_path))
    wait_for(process, lambda: list(tmp_path.glob(at)))
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 128 + number
    assert errors.splitlines()[-1] == "Stopped. Finished work is kept; the same command goes on from there."
    assert "***" not in errors and "Traceback" not in errors
    assert list(tmp_path.glob(at))


@pytest.mark.full
def test_full_disk_while_generating_ends_in_one_line_and_costs_no_row(folder, alone, small_disk, record_property):
    asked, run = count_asked(folder), (*RUN, "--root", str(small_disk))
    process = start(folder, *run)
    wait_for(process, lambda: list(small_disk.glob(PIECE)))
    filled = fill_disk(small_disk)
    _, errors = process.communicate()
    assert process.returncode == 1 and "Traceback" not in errors
    assert "No space left on device" in errors.splitlines()[-1]
    filled.unlink()
    pieces, begun = set(small_disk.glob(PIECE)), time.time()
    process = start(folder, *run)
    wait_for(process, lambda: any("-all-" not in path.name for path in set(small_disk.glob(PIECE)) - pieces))
    record_property("full disk: seconds from the command to the next piece", time.time() - begun)
    finish(process)
    record_property("full disk: rows asked for again", count_asked(folder) - asked - 48)
    require_same(outcome(small_disk), alone)


@pytest.mark.full
def test_object_store_whose_every_request_fails_once_and_that_is_full_for_a_while_costs_no_row(
    folder, alone, s3, s3_proxy, record_property
):
    tried: set[tuple[str, str]] = set()
    injected: Counter[str] = Counter()
    full = threading.Event()

    def fault(*request: str) -> tuple[str, int] | None:
        found = None
        if full.is_set() and request[0] in ("PUT", "POST"):
            found = ("status", 507)
        elif request not in tried:
            tried.add(request)
            found = ("silent", 2) if len(tried) % 10 == 0 else ("status", 500)
        elif request[0] == "GET" and sum(injected.values()) % 10 == 0:
            found = ("slow", 1)
        if found:
            injected[f"{found[0]} {found[1]}"] += 1
        return found

    def pieces() -> set[str]:
        """Return the pieces of engines, without the one that the next command makes of all before it starts any."""
        return {key for key in Objects(s3).list() if fnmatch.fnmatch(key, PIECE) and "-all-" not in key}

    asked, run = count_asked(folder), (*RUN, "--root", s3)
    with s3_proxy.broken(fault):
        process = start(folder, *run)
        wait_for(process, pieces)
        full.set()
        _, errors = process.communicate()
        assert process.returncode == 1 and "Traceback" not in errors and "planted" not in errors
        full.clear()
        before, begun = pieces(), time.time()
        process = start(folder, *run)
        wait_for(process, lambda: pieces() - before)
        record_property("object store: seconds from the command to the next piece", time.time() - begun)
        finish(process)
    record_property("object store: rows asked for again", count_asked(folder) - asked - 48)
    record_property("object store: injected", dict(injected))
    require_same(outcome(Storage(s3).root), alone)


@pytest.mark.full
def test_killed_on_two_nodes_and_ended_on_a_third_that_share_only_an_object_store(
    folder, alone, s3, tmp_path, record_property
):
    asked = count_asked(folder)

    def seen(pattern: str) -> Callable[[], bool]:
        return lambda: any(fnmatch.fnmatch(key, pattern) for key in Objects(s3).list())

    for node, pattern in {"first": "ledger/*/part-*", "second": "resumable/train/*/checkpoint_*/progress.json"}.items():
        process = start(folder, *RUN, "--root", s3, XDG_CACHE_HOME=str(tmp_path / node))
        wait_for(process, seen(pattern))
        kill(process)
    said = finish(start(folder, *RUN, "--root", s3, XDG_CACHE_HOME=str(tmp_path / "third")))
    record_property("three nodes: rows asked for again", count_asked(folder) - asked - 48)

    for key in Objects(s3).list():
        if key.count("/") == 2 and key.endswith("/manifest.json"):
            place = Storage(s3).find(key.split("/")[1].rpartition("-")[2])
            check_files(place, read_manifest(place), hashes=True)
    require_same(outcome(Storage(s3).root), alone)
    assert not any(key.startswith(("resumable", "scratch")) for key in Objects(s3).list())
    assert "planted" not in said
    assert "Nothing to do" in finish(start(folder, *RUN, "--root", s3, XDG_CACHE_HOME=str(tmp_path / "fourth")))

"""The whole command is killed, or told to end, at points that matter; the end is the same as of a run left alone."""

import fnmatch
import json
import signal
from collections.abc import Callable

import pyarrow.parquet as pq
import pytest
from faked import finish, kill, make_folder, outcome, require_same, start, wait_for

from sdft_ray.artifacts import check_files
from sdft_ray.objects import Objects
from sdft_ray.storage import Storage

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


def test_killed_while_generating_and_while_training_ends_as_if_left_alone(folder, alone):
    artifacts = folder / "artifacts"
    wait_for(first := start(folder, *RUN), lambda: list(artifacts.glob(PIECE)))
    kill(first)
    assert not list((artifacts / "distill").glob("*")), "nothing half-done stands in an artifact's place"
    kept = sum(pq.read_metadata(path).num_rows for path in artifacts.glob(PIECE))
    assert kept > 0

    second = start(folder, *RUN)
    wait_for(second, lambda: list(artifacts.glob(CHECKPOINT)))
    kill(second)
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
    assert errors.splitlines()[-1] == "Stopped. What was finished is kept; the same command goes on from there."
    assert "***" not in errors and "Traceback" not in errors
    assert list(tmp_path.glob(at))


@pytest.mark.full
def test_killed_on_two_nodes_and_ended_on_a_third_that_share_only_an_object_store(folder, alone, s3, tmp_path):
    def seen(pattern: str) -> Callable[[], bool]:
        return lambda: any(fnmatch.fnmatch(key, pattern) for key in Objects(s3).list())

    for node, pattern in {"first": "ledger/*/part-*", "second": "resumable/train/*/checkpoint_*/progress.json"}.items():
        process = start(folder, *RUN, "--root", s3, XDG_CACHE_HOME=str(tmp_path / node))
        wait_for(process, seen(pattern))
        kill(process)
    said = finish(start(folder, *RUN, "--root", s3, XDG_CACHE_HOME=str(tmp_path / "third")))

    for key in Objects(s3).list():
        if key.count("/") == 2 and key.endswith("/manifest.json"):
            place = Storage(s3).find(key.split("/")[1].rpartition("-")[2])
            check_files(place, json.loads((place / "manifest.json").read_text()), hashes=True)
    require_same(outcome(Storage(s3).root), alone)
    assert not any(key.startswith(("resumable", "scratch")) for key in Objects(s3).list())
    assert "planted" not in said
    assert "Nothing to do" in finish(start(folder, *RUN, "--root", s3, XDG_CACHE_HOME=str(tmp_path / "fourth")))

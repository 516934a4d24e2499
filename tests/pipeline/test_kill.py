"""SIGKILL of the whole command, twice, at points that matter; the end is the same as of a run left alone."""

import contextlib
import fnmatch
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from sdft_ray.artifacts import check_files
from sdft_ray.objects import Objects
from sdft_ray.storage import Storage

# The command with a fake at the engine boundary: it is slow enough to be caught at work.
SCRIPT = textwrap.dedent(
    """
    import sys, time
    from sdft_ray import cli, lease
    from sdft_ray.core.selection import Generation
    from sdft_ray.stages import distill

    class FakeEngine:
        def __init__(self, model, settings, options, alone):
            pass

        def generate(self, requests):
            for request in requests:
                time.sleep(0.1)
                yield request, Generation(f"seed {request.sampling_seed}", "stop", len(request.prompt_ids), 2)

    distill.VllmEngine = FakeEngine
    lease.BEAT_SECONDS, lease.EXPIRE_SECONDS = 0.5, 8.0
    sys.exit(cli.main(["run", "recipe.yaml", "--compute", "compute.yaml", *sys.argv[1:]]))
    """
)


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """A directory with the recipe and the command."""
    tmp_path = tmp_path_factory.mktemp("kill")
    rows = [{"q": f"What is {i} + {i}?", "a": f"{i} + {i} = {2 * i}"} for i in range(56)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts.txt").write_text("One text.\n\nAnother text.\n\nA third text.")
    recipe = {
        "model": {"path": str(tiny_model)},
        "rows": {
            "path": "sums.jsonl",
            "fields": {"prompt": "q", "response": "a"},
            "held_out": 4,
            "validation": 4,
            "answer": "none",
        },
        "prune": {"blocks": 2, "calibration": {"text": "texts.txt", "limit": 3}},
        "train": {"global_batch_size": 4, "epochs": 3, "lr": 1e-3, "validate_every_steps": 5},
        "arms": {"distilled": {}},
        "evaluate": {"tasks": ["arc_easy"], "limit": 2},
    }
    compute = {
        "distill": {"cpus": 1, "batch_rows": 16, "piece_rows": 4},
        "train": {"workers": 1, "cpus": 1, "micro_batch": 2, "checkpoint_every_steps": 4},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "compute.yaml").write_text(yaml.safe_dump(compute))
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "script.py", *(arguments or ("--until", "train"))],
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd()), **environment},
    )


def kill_when(process: subprocess.Popen, folder: Path, pattern: str) -> None:
    kill_once(process, lambda: bool(list((folder / "artifacts").glob(pattern))), pattern)


def kill_once(process: subprocess.Popen, there: Callable[[], bool], pattern: str) -> None:
    while not there():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
            raise AssertionError(f"it ended before there was a {pattern}: {process.stderr.read()}")
    process.send_signal(signal.SIGKILL)
    process.communicate()


def outcome(root: Path) -> dict:
    """Return what must not depend on kills: rows with seeds and text, losses, and the tuned weights' size."""
    (distilled,) = (root / "distill").iterdir()
    (tuned,) = (root / "train").iterdir()
    return {
        "ids": (distilled.name, tuned.name),
        "rows": pq.read_table(distilled / "train.parquet").to_pylist(),
        "losses": json.loads((tuned / "losses.json").read_text()),
    }


def finish(folder: Path, *arguments: str, **environment: str) -> str:
    process = start(folder, *arguments, **environment)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return errors


def test_killed_while_generating_and_while_training_ends_as_if_left_alone(folder, alone):
    kill_when(start(folder), folder, "ledger/*/part-*.parquet")
    assert not list((folder / "artifacts" / "distill").glob("*")), "nothing half-done stands in an artifact's place"
    kept = sum(pq.read_metadata(path).num_rows for path in (folder / "artifacts").glob("ledger/*/part-*.parquet"))
    assert kept > 0

    second = start(folder)
    kill_when(second, folder, "resumable/train/*/ray_train*/checkpoint_*/progress.json")
    ledger = [
        row["id"]
        for path in (folder / "artifacts").glob("ledger/*/part-*.parquet")
        for row in pq.read_table(path).to_pylist()
    ]
    assert len(ledger) == len(set(ledger)) == 48, "no row lost, none twice"
    assert not list((folder / "artifacts" / "train").glob("*"))

    finish(folder)
    require_same(outcome(folder / "artifacts"), alone)


@pytest.fixture(scope="module")
def alone(folder) -> dict:
    """The outcome of a run that nothing interrupts."""
    finish(folder, "--until", "train", "--root", "alone")
    return outcome(folder / "alone")


def require_same(again: dict, alone: dict) -> None:
    assert again["ids"] == alone["ids"]
    assert again["rows"] == alone["rows"]
    assert [step["step"] for step in again["losses"]] == [step["step"] for step in alone["losses"]]
    for got, expected in zip(again["losses"], alone["losses"], strict=True):
        assert got == pytest.approx(expected, abs=1e-6)


@pytest.mark.full
def test_killed_on_two_nodes_and_ended_on_a_third_that_share_only_an_object_store(folder, alone, s3, tmp_path):
    def seen(pattern: str) -> Callable[[], bool]:
        return lambda: any(fnmatch.fnmatch(key, pattern) for key in Objects(s3).list())

    for node, pattern in {"first": "ledger/*/part-*", "second": "resumable/train/*/checkpoint_*/progress.json"}.items():
        process = start(folder, "--root", s3, XDG_CACHE_HOME=str(tmp_path / node))
        kill_once(process, seen(pattern), pattern)
    said = finish(folder, "--root", s3, XDG_CACHE_HOME=str(tmp_path / "third"))

    for key in Objects(s3).list():
        if key.count("/") == 2 and key.endswith("/manifest.json"):
            place = Storage(s3).find(key.split("/")[1].rpartition("-")[2])
            check_files(place, json.loads((place / "manifest.json").read_text()), hashes=True)
    require_same(outcome(Storage(s3).root), alone)
    assert not any(key.startswith(("resumable", "scratch")) for key in Objects(s3).list())
    assert "planted" not in said
    assert "Nothing to do" in finish(folder, "--root", s3, XDG_CACHE_HOME=str(tmp_path / "fourth"))

"""The chain across the nodes of a cluster on this machine whose head is started anew between two commands."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from test_kill import SCRIPT, outcome

pytestmark = pytest.mark.full


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A directory with a recipe, and the command with a fake at the engine boundary."""
    rows = [{"q": f"What is {i} + {i}?", "a": f"{i} + {i} = {2 * i}"} for i in range(52)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts.txt").write_text("One text.\n\nAnother text.\n\nA third text.")
    recipe = {
        "model": {"path": str(tiny_model)},
        "rows": {
            "path": "sums.jsonl",
            "fields": {"prompt": "q", "response": "a"},
            "held_out": 0,
            "validation": 4,
            "answer": "none",
        },
        "prune": {"blocks": 2, "metric": "angular", "candidates": 0, "calibration": {"text": "texts.txt", "limit": 3}},
        "distill": {"shift_rows": 0},
        "train": {"global_batch_size": 4, "epochs": 2, "lr": 1e-3, "validate_every_steps": 4},
        "arms": {"distilled": {}},
        "evaluate": {"tasks": ["arc_easy", "sciq", "piqa"], "limit": 40, "dtype": "float32"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


@contextlib.contextmanager
def nodes_on_loopback() -> Iterator[str]:
    """Hold a head without CPUs and two nodes with one each; its address."""
    from ray.cluster_utils import Cluster

    before, port = os.environ.get("RAY_API_SERVER_ADDRESS"), free_port()
    # Asked by Ray Train for who is dead; without it, it does not find its cluster among several on one machine.
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        yield cluster.address
    finally:
        cluster.shutdown()
        os.environ.pop("RAY_API_SERVER_ADDRESS")
        if before is not None:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


def start(folder: Path, address: str, *more: str) -> subprocess.Popen:
    compute = {
        "ray": {"address": address, "largest_node": {"cpus": 1}},
        "score": {"cpus": 1},
        "distill": {"actors": 2, "cpus": 1, "batch_rows": 12, "piece_rows": 4},
        "train": {"workers": 2, "cpus": 1, "micro_batch": 2, "checkpoint_every_steps": 2},
    }
    (folder / "compute.yaml").write_text(yaml.safe_dump(compute))
    return subprocess.Popen(
        [sys.executable, "script.py", *more],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )


def finish(process: subprocess.Popen) -> str:
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return errors


def wait_for(process: subprocess.Popen, there) -> None:
    while not there():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            raise AssertionError(f"it ended before: {process.stderr.read()}")


def test_chain_goes_on_under_a_head_that_was_started_anew(folder):
    with nodes_on_loopback() as address:
        process = start(folder, address)
        wait_for(process, lambda: list((folder / "artifacts").glob("ledger/*/part-*.parquet")))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    with nodes_on_loopback() as address:
        finish(start(folder, address, "--until", "train"))
        assert len(outcome(folder)["rows"]) == 48
        assert "Nothing to do" in finish(start(folder, address, "--until", "train"))

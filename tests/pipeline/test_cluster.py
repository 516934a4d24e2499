"""The chain on clusters of several nodes on this machine: nodes die, the head is started anew, nodes come and go."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
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
    (tmp_path / "script.py").write_text(SCRIPT.replace(', "--until", "train"', ", *sys.argv[1:]"))
    return tmp_path


class Nodes:
    """A head without CPUs, and nodes with one each that can be added and killed."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        port = free_port()
        # Asked by Ray Train for who is dead; without it, it does not find its cluster among several on one machine.
        os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self.cluster.address
        self.workers = [self.cluster.add_node(num_cpus=1) for _ in range(2)]

    def kill(self, at_work: str) -> None:
        """Kill a node that has a process with these words at work, and bring another one."""
        for node in self.workers:
            (raylet,) = node.all_processes["raylet"]
            words = [" ".join(process.cmdline()) for process in psutil.Process(raylet.process.pid).children()]
            if any(at_work in word for word in words):
                self.cluster.remove_node(node, allow_graceful=False)
                self.workers.remove(node)
                self.workers.append(self.cluster.add_node(num_cpus=1))
                return
        raise AssertionError(f"no node has a {at_work} at work")


@contextlib.contextmanager
def nodes_on_loopback() -> Iterator[Nodes]:
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    nodes = Nodes()
    try:
        yield nodes
    finally:
        nodes.cluster.shutdown()
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


def scores(folder: Path) -> dict:
    found = {}
    for path in (folder / "artifacts" / "evaluate").glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        found[manifest["id"]] = manifest["summary"]["value"]
    return found


def test_chain_on_nodes_that_die_at_every_stage_ends_as_on_nodes_that_live(folder):
    artifacts = folder / "artifacts"
    with nodes_on_loopback() as nodes:
        finish(start(folder, nodes.address))
        alone, alone_scores = outcome(folder), scores(folder)
        artifacts.rename(folder / "alone")

        process = start(folder, nodes.address)
        wait_for(process, lambda: list(artifacts.glob("ledger/*/part-*.parquet")))
        nodes.kill("ray::MapWorker")
        wait_for(process, lambda: list(artifacts.glob("resumable/train/*/ray_train*/checkpoint_*/progress.json")))
        nodes.kill("RayTrainWorker")
        wait_for(process, lambda: list(artifacts.glob("evaluate/*/manifest.json")))
        nodes.kill("ray::evaluate")
        finish(process)
    assert outcome(folder)["rows"] == alone["rows"]
    assert scores(folder) == alone_scores and len(alone_scores) == 9
    for got, expected in zip(outcome(folder)["losses"], alone["losses"], strict=True):
        assert got == pytest.approx(expected, abs=1e-6)


def test_chain_goes_on_under_a_head_that_was_started_anew(folder):
    with nodes_on_loopback() as nodes:
        process = start(folder, nodes.address)
        wait_for(process, lambda: list((folder / "artifacts").glob("ledger/*/part-*.parquet")))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    with nodes_on_loopback() as nodes:
        finish(start(folder, nodes.address, "--until", "train"))
        assert len(outcome(folder)["rows"]) == 48
        assert "Nothing to do" in finish(start(folder, nodes.address, "--until", "train"))


def test_chain_on_an_autoscaler_brings_nodes_up_from_none_and_lets_them_go(folder, tmp_path):
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
    from ray.util import get_node_ip_address

    port, dashboard = free_port(), free_port()
    address = f"{get_node_ip_address()}:{port}"
    config = {
        "cluster_name": "test",
        "max_workers": 2,
        "provider": {
            # Ray's provider of fake nodes; named as if it were not Ray's, for the wheel lacks the defaults of its own.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
        },
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "head_node_type": "head",
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.1,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        **{f"{part}setup_commands": [] for part in ("", "head_", "worker_")},
        **{f"{part}_start_ray_commands": [] for part in ("head", "worker")},
        "initialization_commands": [],
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    }
    (tmp_path / "autoscaler.yaml").write_text(yaml.safe_dump(config))
    environment = {
        **os.environ,
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    words = ["--head", "--block", "--num-cpus=0", f"--port={port}"]
    words += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    words += [f"--autoscaling-config={tmp_path / 'autoscaler.yaml'}", f"--temp-dir=/tmp/ray-{port}"]
    with (tmp_path / "head.log").open("wb") as log:
        ray = Path(sys.executable).parent / "ray"
        head = subprocess.Popen([ray, "start", *words], stdout=log, stderr=log, env=environment)
    counts: list[int] = []
    try:
        process = start(folder, address, "--until", "train")
        while process.poll() is None:
            counts.append(count_nodes(head))
        finish(process)
        assert counts[0] == 0 and max(counts) == 2, counts
        deadline = time.monotonic() + 120
        while count_nodes(head) and time.monotonic() < deadline:
            head.poll()
        assert count_nodes(head) == 0, "idle nodes are let go"
    finally:
        head.terminate()
        head.wait(60)


def count_nodes(head: subprocess.Popen) -> int:
    """Return how many nodes there are beside the head."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(0.5)
    names = [process.name() for process in psutil.Process(head.pid).children(recursive=True)]
    return max(0, names.count("raylet") - 1)

"""The chain on clusters of several nodes on this machine: nodes die, the head is started anew, nodes come and go.

What a death costs is in the junit file of a run (`-o junit_family=xunit1 --junitxml FILE`): see docs/results.md.
"""

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from command import Command
from events import read_events
from faked import count_asked, finish, kill, make_folder, outcome, require_same, start, wait_for
from machine import free_port

from sdft_ray.store.manifest import check_files, read_manifest

pytestmark = pytest.mark.full


@contextlib.contextmanager
def ray_cluster_of(nodes: int, **more) -> Iterator:
    """Start a Ray head without CPUs, and so many nodes with one each; more can be added, and all be killed."""
    from ray.cluster_utils import Cluster

    port = free_port()
    dashboard = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
    with pytest.MonkeyPatch.context() as patch:
        # Ray Train asks the dashboard who is dead, and does not find it by itself where a machine has several clusters.
        patch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{port}")
        patch.setenv("RAY_worker_register_timeout_seconds", "300")  # as for a Ray of ours: sdft_ray/cluster.py
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **dashboard, **more})
        try:
            for _ in range(nodes):
                cluster.add_node(num_cpus=1)
            yield cluster
        finally:
            cluster.shutdown()


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A directory with a recipe and the command; `run` says which cluster."""
    return make_folder(
        tmp_path,
        tiny_model,
        {},
        train={"global_batch_size": 4, "epochs": 2, "lr": 1e-3, "validate_every_steps": 4},
        arms={"distilled": {}},
        evaluate={"tasks": ["arc_easy", "sciq", "piqa"], "limit": 40, "dtype": "float32"},
    )


def run(folder: Path, address: str, *more: str) -> Command:
    """Return the command at work on a cluster."""
    compute = {
        "ray": {"address": address, "largest_node": {"cpus": 1}},
        "score": {"cpus": 1},
        "distill": {"actors": 2, "cpus": 1, "batch_rows": 12, "piece_rows": 4},
        "train": {"workers": 2, "cpus": 1, "micro_batch": 2, "checkpoint_every_steps": 2},
    }
    (folder / "compute.yaml").write_text(yaml.safe_dump(compute))
    return start(folder, "run", "recipe.yaml", *more)


def kill_node(cluster, process: Command, at_work: str) -> float:
    """Kill a node as soon as one has a process of this name at work, bring another one, and return when it died."""
    found = []

    def look() -> bool:
        for node in cluster.worker_nodes:
            (raylet,) = node.all_processes["raylet"]
            for child in psutil.Process(raylet.process.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if child.cmdline()[:1] and at_work in child.cmdline()[0]:
                        found.append(node)
        return bool(found)

    wait_for(process, look)
    cluster.remove_node(found[0], allow_graceful=False)
    died = time.time()
    cluster.add_node(num_cpus=1)
    return died


def scores(artifacts: Path) -> dict[str, float]:
    manifests = [json.loads(path.read_text()) for path in artifacts.glob("evaluate/*/manifest.json")]
    return {manifest["id"]: manifest["summary"]["value"] for manifest in manifests}


def test_chain_on_nodes_that_die_at_every_stage_ends_as_on_nodes_that_live(folder, record_property):
    artifacts = folder / "artifacts"

    def there(pattern: str) -> Callable[[], list[Path]]:
        return lambda: list(artifacts.glob(pattern))

    with ray_cluster_of(2) as cluster:
        finish(run(folder, cluster.address, "--root", "alone"))

        process = run(folder, cluster.address)
        wait_for(process, there(pieces := "ledger/*/part-*.parquet"))
        died, before = kill_node(cluster, process, "ray::MapWorker"), set(there(pieces)())
        wait_for(process, lambda: set(there(pieces)()) - before or there("distill/*/manifest.json")())
        record_property("generating: seconds to the next piece", time.time() - died)

        wait_for(process, there("resumable/train/*/ray_train*/checkpoint_*/progress.json"))
        died_training = kill_node(cluster, process, "RayTrainWorker")

        wait_for(process, there(evaluations := "evaluate/*/manifest.json"))
        died, before = kill_node(cluster, process, "ray::evaluate"), len(there(evaluations)())
        wait_for(process, lambda: len(there(evaluations)()) > before)
        record_property("evaluating: seconds to the next score", time.time() - died)
        assert "Traceback" not in finish(process)

    require_same(outcome(artifacts), outcome(folder / "alone"))
    assert scores(artifacts) == scores(folder / "alone") and len(scores(artifacts)) == 9
    ledger = [row for path in there("ledger/*/part-*")() for row in pq.read_table(path)["id"].to_pylist()]
    assert len(ledger) == len(set(ledger)) == 48, "no row lost, none twice"
    record_property("generating: rows begun again", count_asked(folder) - 2 * 48)

    (log,) = artifacts.glob("train/*/tensorboard")
    steps = [(event.wall_time, event.step) for event, _ in read_events(log, "train/loss")]
    assert len({step for _, step in steps}) == 24
    record_property("training: steps taken again", len(steps) - 24)
    resumed = min(at for at, _ in steps if at > died_training)
    record_property("training: seconds to the next step", resumed - died_training)


def test_chain_on_nodes_with_disks_of_their_own_brings_a_model_once_to_each(folder, s3, s3_proxy, tmp_path):
    with ray_cluster_of(0) as cluster:
        disks = [tmp_path / "first", tmp_path / "second"]
        for disk in disks:
            cluster.add_node(num_cpus=1, env_vars={"XDG_CACHE_HOME": str(disk)})
        s3_proxy.requests.clear()
        finish(run(folder, cluster.address, "--root", s3, "--until", "train"))
        brought = [
            path for method, path in s3_proxy.requests if method == "GET" and re.search("/cut/.*safetensors", path)
        ]

        def there(disk: Path, pattern: str) -> list[Path]:
            return list(disk.glob(f"sdft_ray/roots/*/{pattern}"))

        for disk in disks:
            (manifest,) = there(disk, "cut/*/manifest.json")
            check_files(manifest.parent, read_manifest(manifest.parent), hashes=True)
            assert there(disk, "ledger/*/part-*"), "it had an engine"
        assert len(brought) == 2, "each node brought the cut model once; the driver made it"
        (tuned,) = there(tmp_path / "cache", "train/*/manifest.json")
        assert json.loads(tuned.read_text())["summary"]["workers"] == 2

        finish(run(folder, cluster.address, "--root", "alone", "--until", "train"))
    require_same(outcome(tuned.parents[2]), outcome(folder / "alone"))


def test_chain_goes_on_under_a_head_that_was_started_anew(folder, record_property):
    def pieces() -> set[Path]:
        return set((folder / "artifacts").glob("ledger/*/part-*.parquet"))

    with ray_cluster_of(2) as cluster:
        process = run(folder, cluster.address)
        wait_for(process, pieces)
        kill(process)
    kept = pieces()
    record_property("head anew: rows kept", sum(pq.read_metadata(path).num_rows for path in kept))
    with ray_cluster_of(2) as cluster:
        process, begun = run(folder, cluster.address, "--until", "train"), time.time()
        wait_for(process, lambda: any("-all-" not in path.name for path in pieces() - kept))
        record_property("head anew: seconds from the command to the next piece", time.time() - begun)
        finish(process)
        ids = [row["id"] for row in outcome(folder / "artifacts")["rows"]]
        assert len(ids) == len(set(ids)) == 48, "no row lost, none twice"
        assert "Nothing to do" in finish(run(folder, cluster.address, "--until", "train"))


def test_chain_on_an_autoscaler_brings_nodes_up_from_none_and_lets_them_go(folder, monkeypatch):
    from ray._common.test_utils import wait_for_condition
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
    from ray.util import get_node_ip_address

    port = free_port()
    config = {
        "cluster_name": "test",
        "max_workers": 2,
        "provider": {
            # Ray's provider of fake nodes; named as if it were not Ray's, for the wheel lacks the defaults of its own.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"{get_node_ip_address()}:{port}",
            "launch_multiple": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.2,
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
    (folder / "autoscaler.yaml").write_text(yaml.safe_dump(config))
    for name in ("RAY_FAKE_CLUSTER", "AUTOSCALER_UPDATE_INTERVAL_S", "RAY_enable_autoscaler_v2"):
        monkeypatch.setenv(name, "1")
    who = dict.fromkeys(("RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING"), FAKE_HEAD_NODE_ID)
    autoscaler = {"autoscaling_config": str(folder / "autoscaler.yaml"), "gcs_server_port": port, "env_vars": who}
    with ray_cluster_of(0, **autoscaler) as cluster:
        nodes: list[int] = []

        def count() -> int:
            nodes.append(sum(node["Alive"] for node in cluster.global_state.node_table()) - 1)
            return nodes[-1]

        process = run(folder, cluster.address, "--until", "train")
        wait_for(process, lambda: count() == 2)
        said = finish(process)
        assert nodes[0] == 0
        assert "waiting up to 600 s for that much to be free" in said
        wait_for_condition(lambda: not count(), timeout=120)

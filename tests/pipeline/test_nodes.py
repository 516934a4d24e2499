"""Engines that are spread over nodes, on clusters of several nodes on this machine that say they have GPUs."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

# In a process of its own, for a cluster of its own. The fake engine starts what vLLM's executor for Ray starts: a
# process a GPU, each in a bundle of the group that the engine's actor is in.
SCRIPT = textwrap.dedent(
    """
    import dataclasses, json, os, signal, sys, time
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

    import ray
    from ray.cluster_utils import Cluster
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    sys.path[:0] = [TESTS, TESTS + "/stages"]
    from test_distill import make_work
    from sdft_ray.spec.compute import load_compute
    from sdft_ray.cluster import ray_cluster, require_capacity
    from sdft_ray.core.selection import Generation
    from sdft_ray.engine import VllmEngine
    from sdft_ray.stages import distill

    folder = Path(sys.argv[1])
    log, engines = folder / "log", folder / "engines"
    log.touch()
    engines.mkdir()

    class OnGpu:
        def node(self):
            return ray.get_runtime_context().get_node_id()

    class FakeEngine:
        def __init__(self, model, settings, options, alone):
            group = ray.util.get_current_placement_group()
            worker = ray.remote(num_cpus=0, num_gpus=1)(OnGpu)
            on = [PlacementGroupSchedulingStrategy(group, i) for i, has in enumerate(group.bundle_specs) if has["GPU"]]
            self.workers = [worker.options(scheduling_strategy=each).remote() for each in on]
            begun = {
                "at": time.time(),
                "backend": options.distributed_executor_backend,
                "sizes": [options.tensor_parallel_size, options.pipeline_parallel_size],
                "group": group.id.hex(),
                "bundles": group.bundle_specs,
                "nodes": ray.get([each.node.remote() for each in self.workers]),
                "here": ray.get_runtime_context().get_node_id(),
            }
            (engines / f"{time.time()}-{os.getpid()}").write_text(json.dumps(begun))

        def generate(self, requests):
            for request in requests:
                time.sleep(SECONDS)
                ray.get([each.node.remote() for each in self.workers])  # raises where one has died
                with log.open("a") as lines:
                    lines.write(request.id + "\\n")
                if finished() == DIES_AT:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield request, Generation("made", "stop", len(request.prompt_ids), 3)

    def finished():
        return len(log.read_text().split())

    def begun():
        return [json.loads(path.read_text()) for path in sorted(engines.iterdir())]

    def groups():
        every = ray.util.placement_group_table()
        return {key: each["state"] for key, each in every.items() if each["name"].startswith("engine-")}

    def until(condition):
        while not condition() and not building.done():
            timeline.append(sum(state != "REMOVED" for state in groups().values()))
            workers.update(name for name in ray.util.list_named_actors() if name.startswith("vllm_Worker"))
            time.sleep(0.2)

    cluster = Cluster(head_node_args={"num_cpus": 1, "include_dashboard": False}, initialize_head=True)
    nodes = [cluster.add_node(num_cpus=1, num_gpus=2) for _ in range(2)]
    timeline, workers = [], set()
    work = make_work(folder, Path(sys.argv[2]), ROWS, answer="none", engine=ENGINE)
    plan = {"cpus": 1, "gpus": 2, "nodes": 2, "tensor_parallel_size": 2, "pipeline_parallel_size": 2, **MORE}
    compute = load_compute({"ray": {"address": cluster.address}, "distill": plan})
    with ray_cluster(compute), ThreadPoolExecutor() as threads:
        require_capacity(compute, distill.NEEDS, "distill")
        building = threads.submit(distill.build, dataclasses.replace(work, compute=compute))
        STEPS
        until(building.done)
        summary = building.result()
        left = groups()
        deadline = time.time() + 30  # Ray frees GPUs a moment after it says that their group is gone
        while ray.available_resources().get("GPU") != ray.cluster_resources()["GPU"]:
            assert time.time() < deadline, ray.available_resources()
            time.sleep(0.2)
    cluster.shutdown()
    print(json.dumps({
        "timeline": timeline, "groups": left, "engines": begun(), "summary": summary.plain(),
        "finished": log.read_text().split(), "workers": sorted(workers),
    }))
    """
)


def run(
    model: Path,
    folder: Path,
    rows: int,
    seconds: float = 0.05,
    dies_at: int = -1,
    steps: str = "",
    starts: str = "FakeEngine",
    path: str = "",
    **more: Any,
) -> dict[str, Any]:
    """Return what became of `distill` on two nodes of a CPU and 2 GPUs each, with engines of 4 GPUs each; path: where
    its processes find more modules."""
    script = SCRIPT.replace("STEPS", textwrap.indent(textwrap.dedent(steps), "    ").strip())
    values = {
        "TESTS": str(Path(__file__).parents[1]),
        "ROWS": rows,
        "SECONDS": seconds,
        "DIES_AT": dies_at,
        "MORE": more,
    }
    script = script.replace("ENGINE", starts)
    for name, value in values.items():
        script = script.replace(name, repr(value))
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(model)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{Path.cwd()}{os.pathsep}{path}"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    return result | {"stderr": done.stderr}


BUNDLES = 2 * [{"CPU": 1.0, "GPU": 1.0}, {"GPU": 1.0}]


def test_engine_over_two_nodes_that_is_killed_begins_again_in_its_group_and_loses_nothing(tiny_model, tmp_path):
    result = run(tiny_model, tmp_path, rows=24, dies_at=9, batch_rows=24, piece_rows=4)
    first, second = result["engines"]
    assert result["groups"] == {first["group"]: "REMOVED"} and second["group"] == first["group"]
    for engine in (first, second):
        assert (engine["backend"], engine["sizes"], engine["bundles"]) == ("ray", [2, 2], BUNDLES)
        assert len({*engine["nodes"]}) == 2 and all(engine["nodes"].count(node) == 2 for node in engine["nodes"])
        assert engine["here"] == engine["nodes"][0]
    assert result["summary"]["rows"] == result["summary"]["kept"] == 24 == len({*result["finished"]})
    assert 1 <= len(result["finished"]) - 24 <= 4 + 1, "the piece that was not written yet"
    assert result["stderr"] == ""


@pytest.mark.full
def test_engines_over_nodes_grow_with_the_cluster_outlive_a_node_and_leave_no_group(tiny_model, tmp_path):
    steps = """
    until(lambda: finished() > 5)
    timeline.append("two nodes come")
    cluster.add_node(num_cpus=1, num_gpus=2)
    cluster.add_node(num_cpus=1, num_gpus=2)
    until(lambda: len(begun()) == 2)
    timeline.append("a node dies, and another comes")
    away = next(node for node in nodes if node.node_id != begun()[0]["here"])
    cluster.remove_node(away, allow_graceful=False)
    cluster.add_node(num_cpus=1, num_gpus=2)
    """
    more = {"actors": {"min": 1, "max": 2}, "batch_rows": 20, "piece_rows": 4}
    result = run(tiny_model, tmp_path, rows=240, seconds=0.3, steps=steps, **more)
    assert result["summary"]["rows"] == result["summary"]["kept"] == 240 == len({*result["finished"]})
    assert {*result["groups"].values()} == {"REMOVED"}
    grown, died = (result["timeline"].index(text) for text in ("two nodes come", "a node dies, and another comes"))
    assert max(result["timeline"][grown + 1 : died]) == 2
    assert result["timeline"][-1] < 2, "the group of an idle engine goes while the last one is at work"
    assert all(len({*engine["nodes"]}) == 2 for engine in result["engines"])
    assert len(result["engines"]) == 3, "the engine that lost a node began again"
    assert len(result["finished"]) - 240 <= 4 + 1, "at most the piece that it had not written yet"


@pytest.mark.full
def test_vllm_itself_works_over_two_nodes_with_processes_on_cpus_that_ray_takes_for_gpus(tiny_model, tmp_path):
    """Its own executor for Ray, which its CPU platform leaves out: a plugin, as other hardware has one, puts it in."""
    plugin = tmp_path / "site" / "ray_on_cpu-1.dist-info"
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: ray_on_cpu\nVersion: 1\n")
    (plugin / "entry_points.txt").write_text("[vllm.platform_plugins]\nray_on_cpu = ray_on_cpu:name\n")
    (plugin.parent / "ray_on_cpu.py").write_text("def name():\n    return 'ray_on_cpu_platform.RayOnCpu'\n")
    (plugin.parent / "ray_on_cpu_platform.py").write_text(
        "from vllm.platforms.cpu import CpuPlatform\n\n\nclass RayOnCpu(CpuPlatform):\n    ray_device_key = 'GPU'\n"
    )
    # Blocks over nodes raise there: where it is eager its CPU build leaves out the pass that makes room for states.
    sizes = {"gpus": 1, "tensor_parallel_size": 2, "pipeline_parallel_size": 1}
    engine = {"kv_cache_gib": 0.1, "max_model_len": 256, "max_num_seqs": 4}
    result = run(tiny_model, tmp_path, 8, starts="VllmEngine", path=str(plugin.parent), **sizes | {"engine": engine})
    assert [name.rpartition("_")[2] for name in result["workers"]] == ["TP0", "TP1"]
    assert {*result["groups"].values()} == {"REMOVED"}
    summary = result["summary"]
    assert (summary["rows"], summary["generations"], summary["reasons"]["error"]) == (8, 8, 0)
    assert summary["generated_tokens"] > 8

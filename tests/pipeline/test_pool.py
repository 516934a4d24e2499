"""A pool of engines on a cluster of nodes: it grows with the cluster, outlives a node, and shrinks at the end."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# A cluster of its own, in a process of its own: 1 node with room for 1 engine, then 3, of which one is killed.
SCRIPT = textwrap.dedent(
    """
    import dataclasses, json, os, sys, time
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

    import psutil
    import ray
    from ray.cluster_utils import Cluster

    sys.path[:0] = [TESTS, TESTS + "/stages"]
    from test_distill import make_work
    from sdft_ray.spec.compute import load_compute
    from sdft_ray.cluster import ray_cluster, require_capacity
    from sdft_ray.core.selection import Generation
    from sdft_ray.stages import distill

    folder = Path(sys.argv[1])
    log, pids = folder / "log", folder / "pids"
    log.touch()
    pids.mkdir()

    class FakeEngine:
        def __init__(self, model, settings, options, alone):
            (pids / str(os.getpid())).touch()

        def generate(self, requests):
            for request in requests:
                time.sleep(0.4)
                with log.open("a") as lines:
                    lines.write(request.id + "\\n")
                yield request, Generation("made", "stop", len(request.prompt_ids), 3)

    cluster = Cluster(head_node_args={"num_cpus": 1, "include_dashboard": False}, initialize_head=True)
    timeline = []

    def engines():
        return sum(psutil.pid_exists(int(path.name)) for path in pids.iterdir())

    def until(condition):
        while not condition():
            timeline.append(engines())
            time.sleep(0.2)

    def finished():
        return len(log.read_text().split())

    work = make_work(folder, Path(sys.argv[2]), ROWS, answer="none", engine=FakeEngine)
    plan = {"actors": {"min": 1, "max": 3}, "cpus": 1, "batch_rows": 20, "piece_rows": 4}
    (folder / "compute.yaml").write_text(json.dumps({"ray": {"address": cluster.address}, "distill": plan}))
    compute = load_compute(folder / "compute.yaml")
    with ray_cluster(compute), ThreadPoolExecutor() as threads:
        require_capacity(compute, distill.NEEDS, "distill")
        building = threads.submit(distill.build, dataclasses.replace(work, compute=compute))
        until(lambda: finished() > 5 or building.done())
        timeline.append("two nodes come")
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]  # in the main thread: it handles signals
        until(lambda: engines() == 3 or building.done())
        timeline.append("a node dies")
        cluster.remove_node(nodes[0], allow_graceful=False)
        until(building.done)
        summary = building.result()
    cluster.shutdown()
    print(json.dumps({"timeline": timeline, "summary": summary.plain(), "finished": log.read_text().split()}))
    """
)
ROWS = 240


@pytest.mark.full
def test_pool_grows_with_the_cluster_outlives_a_node_and_shrinks(tiny_model, tmp_path):
    script = SCRIPT.replace("TESTS", repr(str(Path(__file__).parents[1]))).replace("ROWS", str(ROWS))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(tiny_model)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    timeline = result["timeline"]
    grown, died = timeline.index("two nodes come"), timeline.index("a node dies")
    assert max(timeline[:grown]) == 1
    assert max(timeline[grown + 1 : died] + timeline[died + 1 :]) == 3
    assert timeline[-1] < max(timeline[died + 1 :]), "idle engines go while the last one is at work"
    assert result["summary"]["rows"] == ROWS == result["summary"]["kept"] == len(set(result["finished"]))
    again = len(result["finished"]) - ROWS
    assert again <= 4 + 1, "at most the piece that the dead node's engine had not written yet"

"""Where and how: every `auto` becomes a number, and what can never fit is said at once."""

import ast
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from sdft_ray import pipeline
from sdft_ray.cluster import require_capacity
from sdft_ray.errors import UserError
from sdft_ray.spec.compute import Compute, EngineOptions, load_compute
from sdft_ray.stages import distill, draft, nll
from sdft_ray.stages.distill.placement import bundles
from sdft_ray.submit.kuberay import worker_pods


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a compute file on a machine with that many cores."""

    def load(cores: int, data: dict | None = None):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)), raising=False)
        if data is None:
            return load_compute()
        path = tmp_path / "compute.yaml"
        path.write_text(yaml.safe_dump(data))
        return load_compute(path)

    return load


@pytest.mark.parametrize(("cores", "score", "train"), [(2, 2, 1), (8, 8, 4), (9, 9, 4)])
def test_load_compute_without_a_file_settles_every_auto_for_this_machine(load, cores, score, train):
    assert load(cores).needs() == {
        "score": (1, score, 0),
        "distill": (1, score, 0),
        "train": (2, train, 0),
        "evaluate": (1, 1, 0),
    }


def test_load_compute_shares_the_cores_among_actors_and_workers(load):
    data = {"score": {"actors": 2}, "distill": {"actors": 3}, "train": {"workers": 4}, "evaluate": {"cpus": "auto"}}
    assert {name: need[:2] for name, need in load(8, data).needs().items()} == {
        "score": (2, 4),
        "distill": (3, 2),
        "train": (4, 2),
        "evaluate": (1, 8),
    }


def test_stages_whose_workers_share_a_section_of_the_compute_file_need_what_it_says():
    needs = {name: module.NEEDS.section for name, module in pipeline.MODULES.items() if module.NEEDS}
    assert needs == {
        "score": "score",
        "loss": "score",
        "finals": "score",
        "patch": "score",
        "targets": "score",
        "probes": "evaluate",
        "retention": "evaluate",
        "distill": "distill",
        "train": "train",
        "nll": "distill",
        "draft": "distill",
        "speed": "evaluate",
        "evaluate": "evaluate",
    }
    assert {*needs.values()} == {*Compute.model_fields} - {"ray", "throughput", "track"}


def test_stages_of_one_worker_need_one_bundle_whatever_their_section_says(load):
    data = {"score": {"actors": 2}, "distill": {"actors": 4}, "train": {"workers": 4}, "evaluate": {"cpus": 3}}
    compute = load(8, data)
    needs = {name: compute.bundles(module.NEEDS) for name, module in pipeline.MODULES.items() if module.NEEDS}
    assert needs == {
        "score": (2, 4, 0),
        "loss": (2, 4, 0),
        "finals": (2, 4, 0),
        "patch": (1, 4, 0),
        "targets": (2, 4, 0),
        "probes": (1, 3, 0),
        "retention": (1, 3, 0),
        "distill": (4, 2, 0),
        "train": (4, 2, 0),
        "nll": (1, 2, 0),
        "draft": (1, 2, 0),
        "speed": (1, 3, 0),
        "evaluate": (1, 3, 0),
    }


def test_a_stage_of_one_worker_starts_where_the_actors_of_its_section_do_not_all_fit(ray_cluster, load):
    compute = load(1, {"ray": {"address": "auto", "wait_seconds": 1}, "distill": {"actors": 99}})
    for stage in (nll, draft):
        require_capacity(compute, stage.NEEDS, "here")
    with pytest.raises(UserError, match=r"^compute\.distill: needs 99 x \(1 CPUs, 0 GPUs\); the cluster has "):
        require_capacity(compute, distill.NEEDS, "here")


def test_load_compute_keeps_given_cpus(load):
    assert load(8, {"train": {"workers": 2, "cpus": 3}}).needs()["train"] == (2, 3, 0)


def test_load_compute_with_too_many_cpus_for_this_machine_names_the_numbers(load):
    with pytest.raises(UserError) as error:
        load(4, {"train": {"workers": 2, "cpus": 3}, "distill": {"actors": 6}, "score": {"cpus": 5}})
    assert sorted(error.value.problems) == [
        "compute.distill: 6 x 1 CPUs = 6 is more than the 4 cores of this machine. Lower compute.distill.actors.",
        "compute.score: 1 x 5 CPUs = 5 is more than the 4 cores of this machine. Lower compute.score.cpus.",
        "compute.train: 2 x 3 CPUs = 6 is more than the 4 cores of this machine. Lower compute.train.workers.",
    ]


def test_load_compute_asks_room_for_the_smallest_pool_of_actors(load):
    data = {"ray": {"address": "auto"}, "distill": {"actors": {"min": 2, "max": 16}, "cpus": 4}}
    assert load(2, data).needs()["distill"] == (2, 4, 0)


def test_engines_over_nodes_need_a_bundle_on_each_and_vllms_executor_for_ray(load):
    sizes = {"gpus": 8, "nodes": 2, "tensor_parallel_size": 8, "pipeline_parallel_size": 2}
    spread = {"ray": {"address": "auto"}, "distill": {"actors": {"min": 2, "max": 4}, "cpus": 4, **sizes}}
    compute = load(2, spread)
    assert compute.needs()["distill"] == compute.bundles(distill.NEEDS) == (4, 4, 8)
    assert compute.bundles(nll.NEEDS) == (1, 4, 8), "a model in transformers stays on one node"
    assert compute.distill.engine_options().distributed_executor_backend == "ray"
    assert bundles(compute.distill) == 2 * [{"CPU": 4, "GPU": 1}, *7 * [{"GPU": 1}]]
    numbers = {name: {"cpus": 4} for name in ("score", "train", "evaluate")}
    pod, pods = worker_pods(load(2, spread | numbers))
    assert (pod.cpus, pod.gpus, pods) == (4, 8, 8)
    spread["distill"] = {"cpus": 4, "gpus": 8, "tensor_parallel_size": 8}
    assert load(2, spread).distill.engine_options().distributed_executor_backend is None


def test_engine_options_are_vllms_own():
    source = Path(str(find_spec("vllm").origin)).parent / "engine" / "arg_utils.py"  # importing it takes 10 s
    (arguments,) = (
        node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "EngineArgs"
    )
    known = {node.target.id for node in arguments.body if isinstance(node, ast.AnnAssign)}
    assert set(EngineOptions.model_fields) - known == {"kv_cache_gib"}


def test_load_compute_for_a_running_cluster_is_not_bound_by_this_machine(load):
    compute = load(2, {"ray": {"address": "auto"}, "train": {"workers": 8, "cpus": 4}})
    assert compute.needs()["train"] == (8, 4, 0)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"train": {"wrokers": 2}}, "compute.train.wrokers: unknown key. Did you mean workers?"),
        (
            {"train": {"zero_stage": 4}},
            "compute.train.zero_stage: got 4; expected 0, 1, 2 or 3. Change this value.",
        ),
        (
            {"distill": {"engine": {"blok_size": 1}}},
            "compute.distill.engine.blok_size: unknown key. Did you mean block_size?",
        ),
        ({"distill": {"engine": {"quantization": "fp8"}}}, "compute.distill.engine.quantization: unknown key."),
        ({"distill": {"actors": {"min": 3, "max": 2}}}, "compute.distill.actors: min 3 is more than max 2. Lower min."),
        ({"distill": {"actors": {"max": 2, "mni": 1}}}, "compute.distill.actors.mni: unknown key. Did you mean min?"),
        (
            {"distill": {"tensor_parallel_size": 2, "gpus": 1}},
            "compute.distill: tensor_parallel_size 2 is more than the 1 gpus of an actor. Raise gpus to 2.",
        ),
        (
            {"distill": {"tensor_parallel_size": 4, "pipeline_parallel_size": 2, "gpus": 4}},
            "compute.distill: tensor_parallel_size 4 x pipeline_parallel_size 2 is more than the 4 gpus of an actor. "
            "Raise gpus to 8, or nodes to 2.",
        ),
        (
            {"distill": {"tensor_parallel_size": 4, "gpus": 8}},
            "compute.distill: tensor_parallel_size 4 leaves 4 of the 8 gpus of an actor idle. "
            "Raise tensor_parallel_size or pipeline_parallel_size, or lower gpus.",
        ),
        (
            {"distill": {"gpus": 2}},
            "compute.distill: an engine of one GPU leaves 1 of the 2 gpus of an actor idle. Raise tensor_parallel_size",
        ),
        (
            {"distill": {"tensor_parallel_size": 8, "gpus": 8, "nodes": 2}},
            "compute.distill: tensor_parallel_size 8 leaves 8 of the 16 gpus of an actor idle. "
            "Raise tensor_parallel_size or pipeline_parallel_size, or lower gpus or nodes.",
        ),
        (
            {"distill": {"pipeline_parallel_size": 2, "nodes": 2}},
            "compute.distill: nodes 2 with 0 gpus on each hold no engine. Raise gpus.",
        ),
        (
            {"distill": {"pipeline_parallel_size": 2, "nodes": 2, "gpus": 1}},
            "compute.distill.nodes: 2 are more than this machine, the one node of compute.ray.address: local. Give",
        ),
        (
            {"train": {"deepspeed": "gs://bucket/zero.json"}},
            "compute.train.deepspeed: gs://bucket/zero.json is an address, and a path is needed. Give the path",
        ),
        ({"score": {"actors": 0}}, "compute.score.actors: got 0; expected greater than 0. Change this value."),
        ({"train": {"workers": True}}, "compute.train.workers: true is no number of processes. Give 1 or more, or min"),
        (
            {"train": {"workers": 0}},
            "compute.train.workers: 0 is no number of processes. Give 1 or more, or min and max",
        ),
        (
            {"distill": {"gpus": 1.5}},
            "compute.distill.gpus: 1.5 GPUs are no whole number, and no part of one. Give 2, or",
        ),
        (
            {"evaluate": {"gpus": 2.5}},
            "compute.evaluate.gpus: 2.5 GPUs are no whole number, and no part of one. Give 3",
        ),
        ({"train": {"zero_stage": True}}, "compute.train.zero_stage: true is no whole number. Give 0, 1, 2 or 3."),
        ({"train": {"gpus": 2}}, "compute.train.gpus: 2 are more than the one that a process computes on. Set gpus: 1"),
        ({"score": {"gpus": 2}}, "compute.score.gpus: 2 are more than the one that a process computes on. Set gpus: 1"),
        ({"ray": {"largest_node": {}}}, "compute.ray.largest_node.cpus: is missing. Add it."),
        ({"ray": {"address": ""}}, 'compute.ray.address: got ""; expected text. Change this value.'),
        ({"track": "mlflow"}, 'compute.track: got "mlflow"; expected a list. Change this value.'),
    ],
)
def test_load_compute_with_a_mistake_is_one_clear_line(load, data, line):
    with pytest.raises(UserError) as error:
        load(2, data)
    assert len(error.value.problems) == 1
    assert str(error.value).startswith(line)


def test_load_compute_reads_the_deepspeed_json_where_the_command_runs(load, tmp_path, monkeypatch):
    """Workers, and trials of a sweep, run in other directories and on other nodes."""
    monkeypatch.chdir(tmp_path)
    Path("zero.json").write_text('{"zero_optimization": {"reduce_bucket_size": 1000}}')
    own = {"zero_optimization": {"reduce_bucket_size": 1000}}
    assert load(2, {"train": {"deepspeed": "zero.json"}}).train.deepspeed == own
    assert load(2, {"train": {"deepspeed": own}}).train.deepspeed == own
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(2, {"train": {"deepspeed": "~/zero.json"}}).train.deepspeed == own


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "compute.train.deepspeed: zero.json: is no JSON file that can be read ("),
        ("{", "compute.train.deepspeed: zero.json: is no JSON file that can be read ("),
        ("[]", "compute.train.deepspeed: zero.json: is not a JSON object. See configs/deepspeed for one."),
    ],
)
def test_load_compute_with_a_deepspeed_json_that_is_none_is_one_clear_line(load, tmp_path, monkeypatch, content, line):
    monkeypatch.chdir(tmp_path)
    if content:
        Path("zero.json").write_text(content)
    with pytest.raises(UserError) as error:
        load(2, {"train": {"deepspeed": "zero.json"}})
    assert len(error.value.problems) == 1 and str(error.value).startswith(line)


@pytest.mark.parametrize("cpus", [-1, "all"])
def test_load_compute_with_impossible_cpus_is_one_clear_line(load, cpus):
    with pytest.raises(UserError) as error:
        load(2, {"train": {"cpus": cpus}})
    assert len(error.value.problems) == 1
    assert error.value.problems[0].startswith("compute.train.cpus: ")

"""What a run builds at the same time."""

import os
import sys
import time

import psutil
import pytest

from sdft_ray import overlap, pipeline
from sdft_ray.cluster import RayNode, count_places, fit_together
from sdft_ray.errors import UserError
from sdft_ray.spec.compute import Compute
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.wording import validate
from sdft_ray.store.storage import Storage

RECIPE = {
    "rows": {"path": "rows.jsonl", "fields": {"prompt": "q", "response": "a"}, "held_out": 4},
    "prune": {"blocks": 2, "calibration": {"text": "texts.txt"}},
    "evaluate": {"tasks": ["arc_easy", "held_out"], "retention": {}, "speed": True},
    "arms": {"sft": {}, "distilled": {}},
    "draft": {"models": ["pruned", "distilled"], "prompts": 2},
}
NEEDS = {name: module.NEEDS for name, module in pipeline.MODULES.items()}


@pytest.fixture
def todo(tiny_model, tmp_path, monkeypatch) -> tuple:
    (tmp_path / "rows.jsonl").write_text('{"q": "a", "a": "b"}\n')
    (tmp_path / "texts.txt").write_text("a text")
    monkeypatch.chdir(tmp_path)
    return pipeline.chain(validate(Recipe, RECIPE | {"model": {"path": str(tiny_model)}})).in_order


def compute_of(**sections) -> Compute:
    base = {"score": {"cpus": 1}, "distill": {"cpus": 2}, "train": {"workers": 2, "cpus": 2}, "evaluate": {"cpus": 1}}
    return validate(Compute, base | {name: base.get(name, {}) | more for name, more in sections.items()})


def names(stages) -> list[str]:
    return list(dict.fromkeys(stage.name for stage in stages))


def test_pairs_of_a_run_are_generation_with_cuts_and_training_with_evaluations_of_what_is_there(todo):
    generating, training = overlap.pairs(todo)
    assert names(generating.first) == ["model", "rows"]
    assert (names(generating.here), names(generating.beside)) == (["distill"], ["score", "loss", "cut"])
    assert names(training.first) == ["model", "rows", "score", "loss", "cut", "distill"]
    assert {stage.slug for stage in training.here} == {stage.slug for stage in todo if stage.name == "train"}
    beside = {(stage.name, stage.slug) for stage in training.beside if stage.name in ("evaluate", "retention")}
    assert beside == {
        *(("evaluate", f"{task}-{model}") for task in ("arc-easy", "held-out") for model in ("base", "pruned")),
        *(("retention", model) for model in ("base", "pruned")),
    }
    assert not {"draft", "speed"} & {*names(training.beside)}, "beside others their speeds mean nothing"


def test_pairs_leave_out_what_is_done(todo):
    left = [stage for stage in todo if stage.name not in ("model", "rows", "score", "loss", "cut")]
    (training,) = overlap.pairs(left)
    assert names(training.first) == ["distill"]


@pytest.mark.parametrize(
    ("nodes", "sections", "kept"),
    [
        ([RayNode(2)], {}, [[], []]),
        ([RayNode(4)], {}, [["score", "loss", "cut"], []]),  # training takes all
        ([RayNode(4), RayNode(1)], {}, [["score", "loss", "cut"], ["evaluate"]]),
        ([RayNode(16)], {"distill": {"actors": {"min": 1, "max": 2}}}, [[], ["evaluate"]]),
        ([RayNode(16)], {"train": {"workers": {"min": 1, "max": 2}}}, [["score", "loss", "cut"], []]),
    ],
)
def test_limit_keeps_what_the_nodes_hold_beside_the_rest(todo, nodes, sections, kept):
    compute, others = compute_of(**sections), ("nll", "probes", "retention")
    beside = [overlap.limit(pair, compute, nodes, NEEDS.get).stages for pair in overlap.pairs(todo)]
    assert [[name for name in names(stages) if name not in others] for stages in beside] == kept


@pytest.mark.parametrize(
    ("gpus", "of_one", "places"),
    [
        (1, 0.1, 10),
        (1, 0.2, 5),
        (1, 0.3, 3),
        (2, 0.4, 4),
        (2, 0.6, 2),
        (8, 0.25, 32),
        (8, 2, 4),
        (3, 2, 1),
        (0, 0.5, 0),
    ],
)
def test_processes_that_share_a_gpu_fit_as_often_as_ray_lets_them(gpus, of_one, places):
    """Ray counts ten-thousandths, of one GPU: no process has parts of two."""
    assert count_places([RayNode(64, gpus)], 1, of_one) == places
    assert not places or fit_together([RayNode(64, gpus)], (places, 1, of_one))
    assert not fit_together([RayNode(64, gpus)], (places + 1, 1, of_one))


def test_different_processes_share_gpus_where_each_has_its_parts_of_one():
    assert fit_together([RayNode(9, 1)], (2, 1, 0.4), (1, 1, 0.2))
    assert not fit_together([RayNode(9, 1)], (2, 1, 0.4), (1, 1, 0.3))
    assert fit_together([RayNode(9, 2)], (2, 1, 0.25), (1, 1, 1))  # the two on one
    assert not fit_together([RayNode(9, 2)], (2, 1, 0.6), (1, 1, 1))


@pytest.mark.parametrize(
    ("cpus", "actors", "expected"), [(5, 1, (1, 1)), (7, 1, (1, 3)), (7, 2, (2, 1)), (6, 8, (2, 1)), (64, 2, (2, 6))]
)
def test_evaluations_beside_a_training_take_no_more_than_it_leaves(todo, cpus, actors, expected):
    _, training = overlap.pairs(todo)
    beside = overlap.limit(training, compute_of(evaluate={"actors": actors}), [RayNode(cpus)], NEEDS.get)
    if cpus == 64:  # as many as there are
        assert beside.at_once * actors >= len(beside.stages)
        return
    assert (beside.compute.evaluate.actors, beside.at_once) == expected


def test_what_fails_beside_is_raised_when_the_rest_is_done(ray_cluster, todo, tmp_path, capsys):
    def fail(stages, compute, storage, at_once) -> None:
        raise UserError("rows: are wrong. Mend them.")

    done = []
    with pytest.raises(UserError, match=r"^rows: are wrong"), overlapping(fail, todo, tmp_path):
        while "FAILED" not in capsys.readouterr().err:
            time.sleep(0.1)
        done.append("the rest")
    assert done


def test_what_runs_beside_a_failure_ends_with_it(ray_cluster, todo, tmp_path):
    mark = tmp_path / "pid"

    def last(stages, compute, storage, at_once) -> None:
        mark.write_text(str(os.getpid()))
        time.sleep(600)

    with pytest.raises(KeyboardInterrupt), overlapping(last, todo, tmp_path):
        while not (mark.exists() and mark.read_text()):
            time.sleep(0.1)
        raise KeyboardInterrupt
    while psutil.pid_exists(int(mark.read_text())):
        time.sleep(0.1)


def overlapping(build, todo, root):
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find the modules of tests
    beside = overlap.Beside([todo[0]], compute_of(), 1)
    return overlap.building(build, beside, Storage(str(root)), "train")

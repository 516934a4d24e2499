"""What runs beside what, by the resources of nodes: without Ray."""

import threading

import pytest

from sdft_ray import beside
from sdft_ray.spec.compute import Compute
from sdft_ray.stages import cut, distill, evaluate, score, train
from sdft_ray.store.identity import Stage


def stage(module, name: str, *inputs: Stage, kind: type | None = None) -> Stage:
    settings = (kind or module.Settings).model_construct()
    return Stage(module.__name__.rpartition(".")[2], name, 1, settings, {str(i): each for i, each in enumerate(inputs)})


@pytest.fixture
def stages(monkeypatch):
    monkeypatch.setattr(Stage, "id", property(lambda self: self.slug))
    base = Stage("model", "base", 1, {})
    scored, rewritten = stage(score, "scored", base), stage(distill, "rewritten", base)
    pruned = stage(cut, "pruned", base, scored)
    tuned = stage(train, "tuned", pruned, rewritten)
    evaluations = [
        stage(evaluate, f"{model.slug}-{task}", model, kind=evaluate.TaskSettings)
        for model in (base, pruned, tuned)
        for task in ("one", "other")
    ]
    return [base, scored, pruned, rewritten, tuned, *evaluations]


def compute(cpus: int, **distilling) -> Compute:
    sections = {"score": {"cpus": cpus}, "distill": {"cpus": cpus, **distilling}}
    return Compute.model_validate({**sections, "train": {"workers": 1, "cpus": cpus}, "evaluate": {"cpus": 1}})


def test_the_way_to_the_cuts_goes_beside_generation_where_both_are_open(stages):
    roots, cuts, generated = beside.branches(stages, compute(1))
    assert [[each.slug for each in part] for part in (roots, cuts, generated)] == [
        ["base"], ["scored", "pruned"], ["rewritten"]
    ]  # fmt: skip
    assert beside.branches([each for each in stages if each.slug != "rewritten"], compute(1)) is None
    assert beside.branches(stages, compute(1, actors={"min": 1, "max": 2})) is None, "it takes what there is"


@pytest.mark.parametrize(("nodes", "held"), [([2], True), ([1, 1], True), ([1], False), ([3], True)])
def test_what_the_nodes_do_not_hold_at_once_waits(monkeypatch, nodes, held):
    monkeypatch.setattr(beside, "resources_of_nodes", lambda: [{"CPU": cpus} for cpus in nodes])
    assert beside.are_held_at_once(compute(1)) is held


@pytest.mark.parametrize(("cpus", "at_once"), [(1, 0), (2, 1), (3, 2), (16, 4)])
def test_evaluations_of_models_that_are_there_go_beside_a_training_as_cores_are_left(
    stages, monkeypatch, cpus, at_once
):
    monkeypatch.setattr(beside, "resources_of_nodes", lambda: [{"CPU": cpus}])
    ready, count = beside.evaluations_beside(train.NEEDS, stages[4:], compute(1))
    assert count == at_once
    names = ["base-one", "base-other", "pruned-one", "pruned-other"]
    assert [each.slug for each in ready] == (names if at_once else [])


def test_threads_build_so_many_at_once_and_end_at_the_first_failure(stages):
    evaluations, together, most, lock = stages[5:], [], [], threading.Lock()
    meeting = threading.Barrier(2)

    def build(each, progress, stopped):
        with lock:
            together.append(each)
            most.append(len(together))
        meeting.wait(10)
        with lock:
            together.remove(each)

    with beside.Threads(build) as threads:
        threads.start(evaluations, 2)
    assert max(most) == 2 and len(most) == len(evaluations) and threads.started == {each.id for each in evaluations}

    seen = threading.Event()

    def fail_or_wait(each, progress, stopped):
        if each is evaluations[0]:
            raise ValueError(each.slug)
        assert stopped.wait(10)
        seen.set()

    with pytest.raises(ValueError, match="base-one"), beside.Threads(fail_or_wait) as threads:
        threads.start(evaluations[:2], 2)
    assert seen.wait(10), "the other ends, too"

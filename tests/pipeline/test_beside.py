"""What runs beside what, by the resources of nodes: without Ray."""

import contextlib
import threading
from types import SimpleNamespace

import pytest

from sdft_ray import beside, pipeline
from sdft_ray.errors import StageFailed
from sdft_ray.spec.compute import Compute
from sdft_ray.stages import Summary, cut, distill, evaluate, score, train
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


class Kept:
    """What a storage is to the pipeline, in memory: settings here lack what a manifest would list."""

    uri = "memory"

    def __init__(self) -> None:
        self.done: set[str] = set()

    def survey(self):
        return contextlib.nullcontext()

    def lock(self, name):
        return contextlib.nullcontext()

    def status(self, each) -> str:
        return "done" if each.id in self.done else "missing"

    def commit(self, each, summary, seconds) -> None:
        self.done.add(each.id)

    def where(self, each) -> str:
        return each.slug

    def manifest(self, each):
        return SimpleNamespace(provenance=SimpleNamespace(wall_seconds=1.0))


@pytest.fixture
def built(stages, monkeypatch):
    """What builds the stages on so many cores without Ray: events of (stage, "begin" or "end") in order."""

    def build(cpus: int, failing: str = "") -> list[tuple[str, str]]:
        events: list[tuple[str, str]] = []
        base_evaluated = threading.Event()

        def work(work) -> Summary:
            name = work.stage.slug
            events.append((name, "begin"))
            if name == failing:
                raise StageFailed(f"{name} failed")
            if name == "tuned" and cpus > 1 and not failing:
                assert base_evaluated.wait(10), "it is evaluated meanwhile"
            if name == "base-one":
                base_evaluated.set()
            events.append((name, "end"))
            return Summary()

        @contextlib.contextmanager
        def in_process(build, *arguments):
            build(*arguments)
            yield

        modules = {
            name: SimpleNamespace(VERSION=1, NEEDS=module.NEEDS, UNIT="parts", build=work)
            for name, module in pipeline.MODULES.items()
        }
        monkeypatch.setattr(pipeline, "MODULES", modules)
        monkeypatch.setattr(pipeline, "ray_cluster", lambda compute: contextlib.nullcontext())
        monkeypatch.setattr(pipeline, "require_capacity", lambda *needs: None)
        monkeypatch.setattr(beside, "in_process", in_process)
        monkeypatch.setattr(beside, "resources_of_nodes", lambda: [{"CPU": cpus}])
        pipeline.build(stages, compute(1), Kept())
        return events

    return build


@pytest.mark.parametrize("cpus", [1, 2, 8])
def test_build_makes_every_stage_once_after_what_it_needs(stages, built, cpus):
    events = built(cpus)
    assert sorted(events) == sorted((each.slug, what) for each in stages for what in ("begin", "end"))
    for each in stages:
        for needed in each.inputs.values():
            assert events.index((needed.slug, "end")) < events.index((each.slug, "begin"))
    alone = events.index(("base-one", "begin")) > events.index(("tuned", "end"))
    assert alone is (cpus == 1), "what does not fit waits"


@pytest.mark.parametrize("failing", ["base-one", "tuned", "rewritten", "pruned"])
def test_build_raises_what_a_stage_beside_another_raises(built, failing):
    with pytest.raises(StageFailed, match=f"{failing} failed"):
        built(2, failing)

"""Stages that are built at once: what begins when, and what no more after a failure. Stages do nothing here."""

import contextlib
import threading

import pytest

from sdft_ray import pipeline
from sdft_ray.artifacts import Stage
from sdft_ray.compute import Compute
from sdft_ray.errors import StageFailed
from sdft_ray.storage import Storage

SECONDS = 20  # a test that would hang fails


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Return what builds a plan with `work` in the place of every stage's work, and gives the events in order."""
    for name in ("require_room", "await_room"):
        monkeypatch.setattr(pipeline, name, lambda compute, stage: None)
    monkeypatch.setattr(pipeline, "ray_cluster", lambda compute: contextlib.nullcontext())

    def run(plan, work, **how) -> list[str]:
        events: list[str] = []

        def log_and_work(stage, *_):
            events.append(f"+{stage.slug}")
            work(stage.slug)
            events.append(f"-{stage.slug}")

        monkeypatch.setattr(pipeline, "_build", log_and_work)
        with contextlib.suppress(StageFailed):
            pipeline.build(plan, Compute(), Storage(str(tmp_path)), **how)
        for thread in threading.enumerate():
            if thread.name.startswith("ThreadPoolExecutor"):
                thread.join(SECONDS)
        return events

    return run


@pytest.fixture
def plan() -> list[Stage]:
    """What a sweep of two depths and two sizes shares."""

    def stage(name: str, slug: str, **inputs: Stage) -> Stage:
        return Stage(name, slug, 1, {"slug": slug}, inputs)

    base, rows = stage("model", "base"), stage("rows", "rows")
    score = stage("score", "score", model=base)
    losses = [stage("loss", f"loss-{n}", model=base, score=score) for n in (1, 2)]
    cuts = [stage("cut", f"cut-{n}", model=base, loss=loss) for n, loss in enumerate(losses, 1)]
    written = [stage("distill", f"distill-{n}", model=base, rows=rows) for n in (1, 2)]
    exams = [stage("evaluate", f"exam-{model.slug}", model=model) for model in (base, *cuts)]
    return [base, rows, score, *losses, *cuts, *written, *exams]


def test_a_stage_begins_when_its_inputs_are_there_and_its_kind_is_free(build, plan):
    both = threading.Barrier(2, timeout=SECONDS)

    def work(slug: str) -> None:
        if slug in ("score", "distill-1"):
            both.wait()  # broken unless both are at work at once

    events = build(plan, work, side_by_side=True)

    def ordered(*names: str) -> bool:
        places = [events.index(name) for name in names]
        return places == sorted(places)

    assert len(events) == 2 * len(plan)
    assert ordered("-base", "+rows", "-rows", "+score", "-score", "+loss-1", "-loss-1", "+loss-2", "-loss-2")
    assert ordered("-loss-1", "+cut-1") and ordered("-loss-2", "+cut-2") and ordered("-distill-1", "+distill-2")
    first_exam = min(i for i, event in enumerate(events) if event.startswith("+exam"))
    assert first_exam == 2 * len(plan) - 6, "exams come when all else is there"


def test_without_it_stages_take_turns_in_the_order_of_the_plan(build, plan):
    events = build(plan[:-3], lambda slug: None)
    assert events == [sign + stage.slug for stage in plan[:-3] for sign in "+-"]


def test_after_a_failure_nothing_more_begins(build, plan):
    failed = threading.Event()

    def work(slug: str) -> None:
        if slug == "distill-1":
            failed.set()
            raise StageFailed("distill: broken")
        if slug == "score":
            failed.wait(SECONDS)
            threading.Event().wait(0.2)  # the failure is heard meanwhile

    events = build(plan, work, side_by_side=True)
    assert {event for event in events if event.startswith("+")} == {"+base", "+rows", "+score", "+distill-1"}

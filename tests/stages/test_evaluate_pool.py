"""Items of a task over a pool of actors: whatever dies, the artifact is that of one process with the whole task.

The model is a fake at the boundary where it is loaded; the harness, Ray and the kills are real.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from sdft_ray.core.rows import Row
from sdft_ray.data.benchmarks import offline_task_file
from sdft_ray.errors import StageFailed
from sdft_ray.models.generation import Written
from sdft_ray.spec.evaluation import PassAt
from sdft_ray.stages import evaluate
from sdft_ray.stages.evaluate import presets
from sdft_ray.stages.evaluate.harness import Loaded
from sdft_ray.stages.evaluate.sharded import Sizes
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage

KILLS = 20
ROWS = [Row(f"What is {i} + {i}?", f"{i} + {i} = {2 * i}", str(2 * i), id=f"row{i}") for i in range(24)]


class Fake:
    """A model whose answers are hashes of what is asked, and which some requests kill the first time."""

    def __init__(self, folder: Path, deadly=(), pause=0.0, always=False) -> None:
        self.folder, self.deadly, self.pause, self.always = folder, set(deadly), pause, always

    def _number(self, *asked) -> int:
        name = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        with (self.folder / "asked.txt").open("a") as lines:
            lines.write(name + "\n")
        if name in self.deadly and (self.always or not (self.folder / name).exists()):
            (self.folder / name).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.pause)
        return int(name[:8], 16)

    def loglikelihood(self, requests) -> list:
        return [(-(self._number(*each.args) % 10**6) / 7, False) for each in requests]

    def generate_until(self, requests) -> list:
        return [f"The answer is {self._number(*each.args) % 100}." for each in requests]

    def answer(self, prompts, most, draws=None) -> list:
        each = zip(prompts, draws or [None] * len(prompts), strict=True)
        return [Written([1, 2], str(self._number(ids, most, draw) % 40), True) for ids, draw in each]

    def score(self, requests) -> list:
        return [(-float(self._number("score", *each) % 1000), True) for each in requests]

    def __call__(self) -> Loaded:
        return Loaded(self, None, self.answer, self.score)


@pytest.fixture(scope="module")
def stages(tiny_model) -> dict[str, Stage]:
    """Evaluations of one model: choices, generated answers, held-out rows."""
    base, settings = Stage("model", "tiny", 1, {"name": "tiny"}, location=tiny_model), []
    for task, limit in {"arc_easy": 60, "gsm8k_cot": 40}.items():
        way, file = presets.OFFLINE[task], str(offline_task_file(task))
        asked = {"metric": way.metric, "shots": way.shots, "limit": limit, "chat_template": False, "file": file}
        settings.append(evaluate.TaskSettings(task=task, dtype="float32", engine="vllm", **asked))
    settings.append(
        evaluate.HeldOutSettings(
            dtype="float32", engine="vllm", max_new_tokens=8, answer="number", pass_at=PassAt(samples=5)
        )
    )
    return {each.task: Stage("evaluate", each.task, 1, each, {"model": base}) for each in settings}


@pytest.fixture(scope="module")
def alone(stages, tiny_model, tmp_path_factory) -> dict:
    """What one process makes of each whole task, and what it asks the model for."""
    from sdft_ray.stages.evaluate.by_engine import OutlineLM

    fake = Fake(tmp_path_factory.mktemp("alone"))

    class Plain(OutlineLM):
        def loglikelihood(self, requests, disable_tqdm=False) -> list:
            return fake.loglikelihood(requests)

        def generate_until(self, requests, disable_tqdm=False) -> list:
            return fake.generate_until(requests)

    lm = Plain(str(tiny_model))
    loaded = Loaded(lm, lm.tokenizer, fake.answer, fake.score)
    made = {task: outcome(evaluate.evaluate(lambda: loaded, each.settings, ROWS)) for task, each in stages.items()}
    asked = (fake.folder / "asked.txt").read_text().split()
    assert len(asked) == len(set(asked)) > 300
    return {"made": made, "asked": asked}


def outcome(result) -> tuple:
    summary, items = result
    return {name: value for name, value in summary.plain().items() if name != "seconds"}, list(items)


def start(fake: Fake, model: Path, actors: int, items: int):
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find the modules of tests
    takes = {"num_cpus": 0.1, "scheduling_strategy": "DEFAULT"}
    return evaluate.start_evaluator(lambda: model, fake, takes, Sizes(actors, items))


def ask(evaluator, stages, storage) -> dict:
    return {task: evaluator.evaluate.remote(evaluate.evaluate, stage, storage, ROWS) for task, stage in stages.items()}


def test_twenty_kills_cost_no_item_and_count_none_twice(ray_cluster, stages, alone, tiny_model, tmp_path):
    import ray

    draw, asked = random.Random(7), alone["asked"]
    parts = [asked[len(asked) * i // KILLS : len(asked) * (i + 1) // KILLS] for i in range(KILLS)]
    fake = Fake(tmp_path, deadly=map(draw.choice, parts))  # spread: four deaths over one shard would be its fault
    evaluator = start(fake, tiny_model, actors=4, items=4)
    made = {task: outcome(ray.get(each)) for task, each in ask(evaluator, stages, Storage(str(tmp_path))).items()}
    ray.kill(evaluator)
    assert made == alone["made"]
    assert {len(items) for _, items in made.values()} == {60, 40, 24}
    asked = Counter((tmp_path / "asked.txt").read_text().split())
    assert set(asked) == set(alone["asked"])
    assert sum((tmp_path / name).exists() for name in asked) == KILLS
    assert asked.total() - len(asked) <= KILLS * 4 * 4, "a kill cost more than its shard of 4 items of 4 choices"


def find(kind: str) -> list:
    """Return the actors of a class that are alive."""
    from ray.util.state import list_actors

    return list_actors(filters=[("class_name", "=", kind), ("state", "=", "ALIVE")])


def kept(root: Path) -> list[Path]:
    """Return the files of answered shards."""
    return list(root.glob("resumable/evaluate/*/*.json"))


def test_the_harness_itself_killed_goes_on_from_the_answers_that_are_kept(
    ray_cluster, stages, alone, tiny_model, tmp_path
):
    import ray

    evaluator = start(Fake(tmp_path, pause=0.02), tiny_model, actors=2, items=4)
    tasks = ask(evaluator, stages, Storage(str(tmp_path)))
    while len(kept(tmp_path)) < 4:
        time.sleep(0.05)
    (process,) = find("Evaluator")
    os.kill(process.pid, signal.SIGKILL)
    assert {task: outcome(ray.get(each)) for task, each in tasks.items()} == alone["made"]
    ray.kill(evaluator)
    again = len((tmp_path / "asked.txt").read_text().split()) - len(alone["asked"])
    assert again <= 2 * 4 * 5, "more than what its two actors were at was asked for again"


@pytest.mark.parametrize("actors", [1, 3])
def test_answers_that_are_kept_are_not_asked_for_again(ray_cluster, stages, alone, tiny_model, tmp_path, actors):
    import ray

    storage, fake = Storage(str(tmp_path)), Fake(tmp_path, pause=0.02)
    evaluator = start(fake, tiny_model, actors=2, items=8)
    ask(evaluator, stages, storage)
    while len(kept(tmp_path)) < 6:
        time.sleep(0.05)
    ray.kill(evaluator)
    while find("Answerer"):  # which still ask
        time.sleep(0.1)
    answers = sum(len(json.loads(path.read_text())) for path in kept(tmp_path))
    before = len((tmp_path / "asked.txt").read_text().split())
    evaluator = start(Fake(tmp_path), tiny_model, actors=actors, items=16)
    made = {task: outcome(ray.get(each)) for task, each in ask(evaluator, stages, storage).items()}
    ray.kill(evaluator)
    assert made == alone["made"]
    again = len((tmp_path / "asked.txt").read_text().split()) - before
    assert again <= len(alone["asked"]) - answers, "what was kept was asked for again"


def test_items_that_always_kill_fail_their_task_alone(ray_cluster, stages, alone, tiny_model, tmp_path):
    import ray

    wanted = {task: stage for task, stage in stages.items() if task != "held_out"}
    evaluator = start(Fake(tmp_path, deadly=alone["asked"][:1], always=True), tiny_model, actors=2, items=32)
    tasks = ask(evaluator, wanted, Storage(str(tmp_path)))
    assert outcome(ray.get(tasks["gsm8k_cot"])) == alone["made"]["gsm8k_cot"]
    with pytest.raises(StageFailed, match=r"evaluate: processes with the model died 4 times over \d+ requests"):
        ray.get(tasks["arc_easy"])
    ray.kill(evaluator)

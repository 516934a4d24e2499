"""Evaluation by vLLM against plain lm-eval on transformers: the same numbers, the same answers, the same artifacts."""

import os
import signal
import sys
import time

import pytest
import torch

from sdft_ray import pipeline
from sdft_ray.cluster import in_thread
from sdft_ray.data.benchmarks import offline_task_file
from sdft_ray.data.chat import render_prompt
from sdft_ray.errors import UserError
from sdft_ray.models.generation import Draw, generate, plain_generation
from sdft_ray.results import ITEMS, Item, read_items
from sdft_ray.spec.compute import Compute, EngineOptions, load_compute
from sdft_ray.spec.wording import validate
from sdft_ray.stages import evaluate
from sdft_ray.stages.evaluate import harness, presets
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage

torch.set_num_threads(1)

CONTEXT = 2047  # of the tiny model's 2,048 tokens: vLLM makes one behind what it reads
ENGINE = {"kv_cache_gib": 0.5, "max_num_seqs": 16}
TEXTS = ["Two and two make four.", "A text longer than the context. " * 80]
PROMPTS = ["What is 2 + 2?", "Name a colour.", "Who are you?"]


def settings_of(task: str, limit: int, engine: str = "vllm") -> evaluate.TaskSettings:
    way, file = presets.OFFLINE[task], str(offline_task_file(task))
    asked = {"metric": way.metric, "shots": way.shots, "limit": limit, "chat_template": False, "file": file}
    return evaluate.TaskSettings(task=task, dtype="float32", engine=engine, **asked)


TASKS = {"arc_easy": 12, "gsm8k_cot": 4}


def samples_of(output: harness.Reported) -> list[tuple]:
    """Return of each item and filter what the model said and what that is worth."""
    keys = ("doc_id", "filter", "resps", "filtered_resps", "acc", "exact_match")
    return [tuple(sample.get(key) for key in keys) for samples in output.samples.values() for sample in samples]


def asking(kind: str, *arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


@pytest.fixture(scope="module")
def plain(tiny_model):
    """Plain lm-eval over transformers, with the context that the engine has."""
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(tiny_model), dtype="float32", device="cpu", batch_size=4, max_length=CONTEXT)
    lm.model.generation_config = plain_generation(lm.model, lm.tokenizer)
    return lm


@pytest.fixture(scope="module")
def asked(plain) -> dict:
    """What both are asked for."""
    first, long = list(range(20, 32)), [i % 200 + 10 for i in range(CONTEXT)]
    with torch.inference_mode():
        greedy = plain.model.generate(torch.tensor([first]), max_new_tokens=4)[0, len(first) :].tolist()
    letters = [(first, [token]) for token in range(60, 200)]  # more than are looked up at once
    inner = [(first, [5, 6, 7]), (first, [5, 6, 8]), (first, [5, 6, 7]), (first, greedy), (first, greedy[:1])]
    alike = [(long[:100], [*range(40, 80), *end]) for end in ([1, 2], [3, 4], [5])]  # share more than their context
    whole = [*alike, (long, [11, 12, 13]), (long, [13]), ([9], long), ([77], [78, 79])]
    (written,) = plain.generate_until(asking("generate_until", ("Q: 2?\nA:", {"until": [], "max_gen_toks": 24})))
    assert len(written) > 8
    until = [{"until": []}, {"until": [written[5:7]]}, {"until": ["no such text", written[8]]}, {"until": written[0]}]
    return {
        "pairs": [*letters, *inner, *whole],
        "tasks": [settings_of(task, limit) for task, limit in TASKS.items()],
        "prompts": [render_prompt(plain.tokenizer, prompt) for prompt in PROMPTS],
        "until": [("Q: 2?\nA:", {"max_gen_toks": 24, **each}) for each in until],
        "rolling": [(text,) for text in TEXTS],
    }


@pytest.fixture(scope="module")
def found(ray_cluster, tiny_model, asked) -> dict:
    """What one engine makes of it."""
    import ray
    from ray import cloudpickle

    def measure(model: str, asked: dict) -> dict:
        from sdft_ray.stages.evaluate.by_engine import load_engine

        options = EngineOptions(**ENGINE)
        loaded = load_engine(model, "float32", 4, "cpu", options)
        lm = loaded.lm
        found = {"tasks": [samples_of(harness.ask_harness(lm, task)) for task in asked["tasks"]]}
        found["packed"], found["answers"] = loaded.score(asked["pairs"]), loaded.answer(asked["prompts"], 24)
        draws = [Draw(1.0, 0.9, seed) for seed, _ in enumerate(asked["prompts"])]
        found["drawn"] = loaded.answer(asked["prompts"], 24, draws)
        found["drawn_backwards"] = loaded.answer(asked["prompts"][::-1], 24, draws[::-1])[::-1]
        found["until"] = lm.generate_until(asking("generate_until", *asked["until"]))
        sampled = {"until": [], "do_sample": True, "temperature": 1.0, "top_k": 3, "max_gen_toks": 8}
        found["sampled"] = [lm.generate_until(asking("generate_until", *6 * [("Q", sampled)])) for _ in range(2)]
        lm.in_engine = True  # as on a GPU
        found["scores"] = loaded.score(asked["pairs"])
        found["choices"] = samples_of(harness.ask_harness(lm, asked["tasks"][0]))
        found["rolling"] = lm.loglikelihood_rolling(asking("loglikelihood_rolling", *asked["rolling"]))
        found["refused"] = []
        for refused in (
            lambda: loaded.answer([[9] * 2040], 24),
            lambda: lm.generate_until(asking("generate_until", ("Q", {"num_beams": 2, "no_repeat_ngram_size": 3}))),
        ):
            try:
                refused()
            except UserError as error:
                found["refused"].append(str(error))
        return found

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find the modules of tests
    return ray.get(ray.remote(max_calls=1)(measure).remote(str(tiny_model), asked))


def assert_near(scores, expected) -> None:
    assert [likelihood for likelihood, _ in scores] == pytest.approx([x for x, _ in expected], abs=1e-3, rel=1e-6)
    assert [greedy for _, greedy in scores] == [x for _, x in expected]


@pytest.mark.parametrize("way", ["scores", "packed"])
def test_log_likelihoods_are_those_of_plain_lm_eval(way, found, asked, plain):
    pairs = [(("", ""), *pair) for pair in asked["pairs"]]
    expected = plain._loglikelihood_tokens(pairs, disable_tqdm=True)
    assert {greedy for _, greedy in expected} == {True, False}
    assert_near(found[way], expected)


def test_rolling_log_likelihoods_are_those_of_plain_lm_eval(found, asked, plain):
    expected = plain.loglikelihood_rolling(asking("loglikelihood_rolling", *asked["rolling"]), disable_tqdm=True)
    assert found["rolling"] == pytest.approx(expected, rel=1e-6, abs=1e-3)


def test_tasks_have_the_answers_and_scores_of_plain_lm_eval_under_every_filter(found, asked, plain):
    (choices, written), expected = found["tasks"], [samples_of(harness.ask_harness(plain, t)) for t in asked["tasks"]]
    for ours in (choices, found["choices"]):
        assert [sample[4] for sample in ours] == [sample[4] for sample in expected[0]]
        for (_, _, _, scores, *_), (_, _, _, others, *_) in zip(ours, expected[0], strict=True):
            assert_near(scores, others)
    assert {name for _, name, *_ in written} == {"strict-match", "flexible-extract"} and len(written) == 8
    assert written == expected[1]
    assert all(text for _, _, ((text,),), *_ in written), "nothing was written"


def test_held_out_answers_are_those_of_transformers(found, asked, plain):
    assert found["answers"] == generate(plain.model, plain.tokenizer, asked["prompts"], 24, batch_size=4)


def test_drawn_held_out_answers_are_drawn_by_their_own_seeds(found):
    assert found["drawn"] == found["drawn_backwards"] != found["answers"]


def test_stop_strings_cut_as_in_plain_lm_eval(found, asked, plain):
    expected = plain.generate_until(asking("generate_until", *asked["until"]), disable_tqdm=True)
    assert found["until"] == expected and len(set(expected)) > 2


def test_sampled_answers_have_seeds_of_their_own(found):
    first, again = found["sampled"]
    assert first == again and len(set(first)) > 1


def test_what_the_engine_cannot_do_is_one_clear_line(found):
    assert found["refused"] == [
        "compute.evaluate.engine.max_model_len: 2048 is too few for a prompt and answer of 2064 tokens. "
        "Raise it to 2064 or more.",
        "evaluate.engine: vllm cannot generate with no_repeat_ngram_size, num_beams, which a task asks for. "
        "Set evaluate.engine: transformers.",
    ]


@pytest.mark.full
def test_an_engine_serves_all_tasks_of_a_model_and_its_death_costs_what_it_was_at(ray_cluster, tiny_model, tmp_path):
    from ray.util.state import list_actors

    storage, base = Storage(str(tmp_path / "root")), Stage("model", "tiny", 1, {"name": "tiny"}, location=tiny_model)
    compute = validate(Compute, load_compute().model_dump(mode="json") | {"evaluate": {"engine": ENGINE}})

    def stages(engine: str) -> list[Stage]:
        settings = [settings_of(task, limit, engine) for task, limit in TASKS.items()]
        return [Stage("evaluate", each.task, 1, each, {"model": base}) for each in settings]

    def count_done() -> int:
        return sum(storage.status(stage) == "done" for stage in stages("vllm"))

    def alive(kind: str) -> list:
        return list_actors(filters=[("class_name", "=", kind), ("state", "=", "ALIVE")])

    at_work = in_thread(pipeline.build, stages("vllm"), compute, storage)
    while not count_done() and not at_work.done():
        time.sleep(0.1)
    (actor,) = alive("Answerer")
    os.kill(actor.pid, signal.SIGKILL)
    assert count_done() == 1
    at_work.result()
    pipeline.build(stages("transformers"), compute, storage)
    for ours, theirs in zip(stages("vllm"), stages("transformers"), strict=True):
        assert ours.id != theirs.id
        found, expected = (read_items(storage.files(stage, ITEMS), Item) for stage in (ours, theirs))
        assert found == expected and len(found) == TASKS[ours.settings.task]
    (evaluator,) = list_actors(filters=[("class_name", "=", "Evaluator")])
    assert evaluator.state == "DEAD"
    while alive("Answerer"):  # they end with it
        time.sleep(0.1)

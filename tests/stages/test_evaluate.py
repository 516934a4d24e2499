"""Evaluations: the harness is asked for what the recipe says, and our scores are its scores."""

import functools
import math
import sys
import types

import pytest
import torch
from tiny import make_tiny_model, make_tokenizer

from sdft_ray.core.rows import PLAIN, Row
from sdft_ray.data.benchmarks import offline_task_file
from sdft_ray.data.chat import encode_row, render_prompt
from sdft_ray.errors import UserError
from sdft_ray.models import generation
from sdft_ray.models.generation import Draw, Written
from sdft_ray.spec.evaluation import PassAt
from sdft_ray.stages import evaluate
from sdft_ray.stages.evaluate import harness, held_out, presets
from sdft_ray.stages.evaluate.harness import Loaded
from sdft_ray.stages.evaluate.scores import make_score
from sdft_ray.stages.evaluate.settings import Source

torch.set_num_threads(1)

HUB = {
    "arc_challenge": "allenai/ai2_arc",
    "hellaswag": "Rowan/hellaswag",
    "truthfulqa_mc2": "truthfulqa/truthful_qa",
    "mmlu": "cais/mmlu",
    "winogrande": "allenai/winogrande",
    "gsm8k": "openai/gsm8k",
    "gsm8k_cot": "openai/gsm8k",
    "ifeval": "google/IFEval",
    "mmlu_pro": "TIGER-Lab/MMLU-Pro",
}


class Asked(Exception):
    pass


@pytest.mark.parametrize("task", HUB)
def test_task_of_a_hub_is_asked_for_at_the_pinned_commit(task, tmp_path, monkeypatch):
    import datasets
    import nltk

    # What ifeval's task imports, and would download, is needed to grade answers alone.
    monkeypatch.setattr(nltk.data, "find", lambda name: name)
    monkeypatch.setitem(sys.modules, "langdetect", types.ModuleType("langdetect"))
    monkeypatch.setitem(sys.modules, "immutabledict", types.SimpleNamespace(immutabledict=dict))

    def load_dataset(**asked):
        raise Asked(asked["path"], asked.get("revision"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    manager, way = presets.task_manager(presets.FOLDERS[task]), (presets.OPENLLM_V1 | presets.GENERATIVE)[task]
    assert len(way.revision) == 40
    path = harness.write_task(manager, task, {"dataset_kwargs": {"revision": way.revision}}, tmp_path)
    with pytest.raises(Asked) as asked:
        manager.load(path)
    assert asked.value.args == (HUB[task], way.revision)


def test_leaderboard_has_the_published_shots():
    assert {task: way.shots for task, way in presets.OPENLLM_V1.items()} == {
        "arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": 0, "mmlu": 5, "winogrande": 5, "gsm8k": 5
    }  # fmt: skip


def test_ifeval_without_its_packages_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(presets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^evaluate\.tasks: ifeval needs immutabledict and langdetect, .*lm_eval\[ife"):
        presets.require_usable("generative", ["gsm8k_cot", "ifeval"])
    presets.require_usable("generative", ["gsm8k_cot", "mmlu_pro", "held_out"])


def test_a_name_of_the_harness_without_a_score_is_refused_before_anything_is_built(monkeypatch):
    def entry(kind, tags=(), **cfg):
        return types.SimpleNamespace(kind=types.SimpleNamespace(name=kind), tags={*tags}, cfg=cfg or None)

    index = {
        "arc_easy": entry("TASK", output_type="multiple_choice"),
        "own": entry("PY_TASK"),
        "ai2_arc": entry("TAG", ["arc_easy", "arc_challenge"]),
        "openllm": entry("GROUP", task=["mmlu", {"task": "gsm8k", "num_fewshot": 5}]),
        "mmlu": entry("GROUP", task=["mmlu_stem"], aggregate_metric_list=[{"metric": "acc"}]),
        "wikitext": entry("TASK", output_type="loglikelihood_rolling"),
        **{f"word_{i:05}": entry("TASK") for i in range(10_000)},
    }
    monkeypatch.setattr(presets, "task_manager", lambda: types.SimpleNamespace(task_index=index))
    presets.require_usable("harness", ["arc_easy", "own", "mmlu", "held_out"])
    with pytest.raises(UserError) as error:
        presets.require_usable("harness", ["ai2_arc", "openllm", "wikitext", "arc_eazy", "/tasks/mine.yaml"])
    several = "stands for several tasks, without a score of all. Give these"
    assert [line.partition(": ")[2] for line in error.value.problems[:4]] == [
        f"ai2_arc {several}: arc_challenge, arc_easy.",
        f"openllm {several}: mmlu, gsm8k.",
        "wikitext measures perplexity alone, and a score is higher for a better model. "
        "Take another task; evaluate.retention measures likelihoods of texts.",
        "lm-eval has no task arc_eazy. Did you mean arc_easy?",
    ]
    assert len(error.value.problems[4]) < 1000 and error.value.problems[4].endswith(" and 9,946 more.")


def test_a_harness_task_is_scored_by_what_is_higher_for_a_better_model():
    results = ["alias", "perplexity,none", "perplexity_stderr,none", "f1,none", "acc,none", "acc,strict"]
    better = {"perplexity": False, "f1": True, "acc": True}
    samples = [{"filter": "none", "perplexity": -3.5, "f1": (1, 0), "acc": 1.0}]
    assert harness.choose_metric("lambada", results, better, samples) == "acc,none"
    for nothing in ({}, {"perplexity": False, "f1": True}):
        with pytest.raises(
            UserError, match=r"evaluate\.tasks: lambada has no metric that is higher for a better model"
        ):
            harness.choose_metric("lambada", results, nothing, samples)


def test_a_further_metric_that_is_no_number_is_left_out(monkeypatch):
    sample = {"filter": "none", "acc": 1.0, "doc_hash": "a", "doc": {}, "arguments": [0, 1]}
    results = {"alias": "t", "acc,none": 1.0, "acc_stderr,none": "N/A", "f1,none": 0.5, "spearmanr,none": math.nan}
    reported = harness.Reported(
        results={"t": {**results, "mcc,none": "N/A"}},
        samples={"t": [sample]},
        higher_is_better={"t": {"acc": True}},
        **{"n-samples": {"t": {"effective": 1, "original": 1}}},
    )
    monkeypatch.setattr(harness, "ask_harness", lambda *_: reported)
    score, _ = harness.run_task(None, types.SimpleNamespace(task="t", metric=None))
    assert (score.value, score.chance, score.other_metrics) == (1.0, 0.5, {"f1,none": 0.5})


def test_a_score_that_is_no_number_names_the_precision():
    score = make_score("exact_match", [0.0, 1.0], 0.0, limited=False, bits_per_byte=math.nan)
    with pytest.raises(UserError, match=r"^evaluate\.dtype: float16 gives logits of NaN\. Set float32\.$"):
        evaluate.require_number(score, "float16")
    evaluate.require_number(make_score("acc", [0.0, 1.0], 0.0, limited=False), "float16")


@pytest.mark.parametrize(("task", "metric", "shots"), [("arc_easy", None, 2), ("hellaswag", "acc_norm,none", 0)])
def test_evaluate_in_float32_scores_exactly_what_plain_lm_eval_does(task, metric, shots, tiny_model, tmp_path):
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    way, file = presets.OFFLINE[task], offline_task_file(task)
    settings = evaluate.TaskSettings(
        task=task, dtype="float32", metric=metric, shots=shots, limit=12, chat_template=False, file=str(file)
    )
    load = functools.partial(harness.load_model, str(tiny_model), "float32", 8, "cpu")
    ours, items = evaluate.evaluate(load, settings, [])
    manager = presets.task_manager()
    (tmp_path / "plain.yaml").write_text(
        f"include: {manager.task_index[task].yaml_path}\ndataset_path: arrow\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{validation: {file}}}}}\ntraining_split: null\nvalidation_split: validation\n"
        "test_split: null\n"
    )
    plain = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(tiny_model), dtype="float32", device="cpu", batch_size=8),
        tasks=[str(tmp_path / "plain.yaml")],
        num_fewshot=shots,
        limit=12,
        task_manager=manager,
        bootstrap_iters=0,
    )
    expected = plain["results"][task]
    assert 0 < ours.value < 1 and ours.n == 12 and ours.limited
    assert ours.value == expected[way.metric]
    assert ours.other_metrics == {
        key: value for key, value in expected.items() if key in ("acc,none", "acc_norm,none") and key != way.metric
    }
    metric = way.metric.partition(",")[0]
    assert [item.value for item in items] == [sample[metric] for sample in plain["samples"][task]]


def test_generate_takes_the_likeliest_token_whatever_the_model_says_of_generation(tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    prompts = [render_prompt(tokenizer, prompt) for prompt in ("2 + 2?", "What is the capital of France?")]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.inference_mode():
            while (
                len(ids) < len(prompt) + 12 and (token := int(model(torch.tensor([ids])).logits[0, -1].argmax())) != 2
            ):
                ids.append(token)
        expected.append(tokenizer.decode(ids[len(prompt) :]))
    assert any(expected)
    model.generation_config.update(
        do_sample=True, temperature=2.0, num_beams=3, repetition_penalty=5.0, no_repeat_ngram_size=1, max_length=3,
        min_new_tokens=12, forced_eos_token_id=7, suppress_tokens=list(range(9, 99)), renormalize_logits=True,
    )  # fmt: skip
    written = generation.generate(model, tokenizer, prompts, 12, batch_size=2)
    assert [each.text for each in written] == expected
    for each in written:
        assert each.ended == (each.ids[-1] == 2) and (each.ended or len(each.ids) == 12)


def test_generate_stops_at_the_templates_end_of_turn_and_at_the_ends_that_the_config_names(tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    prompts = [render_prompt(tokenizer, "2 + 2?")]
    ((ids, text, ended),) = generation.generate(model, tokenizer, prompts, 12, batch_size=2)
    assert tokenizer.decode(ids) == text and not ended
    third = next(i for i, token in enumerate(ids) if i >= 3 and token not in ids[:i])
    model.config.eos_token_id = [tokenizer.eos_token_id, ids[third]]
    (ended,) = generation.generate(model, tokenizer, prompts, 12, batch_size=2)
    assert ended == (ids[: third + 1], tokenizer.decode(ids[:third]), True)
    model.config.eos_token_id = None
    mark = tokenizer.convert_ids_to_tokens(ids[third])
    tokenizer.add_tokens([mark])  # as one that is not called special
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", f"{mark}\n")
    (ended,) = generation.generate(model, tokenizer, prompts, 12, batch_size=2)
    assert ended == (ids[: third + 1], tokenizer.decode(ids[:third]), True)


def test_generate_draws_each_answer_by_its_own_seed_whatever_stands_beside_it(tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    prompts = [render_prompt(tokenizer, prompt) for prompt in ("2 + 2?", "2 + 2?", "What is the capital of France?")]
    draws = [Draw(1.0, 0.9, seed) for seed in (1, 2, 1)]
    together = generation.generate(model, tokenizer, prompts, 12, draws, batch_size=2)
    alone = [
        generation.generate(model, tokenizer, [prompt], 12, [draw], batch_size=1)[0]
        for prompt, draw in zip(prompts, draws, strict=True)
    ]
    greedy = generation.generate(model, tokenizer, prompts, 12, batch_size=2)
    assert together == alone and together[0] != together[1] != greedy[0]
    cold = generation.generate(model, tokenizer, prompts, 12, [Draw(1e-6, 1.0, 3)] * 3, batch_size=2)
    assert cold == greedy


def test_drawn_tokens_have_the_chances_of_their_nucleus():
    # At temperature 0.5 chances are squared: 16, 9, 4 and 1 of 30. A nucleus of 0.9 needs the first three.
    logits, count = torch.tensor([0.4, 0.3, 0.2, 0.1]).log(), 6000
    drawn = generation._drawing([Draw(0.5, 0.9, seed) for seed in range(count)])(None, logits.expand(count, -1))
    shares = [float((drawn.argmax(-1) == token).sum()) / count for token in range(4)]
    assert shares == pytest.approx([16 / 29, 9 / 29, 4 / 29, 0], abs=0.025)  # four standard errors
    assert shares[3] == 0


OPENS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def test_held_out_answers_are_graded_without_thoughts_and_references_without_what_the_template_writes(tmp_path):
    from transformers import AutoModelForCausalLM

    tokenizer = make_tokenizer()
    tokenizer.chat_template = OPENS_THOUGHTS
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path, num_hidden_layers=2))
    said = {
        "a?": "\n</think>\n\n4<|im_end|>",
        "b?": "4?\n</think>\n\n5<|im_end|>",
        "c?": "4, 4, 4<|im_end|>",  # a thought without an end
        "d?": "5?\n</think>\n\n4<|im_end|>",
    }
    learn_by_heart(model, [(render_prompt(tokenizer, p), tokenizer(text)["input_ids"]) for p, text in said.items()])
    rows = [Row(prompt, "It is 4.", "4", id=prompt) for prompt in said]
    lm = types.SimpleNamespace(model=model, tokenizer=tokenizer, max_length=512)
    loaded = harness.in_transformers(lm, 4)
    _, items = held_out.evaluate_held_out(loaded, rows, [Source(name="sums", answer="number")], 32)
    assert {item.id: item.value for item in items} == {"a?": 1.0, "b?": 0.0, "c?": 0.0, "d?": 1.0}
    assert [item.generated for item in items][::2] == ["4", "<think>\n4, 4, 4"]
    assert all(item.ended for item in items)
    for item, row in zip(items, rows, strict=True):
        ids = encode_row(tokenizer, row.prompt, "It is 4.").ids
        with torch.inference_mode():
            at = model(torch.tensor([ids])).logits[0].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
        # The last nine are the eight bytes of the reference and the end of turn.
        assert item.bits == pytest.approx(-float(at[-9:-1].sum()) / torch.tensor(2.0).log().item(), rel=1e-4)


def test_held_out_rows_of_several_sources_are_checked_as_each_says(tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    lm = types.SimpleNamespace(
        model=AutoModelForCausalLM.from_pretrained(tiny_model), tokenizer=tokenizer, max_length=512
    )
    loaded = harness.in_transformers(lm, 4)
    sums = [Row(f"{i}?", f"It is {i}.", str(i), id=f"sum{i}") for i in range(3)]
    chats = [Row(f"Say {i}.", f"I say {i}.", id=f"chat{i}", origin=1) for i in range(2)]
    texts = [Row("", f"A plain text, number {i}.", conversation=PLAIN, id=f"text{i}", origin=2) for i in range(2)]
    answers = {"sums": "number", "chats": "none", "texts": "none"}
    sources = [Source(name=name, answer=answer) for name, answer in answers.items()]
    score, items = held_out.evaluate_held_out(
        loaded, [*chats, *sums, *texts], [*sources, Source(name="texts", answer="none")], 4
    )
    assert [item.id for item in items] == ["sum0", "sum1", "sum2"] and score.n == 3
    assert {*score.other_metrics} == {
        "exact_match sums",
        *(f"bits_per_byte {name}" for name in ("sums", "chats", "texts")),
    }
    assert score.other_metrics["exact_match sums"] == score.value
    for name, rows in (("sums", sums), ("chats", chats)):
        own = [row._replace(origin=0, answer="0") for row in rows]
        alone, _ = held_out.evaluate_held_out(loaded, own, sources[:1], 4)
        assert alone.bits_per_byte == pytest.approx(score.other_metrics[f"bits_per_byte {name}"], rel=1e-4)
        assert alone.other_metrics == {}
    bits = 0.0
    for row in texts:
        ids = torch.tensor([encode_row(tokenizer, "", row.reference, PLAIN).ids])
        with torch.inference_mode():
            bits -= float(lm.model(ids).logits[0].log_softmax(-1)[range(ids.shape[1] - 1), ids[0, 1:]].sum())
    size = sum(len(row.reference) for row in texts)
    assert score.other_metrics["bits_per_byte texts"] == pytest.approx(bits / math.log(2) / size, rel=1e-4)


def test_held_out_sampled_answers_are_counted_by_row_and_move_no_score(tiny_model):
    from transformers import AutoTokenizer

    asked = []

    def answer(prompts, most, draws=None):
        asked.append(draws)
        return [Written([1], str(i % 3), True) for i, _ in enumerate(prompts)]

    def scored(requests):
        return [(-1.0, True)] * len(requests)

    loaded = Loaded(None, AutoTokenizer.from_pretrained(tiny_model), answer, scored)
    rows = [Row(f"{i}?", "1", "1", id=f"row{i}") for i in range(3)]
    rows.insert(1, Row("Say it.", "I say it.", id="chat", origin=1))
    sources = [Source(name="sums", answer="number"), Source(name="chats", answer="none")]
    wanted = PassAt(k=(1,), samples=4, temperature=0.5, top_p=0.75, seed=7)
    score, items = held_out.evaluate_held_out(loaded, rows, sources, 4, wanted)
    # The answers are 0, 1, 2, 0, then 1, 2, 0, 1, then 2, 0, 1, 2.
    assert [item.right for item in items] == [1, 2, 1]
    assert {(draw.temperature, draw.top_p) for draw in asked[1]} == {(0.5, 0.75)}
    assert len({draw.seed for draw in asked[1]}) == 12
    held_out.evaluate_held_out(loaded, rows[2:], sources, 4, wanted)
    assert asked[3] == asked[1][4:], "a row's seeds depend on other rows"
    plain, without = held_out.evaluate_held_out(loaded, rows, sources, 4)
    assert plain == score and all("right" not in item.plain() for item in without)


def test_held_out_without_a_row_that_is_checked_is_one_clear_line(tiny_model):
    from transformers import AutoTokenizer

    lm = types.SimpleNamespace(model=None, tokenizer=AutoTokenizer.from_pretrained(tiny_model), max_length=512)
    with pytest.raises(UserError, match=r"^evaluate\.tasks: held_out has no row"):
        held_out.evaluate_held_out(
            harness.in_transformers(lm, 4), [Row("a?", "b")], [Source(name="chats", answer="none")], 4
        )


def learn_by_heart(model, texts):
    """Train a model until it gives the second part of each text after the first."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(400):
        wrong = 0
        for before, after in texts:
            ids = torch.tensor([before + after])
            logits = model(ids).logits[0, len(before) - 1 : -1]
            wrong += int((logits.argmax(-1) != ids[0, len(before) :]).sum())
            torch.nn.functional.cross_entropy(logits, ids[0, len(before) :]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if not wrong:
            return
    raise AssertionError("it did not learn")

"""Exams: the harness is asked for what the recipe says, and our scores are its scores."""

import pytest

from sdft_ray.errors import UserError
from sdft_ray.sources import offline_task_file
from sdft_ray.stages import evaluate

HUB = {
    "arc_challenge": "allenai/ai2_arc",
    "hellaswag": "Rowan/hellaswag",
    "truthfulqa_mc2": "truthfulqa/truthful_qa",
    "mmlu": "cais/mmlu",
    "winogrande": "allenai/winogrande",
    "gsm8k": "openai/gsm8k",
}


class Asked(Exception):
    pass


@pytest.mark.parametrize("task", HUB)
def test_leaderboard_task_asks_the_hub_for_the_pinned_commit(task, tmp_path, monkeypatch):
    import datasets

    def load_dataset(**asked):
        raise Asked(asked["path"], asked.get("revision"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    manager, exam = evaluate.task_manager(evaluate._FOLDERS[task]), evaluate.OPENLLM_V1[task]
    assert len(exam.revision) == 40
    path = evaluate.write_task(manager, task, {"dataset_kwargs": {"revision": exam.revision}}, tmp_path)
    with pytest.raises(Asked) as asked:
        manager.load(path)
    assert asked.value.args == (HUB[task], exam.revision)


def test_leaderboard_has_the_published_shots():
    assert {task: exam.shots for task, exam in evaluate.OPENLLM_V1.items()} == {
        "arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": 0, "mmlu": 5, "winogrande": 5, "gsm8k": 5
    }  # fmt: skip


def test_a_harness_task_is_scored_by_what_is_higher_for_a_better_model():
    results = ["alias", "perplexity,none", "perplexity_stderr,none", "f1,none", "acc,none", "acc,strict"]
    better = {"perplexity": False, "f1": True, "acc": True}
    samples = [{"filter": "none", "perplexity": -3.5, "f1": (1, 0), "acc": 1.0}]
    assert evaluate.choose_metric("lambada", results, better, samples) == "acc,none"
    for nothing in ({}, {"perplexity": False, "f1": True}):
        with pytest.raises(
            UserError, match=r"evaluate\.tasks: lambada has no metric that is higher for a better model"
        ):
            evaluate.choose_metric("lambada", results, nothing, samples)


@pytest.mark.parametrize(("task", "metric"), [("arc_easy", None), ("hellaswag", "acc_norm,none")])
def test_examine_in_float32_scores_exactly_what_plain_lm_eval_does(task, metric, tiny_model, tmp_path):
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    exam, file = evaluate.OFFLINE[task], offline_task_file(task)
    settings = {
        "task": task,
        "dtype": "float32",
        "metric": metric,
        "shots": 0,
        "limit": 12,
        "chat_template": False,
    }
    ours, items = evaluate.examine(lambda: tiny_model, settings, {"file": str(file)}, [], 8, "cpu")
    harness = evaluate.task_manager()
    (tmp_path / "plain.yaml").write_text(
        f"include: {harness.task_index[task].yaml_path}\ndataset_path: arrow\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{validation: {file}}}}}\ntraining_split: null\nvalidation_split: validation\n"
        "test_split: null\n"
    )
    plain = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(tiny_model), dtype="float32", device="cpu", batch_size=8),
        tasks=[str(tmp_path / "plain.yaml")],
        num_fewshot=0,
        limit=12,
        task_manager=harness,
        bootstrap_iters=0,
    )
    expected = plain["results"][task]
    assert 0 < ours["value"] < 1 and ours["n"] == 12 and ours["limited"]
    assert ours["value"] == expected[exam.metric]
    assert ours["other_metrics"] == {
        key: value for key, value in expected.items() if key in ("acc,none", "acc_norm,none") and key != exam.metric
    }
    metric = exam.metric.partition(",")[0]
    assert [item["value"] for item in items] == [sample[metric] for sample in plain["samples"][task]]

"""Exams: the harness is asked for what the recipe says, and our scores are its scores."""

import pytest

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
    manager, exam = evaluate.task_manager(), evaluate.OPENLLM_V1[task]
    assert len(exam.revision) == 40
    path = evaluate.write_task(manager, task, {"dataset_kwargs": {"revision": exam.revision}}, tmp_path)
    with pytest.raises(Asked) as asked:
        manager.load(path)
    assert asked.value.args == (HUB[task], exam.revision)


def test_leaderboard_has_the_published_shots():
    assert {task: exam.shots for task, exam in evaluate.OPENLLM_V1.items()} == {
        "arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": 0, "mmlu": 5, "winogrande": 5, "gsm8k": 5
    }  # fmt: skip

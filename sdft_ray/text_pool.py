"""A pool of actors that each hold a model, and the texts that they measure.

In: an actor's class, and corpora of texts as token ids. Out: what the actors find, in the order of the texts.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

from sdft_ray.progress import Progress
from sdft_ray.spec.compute import Score


def measure(
    actor: Any,
    corpora: Sequence[Sequence[tuple[list[int], int]]],
    plan: Score,
    progress: Progress,
    **arguments: Any,
) -> list[dict[str, list[Any]]]:
    """Return what actors of a class find for the (ids, first) of each text: for each corpus, by name, in its order.

    Batches are made here, of texts of like length: so they are the same whatever the number of actors.
    """
    import ray

    assert plan.cpus != "auto", "load_compute settles auto"
    texts = [text for corpus in corpora for text in corpus]
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i][0]))
    batches = [order[i : i + plan.batch_size] for i in range(0, len(order), plan.batch_size)]
    dataset = ray.data.from_items(
        [{"index": batch, "texts": json.dumps([texts[i] for i in batch])} for batch in batches],
        override_num_blocks=len(batches),
    ).map(
        actor,
        fn_constructor_kwargs={"device": "cuda" if plan.gpus else "cpu", **arguments},
        compute=ray.data.ActorPoolStrategy(size=plan.actors),
        num_cpus=plan.cpus,
        num_gpus=plan.gpus or None,
    )
    found: dict[int, dict[str, Any]] = {}
    progress.begin(len(texts))
    for batch in dataset.iter_rows():
        for place, i in enumerate(batch.pop("index")):
            found[int(i)] = {name: values[place] for name, values in batch.items()}
        progress.update(len(found))
    assert sorted(found) == list(range(len(texts))), "every text is measured once"
    ordered = iter(found[i] for i in range(len(texts)))
    each = [list(itertools.islice(ordered, len(corpus))) for corpus in corpora]
    return [{name: [result[name] for result in results] for name in results[0]} for results in each]

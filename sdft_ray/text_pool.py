"""Calibration texts, and a pool of actors that each hold a model and measure them.

In: the settings of corpora; an actor's class, and corpora of texts as token ids. Out: the corpora; the actors' results,
in the order of the texts.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft_ray.core.rows import Row
from sdft_ray.data.calibration import Corpus, CorpusSettings, read_corpora
from sdft_ray.progress import Progress
from sdft_ray.results import read_split
from sdft_ray.spec.compute import Score


def read_texts(base: Path, settings: Sequence[CorpusSettings], rows: Mapping[int, Path]) -> list[Corpus]:
    """Return corpora as token ids of the model in `base`; rows: the directories of corpora of rows, by their number."""
    first = {i: read_split(place, "train", Row, settings[i].texts) for i, place in rows.items()}
    return read_corpora(base, settings, first)


def measure(
    actor: Any,
    corpora: Sequence[Sequence[tuple[list[int], int]]],
    section: Score,
    progress: Progress,
    **arguments: Any,
) -> list[dict[str, list[Any]]]:
    """Return the results of a class of actors for the (ids, first) of each text: by corpus, then by name, in its order.

    Batches of texts of similar length are made here, so that they do not depend on the number of actors.
    """
    import ray

    assert section.cpus != "auto", "load_compute settles auto"
    texts = [text for corpus in corpora for text in corpus]
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i][0]))
    batches = [order[i : i + section.batch_size] for i in range(0, len(order), section.batch_size)]
    dataset = ray.data.from_items(
        [{"index": batch, "texts": json.dumps([texts[i] for i in batch])} for batch in batches],
        override_num_blocks=len(batches),
    ).map(
        actor,
        fn_constructor_kwargs={"device": "cuda" if section.gpus else "cpu", **arguments},
        compute=ray.data.ActorPoolStrategy(size=section.actors),
        num_cpus=section.cpus,
        num_gpus=section.gpus or None,
    )
    results: dict[int, dict[str, Any]] = {}
    progress.begin(len(texts))
    progress.enter("loading the model")
    for batch in dataset.iter_rows():
        for place, i in enumerate(batch.pop("index")):
            results[int(i)] = {name: values[place] for name, values in batch.items()}
        progress.update(len(results))
    assert sorted(results) == list(range(len(texts))), "every text is measured once"
    ordered = iter(results[i] for i in range(len(texts)))
    by_corpus = [list(itertools.islice(ordered, len(corpus))) for corpus in corpora]
    return [{name: [result[name] for result in own] for name in own[0]} for own in by_corpus]

"""Calibration texts, and a pool of actors that measure them with a model, which each holds whole or block by block.

In: the settings of corpora; what measures, and corpora of texts as token ids. Out: the corpora; the results, in the
order of the texts. A model that is whole takes one batch after the other; one that is streamed all batches of an actor
at once, so that its files are read once.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft_ray.cluster import begin_work
from sdft_ray.core.rows import Row
from sdft_ray.data.calibration import Corpus, CorpusSettings, read_corpora
from sdft_ray.models.sizes import sizes_of_directory
from sdft_ray.progress import Progress
from sdft_ray.results import read_split
from sdft_ray.spec.compute import Compute, Score, settled


def read_texts(base: Path, settings: Sequence[CorpusSettings], rows: Mapping[int, Path]) -> list[Corpus]:
    """Return corpora as token ids of the model in `base`; rows: the directories of corpora of rows, by their number."""
    first = {i: read_split(place, "train", Row, settings[i].texts) for i, place in rows.items()}
    return read_corpora(base, settings, first)


Texts = Sequence[tuple[list[int], int]]
"""Of one batch: the ids of each, and the first of its tokens that counts."""
Meter = Callable[..., Callable[[Sequence[Texts]], Iterator[Any]]]
"""Makes of a model's place, dtype, device and whether it is streamed what measures batches: it yields the share that is
done, and at last the results of each batch by name."""


def is_streamed(base: Path, dtype: str, compute: Compute, alone: bool = False) -> bool:
    """Return whether processes that measure with a model hold one block of it at a time; alone: there is one."""
    weights = sizes_of_directory(base).total * (4 if dtype == "float32" else 2)
    return compute.streams(weights, alone)


def measure(
    meter: Meter, corpora: Sequence[Texts], section: Score, progress: Progress, streamed: bool, **arguments: Any
) -> list[dict[str, list[Any]]]:
    """Return the results for the (ids, first) of each text: by corpus, then by name, in its order.

    Batches of texts of similar length are made here, so that they do not depend on the number of actors.
    """
    texts = [text for corpus in corpora for text in corpus]
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i][0]))
    batches = [order[i : i + section.batch_size] for i in range(0, len(order), section.batch_size)]
    given = [[texts[i] for i in batch] for batch in batches]
    arguments |= {"device": "cuda" if section.gpus else "cpu", "streamed": streamed}
    progress.begin(len(texts))
    progress.enter("loading the model")
    run = _measure_at_once if streamed else _measure_one_by_one
    results: dict[int, dict[str, Any]] = {}
    for number, found in run(meter, given, section, progress, arguments):
        results |= {
            i: {name: values[place] for name, values in found.items()} for place, i in enumerate(batches[number])
        }
    assert sorted(results) == list(range(len(texts))), "every text is measured once"
    ordered = iter(results[i] for i in range(len(texts)))
    by_corpus = [list(itertools.islice(ordered, len(corpus))) for corpus in corpora]
    return [{name: [result[name] for result in own] for name in own[0]} for own in by_corpus]


def _measure_one_by_one(
    meter: Meter, batches: Sequence[Texts], section: Score, progress: Progress, arguments: dict[str, Any]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of each batch and its results."""
    import ray

    done = 0
    actor: Any = _Actor  # Ray's annotations know functions alone
    dataset = ray.data.from_items(
        [{"number": number, "texts": json.dumps(texts)} for number, texts in enumerate(batches)],
        override_num_blocks=len(batches),
    ).map(
        actor,
        fn_constructor_kwargs={"meter": meter, **arguments},
        compute=ray.data.ActorPoolStrategy(size=section.actors),
        num_cpus=settled(section.cpus),
        num_gpus=section.gpus or None,
    )
    for found in dataset.iter_rows():
        number = int(found.pop("number"))
        yield number, found
        done += len(batches[number])
        progress.update(done)


class _Actor:
    """Holds what measures, with a model that is whole."""

    def __init__(self, meter: Meter, **arguments: Any) -> None:
        begin_work()
        self.measure = meter(**arguments)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the results of one batch."""
        *_, [found] = self.measure([json.loads(row["texts"])])
        return {"number": row["number"], **found}


def _measure_at_once(
    meter: Meter, batches: Sequence[Texts], section: Score, progress: Progress, arguments: dict[str, Any]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of each batch and its results, once an actor has taken all of its batches through the model."""
    shares = [share for i in range(section.actors) if (share := batches[i :: section.actors])]
    total = sum(map(len, batches))
    for pieces in stream(_measure_share, [(meter, share, arguments) for share in shares], section):
        if isinstance(pieces[0], float):
            progress.update(int(total * min(pieces)))
            continue
        for i, share in enumerate(pieces):
            yield from ((i + section.actors * place, found) for place, found in enumerate(share))


def _measure_share(meter: Meter, batches: Sequence[Texts], arguments: dict[str, Any]) -> Iterator[Any]:
    yield from meter(**arguments)(batches)


def stream(function: Callable[..., Iterator[Any]], shares: Sequence[tuple[Any, ...]], section: Score) -> Iterator[Any]:
    """Run a generator function in one process a share, which is its arguments; yield what all of them yield next."""
    import ray

    task: Any = ray.remote(_with_own_cores).options(
        num_cpus=settled(section.cpus), num_gpus=section.gpus or None, num_returns="streaming", name=function.__name__
    )
    for pieces in zip(*[task.remote(function, *share) for share in shares], strict=True):
        yield ray.get(list(pieces))


def _with_own_cores(function: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Any]:
    begin_work()
    yield from function(*arguments)

"""Stage `nll`: how far the rewrites lie from the references, in the base model's own eyes.

In: the base model and the distilled rows. Out: nll.json: of a sample of the rows that keep their rewrite, the lengths
of references and rewrites in tokens, and the mean negative log-likelihood of a token of each, given the prompt without
the reference. The rewrites should be the likelier ones: that is what the method is about. Nothing depends on this
stage, so measuring on more rows moves no other number.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdft_ray import stages
from sdft_ray.cluster import begin_work
from sdft_ray.core.rows import Exchange, TrainingRow
from sdft_ray.data.chat import encode_rows
from sdft_ray.models.exporting import load_causal
from sdft_ray.results import NLL, Likelihood, read_row, training_batches
from sdft_ray.spec.compute import Needs
from sdft_ray.spec.recipe import Distill
from sdft_ray.spec.section import Section
from sdft_ray.stages import Work
from sdft_ray.store.identity import Stage
from sdft_ray.store.record import Record

VERSION, NEEDS, UNIT = 1, Needs("distill", alone=True), "texts"
COLUMNS = {"reference": "reference", "distilled": "response"}
_FORWARD_TOKENS = 2048  # of one forward pass: a few rows of a small model's data, hundreds of MB of logits at most


class Settings(Section):
    """How many rows are measured, which, and how exactly."""

    unhashed = ("sources",)
    rows: int
    dtype: str
    seed: int
    sources: tuple[str, ...] = ()
    """Where there are several: their names."""


class Likelihoods(Record):
    """How likely rewrites and references are; without rows there is neither."""

    rows: int
    """That keep their rewrite, of which both are measured."""
    reference: Likelihood | None = None
    distilled: Likelihood | None = None


class SourceLikelihoods(Likelihoods):
    """Those of one source."""

    name: str


class Summary(Likelihoods, stages.Summary):
    """Those of all rows."""

    by_source: tuple[SourceLikelihoods, ...] = ()
    """Where there are several."""


def stage(wanted: Distill, base: Stage, distilled: Stage, sources: Sequence[str]) -> Stage[Settings]:
    """Return the stage; sources: the names of all that the rows are of."""
    names = tuple(sources) if len(sources) > 1 else ()
    settings = Settings(rows=wanted.shift_rows, dtype=wanted.dtype, seed=wanted.seed, sources=names)
    return Stage("nll", distilled.slug, VERSION, settings, {"model": base, "distilled": distilled})


def build(work: Work[Settings]) -> Summary:
    """Write nll.json."""
    directory = work.input("distilled")
    drawn = draw_rows(_judged(directory), work.settings.rows, work.settings.seed)
    rows = [read_row(directory, "train", row.place, Rewritten) for row in drawn]
    work.progress.begin(len(COLUMNS) * len(rows))
    work.progress.enter("loading the model")
    portions: dict[str, list[Portion]] = {}
    for name, portion in _measure_on_ray(work, rows) if rows else ():
        portions.setdefault(name, []).append(portion)
        work.progress.update(sum(each.rows for every in portions.values() for each in every))
    by_source = tuple(
        SourceLikelihoods(name=name, **_likelihoods(portions, [row for row in rows if row.origin == i], i))
        for i, name in enumerate(work.settings.sources)
    )
    summary = Summary(**_likelihoods(portions, rows), **({"by_source": by_source} if by_source else {}))
    summary.to_file(work.directory / NLL, indent=1)
    return summary


class Portion(NamedTuple):
    """Sums over some responses."""

    rows: int
    tokens: int
    nll: float
    """In nats."""
    origin: int = 0
    """The source that they are of."""


def _likelihoods(
    portions: Mapping[str, Sequence[Portion]], rows: Sequence[Rewritten], origin: int | None = None
) -> dict[str, Any]:
    """Return the fields of `Likelihoods`, over rows of one source or of all."""
    wanted = {name: [p for p in some if origin in (None, p.origin)] for name, some in portions.items()}
    return {"rows": len(rows)} | {name: _likelihood(some, len(rows)) for name, some in wanted.items() if some}


def _likelihood(portions: Sequence[Portion], rows: int) -> Likelihood:
    tokens = sum(portion.tokens for portion in portions)
    return Likelihood(mean_tokens=tokens / rows, nll_per_token=sum(portion.nll for portion in portions) / tokens)


class Rewritten(NamedTuple):
    """A row with its reference and its response."""

    prompt: str
    reference: str
    response: str
    conversation: str | None = None
    origin: int = 0

    def exchange(self, column: str) -> Exchange:
        """Return what is given, with one of both responses."""
        return Exchange(self.prompt, getattr(self, column), self.conversation)


class Judged(NamedTuple):
    """What decides whether a row is drawn: of millions of rows no text is read."""

    id: str
    reason: str
    place: int = 0
    """Among the rows."""


def _judged(directory: Path) -> Iterator[list[Judged]]:
    places = itertools.count()
    for batch in training_batches(directory, None, Judged):
        yield [Judged(row.id, row.reason, place) for row, place in zip(batch, places, strict=False)]


def draw_rows(batches: Iterable[Sequence[Judged]], count: int, seed: int) -> list[Judged]:
    """Return some of the rows that keep their rewrite, drawn by their ids without regard to their order."""

    def rank(row: Judged) -> bytes:
        return hashlib.sha256(f"shift:{seed}:{row.id}".encode()).digest()

    return heapq.nsmallest(count, (row for batch in batches for row in batch if row.reason == "kept"), key=rank)


def _measure_on_ray(work: Work[Settings], rows: Sequence[Rewritten]) -> Iterator[tuple[str, Portion]]:
    import ray

    plan = work.compute.distill
    task: Any = ray.remote(measure).options(
        num_cpus=plan.cpus, num_gpus=plan.gpus or None, num_returns="streaming", name="nll"
    )
    for portion in task.remote(work.handle("model"), work.settings.dtype, "cuda" if plan.gpus else "cpu", rows):
        yield ray.get(portion)


def measure(
    model: Callable[[], Path], dtype: str, device: str, rows: Sequence[Rewritten]
) -> Iterator[tuple[str, Portion]]:
    """Yield, some rows at a time, whose responses they are and the sums of their tokens and of their losses in nats."""
    from transformers import AutoTokenizer

    from sdft_ray.core.packing import in_passes

    directory = model()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    begin_work()
    loaded = load_causal(directory, dtype).to(device).eval()
    for name, column in COLUMNS.items():
        for origin in sorted({row.origin for row in rows}):
            mine = [row.exchange(column) for row in rows if row.origin == origin]
            for some in in_passes(encode_rows(tokenizer, mine), _FORWARD_TOKENS):
                tokens = sum(len(row.ids) - row.trained_from for row in some)
                yield name, Portion(len(some), tokens, summed_loss(loaded, some), origin)


def summed_loss(model: Any, rows: Sequence[TrainingRow]) -> float:
    """Return the negative log-likelihood of all trained tokens of some rows, summed."""
    import torch

    from sdft_ray.core.losses import cross_entropy
    from sdft_ray.core.packing import pack_rows
    from sdft_ray.core.rowwise import may_share_a_sequence

    if len(rows) > 1 and not may_share_a_sequence(model.config):
        return sum(summed_loss(model, [row]) for row in rows)
    packed = pack_rows(rows)
    with torch.inference_mode():
        logits = packed.logits(model)  # (K, V)
        return float(cross_entropy(logits, packed.targets.to(logits.device)).sum(dtype=torch.float64))

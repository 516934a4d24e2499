"""Stage `finals`: which of the best cuts has the least loss once each was patched and briefly trained.

In: the losses of candidates, and a trained model for each of the best of them. Out: losses.json: the loss of each on
the same texts, which nothing was fitted or trained on, and the choice. The stages before it are the ordinary ones, so a
finalist is the artifact that its own recipe would make.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdft_ray import stages
from sdft_ray.core.choice import Choice
from sdft_ray.core.surgery import name_blocks
from sdft_ray.data.calibration import CorpusSettings
from sdft_ray.losses import Model, measure_losses, read_loss_texts
from sdft_ray.progress import log
from sdft_ray.results import CANDIDATES, Cut
from sdft_ray.spec.compute import Needs
from sdft_ray.spec.section import Section
from sdft_ray.stages import Work
from sdft_ray.store.identity import Stage, numbered
from sdft_ray.store.record import Record

VERSION, NEEDS, UNIT = 1, Needs("score"), "texts"


class Settings(Section):
    """What the finalists are measured on."""

    dtype: str
    calibration: tuple[CorpusSettings, ...]


class Finalist(Record):
    """A cut that was patched and trained; losses are in nats a token."""

    blocks: tuple[int, ...]
    untrained: float
    """With its blocks skipped, by which it was among the best."""
    loss: float
    """After its training: the mean over corpora."""
    losses: dict[str, float]
    """By corpus."""


class Summary(stages.Summary):
    """The finalists, and what it took to choose one."""

    finalists: tuple[Finalist, ...]
    """The best one first."""
    choice: Choice
    rows: int
    """That each was trained on."""
    seconds: float
    """Of all that was built for the choice alone: cuts, patches and trainings."""


def stage(
    dtype: str,
    corpora: tuple[CorpusSettings, ...],
    base: Stage[Any],
    trained: Sequence[Stage[Any]],
    corpus_rows: Mapping[str, Stage[Any]],
) -> Stage[Settings]:
    """Return the stage; corpus_rows: the rows of corpora that are rows, by `rows_N` for the corpus N."""
    finalists = {numbered("finalist", i): each for i, each in enumerate(trained)}
    settings = Settings(dtype=dtype, calibration=corpora)
    return Stage("finals", base.slug, VERSION, settings, {"model": base, **finalists, **corpus_rows})


def build(work: Work[Settings]) -> Summary:
    """Write losses.json."""
    import torch

    from sdft_ray.core.similarity import choose

    settings, keys = work.settings, work.stage.keys("finalist")
    rows = work.numbered_inputs("rows", len(settings.calibration))
    corpora = read_loss_texts(work.input("model"), settings.calibration, rows)
    columns = [
        measure_losses(Model(work.input(key), work.handle(key), settings.dtype), corpora, work.compute, work.progress)
        for key in keys
    ]
    losses = [torch.cat(each, dim=1) for each in zip(*columns, strict=True)]  # of each corpus (B, finalists)
    made = [_made(work.stage.inputs[key]) for key in keys]
    cuts = [Cut.model_validate(work.storage.manifest(stages[-1]).summary) for stages in made]
    finalists = [
        Finalist(
            blocks=cut.removed,
            untrained=cut.cost or 0.0,
            loss=float(sum(each[:, i].mean() for each in losses)) / len(losses),
            losses={corpus.name: float(each[:, i].mean()) for corpus, each in zip(corpora, losses, strict=True)},
        )
        for i, cut in enumerate(cuts)
    ]
    choice = choose(losses, [each.blocks for each in finalists])
    built = {stage.id: stage for stages in made for stage in stages}
    summary = Summary(
        finalists=tuple(sorted(finalists, key=lambda each: each.loss)),
        choice=choice,
        rows=made[0][0].settings.train.rows,
        seconds=round(sum(work.storage.manifest(each).provenance.wall_seconds for each in built.values()), 1),
    )
    summary.to_file(work.directory / CANDIDATES)
    log(f"finals: {describe(summary)}")
    return summary


def describe(summary: Summary) -> str:
    """Return in words what came of each finalist."""
    each = (f"{name_blocks(one.blocks)} {one.untrained:.3f} to {one.loss:.3f}" for one in summary.finalists)
    return f"{', '.join(each)} nats a token after {summary.rows} rows, in {summary.seconds:.0f} s"


def _made(trained: Stage[Any]) -> list[Stage[Any]]:
    """Return the training of a finalist, the model that it began with, and at last the cut."""
    start = trained.model
    return [*filter(None, (trained, start, start.inputs.get("pruned")))]

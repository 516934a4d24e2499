"""Stage `loss`: the loss of candidates on texts that no distance was measured on, with their blocks skipped.

In: the base model, the calibration corpora and, where spans are tried, the distances. Out: losses.json: each span with
its loss beside its ranks by distance and by influence; or the blocks that go one after the other, each time the one
without which the loss is least. It costs a forward pass a candidate and so knows the number of blocks, which `score`
does not. Nothing is copied: all candidates advance together, block by block, and those that have lost the same blocks
so far share their state.

One after the other every block is a candidate at each step. What a step measured is kept in a ledger that knows nothing
of the number of blocks: another number goes on from there, and so does a run after a kill.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft_ray import stages
from sdft_ray.core.choice import Choice
from sdft_ray.core.passes import Passes, count_passes
from sdft_ray.data.calibration import Corpus, CorpusSettings
from sdft_ray.data.readers import read_json
from sdft_ray.losses import Model, measure_losses, read_loss_texts
from sdft_ray.models.depth import Depth, blocks_in, depth_settings, settle_depth
from sdft_ray.progress import Progress, log
from sdft_ray.results import CANDIDATES, read_measured
from sdft_ray.spec.compute import Compute, Needs
from sdft_ray.spec.pruning import Prune
from sdft_ray.stages import Work
from sdft_ray.store.files import write_atomically
from sdft_ray.store.identity import Stage, short_id
from sdft_ray.store.record import Record

if TYPE_CHECKING:
    from torch import Tensor

VERSION, NEEDS, UNIT = 2, Needs("score"), "texts"


class Settings(Depth):
    """Which spans are tried, and on what."""

    dtype: str
    calibration: tuple[CorpusSettings, ...]
    contiguous: bool
    candidates: int


class GreedySettings(Depth):
    """How many blocks go one after the other, and on what that is measured."""

    dtype: str
    calibration: tuple[CorpusSettings, ...]


LossStage = Stage[Settings] | Stage[GreedySettings]


class Ranked(Record):
    """Blocks whose removal is worth a try."""

    blocks: tuple[int, ...]
    distance: float | None = None
    distance_rank: int | None = None
    """From 1; absent for blocks that are no span."""
    influence: float
    influence_rank: int | None = None


class Candidate(Ranked):
    """Blocks whose removal was tried."""

    loss: float
    """The mean over corpora, in nats a token."""
    losses: dict[str, float]
    """By corpus."""


class Taken(Record):
    """One step of removing blocks one after the other."""

    block: int
    """That is removed, of the base."""
    loss: float
    """Without it and those of earlier steps: the mean over corpora, in nats a token."""
    losses: dict[str, float]
    """By corpus."""
    runner_up: int | None
    """The next best block; None where there is no other."""
    runner_up_loss: float | None
    agreement: float
    """Fraction of bootstrap samples of the texts that remove the same block here."""


class Summary(stages.Summary):
    """What every candidate costs, and which one is chosen; losses are in nats a token."""

    texts: dict[str, int]
    """Loss texts, by corpus."""
    base_loss: float
    """With nothing removed."""
    candidates: tuple[Candidate, ...]
    """The best one first."""
    choice: Choice


class GreedySummary(stages.Summary):
    """The blocks that go one after the other; losses are in nats a token."""

    texts: dict[str, int]
    """Loss texts, by corpus."""
    base_loss: float
    """With nothing removed."""
    steps: tuple[Taken, ...]
    """In the order of removal."""
    choice: Choice
    """All of them; its agreement is that of bootstrap samples with every step."""
    cost: Passes


def stage(
    prune: Prune,
    corpora: tuple[CorpusSettings, ...],
    base: Stage,
    score: Stage | None,
    corpus_rows: Mapping[str, Stage],
) -> LossStage:
    """Return the stage; corpus_rows: the rows of corpora that are rows, by `rows_N` for the corpus N."""
    common = {"dtype": prune.dtype, "calibration": corpora, **dict(depth_settings(prune))}
    if score is None:
        greedy = GreedySettings(**common)
        return Stage("loss", greedy.slug(base.slug), VERSION, greedy, {"model": base, **corpus_rows})
    settings = Settings(contiguous=prune.contiguous, candidates=prune.candidates, **common)
    inputs = {"model": base, "score": score, **corpus_rows}
    return Stage("loss", settings.slug(base.slug), VERSION, settings, inputs)


def build(work: Work[Any]) -> Summary | GreedySummary:
    """Write losses.json."""
    summary = _remove_one_by_one(work) if isinstance(work.settings, GreedySettings) else _try_spans(work)
    summary.to_file(work.directory / CANDIDATES)
    return summary


def _read_texts(work: Work[Any]) -> list[Corpus]:
    wanted = work.settings.calibration
    return read_loss_texts(work.input("model"), wanted, work.numbered_inputs("rows", len(wanted)))


def _given(work: Work[Any], corpora: Sequence[Corpus]) -> tuple[Model, Sequence[Corpus], Compute, Progress]:
    """Return what `measure_losses` needs of the base."""
    model = Model(work.input("model"), work.handle("model"), work.settings.dtype)
    return model, corpora, work.compute, work.progress


def _try_spans(work: Work[Settings]) -> Summary:
    """Return the losses of the best candidates by distance and by influence."""
    import torch

    from sdft_ray.core.similarity import choose

    candidates, corpora = rank_candidates(work), _read_texts(work)
    removed = [candidate.blocks for candidate in candidates]
    losses = measure_losses(*_given(work, corpora), removed)
    means = torch.stack([each.mean(dim=0) for each in losses])  # (corpora, 1 + C)
    names = [corpus.name for corpus in corpora]
    tried = [
        Candidate(
            **ranked.model_dump(exclude_unset=True),
            loss=float(mean.mean()),
            losses=dict(zip(names, mean.tolist(), strict=True)),
        )
        for ranked, mean in zip(candidates, means[:, 1:].T, strict=True)
    ]
    return Summary(
        texts={corpus.name: len(corpus.loss_texts) for corpus in corpora},
        base_loss=float(means[:, 0].mean()),
        candidates=tuple(sorted(tried, key=lambda candidate: candidate.loss)),
        choice=choose([each[:, 1:] for each in losses], removed),
    )


def _remove_one_by_one(work: Work[GreedySettings]) -> GreedySummary:
    """Return the blocks whose removal, one after the other, raises the loss least at each step."""
    import torch

    base, protect = work.input("model"), work.settings.protect
    depth, blocks = settle_depth(work.settings, "anywhere", base), blocks_in(base)
    corpora, steps, agree = _read_texts(work), list[Taken](), torch.ones(())
    base_loss = 0.0
    with _kept_steps(work) as kept:
        for number in range(depth):
            gone = tuple(sorted(step.block for step in steps))
            free = [block for block in range(protect.first, blocks - protect.last) if block not in gone]
            losses = _measure_step(work, kept / f"step-{number}.json", corpora, free, gone)
            base_loss = base_loss or float(_mean(losses)[0])
            step, agrees = _take(losses, free, [corpus.name for corpus in corpora])
            steps.append(step)
            agree = agree * agrees
            log(f"loss: {number + 1} of {depth} blocks, {step.block} goes: {step.loss:.3f} nats a token")
    removed, last = tuple(sorted(step.block for step in steps)), steps[-1]
    others = None if last.runner_up is None else tuple(sorted({*removed} - {last.block} | {last.runner_up}))
    return GreedySummary(
        texts={corpus.name: len(corpus.loss_texts) for corpus in corpora},
        base_loss=base_loss,
        steps=tuple(steps),
        choice=Choice(removed, last.loss, others, float(agree.mean())),
        cost=count_passes(blocks, depth, protect.first, protect.last),
    )


def _mean(losses: Sequence[Tensor]) -> Tensor:
    """Return the mean over corpora of the mean over texts: (B, 1 + C) each to (1 + C)."""
    import torch

    return torch.stack([each.mean(dim=0) for each in losses]).mean(dim=0)


def _take(losses: Sequence[Tensor], free: Sequence[int], names: Sequence[str]) -> tuple[Taken, Tensor]:
    """Return the block of those that are `free` without which losses are least, and which bootstrap samples agree.

    losses: for each corpus (B, 1 + C), the first without any of them.
    """
    from sdft_ray.core.similarity import agreeing

    mean = _mean(losses)[1:]
    best, *others = mean.argsort(stable=True).tolist()
    agrees = agreeing([each[:, 1:] for each in losses], best).double()
    step = Taken(
        block=free[best],
        loss=float(mean[best]),
        losses={name: float(each[:, 1 + best].mean()) for name, each in zip(names, losses, strict=True)},
        runner_up=free[others[0]] if others else None,
        runner_up_loss=float(mean[others[0]]) if others else None,
        agreement=float(agrees.mean()),
    )
    return step, agrees


@contextmanager
def _kept_steps(work: Work[GreedySettings]) -> Iterator[Path]:
    """Hold the directory of the losses of steps, whose id has everything of the stage's but the number of blocks."""
    settings = {name: value for name, value in work.settings.hashed().items() if name not in ("blocks", "target")}
    key = short_id({**work.stage.identity, "settings": settings})
    with work.storage.lock(f"ledger-{key}"):
        folder = work.storage.ledger(f"{work.stage.model.slug}-steps-{key}")
        work.storage.bring(folder)
        yield folder


def _measure_step(
    work: Work[GreedySettings], kept: Path, corpora: Sequence[Corpus], free: Sequence[int], gone: Sequence[int]
) -> list[Tensor]:
    """Return `measure_losses` of every block that is free, from the file where an earlier run kept them."""
    import torch

    if not kept.is_file():
        losses = measure_losses(*_given(work, corpora), [(block,) for block in free], gone)
        write_atomically(kept, json.dumps([each.tolist() for each in losses]))
        work.storage.publish(kept)
    return [torch.tensor(each, dtype=torch.float64) for each in read_json(kept)]


def rank_candidates(work: Work[Settings]) -> list[Ranked]:
    """Return the sets of blocks that are worth a try: the best spans by distance, and the best by influence.

    Each with its distance and influence and its rank by them, from 1; a set that is no span has no rank.
    """
    from sdft_ray.core.similarity import choose_blocks, span_distances, span_influences

    size = settle_depth(work.settings, "span" if work.settings.contiguous else "anywhere", work.input("model"))
    protect = work.settings.protect
    distances, influences = read_measured(work.input("score"))
    blocks = influences[0].shape[1]
    starts = range(protect.first, blocks - size - protect.last + 1)

    def costs(each: Sequence[Any], cost: Any) -> list[float]:
        mean: Any = sum(cost(corpus, size).double().mean(dim=0) for corpus in each) / len(each)
        return list(mean.tolist())

    by_distance, by_influence = costs(distances, span_distances), costs(influences, span_influences)
    ranks = [
        {start: rank for rank, start in enumerate(sorted(starts, key=lambda s: cost[s]), 1)}
        for cost in (by_distance, by_influence)
    ]
    chosen = [start for start in starts if min(rank[start] for rank in ranks) <= work.settings.candidates]
    candidates = [
        Ranked(
            blocks=tuple(range(start, start + size)),
            distance=by_distance[start],
            distance_rank=ranks[0][start],
            influence=by_influence[start],
            influence_rank=ranks[1][start],
        )
        for start in chosen
    ]
    if not work.settings.contiguous:
        choice = choose_blocks(influences, size, protect.first, protect.last)
        if all(choice.blocks != candidate.blocks for candidate in candidates):
            candidates.append(Ranked(blocks=choice.blocks, influence=choice.value))
    return candidates

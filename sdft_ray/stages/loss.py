"""Stage `loss`: the loss of the best candidates on texts that no distance was measured on, with their blocks skipped.

In: the base model, the distances and the calibration corpora. Out: losses.json, each candidate with its loss beside its
ranks by distance and by influence. It costs a forward pass a candidate and so knows the number of blocks, which
`score` does not. Nothing is copied: the base runs once, and each candidate goes on from the state before its first
removed block, through the model's own code with stand-ins where blocks are out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from sdft_ray import stages
from sdft_ray.cluster import use_assigned_cores
from sdft_ray.core.choice import Choice
from sdft_ray.core.surgery import decoder_of
from sdft_ray.data.calibration import CorpusSettings
from sdft_ray.errors import UserError, problem
from sdft_ray.results import CANDIDATES, Candidate, Ranked, read_measured
from sdft_ray.spec.compute import Needs
from sdft_ray.spec.recipe import Protect, Prune
from sdft_ray.spec.section import Section
from sdft_ray.stages import Work
from sdft_ray.store.files import write_atomically
from sdft_ray.store.identity import Stage
from sdft_ray.text_pool import measure, read_texts

VERSION, NEEDS, UNIT = 2, Needs("score"), "texts"


class Settings(Section):
    """Which spans are tried, and on what."""

    dtype: str
    calibration: tuple[CorpusSettings, ...]
    depth: int = Field(serialization_alias="blocks")
    contiguous: bool
    protect: Protect
    candidates: int


class Summary(stages.Summary):
    """What every candidate costs, and which one is chosen; losses are in nats a token."""

    texts: dict[str, int]
    """Loss texts, by corpus."""
    base_loss: float
    """With nothing removed."""
    candidates: tuple[Candidate, ...]
    """The best one first."""
    choice: Choice


def stage(
    prune: Prune, corpora: tuple[CorpusSettings, ...], base: Stage, score: Stage, corpus_rows: Mapping[str, Stage]
) -> Stage[Settings]:
    """Return the stage; corpus_rows: the rows of corpora that are rows, by `rows_N` for the corpus N."""
    settings = Settings(
        dtype=prune.dtype,
        calibration=corpora,
        depth=prune.blocks,
        contiguous=prune.contiguous,
        protect=prune.protect,
        candidates=prune.candidates,
    )
    inputs = {"model": base, "score": score, **corpus_rows}
    return Stage("loss", f"{base.slug}-{prune.blocks}", VERSION, settings, inputs)


def build(work: Work[Settings]) -> Summary:
    """Write losses.json."""
    import numpy as np
    import torch

    from sdft_ray.core.similarity import choose

    candidates = rank_candidates(work)
    wanted = work.settings.calibration
    corpora = read_texts(work.input("model"), wanted, work.numbered_inputs("rows", len(wanted)))
    assert len({corpus.name for corpus in corpora}) == len(corpora), "losses are kept by the names of corpora"
    for corpus in corpora:
        if not corpus.loss_texts:
            what = f"{corpus.name} has no text left to hold back for the loss"
            do = "Give 3 texts of two tokens or more, or set prune.metric: angular and prune.candidates: 0"
            raise UserError(problem("prune.calibration", what, do))
    removed = [candidate.blocks for candidate in candidates]
    texts = [[(text.ids, text.content_from) for text in corpus.loss_texts] for corpus in corpora]
    model = {"model": work.handle("model"), "dtype": work.settings.dtype}
    measured = measure(LossMeter, texts, work.compute.score, work.progress, candidates=[(), *removed], **model)
    losses = [
        torch.from_numpy(np.stack(corpus["loss"])).double() for corpus in measured
    ]  # (B, 1 + C) each, the base first
    if not all(torch.isfinite(each).all() for each in losses):
        raise UserError(problem("model", "gives a loss of NaN on the loss texts", "Try prune.dtype: float32"))
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
    summary = Summary(
        texts={corpus.name: len(corpus.loss_texts) for corpus in corpora},
        base_loss=float(means[:, 0].mean()),
        candidates=tuple(sorted(tried, key=lambda candidate: candidate.loss)),
        choice=choose([each[:, 1:] for each in losses], removed),
    )
    write_atomically(work.directory / CANDIDATES, json.dumps(summary.plain()))
    return summary


def rank_candidates(work: Work[Settings]) -> list[Ranked]:
    """Return the sets of blocks that are worth a try: the best spans by distance, and the best by influence.

    Each with its distance and influence and its rank by them, from 1; a set that is no span has no rank.
    """
    from sdft_ray.core.similarity import choose_blocks, span_distances, span_influences

    size, protect = work.settings.depth, work.settings.protect
    distances, influences = read_measured(work.input("score"))
    blocks = influences[0].shape[1]
    starts = range(protect.first, blocks - size - protect.last + 1)

    def costs(each: Sequence[Any], cost: Any) -> list[float]:
        return list(sum(cost(corpus, size).double().mean(dim=0) for corpus in each) / len(each))

    by_distance, by_influence = costs(distances, span_distances), costs(influences, span_influences)
    ranks = [
        {start: rank for rank, start in enumerate(sorted(starts, key=lambda s: cost[s]), 1)}
        for cost in (by_distance, by_influence)
    ]
    chosen = [start for start in starts if min(rank[start] for rank in ranks) <= work.settings.candidates]
    candidates = [
        Ranked(
            blocks=tuple(range(start, start + size)),
            distance=float(by_distance[start]),
            distance_rank=ranks[0][start],
            influence=float(by_influence[start]),
            influence_rank=ranks[1][start],
        )
        for start in chosen
    ]
    if not work.settings.contiguous:
        choice = choose_blocks(influences, size, protect.first, protect.last)
        if all(choice.blocks != candidate.blocks for candidate in candidates):
            candidates.append(Ranked(blocks=choice.blocks, influence=choice.value))
    return candidates


class LossMeter:
    """An actor that takes the loss of texts under each candidate: holds the base model."""

    def __init__(self, model: Callable[[], Path], dtype: str, device: str, candidates: Sequence[Sequence[int]]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        use_assigned_cores()
        self.model = AutoModelForCausalLM.from_pretrained(model(), dtype=getattr(torch, dtype)).to(device).eval()
        self.candidates = candidates

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the losses (b, C) of a batch."""
        texts = json.loads(row["texts"])
        losses = skipped_losses(self.model, [ids for ids, _ in texts], [f for _, f in texts], self.candidates)
        return {"index": row["index"], "loss": losses.numpy()}


def skipped_losses(
    model: Any, ids: Sequence[list[int]], first: Sequence[int], candidates: Sequence[Sequence[int]]
) -> Any:
    """Return the mean next-token loss in nats of each text with each candidate's blocks skipped, (B, C).

    Counted are the tokens from `first` of each text on (never its very first, which nothing predicts). An empty
    candidate is the whole model.
    """
    import torch

    device = model.device
    lengths = [len(row) for row in ids]
    width = max(lengths)
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=device)  # (B, T)
    position = torch.arange(width, device=device)[None]
    real = position < torch.tensor(lengths, device=device)[:, None]
    counted = (real & (position >= torch.tensor(first, device=device)[:, None]))[:, 1:]  # (B, T-1)
    inputs = {"input_ids": input_ids, "attention_mask": real.long(), "use_cache": False}
    blocks = list(decoder_of(model).layers)
    kinds: set[type] = set()  # of what blocks return: of falcon_h1 it is a tuple
    states: dict[int, Any] = {}  # x(l) for every l at which some candidate begins

    def keep(block: int) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states[block] = args[0] if args else kwargs["hidden_states"]

        return hook

    hooks = [
        blocks[block].register_forward_pre_hook(keep(block), with_kwargs=True)
        for block in {min(removed) for removed in candidates if removed}
    ]
    hooks.append(blocks[0].register_forward_hook(lambda _module, _args, output: kinds.add(type(output))))
    try:
        with torch.inference_mode():
            whole = _losses(model(**inputs).logits, input_ids, counted)
            for hook in hooks:
                hook.remove()
            losses = []
            for removed in candidates:
                if not removed:
                    losses.append(whole)
                    continue
                with standing_in(model, removed, states[min(removed)], tuple in kinds):
                    losses.append(_losses(model(**inputs).logits, input_ids, counted))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(losses, dim=1).cpu()


@contextmanager
def standing_in(model: Any, removed: Sequence[int], state: Any, in_tuple: bool) -> Iterator[None]:
    """Make the model begin at `state`, x(l) of the first removed block l, and skip the removed blocks.

    Blocks keep their places, so that masks and kinds that the model's code picks by place stay theirs.
    in_tuple: whether its blocks return a tuple.
    """
    import torch

    class StandIn(torch.nn.Module):
        """Gives back what it gets, or a state; passes for the block in whose place it stands."""

        def __init__(self, block: Any, given: Any = None) -> None:
            super().__init__()
            self.given = given
            for name in ("attention_type", "layer_type", "block_type"):  # by which model code picks a block's mask
                if hasattr(block, name):
                    setattr(self, name, getattr(block, name))

        def forward(self, hidden_states: Any, *_args: Any, **_kwargs: Any) -> Any:
            given = hidden_states if self.given is None else self.given
            return (given,) if in_tuple else given

    decoder, start = decoder_of(model), min(removed)
    blocks = decoder.layers
    decoder.layers = torch.nn.ModuleList(
        StandIn(block, state if i == start else None) if i <= start or i in removed else block
        for i, block in enumerate(blocks)
    )
    try:
        yield
    finally:
        decoder.layers = blocks


def _losses(logits: Any, input_ids: Any, counted: Any) -> Any:
    """Return each text's mean loss, (B), of logits (B, T, V); a text at a time, to hold no second (B, T, V)."""
    import torch

    return torch.stack(
        [
            torch.nn.functional.cross_entropy(row[:-1][some].float(), ids[1:][some])
            for row, ids, some in zip(logits, input_ids, counted, strict=True)
        ]
    )

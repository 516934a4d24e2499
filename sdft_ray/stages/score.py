"""Stage `score`: what every block and every span of blocks does to the residual stream, measured in one pass.

In: the base model and calibration corpora. Out: distances.json (per corpus d(l, n) for all l and n, the Block
Influence of every block, and the choice for every n) and texts.safetensors (the same of every text, for certainty). It
knows nothing of how many blocks will go, nor of the metric that decides, so a sweep scores once. Hooks take x(0)..x(L)
as they pass by: transformers' own `hidden_states` end behind the final norm, and keep every token of every state.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft_ray import stages
from sdft_ray.cluster import use_assigned_cores
from sdft_ray.core.choice import Choice, JointChoice
from sdft_ray.core.surgery import decoder_of
from sdft_ray.data.calibration import CorpusSettings
from sdft_ray.errors import UserError, problem
from sdft_ray.results import DISTANCES, TEXTS, Corpus, Distances, MeasuredCorpus
from sdft_ray.spec.compute import Needs
from sdft_ray.spec.section import Section
from sdft_ray.stages import Work
from sdft_ray.store.files import write_atomically
from sdft_ray.store.identity import Stage
from sdft_ray.text_pool import measure, read_texts

VERSION, NEEDS, UNIT = 3, Needs("score"), "texts"


class Settings(Section):
    """What is measured, and how exactly."""

    dtype: str
    calibration: tuple[CorpusSettings, ...]


class Summary(stages.Summary):
    """What every metric would remove, for every number of blocks."""

    blocks: int
    """Of the model."""
    corpora: tuple[Corpus, ...]
    choices: dict[str, dict[int, JointChoice]]
    """By metric and number of blocks."""


def stage(
    dtype: str, corpora: tuple[CorpusSettings, ...], base: Stage, corpus_rows: Mapping[str, Stage]
) -> Stage[Settings]:
    """Return the stage; corpus_rows: the rows of corpora that are rows, by `rows_N` for the corpus N."""
    return Stage(
        "score", base.slug, VERSION, Settings(dtype=dtype, calibration=corpora), {"model": base, **corpus_rows}
    )


def build(work: Work[Settings]) -> Summary:
    """Write distances.json and texts.safetensors."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    first = {"last": lambda text: len(text.ids) - 1, "all": lambda _: 0, "response": lambda text: text.content_from}
    wanted = work.settings.calibration
    corpora = read_texts(work.input("model"), wanted, work.numbered_inputs("rows", len(wanted)))
    texts = [[(t.ids, first[c.positions](t)) for t in c.measured] for c in corpora]
    model = {"model": work.handle("model"), "dtype": work.settings.dtype}
    by_corpus = measure(Scorer, texts, work.compute.score, work.progress, **model)
    for blame in (blame for corpus in by_corpus for blame in corpus["blame"] if blame):
        raise UserError(problem("model", blame, "Fix the weights; if they are whole, try prune.dtype: float32"))
    distances = [torch.from_numpy(np.stack(corpus["distances"])).float() for corpus in by_corpus]  # (B, L+1, L+1) each
    influences = [torch.from_numpy(np.stack(corpus["influences"])).float() for corpus in by_corpus]  # (B, L) each
    kept = {f"distances.{i}": each for i, each in enumerate(distances)}
    save_file(kept | {f"influences.{i}": each for i, each in enumerate(influences)}, work.directory / TEXTS)
    measured = [
        MeasuredCorpus(
            name=corpus.name,
            positions=corpus.positions,
            texts=len(corpus.measured),
            tokens=sum(len(text.ids) for text in corpus.measured),
            shortened=corpus.shortened,
            choices=_choices([distances[i]], [influences[i]]),
            distances=distances[i].double().mean(dim=0).tolist(),
            influences=influences[i].double().mean(dim=0).tolist(),
        )
        for i, corpus in enumerate(corpora)
    ]
    blocks, choices = influences[0].shape[1], _join(_choices(distances, influences), measured)
    everything = Distances(blocks=blocks, corpora=tuple(measured), choices=choices)
    write_atomically(work.directory / DISTANCES, json.dumps(everything.plain()))
    return Summary(blocks=blocks, corpora=tuple(measured), choices=choices)


def _choices(distances: Sequence[Any], influences: Sequence[Any]) -> dict[str, dict[int, Choice]]:
    """Return, for each metric and each number of blocks, the span chosen, its runner-up, and how sure that is."""
    from sdft_ray.core.similarity import choose_span, span_distances, span_influences

    sizes = range(1, influences[0].shape[1])
    costs = {
        "angular": lambda size: [span_distances(each, size) for each in distances],
        "influence": lambda size: [span_influences(each, size) for each in influences],
    }
    return {metric: {size: choose_span(cost(size), size) for size in sizes} for metric, cost in costs.items()}


def _join(choices: dict[str, dict[int, Choice]], corpora: Sequence[Corpus]) -> dict[str, dict[int, JointChoice]]:
    """Return the choices of all corpora, each with how far the corpora agree on it."""

    def shared(metric: str, size: int) -> float:
        spans = [set(corpus.choices[metric][size].blocks) for corpus in corpora]
        return len(set.intersection(*spans)) / size

    return {
        metric: {size: JointChoice(**vars(choice), shared=shared(metric, size)) for size, choice in sizes.items()}
        for metric, sizes in choices.items()
    }


class Scorer:
    """An actor that measures texts: holds the base model without its head."""

    def __init__(self, model: Callable[[], Path], dtype: str, device: str) -> None:
        import torch
        from transformers import AutoModel

        use_assigned_cores()
        self.model = AutoModel.from_pretrained(model(), dtype=getattr(torch, dtype)).to(device).eval()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a batch's distances (b, L+1, L+1) and influences (b, L), and what is to blame where they are NaN."""
        texts = json.loads(row["texts"])
        distances, influences = pass_by(self.model, [ids for ids, _ in texts], [first for _, first in texts])
        blame = [self._blame(each) for each in influences]
        return {"index": row["index"], "distances": distances.numpy(), "influences": influences.numpy(), "blame": blame}

    def _blame(self, influence: Any) -> str:
        """Return where NaN first came up for one text, (L) -> text, or nothing."""
        import torch

        wrong = (~torch.isfinite(influence)).nonzero()
        if not len(wrong):
            return ""
        block = int(wrong[0])
        inside = f"layers.{block}."
        for name, tensor in self.model.named_parameters():
            if (inside in name or "layers." not in name) and not torch.isfinite(tensor).all():
                return f"{name} of its weights holds NaN or infinity"
        return f"block {block} gives NaN or infinity on calibration texts, though its weights are finite"


def pass_by(model: Any, ids: Sequence[list[int]], first: Sequence[int]) -> tuple[Any, Any]:
    """Return distances (B, L+1, L+1), averaged over the tokens from `first` of each sequence to its end, and the Block
    Influence of every block over all tokens, (B, L): 1 - mean of cos_sim(x(i), x(i+1)) (arXiv 2403.03853).

    Of each state only the tokens that are averaged over stay in memory, (L+1, D) each.
    """
    import torch

    from sdft_ray.core.similarity import angular_distances

    device = model.device
    lengths = torch.tensor([len(row) for row in ids], device=device)
    width = int(lengths.max())
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=device)  # (B, T)
    position = torch.arange(width, device=device)[None]
    real = position < lengths[:, None]
    wanted = real & (position >= torch.tensor(first, device=device)[:, None])  # (B, T), P of them
    states: list[Any] = []
    influences: list[Any] = []
    before: list[Any] = [None, None]  # x(l - 1) and its norms

    def see(hidden: Any) -> None:
        hidden = hidden.float()
        states.append(hidden[wanted])  # (P, D)
        norm = torch.linalg.vector_norm(hidden, dim=-1)  # (B, T)
        previous, previous_norm = before
        if previous is not None:
            cos = torch.linalg.vecdot(previous, hidden) / (norm * previous_norm).clamp_min(1e-12)
            influences.append(1 - torch.where(real, cos, 0).sum(dim=1) / lengths)
        before[:] = hidden, norm

    def enters(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(args[0] if args else kwargs["hidden_states"])

    def leaves(_module: Any, _args: Any, output: Any) -> None:
        see(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_pre_hook(enters, with_kwargs=True) for block in decoder_of(model).layers]
    hooks.append(decoder_of(model).layers[-1].register_forward_hook(leaves))
    try:
        with torch.inference_mode():
            model(input_ids=input_ids, attention_mask=real.long(), use_cache=False)
            before.clear()
            stacked = torch.stack(states, dim=1)  # (P, L+1, D)
            text = wanted.nonzero()[:, 0]
            total = torch.zeros(len(ids), *[stacked.shape[1]] * 2, dtype=torch.float64, device=device)
            for some in torch.arange(len(stacked), device=device).split(64):  # in float64 all at once would be large
                total.index_add_(0, text[some], angular_distances(stacked[some]))
            distances = total / wanted.sum(dim=1)[:, None, None]
    finally:
        for hook in hooks:
            hook.remove()
    return distances.cpu(), torch.stack(influences, dim=1).cpu()

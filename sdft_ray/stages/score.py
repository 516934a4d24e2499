"""Stage `score`: what every block and every span of blocks does to the residual stream, measured in one pass.

In: the base model and calibration corpora. Out: distances.json (per corpus d(l, n) for all l and n, the Block
Influence of every block, and the choice for every n) and texts.safetensors (the same of every text, for certainty). It
knows nothing of how many blocks will go, nor of the metric that decides, so a sweep scores once. x(0)..x(L) are
taken as they pass by: transformers' own `hidden_states` end behind the final norm, and keep every token of every state.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdft_ray import stages
from sdft_ray.core.choice import Choice, JointChoice
from sdft_ray.data.calibration import CorpusSettings
from sdft_ray.errors import UserError, problem
from sdft_ray.results import DISTANCES, TEXTS, Corpus, Distances, MeasuredCorpus
from sdft_ray.spec.compute import Needs
from sdft_ray.spec.section import Section
from sdft_ray.stages import Work
from sdft_ray.store.identity import Stage
from sdft_ray.text_pool import Texts, is_streamed, measure, read_texts

if TYPE_CHECKING:
    from sdft_ray.core.walking import Batch, Walk

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
    streamed = is_streamed(work.input("model"), work.settings.dtype, work.compute)
    model = {"model": work.handle("model"), "dtype": work.settings.dtype}
    found = measure(Scorer, texts, work.compute.score, work.progress, streamed, **model)
    by_corpus = [_Measured(**each) for each in found]
    for blame in (blame for corpus in by_corpus for blame in corpus.blame if blame):
        raise UserError(problem("model", blame, "Fix the weights; if they are whole, try prune.dtype: float32"))
    distances = [torch.from_numpy(np.stack(corpus.distances)).float() for corpus in by_corpus]  # (B, L+1, L+1) each
    influences = [torch.from_numpy(np.stack(corpus.influences)).float() for corpus in by_corpus]  # (B, L) each
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
    everything.to_file(work.directory / DISTANCES)
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


class _Measured(NamedTuple):
    """What comes of the texts of a corpus or a batch, one each: see `Scorer`."""

    distances: Sequence[Any]
    influences: Sequence[Any]
    blame: list[str]


class Scorer:
    """Measures texts with the base model without its head."""

    def __init__(self, model: Callable[[], Path], dtype: str, device: str, streamed: bool) -> None:
        from sdft_ray.models.streamed import open_walk

        self.walk, self.streamed = open_walk("AutoModel", model(), dtype, device, streamed), streamed

    def __call__(self, batches: Sequence[Texts]) -> Iterator[Any]:
        """Yield the share that is done, then of each batch distances (b, L+1, L+1) and influences (b, L), and what is
        to blame where they are NaN."""
        measured = yield from pass_by(self.walk, batches, on_disk if self.streamed else None)
        yield [
            _Measured(distances.numpy(), influences.numpy(), [*map(self._blame, influences)])._asdict()
            for distances, influences in measured
        ]

    def _blame(self, influence: Any) -> str:
        """Return where NaN first came up for one text, (L) -> text, or nothing."""
        import torch

        wrong = (~torch.isfinite(influence)).nonzero()
        if not len(wrong):
            return ""
        block = int(wrong[0])
        inside = f"layers.{block}."
        with self.walk.hold(self.walk.embeddings, self.walk.blocks[block]):
            for name, tensor in self.walk.model.named_parameters():
                if (inside in name or "layers." not in name) and not torch.isfinite(tensor).all():
                    return f"{name} of its weights holds NaN or infinity"
        return f"block {block} gives NaN or infinity on calibration texts, though its weights are finite"


def pass_by(
    walk: Walk, batches: Sequence[Texts], room: Callable[..., Any] | None = None
) -> Generator[float, None, list[tuple[Any, Any]]]:
    """Return for each batch distances (B, L+1, L+1), averaged over the tokens from the first that counts of each text
    to its end, and the Block Influence of every block over all tokens, (B, L): 1 - mean of cos_sim(x(i), x(i+1))
    (arXiv 2403.03853). Yield the share that is done.

    Of each state only the tokens that are averaged over are kept, (L+1, P, D), in a tensor that `room` makes.
    """
    from sdft_ray.core.walking import pad

    padded = [pad([ids for ids, _ in texts], walk.device) for texts in batches]
    seen = [_Seen(batch, [first for _, first in texts]) for texts, batch in zip(batches, padded, strict=True)]
    for number, i, before, state in walk.states(padded):
        if before is None:
            seen[i].make_room(len(walk.blocks) + 1, state, room)
        seen[i].see(number, before, state)
        if i == len(batches) - 1:
            yield number / (len(walk.blocks) + 1)
    return [each.measure() for each in seen]


class _Seen:
    """What is kept of the states of one batch as they pass by."""

    def __init__(self, batch: Batch, first: Sequence[int]) -> None:
        import torch

        position = torch.arange(batch.ids.shape[1], device=batch.ids.device)[None]
        start = torch.tensor(first, device=batch.ids.device)[:, None]
        self.real, self.wanted = batch.real, batch.real & (position >= start)  # (B, T), P of them wanted
        self.influences: list[Any] = []

    def make_room(self, states: int, like: Any, room: Callable[..., Any] | None) -> None:
        """Prepare for so many states like this one."""
        shape = states, int(self.wanted.sum()), like.shape[-1]
        self.states = room(shape, like.dtype) if room else like.new_empty(shape)

    def see(self, number: int, before: Any, state: Any) -> None:
        """Take in x(number), (B, T, D), beside x(number - 1)."""
        import torch

        self.states[number] = state[self.wanted]
        if before is not None:
            old, new = before.float(), state.float()
            norms = torch.linalg.vector_norm(old, dim=-1) * torch.linalg.vector_norm(new, dim=-1)  # (B, T)
            cos = torch.linalg.vecdot(old, new) / norms.clamp_min(1e-12)
            self.influences.append(1 - torch.where(self.real, cos, 0).sum(dim=1) / self.real.sum(dim=1))

    def measure(self) -> tuple[Any, Any]:
        """Return distances (B, L+1, L+1) and influences (B, L)."""
        import torch

        from sdft_ray.core.similarity import angular_distances

        device, count = self.wanted.device, self.states.shape[0]
        text = self.wanted.nonzero()[:, 0]
        total = torch.zeros(len(self.wanted), count, count, dtype=torch.float64, device=device)
        for some in torch.arange(len(text), device=device).split(64):  # in float64 all at once would be large
            states = self.states[:, some.to(self.states.device)].to(device).float()
            total.index_add_(0, text[some], angular_distances(states.transpose(0, 1)))
        distances = total / self.wanted.sum(dim=1)[:, None, None]
        return distances.cpu(), torch.stack(self.influences, dim=1).cpu()


def on_disk(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return an uninitialised tensor that is a file without a name: the kernel writes it out where memory is short."""
    import torch

    elements = math.prod(shape)
    with tempfile.NamedTemporaryFile(prefix="sdft-states-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, elements * dtype.itemsize)  # a full disk is an error here
        except OSError as error:
            what = f"has no {elements * dtype.itemsize / 1e9:.1f} GB for the states of a batch ({error.strerror})"
            do = "Set TMPDIR to a larger disk, or compute.score.weights: resident"
            raise UserError(problem(tempfile.gettempdir(), what, do)) from None
        return torch.from_file(file.name, shared=True, size=elements, dtype=dtype).view(shape)

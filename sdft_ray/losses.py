"""The loss of a model on the calibration texts that were held back, with some of its blocks skipped.

In: the settings of corpora, a model, and candidates: blocks to skip. Out: the corpora; a loss for each text and
candidate. Several stages choose by this loss, so it is measured in one way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdft_ray.data.calibration import Corpus, CorpusSettings
from sdft_ray.errors import UserError, problem
from sdft_ray.progress import Progress
from sdft_ray.spec.compute import Compute
from sdft_ray.text_pool import Texts, is_streamed, measure, read_texts

if TYPE_CHECKING:
    from torch import Tensor


class Model(NamedTuple):
    """A model that is measured."""

    place: Path
    """Its directory on this node."""
    handle: Callable[[], Path]
    """Gives a worker, on whatever node, its directory there."""
    dtype: str


def read_loss_texts(base: Path, wanted: Sequence[CorpusSettings], rows: Mapping[int, Path]) -> list[Corpus]:
    """Return the corpora, each of which has loss texts; rows: as `read_texts` takes them."""
    corpora = read_texts(base, wanted, rows)
    assert len({corpus.name for corpus in corpora}) == len(corpora), "losses are kept by the names of corpora"
    for corpus in corpora:
        if not corpus.loss_texts:
            what = f"{corpus.name} has no text left to hold back for the loss"
            do = "Give 3 texts of two tokens or more, or set prune.metric: angular and prune.candidates: 0"
            raise UserError(problem("prune.calibration", what, do))
    return corpora


def measure_losses(
    model: Model,
    corpora: Sequence[Corpus],
    compute: Compute,
    progress: Progress,
    candidates: Sequence[Sequence[int]] = (),
    gone: Sequence[int] = (),
) -> list[Tensor]:
    """Return for each corpus the losses of its texts (B, 1 + C), of which the first are without any candidate.

    gone: blocks that are skipped in all of them.
    """
    import numpy as np
    import torch

    texts = [[(text.ids, text.content_from) for text in corpus.loss_texts] for corpus in corpora]
    streamed = is_streamed(model.place, model.dtype, compute)
    arguments = {"model": model.handle, "dtype": model.dtype, "candidates": [(), *candidates], "gone": gone}
    measured = measure(LossMeter, texts, compute.score, progress, streamed, **arguments)
    losses = [torch.from_numpy(np.stack(corpus["loss"])).double() for corpus in measured]
    if not all(torch.isfinite(each).all() for each in losses):
        raise UserError(problem("model", "gives a loss of NaN on the loss texts", "Try prune.dtype: float32"))
    return losses


class LossMeter:
    """Takes the loss of texts under each candidate."""

    def __init__(
        self,
        model: Callable[[], Path],
        dtype: str,
        device: str,
        streamed: bool,
        candidates: Sequence[Sequence[int]],
        gone: Sequence[int],
    ) -> None:
        from sdft_ray.models.streamed import open_walk

        self.walk = open_walk("AutoModelForCausalLM", model(), dtype, device, streamed)
        self.candidates, self.gone = candidates, gone

    def __call__(self, batches: Sequence[Texts]) -> Iterator[Any]:
        """Yield the share that is done, then the losses (b, C) of each batch."""
        from sdft_ray.core.skipping import skipped_losses

        losses = yield from skipped_losses(self.walk, batches, self.candidates, self.gone)
        yield [{"loss": each.numpy()} for each in losses]

"""The stages that choose which blocks go, and make the pruned model.

In: a recipe, and the rows of its own. Out: its `Cutting`: what is measured, the finalists where several cuts are
trained before one is chosen, the cut and its patch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sdft_ray.data.calibration import CorpusSettings
from sdft_ray.spec.recipe import Recipe
from sdft_ray.stages import cut, finals, loss, model, patch, score, train
from sdft_ray.store.identity import Stage
from sdft_ray.training_data import MixedStage, calibration


@dataclasses.dataclass(frozen=True)
class Cutting:
    """From the base to the model that arms are trained from."""

    corpora: tuple[CorpusSettings, ...]
    corpus_rows: Mapping[str, MixedStage]
    """The rows of calibration corpora that are rows, by `rows_N` for the corpus N."""
    score: Stage[score.Settings] | None
    """None where nothing that is measured chooses the blocks."""
    loss: loss.LossStage | None
    finalists: tuple[Stage[Any], ...]
    """The cuts, patches and trainings of the best candidates, and at last what chooses one; none where the loss of
    untrained models decides."""
    pruned: cut.CutStage
    patched: Stage[patch.Settings] | None
    """The pruned model with a linear patch: arms are trained from it where there is one."""

    @property
    def trained(self) -> list[Stage[train.Settings]]:
        """The trainings of finalists."""
        return [stage for stage in self.finalists if isinstance(stage.settings, train.Settings)]

    @property
    def in_order(self) -> tuple[Stage[Any], ...]:
        """The stages, in the order in which they are built."""
        measured = [stage for stage in (self.score, self.loss) if stage]
        return (*self.corpus_rows.values(), *measured, *self.finalists, self.pruned, *filter(None, [self.patched]))


def cutting(recipe: Recipe, base: Stage[model.Settings], own: MixedStage) -> Cutting:
    """Return the stages that cut the base of a recipe; own: its rows."""
    prune = recipe.prune
    corpora, corpus_rows = calibration(recipe, own) if prune.reads_texts else ((), {})
    scored = score.stage(prune.dtype, corpora, base, corpus_rows) if prune.is_scored else None
    is_tried = prune.is_greedy or (prune.is_scored and prune.candidates)
    tried = loss.stage(prune, corpora, base, scored, corpus_rows) if is_tried else None

    def cut_out(decides: Stage[Any] | None, rank: int = 0) -> tuple[cut.CutStage, Stage[patch.Settings] | None]:
        pruned = cut.stage(prune, base, scored, decides, rank)
        is_patched = prune.patch == "linear"
        return pruned, patch.stage(prune, corpora, base, pruned, corpus_rows) if is_patched else None

    finalists: list[Stage[Any]] = []
    decides: Stage[Any] | None = tried if prune.metric == "loss" else None
    if prune.finalists:
        trained = []
        for rank in range(prune.finalists.count):
            pruned, patched = cut_out(tried, rank)
            trained.append(
                train.stage(prune.finalists.settings(recipe.train), "sft", patched or pruned, [{"rows": own}])
            )
            finalists += [*filter(None, [pruned, patched]), trained[-1]]
        decides = finals.stage(prune.dtype, corpora, base, trained, corpus_rows)
        finalists.append(decides)
    pruned, patched = cut_out(decides)
    return Cutting(corpora, corpus_rows, scored, tried, tuple(finalists), pruned, patched)

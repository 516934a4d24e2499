"""What a finished model was made of and how good it is, read from the manifests under a root.

In: the manifest of a model. Out: its ancestors back to the base, the rows it was trained on, and its scores beside the
base's. An id is enough: what a recipe file says is in the manifests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from sdft_ray.core.recovery import Estimate, paired_differences
from sdft_ray.data.readers import RowsContent
from sdft_ray.errors import UserError
from sdft_ray.results import ITEMS, Item, read_items
from sdft_ray.stages import cut, evaluate, train
from sdft_ray.stages.distill.card import describe_source
from sdft_ray.store.identity import canonical_json, numbered
from sdft_ray.store.manifest import MANIFEST, Manifest, read_manifest
from sdft_ray.store.storage import Storage


class Source(NamedTuple):
    """Where training rows come from."""

    name: str
    licence: str
    """`unknown` for files: their owner knows."""
    repo: str | None = None
    """Its name on the hub, where it has one."""


class Scored(NamedTuple):
    """A model's score on one task, beside the base's on the same items."""

    task: str
    score: evaluate.Summary
    base: evaluate.Summary | None = None
    difference: Estimate | None = None
    """Of the model over the base."""


class Origin(NamedTuple):
    """Where a model comes from."""

    ancestors: tuple[Manifest, ...]
    """The model, what it was made from, and so on; the base last, where the root has it."""
    sources: tuple[Source, ...]
    scores: tuple[Scored, ...]
    mean_difference: Estimate | None
    """Of all tasks that the base was evaluated on, too."""
    teacher: str | None = None
    """The model that rewrote the rows, where that is not the base."""
    trainings: tuple[Manifest, ...] = ()
    """Those that it comes from; of a merged model the trainings of each."""

    @property
    def model(self) -> Manifest:
        return self.ancestors[0]

    @property
    def base(self) -> Manifest | None:
        """The unpruned model; None for a directory of the user's own, which has no manifest."""
        return last if (last := self.ancestors[-1]).stage == "model" else None

    @property
    def cut(self) -> cut.Summary:
        """Which blocks are gone."""
        (manifest,) = (each for each in self.ancestors if each.stage == "cut")
        return cut.Summary.model_validate(manifest.summary)

    @property
    def trained(self) -> list[train.Summary]:
        """How each was trained."""
        return [train.Summary.model_validate(each.summary) for each in self.trainings]


def find_origin(model: Manifest, storage: Storage) -> Origin:
    """Return where a model comes from; raises UserError where the root lacks what it was made from."""
    ancestors = [model, *_ancestors(model, storage)]
    oldest = ancestors[-1]
    base = oldest.id if oldest.stage == "model" else oldest.identity.model
    scored = ancestors[1].id if model.stage == "whole" else model.id  # on text it is the model inside
    scores, mean = _scores(scored, base, storage)
    trainings = tuple(_trainings(model, storage))
    sources, teacher = tuple(_sources(trainings, storage)), _teacher(trainings, storage)
    return Origin(tuple(ancestors), sources, scores, mean, teacher, trainings)


def _ancestors(manifest: Manifest, storage: Storage) -> Iterator[Manifest]:
    while manifest.stage != "model":
        try:
            manifest = _manifest(manifest.identity.model, storage)
        except UserError:
            if manifest.stage == "cut":  # of a directory of the user's own, which has no manifest
                return
            raise
        yield manifest


def _manifest(identity: str, storage: Storage) -> Manifest:
    manifest = read_manifest(storage.find(identity, MANIFEST))
    assert manifest, "an artifact is found by its manifest"
    return manifest


def _trainings(model: Manifest, storage: Storage) -> Iterator[Manifest]:
    """Yield the trainings that a model comes from; none of a directory of the user's own that was merged into it."""
    if model.stage == "train":
        yield model
        return
    for name, identity in sorted(model.identity.inputs.items()) if model.stage in ("merge", "whole") else ():
        lineage = model.lineage.inputs.get(name)
        if name.partition("_")[0] == "model" and not (lineage and lineage.stage == "model"):
            yield from _trainings(_manifest(identity, storage), storage)


def _sources(trainings: Sequence[Manifest], storage: Storage) -> list[Source]:
    """Return the sources of the rows of trainings."""
    ids = [
        identity
        for manifest in trainings
        for name, identity in sorted(manifest.identity.inputs.items())
        if name.partition("_")[0] == "rows"
    ]
    each = [_manifest(identity, storage) for identity in ids]
    mixed = [_manifest(identity, storage) for mix in each if mix.stage == "mix" for identity in _numbered_rows(mix)]
    rows = [manifest for manifest in (*each, *mixed) if manifest.stage == "rows"]
    return list(dict.fromkeys(_source(manifest) for manifest in rows))


def _teacher(trainings: Sequence[Manifest], storage: Storage) -> str | None:
    read = (each.identity.inputs.get("distilled") for each in trainings)
    return next((_manifest(identity, storage).summary.get("teacher") for identity in read if identity), None)


def _numbered_rows(mix: Manifest) -> list[str]:
    inputs = mix.identity.inputs
    return [inputs[numbered("rows", i)] for i in range(len(inputs))]


def _source(rows: Manifest) -> Source:
    adapter: TypeAdapter[Any] = TypeAdapter(RowsContent)
    content = adapter.validate_json(json.dumps(rows.identity.settings["source"]))
    return Source(*describe_source(content, rows.slug), repo=getattr(content, "repo", None))


# --- scores ---------------------------------------------------------------------------------------------------


def _scores(model: str, base: str, storage: Storage) -> tuple[tuple[Scored, ...], Estimate | None]:
    """Return the scores of a model by task, and its mean difference to the base.

    Of several evaluations on a task it is one that the base has, too, and of these the one of most items.
    """
    evaluations = [each for each in storage.manifests("evaluate") if each.identity.model in (model, base)]
    of_base = {_way(each): each for each in evaluations if each.identity.model == base}
    found = {_way(each): each for each in evaluations if each.identity.model == model}
    in_order = sorted(found, key=lambda way: (way in of_base, _summary(found[way]).n))
    by_task = {_task(found[way]): way for way in in_order}
    mine = {way: found[way] for way in by_task.values()}
    shared = [way for way in mine if way in of_base]
    pairs = {way: (_values(mine[way], storage), _values(of_base[way], storage)) for way in shared}
    differences: dict[str, Estimate] = {}
    mean = None
    if pairs:
        first, second = ({way: pair[i] for way, pair in pairs.items()} for i in (0, 1))
        differences, mean = paired_differences(first, second)
    scores = (
        Scored(
            task=_task(each),
            score=_summary(each),
            base=_summary(of_base[way]) if way in of_base else None,
            difference=differences.get(way),
        )
        for way, each in mine.items()
    )
    return tuple(sorted(scores, key=lambda scored: scored.task)), mean


def _task(evaluation: Manifest) -> str:
    return str(evaluation.identity.settings["task"])


def _summary(evaluation: Manifest) -> evaluate.Summary:
    return evaluate.Summary.model_validate(evaluation.summary)


def _way(evaluation: Manifest) -> str:
    """Return what two models must have in common for their items to be the same."""
    inputs = {name: identity for name, identity in evaluation.identity.inputs.items() if name != "model"}
    return canonical_json([evaluation.identity.settings, inputs, evaluation.identity.version])


def _values(evaluation: Manifest, storage: Storage) -> list[float]:
    return [item.value for item in read_items(storage.find(evaluation.id, ITEMS), Item)]

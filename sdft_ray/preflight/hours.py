"""The hours of stages: their work, by what processes do of it in a second, as stated or as measured.

In: an amount of work, the compute file, and finished artifacts. Out: hours, and where their rate comes from. A rate
that the compute file states is that of one process. A measured one is that of all processes of a stage, whose number no
artifact keeps; models that are compared and evaluated side by side are stages of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from pydantic import AliasChoices, Field

from sdft_ray.spec.throughput import Throughput
from sdft_ray.store.identity import Stage, ancestors, canonical_json
from sdft_ray.store.manifest import Identity, Lineage, Manifest
from sdft_ray.store.record import Record
from sdft_ray.store.storage import Storage

Kind = Literal["score", "distill", "train", "retention", "evaluate"]
_WAY = ("dtype", "method", "scope", "arm", "soft", "engine", "task", "shots", "pass_at")
"""The settings of a stage on which its speed depends most."""
_SIDE_BY_SIDE: tuple[Kind, ...] = ("retention", "evaluate")


@dataclasses.dataclass(frozen=True)
class Hours:
    """How long a stage takes."""

    hours: float
    rate: Literal["stated", "measured"]


class Rates:
    """What processes do in a second; manifests are read once a kind, however many recipes ask."""

    def __init__(self, stated: Throughput, storage: Storage) -> None:
        self._stated, self._storage = stated, storage
        self._finished: dict[Kind, dict[str, list[Manifest]]] = {}
        """By what they have in common."""

    def hours(
        self, kind: Kind, amount: float | None, processes: int, stages: Iterable[Stage[Any]], of_one: int = 1
    ) -> Hours | None:
        """Return the hours of an amount of work, that of these stages; None where it or its rate is not known.

        of_one: how many of the processes one stage has, of those that go on side by side.
        """
        if not amount:
            return None
        if stated := getattr(self._stated, kind):
            return Hours(amount / stated / processes / 3600, "stated")
        if not (measured := self._measure(kind, stages)):
            return None
        at_once = max(1, processes // of_one) if kind in _SIDE_BY_SIDE else 1
        return Hours(amount / measured / at_once / 3600, "measured")

    def _measure(self, kind: Kind, stages: Iterable[Stage[Any]]) -> float | None:
        """Return what finished stages like these did in a second; None where one of these has none like it.

        The one that took longest counts: a short one may have found its rows in the ledger, or be all start.
        """
        if kind not in self._finished:
            self._finished[kind] = {}
            for each in self._storage.manifests(kind):
                key = _key(each.lineage.version, each.lineage.settings, _models(each.lineage))
                self._finished[kind].setdefault(key, []).append(each)
        amount = seconds = 0.0
        for stage in stages:
            models = [Identity(**each.identity).settings for each in ancestors([stage]) if each.name == "model"]
            key = _key(stage.version, Identity(**stage.identity).settings, models)
            alike = self._finished[kind].get(key, [])
            worked = [work for work in (_done(kind, each) for each in alike) if work[0]]
            done, took = max(worked, key=lambda work: work[1], default=(0.0, 0.0))
            if not done:
                return None
            amount, seconds = amount + done, seconds + took
        return amount / seconds if seconds else None


def describe(rates: Mapping[str, str | None]) -> str:
    """Return in words where hours come from, or how they could be known; rates: `stated`, `measured` or none, by
    stage."""
    ways = {
        "stated": "by compute.throughput of ",
        "measured": "as the longest finished stage of this base went, with its processes: ",
    }
    stages = {way: ", ".join(stage for stage, rate in rates.items() if rate == way) for way in ways}
    said = [ways[way] + names for way, names in stages.items() if names]
    if not said:
        return "Hours: not known. State compute.throughput, or run a smaller recipe of this base first."
    return f"Hours, of all work of a recipe and as if nothing were done: {'; '.join(said)}."


class _Texts(Record):
    texts: int = Field(0, validation_alias=AliasChoices("texts", "n"))


class _Kept(Record):
    """What the summary of `retention` says of its work; other kinds give one of these names another meaning."""

    responses: _Texts | None = None
    texts: _Texts | None = None
    bits_per_byte: _Texts | None = None

    @property
    def amount(self) -> int:
        """Texts of all kinds."""
        return sum(each.texts for each in (self.responses, self.texts, self.bits_per_byte) if each)


class _Summary(Record):
    """What the summaries of these kinds of stages say of their work and their time."""

    corpora: tuple[_Texts, ...] = ()
    generations: int = 0
    asked: int | None = None
    steps: int = 0
    n: int = 0
    seconds: float | None = Field(None, validation_alias=AliasChoices("training_seconds", "seconds"))
    """That it worked, without waiting for its turn."""


def _done(kind: Kind, manifest: Manifest) -> tuple[float, float]:
    """Return the work that a finished stage did, and in how many seconds: of rewriting, its last command did."""
    found = _Summary.model_validate(manifest.summary)
    amounts: dict[Kind, int] = {
        "score": sum(corpus.texts for corpus in found.corpora),
        "distill": found.generations if found.asked is None else found.asked,
        "train": found.steps * manifest.identity.settings.get("train", {}).get("global_batch_size", 0),
        "retention": _Kept.model_validate(manifest.summary).amount if kind == "retention" else 0,
        "evaluate": found.n,
    }
    return amounts[kind], found.seconds or manifest.provenance.wall_seconds


def _key(version: int, settings: Mapping[str, Any], models: Iterable[Mapping[str, Any]]) -> str:
    """Return what stages have in common whose rates can be compared: their way, and the models at their beginning."""
    flat = {**settings, **settings.get("train", {})}
    return canonical_json([version, [flat.get(name) for name in _WAY], sorted({*map(canonical_json, models)})])


def _models(lineage: Lineage) -> Iterator[dict[str, Any]]:
    if lineage.stage == "model":
        yield lineage.settings
    for each in lineage.inputs.values():
        yield from _models(each)

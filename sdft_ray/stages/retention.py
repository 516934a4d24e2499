"""Stage `retention`: how near a model stays to the base, token by token.

In: the base, a model, and the probes. Out: retention.jsonl, sums for each probe, for intervals and paired comparisons.
Accuracy on a few hundred items has an error of points; here every token counts, no answer has to be right, and both
models see the same ones. They stand side by side in one process, so the base's logits are stored nowhere: at full
vocabulary they are half a megabyte a token. One text goes through each model alone, so nothing is padded or packed.

Memory: both models, and five pieces of at most 2^25 logits in float32 (0.7 GB).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdft_ray import stages
from sdft_ray.cluster import begin_work
from sdft_ray.core.recovery import Estimate, ratio
from sdft_ray.core.retention import Measured, Nearness, Probe, compare, read_lines, write_lines
from sdft_ray.core.surgery import decoder_of
from sdft_ray.errors import UserError, problem
from sdft_ray.models.exporting import load_causal
from sdft_ray.results import PROBES, RETENTION
from sdft_ray.spec.compute import Needs
from sdft_ray.spec.section import Section
from sdft_ray.stages import Work
from sdft_ray.store.files import write_atomically
from sdft_ray.store.identity import Stage, slugify
from sdft_ray.store.record import Record

VERSION, NEEDS, UNIT = 1, Needs("evaluate"), "parts"
PIECE_LOGITS = 2**25  # that are compared at once
FIGURES = ("kl_responses", "kl_texts", "agreement_responses", "agreement_texts", "bits_per_byte")


class Settings(Section):
    """How exactly."""

    dtype: str


class Kept(Record):
    """How near a model stays to the base on texts of one kind; intervals are over texts."""

    texts: int
    tokens: int
    kl: Estimate
    """KL(base || model), nats a token."""
    agreement: Estimate
    """Share of tokens at which both find the same one the likeliest."""


class Summary(stages.Timed):
    """How near a model stays to the base; absent is what there were no texts for."""

    responses: Kept | None = None
    """On what the base wrote on held-out rows."""
    texts: Kept | None = None
    """On plain texts."""
    bits_per_byte: Estimate | None = None
    """Of held-out references under the model."""

    @property
    def figures(self) -> dict[str, Estimate]:
        """Every figure that there is, by its name in FIGURES."""
        found = {"bits_per_byte": self.bits_per_byte}
        for name, kept in (("responses", self.responses), ("texts", self.texts)):
            if kept:
                found |= {f"kl_{name}": kept.kl, f"agreement_{name}": kept.agreement}
        return {name: figure for name in FIGURES if (figure := found.get(name))}


def stage(dtype: str, name: str, base: Stage[Any], model: Stage[Any], probes: Stage[Any]) -> Stage[Settings]:
    """Return the stage that compares the model of this name with the base."""
    inputs = {"base": base, "model": model, "probes": probes}
    return Stage("retention", slugify(name), VERSION, Settings(dtype=dtype), inputs)


def build(work: Work[Settings]) -> Summary:
    """Write retention.jsonl."""
    import ray

    plan = work.compute.evaluate
    probes = read_lines((work.input("probes") / PROBES).read_text(encoding="utf-8"), Probe)
    model = work.handle("model") if work.stage.model.id != work.stage.inputs["base"].id else None
    measured, seconds = work.result(
        ray.remote(measure)
        .options(num_cpus=plan.cpus, num_gpus=plan.gpus, name=work.stage.slug, scheduling_strategy="DEFAULT")
        .remote(work.handle("base"), model, probes, work.settings.dtype, "cuda" if plan.gpus else "cpu")
    )
    if not all(math.isfinite(each.kl + each.nll) for each in measured):
        raise UserError(problem("evaluate.dtype", f"{work.settings.dtype} gives logits of NaN", "Set float32"))
    write_atomically(work.directory / RETENTION, write_lines(measured))
    return summarise(measured, seconds=seconds)


def summarise(measured: Sequence[Measured], **more: Any) -> Summary:
    """Return the figures of what was measured on probes; more: fields that the summary has besides."""
    figures: dict[str, Any] = dict(more)
    for kind, name in (("response", "responses"), ("text", "texts")):
        if those := [each for each in measured if each.kind == kind]:
            tokens = [each.tokens for each in those]
            figures[name] = Kept(
                texts=len(those),
                tokens=sum(tokens),
                kl=ratio([each.kl for each in those], tokens),
                agreement=ratio([each.agreed for each in those], tokens),
            )
    references = [each for each in measured if each.kind == "reference"]
    bits, size = [each.bits for each in references], [each.bytes for each in references]
    return Summary(**figures, **({"bits_per_byte": ratio(bits, size)} if references else {}))


def subtract(first: Sequence[Measured], second: Sequence[Measured]) -> list[Measured]:
    """Return what one model has more than another on each probe. Summarised, it is the paired difference of figures."""
    assert [(each.kind, each.id) for each in first] == [(each.kind, each.id) for each in second], "other probes"
    return [
        a._replace(kl=a.kl - b.kl, agreed=a.agreed - b.agreed, nll=a.nll - b.nll)
        for a, b in zip(first, second, strict=True)
    ]


@stages.timed
def measure(
    base: Callable[[], Path], model: Callable[[], Path] | None, probes: Iterable[Probe], dtype: str, device: str
) -> list[Measured]:
    """Return what is measured on each probe, and the seconds that it took; runs in a Ray worker. A model of None is
    the base itself."""
    begin_work()

    def load(directory: Callable[[], Path]) -> Any:
        return load_causal(directory(), dtype).to(device).eval()

    loaded = load(base)
    both = (loaded, load(model) if model else loaded)
    return [
        Measured(probe.kind, probe.id, probe.bytes, len(probe.ids) - probe.first, *compare_models(*both, probe))
        for probe in probes
    ]


def compare_models(base: Any, model: Any, probe: Probe, piece_logits: int = PIECE_LOGITS) -> Nearness:
    """Return how near a loaded model is to the base on a probe: only the K predicted positions go through the heads,
    and at most `piece_logits` logits of each model are held at once."""
    import torch

    ids = torch.tensor([probe.ids], device=base.device)  # (1, T)
    given, sums = ids[:, :-1], Nearness(0.0, 0, 0.0)
    positions = torch.arange(probe.first - 1, given.shape[1], device=base.device)  # (K), each predicts the next token
    with torch.inference_mode(), read_once(base, given), read_once(model, given):
        for keep in positions.split(max(1, piece_logits // base.config.vocab_size)):
            first, second = (
                each(input_ids=given, logits_to_keep=keep, use_cache=False).logits[0] for each in (base, model)
            )
            sums = sums.plus(compare(first, second, ids[0, keep + 1]))
    return sums


@contextmanager
def read_once(model: Any, ids: Any) -> Iterator[None]:
    """Let a model's blocks read ids (1, T) now, and its head whatever part of that it is asked for, through the model's
    own code, which may scale or cap logits."""
    body = decoder_of(model)
    output = body(input_ids=ids, use_cache=False)
    body.forward = lambda *_, **__: output  # in place of the class's own
    try:
        yield
    finally:
        vars(body).pop("forward", None)

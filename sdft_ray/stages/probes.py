"""Stage `probes`: the texts that retention is measured on, as token ids.

In: the base model, held-out rows, and a file of plain texts. Out: probes.jsonl: what the base wrote greedily on the
rows, their references, and texts that no stage fits on. They are made once, by the base, so that every model is
measured on the same tokens and another one costs only itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft_ray import stages
from sdft_ray.cluster import begin_work
from sdft_ray.core.retention import KINDS, Probe, write_lines
from sdft_ray.core.rows import Row, TrainingRow
from sdft_ray.data.calibration import FurtherTexts, read_further
from sdft_ray.data.chat import encode_rows, opening_ids
from sdft_ray.errors import UserError, problem
from sdft_ray.models.exporting import load_causal
from sdft_ray.models.generation import generate
from sdft_ray.results import PROBES, read_held_out
from sdft_ray.spec.compute import Needs
from sdft_ray.spec.evaluation import Evaluate
from sdft_ray.spec.section import Section
from sdft_ray.stages import Work
from sdft_ray.store.files import write_atomically
from sdft_ray.store.identity import Stage, numbered

VERSION, NEEDS, UNIT = 1, Needs("evaluate", alone=True), "parts"


class Settings(Section):
    """Which rows and texts, and how the base responds."""

    optional = ("texts",)
    dtype: str
    rows: int
    max_new_tokens: int
    texts: FurtherTexts | None = None


class Summary(stages.Timed):
    """How many texts there are of each kind."""

    texts: dict[str, int]
    tokens: dict[str, int]
    """That are predicted."""


def stage(
    wanted: Evaluate, texts: FurtherTexts | None, base: Stage[Any], rows: Sequence[Stage[Any]]
) -> Stage[Settings]:
    """Return the stage; rows: those of each source that holds some out."""
    assert wanted.retention, "the recipe asks for it"
    count = wanted.retention.rows if rows else 0
    settings = Settings(dtype=wanted.dtype, rows=count, max_new_tokens=wanted.max_new_tokens, texts=texts)
    inputs = {numbered("rows", i): stage for i, stage in enumerate(rows)} if count else {}
    return Stage("probes", base.slug, VERSION, settings, {"model": base, **inputs})


def build(work: Work[Settings]) -> Summary:
    """Write probes.jsonl."""
    import ray

    plan, settings = work.compute.evaluate, work.settings
    rows = read_held_out(work.inputs("rows"))[: settings.rows] if settings.rows else []
    texts = read_further(settings.texts) if settings.texts else []
    probes, seconds = work.result(
        ray.remote(make_probes)
        .options(num_cpus=plan.cpus, num_gpus=plan.gpus, name="probes", scheduling_strategy="DEFAULT")
        .remote(work.handle("model"), settings, rows, texts, plan.batch_size, "cuda" if plan.gpus else "cpu")
    )
    if not probes:
        what = "finds neither held-out rows nor texts of two tokens to measure on"
        raise UserError(problem("evaluate.retention", what, "Raise rows.held_out or evaluate.retention.texts"))
    write_atomically(work.directory / PROBES, write_lines(probes))
    by_kind = {kind: [probe for probe in probes if probe.kind == kind] for kind in KINDS}
    return Summary(
        texts={kind: len(those) for kind, those in by_kind.items()},
        tokens={kind: sum(len(each.ids) - each.first for each in those) for kind, those in by_kind.items()},
        seconds=seconds,
    )


@stages.timed
def make_probes(
    model: Callable[[], Path],
    settings: Settings,
    rows: Sequence[Row],
    texts: Sequence[str],
    batch_size: int,
    device: str,
) -> list[Probe]:
    """Return the probes, and the seconds that they took; runs in a Ray worker."""
    from transformers import AutoTokenizer

    begin_work()
    directory = model()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    encoded = dict(zip(rows, encode_rows(tokenizer, [row.exchange for row in rows]), strict=True))
    asked = {row: each for row, each in encoded.items() if not row.exchange.is_plain}
    probes = _respond(directory, settings, tokenizer, asked, batch_size, device) if asked else []
    probes += _references(tokenizer, encoded)
    if settings.texts:
        ids = [tokenizer(text).input_ids[: settings.texts.max_tokens] for text in texts]
        probes += [Probe("text", str(i), each, 1) for i, each in enumerate(ids, settings.texts.skip)]
    return [probe for probe in probes if probe.first < len(probe.ids)]


def _respond(
    directory: Path, settings: Settings, tokenizer: Any, asked: Mapping[Row, TrainingRow], batch_size: int, device: str
) -> list[Probe]:
    """Return what the base writes greedily on each row, with the token that ends it."""
    model = load_causal(directory, settings.dtype).to(device).eval()
    prompts = [each.ids[: each.trained_from] for each in asked.values()]
    written = generate(model, tokenizer, prompts, settings.max_new_tokens, batch_size=batch_size)
    return [
        Probe("response", row.id, prompt + answer.ids, len(prompt))
        for row, prompt, answer in zip(asked, prompts, written, strict=True)
    ]


def _references(tokenizer: Any, encoded: Mapping[Row, TrainingRow]) -> Iterator[Probe]:
    """Yield each reference without what the template writes around it, as `held_out` measures it; none that calls a
    function, whose text is the template's."""
    opening = len(opening_ids(tokenizer))
    for row, each in encoded.items():
        size = len(row.reference.encode())
        if row.exchange.is_plain:
            yield Probe("reference", row.id, each.ids, 1, size)
        elif not row.exchange.calls:
            yield Probe("reference", row.id, each.ids[:-1], each.trained_from + opening, size)

"""Stage `export`: a model in a smaller form, as another program serves it.

In: a model directory. Out: a GGUF file, or quantised safetensors, beside config and tokenizer; read back and compared
with the model. It is a stage of its own so that the evaluations take it like any model: what the form costs in quality
then stands in the same table.
"""

from __future__ import annotations

from typing import Any

from sdft_ray import stages
from sdft_ray.models.directory import weight_files
from sdft_ray.progress import log, quiet_transformers
from sdft_ray.spec.recipe import Format
from sdft_ray.spec.section import Section
from sdft_ray.stages import Work
from sdft_ray.store.identity import Stage, slugify

VERSION, NEEDS, UNIT = 1, None, "tensors"


class Settings(Section):
    """In what form."""

    unhashed = ("of",)
    format: Format
    of: str
    """What the report calls the model."""


class Summary(stages.Summary):
    """How large the weights are, and how far from the model's."""

    bytes: int
    of_bytes: int
    """Of the model."""
    largest_error: float
    """Of a weight, beyond the rounding of float16 or bfloat16."""


def stage(form: Format, name: str, model: Stage[Any]) -> Stage[Settings]:
    """Return the stage that writes the model of this name."""
    return Stage("export", slugify(f"{model.slug}-{form}"), VERSION, Settings(format=form, of=name), {"model": model})


def build(work: Work[Settings]) -> Summary:
    """Write the model."""
    from sdft_ray.models import exporting

    quiet_transformers()
    model, form = work.input("model"), work.settings.format
    written = exporting.write(model, work.directory, form, work.stage.slug, work.progress)
    log(f"export: {exporting.serve_line(work.storage.where(work.stage), form)}")
    return Summary(
        bytes=written.bytes,
        of_bytes=sum(file.stat().st_size for file in weight_files(model)),
        largest_error=written.largest_error,
    )

"""Stage `whole`: a tuned text model in the place of the decoder of the model that it was taken from.

In: a text model, and the model that also sees or hears. Out: that model with this decoder: its own config around the
new one, every other tensor byte for byte. The chain works on plain text models, so this is its last step and no other
stage knows of it.
"""

from __future__ import annotations

from typing import Any

from sdft_ray import stages
from sdft_ray.models.parts import write_whole
from sdft_ray.progress import quiet_transformers
from sdft_ray.spec.section import Section
from sdft_ray.stages import Work
from sdft_ray.store.identity import Stage

VERSION, NEEDS, UNIT = 1, None, "parts"


class Settings(Section):
    """Nothing to choose."""


class Summary(stages.Summary):
    """How large it is."""

    parameters: int
    kept: int
    """Tensors beside the decoder, which are those of the model that it was taken from."""


def stage(model: Stage[Any], whole: Stage[Any]) -> Stage[Settings]:
    """Return the stage that puts a text model back into the whole."""
    return Stage("whole", f"{model.slug}-whole", VERSION, Settings(), {"model": model, "whole": whole})


def build(work: Work[Settings]) -> Summary:
    """Write the model."""
    quiet_transformers()
    parameters, kept = write_whole(work.input("model"), work.input("whole"), work.directory)
    return Summary(parameters=parameters, kept=kept)

"""Which models are also written in smaller forms, as other programs serve them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from sdft_ray.spec.section import Section, require_distinct

Format = Literal["f16", "bf16", "q8_0", "q4_k_m", "int8"]


class Export(Section):
    """Models that are also written in other forms, each of which takes the evaluations; other scores do not change."""

    models: Annotated[tuple[str, ...], AfterValidator(require_distinct)] | None = Field(None, min_length=1)
    """Names of the models, as in the report, `base` among them; the arms' models where absent."""
    formats: Annotated[tuple[Format, ...], AfterValidator(require_distinct)] = Field(min_length=1)
    """`f16`, `bf16`, `q8_0`, `q4_k_m`: a GGUF file, for llama.cpp; the last needs `pip install 'sdft-ray[q4]'`. `int8`:
    safetensors with weights and activations of 8 bits (compressed-tensors), for vLLM."""

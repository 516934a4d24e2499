"""Stage `speed`: how fast the pruned model is against the base, measured.

In: both models. Out: speed.json: tokens per second of prefill and of decoding, and their ratios. Counted FLOPs say what
is saved on paper; caches, memory and kernels decide what is saved in truth. The two take turns, so that whatever else
the machine does slows both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdft_ray import stages
from sdft_ray.cluster import begin_work
from sdft_ray.models.exporting import load_causal
from sdft_ray.results import SPEED, Pace
from sdft_ray.spec.compute import Needs
from sdft_ray.spec.section import Section
from sdft_ray.stages import Work
from sdft_ray.store.identity import Stage

VERSION, NEEDS, UNIT = 2, Needs("evaluate", alone=True), "parts"


class Settings(Section):
    """What is timed."""

    dtype: str
    prompt_tokens: int = 256
    new_tokens: int = 32
    runs: int = 5


class Summary(stages.Summary):
    """How fast the pruned model is against the base."""

    prefill: Pace
    decode: Pace


def stage(dtype: str, base: Stage, pruned: Stage) -> Stage[Settings]:
    """Return the stage."""
    return Stage("speed", pruned.slug, VERSION, Settings(dtype=dtype), {"model": base, "pruned": pruned})


def build(work: Work[Settings]) -> Summary:
    """Write speed.json."""
    import ray

    plan = work.compute.evaluate
    summary: Summary = ray.get(
        ray.remote(measure)
        .options(num_cpus=plan.cpus, num_gpus=plan.gpus, name="speed")
        .remote(work.handle("model"), work.handle("pruned"), work.settings, "cuda" if plan.gpus else "cpu")
    )
    summary.to_file(work.directory / SPEED, indent=1)
    return summary


def measure(base: Callable[[], Path], pruned: Callable[[], Path], settings: Settings, device: str) -> Summary:
    """Return the tokens per second of both models, and their ratio in each pair of runs; runs in a Ray worker."""
    import torch
    from transformers import GenerationConfig

    begin_work()
    models = [load_causal(model(), settings.dtype).to(device).eval() for model in (base, pruned)]
    for model in models:  # one without a base's own: beams or a penalty on repetition would be measured too
        model.generation_config = GenerationConfig(max_new_tokens=settings.new_tokens, do_sample=False)
    ids = torch.arange(settings.prompt_tokens, device=device)[None] % models[0].config.vocab_size
    mask, count = torch.ones_like(ids), settings.new_tokens

    def prefill(model: Any) -> None:
        model(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=True)

    def decode(model: Any) -> None:
        model.generate(input_ids=ids[:, :1], attention_mask=mask[:, :1], generation_config=model.generation_config)

    with torch.inference_mode():
        return Summary(
            prefill=_take_turns(prefill, models, ids.shape[1], settings.runs, device),
            decode=_take_turns(decode, models, count, settings.runs, device),
        )


def _take_turns(work: Callable[[Any], None], models: list[Any], tokens: int, runs: int, device: str) -> Pace:
    speeds: list[list[float]] = []
    for _ in range(runs + 1):
        speeds.append([tokens / _seconds(work, model, device) for model in models])
    speeds = speeds[1:]  # the first pair warms up
    ratios = [pruned / base for base, pruned in speeds]
    return Pace(
        base_tokens_per_second=statistics.median(base for base, _ in speeds),
        pruned_tokens_per_second=statistics.median(pruned for _, pruned in speeds),
        ratio=statistics.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
    )


def _seconds(work: Callable[[Any], None], model: Any, device: str) -> float:
    import torch

    begun = time.perf_counter()
    work(model)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun

"""Stage `draft`: what a smaller model is worth as the draft of the unpruned one, measured in vLLM.

In: the base, a model to draft for it, and held-out prompts. Out: draft.json (acceptance, tokens a call, tokens per
second with and without drafting, for greedy and for sampled text) and speculative_config.json for `vllm serve`, which
wants both models on a disk.
The base alone and the base with its draft take turns on the same prompts: whatever else the machine does slows both.
Drafting must not change greedy text: in float32 a token that differs by more than rounding fails the stage.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdft_ray import stages
from sdft_ray.core.rows import Given
from sdft_ray.core.speculation import worth
from sdft_ray.data.chat import end_of_turn, render_prompts
from sdft_ray.data.readers import read_json
from sdft_ray.engine import NEAR_TIE, engine_arguments, fix_sampling
from sdft_ray.errors import StageFailed, UserError, problem
from sdft_ray.progress import log
from sdft_ray.results import DRAFT, SPECULATIVE_CONFIG, Counted, Differing, Drafted, Measured, Race, read_held_out
from sdft_ray.spec.compute import EngineOptions, Needs
from sdft_ray.spec.recipe import Draft
from sdft_ray.stages import Work
from sdft_ray.store.files import write_atomically
from sdft_ray.store.identity import Stage, numbered

VERSION, NEEDS, UNIT = 2, Needs("distill", alone=True), "parts"
METHOD = "draft_model"  # vLLM's name for it


class Settings(Draft):
    """How a model is tried as a draft."""

    unhashed = ("models", "name")
    name: str
    """What the report calls the model."""


class Summary(stages.Summary):
    """What a model is worth as a draft."""

    engine: str
    method: str
    """What the engine calls this way to draft."""
    prompts: int
    cost: float
    """Time of a draft's token over the base's."""
    greedy: Drafted
    sampled: Drafted


def stage(wanted: Draft, name: str, pruned: Stage, base: Stage, draft: Stage, rows: Sequence[Stage]) -> Stage[Settings]:
    """Return the stage that tries the model of this name; rows: those of each source."""
    settings = Settings(**dict(wanted) | {"tokens": tuple(sorted(wanted.tokens))}, name=name)
    inputs = {"model": base, "draft": draft, **{numbered("rows", i): each for i, each in enumerate(rows)}}
    return Stage("draft", f"{pruned.slug}-{name}", VERSION, settings, inputs)


def candidate(stage: Stage[Any]) -> Stage[Any]:
    """Return the model that a stage tries."""
    return stage.inputs["draft"]


def build(work: Work[Settings]) -> Summary:
    """Write draft.json and speculative_config.json."""
    import ray

    plan = work.compute.distill
    asked = [row for row in read_held_out(work.inputs("rows")) if not row.exchange.is_plain]
    rows = asked[: work.settings.prompts]
    options = plan.engine_options()
    summary: Summary = ray.get(
        ray.remote(max_calls=1)(measure)  # an engine takes threads and environment of its process for good
        .options(num_cpus=plan.cpus, num_gpus=plan.gpus, name="draft")
        .remote(
            work.handle("model"), work.handle("draft"), [row.exchange.given for row in rows], work.settings, options
        )
    )
    best = summary.greedy.best
    base, draft = (work.storage.where(work.stage.inputs[name]) for name in ("model", "draft"))
    config = {"method": METHOD, "model": draft, "num_speculative_tokens": best.tokens}
    summary.to_file(work.directory / DRAFT, indent=1)
    write_atomically(work.directory / SPECULATIVE_CONFIG, json.dumps(config, indent=1) + "\n")
    gained = f"{best.speedup:.2f} times the base's tokens/s with {best.tokens} drafted"
    serve = f"vllm serve {base} --speculative-config '{json.dumps(config)}'"
    notes = [] if plan.gpus else ["on a CPU for greedy requests only: docs/footguns.md"]
    if "://" in base:
        notes.append("both models must be brought to a disk first")
    log(f"draft: {work.stage.slug}: {gained}. {serve}" + (f" ({'; '.join(notes)})" if notes else ""))
    return summary


def measure(
    target: Callable[[], Path],
    draft: Callable[[], Path],
    prompts: Sequence[Given],
    settings: Settings,
    options: EngineOptions,
) -> Summary:
    """Return acceptance and speeds of a draft; runs in a Ray worker of its own."""
    base, small = target(), draft()
    ids, end = render_alike(base, small, prompts)
    length = max(map(len, ids)) + settings.max_new_tokens + max(settings.tokens) + 1
    _require_context(base, length, settings.max_new_tokens)
    fair = {
        # Two engines are alive at a time. A prompt that one of them has read before would be no fair race.
        "gpu_memory_utilization": options.gpu_memory_utilization / 2,
        "kv_cache_gib": options.kv_cache_gib / 2,
        "enable_prefix_caching": False,
        "max_num_seqs": settings.at_once,
        "max_model_len": length,
    }
    arguments = engine_arguments(str(base), settings.dtype, options.model_copy(update=fair), alone=True)
    from vllm import LLM, SamplingParams  # after what it reads of the environment is set

    fix_sampling()

    def start(**more: Any) -> Any:
        return LLM(**{**arguments, **more}, disable_log_stats=False)

    sampling = {"temperature": settings.temperature, "top_p": settings.top_p}
    until = {"max_tokens": settings.max_new_tokens, "stop_token_ids": [end]}
    greedy = SamplingParams(temperature=0, **until)
    ways = {"greedy": greedy, "sampled": SamplingParams(**sampling, **until)}
    groups = [ids[i : i + settings.at_once] for i in range(0, len(ids), settings.at_once)]
    alone, other = start(), start(model=str(small))
    race, _ = _take_turns(alone, other, groups, greedy)
    _end(other)
    cost = 1 / race.speedup
    measured: dict[str, list[Measured]] = {way: [] for way in ways}
    for k in settings.tokens:
        drafting = start(speculative_config={"method": METHOD, "model": str(small), "num_speculative_tokens": k})
        for way, params in ways.items():
            race, texts = _take_turns(alone, drafting, groups, params, k)
            differing = {"differing": compare_texts(base, settings.dtype, ids, *texts)} if way == "greedy" else {}
            gain = worth(race.drafts, race.accepted, cost)
            measured[way].append(Measured(**race.model_dump(exclude_unset=True), **differing, **vars(gain)))
        _end(drafting)
    drafted = {way: Drafted(measured=tuple(each), counted=_count_all(each[-1], cost)) for way, each in measured.items()}
    return Summary(engine="vllm", method=METHOD, prompts=len(ids), cost=cost, **drafted)


def _count_all(largest: Measured, cost: float) -> tuple[Counted, ...]:
    """Return what each smaller number of drafted tokens would bring, from what was measured with the largest."""
    accepted = largest.accepted
    return tuple(
        Counted(tokens=k, **vars(worth(largest.drafts, accepted[:k], cost))) for k in range(1, len(accepted) + 1)
    )


def render_alike(target: Path, draft: Path, prompts: Sequence[Given]) -> tuple[list[list[int]], int]:
    """Return the prompts and the end of turn as token ids; raises UserError where the two models do not mean the same
    by an id."""
    from transformers import AutoTokenizer

    ours, theirs = (AutoTokenizer.from_pretrained(model) for model in (target, draft))
    if ours.get_vocab() != theirs.get_vocab():
        do = "Give a draft that was made from the base"
        raise UserError(problem("draft.models", f"{draft} has another tokenizer than {target}", do))
    return render_prompts(ours, prompts), end_of_turn(ours)


def _require_context(model: Path, length: int, new: int) -> None:
    context = read_json(model / "config.json").get("max_position_embeddings")
    if context and length > context:
        what = f"with the longest prompt and the drafted tokens it makes {length}, and the model's context is {context}"
        over = length - context
        do = f"Lower it by {over}" if over < new else "Hold out rows with shorter prompts"
        raise UserError(problem("draft.max_new_tokens", what, do))


def _take_turns(
    one: Any, other: Any, groups: Sequence[Sequence[list[int]]], params: Any, tokens: int = 0
) -> tuple[Race, list[list[list[int]]]]:
    """Return the tokens per second of two engines on the same prompts with what the other drafted and had accepted, and
    the tokens that each of them made."""
    for engine in (one, other):
        _generate(engine, groups[0], params)  # warms up
    drafts, accepted = _count(other)
    runs = [[_generate(engine, group, params) for engine in (one, other)] for group in groups]
    drafts_now, accepted_now = _count(other)
    speeds = [[sum(map(len, texts)) / seconds for texts, seconds in run] for run in runs]
    ratios = [theirs / ours for ours, theirs in speeds]
    race = Race(
        tokens=tokens,
        target_tokens_per_second=statistics.median(speed for speed, _ in speeds),
        tokens_per_second=statistics.median(speed for _, speed in speeds),
        speedup=statistics.median(ratios),
        speedup_min=min(ratios),
        speedup_max=max(ratios),
        drafts=drafts_now - drafts,
        accepted=tuple(now - before for now, before in zip(accepted_now, accepted, strict=True)),
    )
    return race, [[text for run in runs for text in run[i][0]] for i in (0, 1)]


def _generate(engine: Any, group: Sequence[list[int]], params: Any) -> tuple[list[list[int]], float]:
    """Return the tokens that an engine makes of prompts, and the seconds it took."""
    begun = time.perf_counter()
    made = engine.generate([{"prompt_token_ids": ids} for ids in group], params, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in made], time.perf_counter() - begun


def _end(engine: Any) -> None:
    """Give an engine's memory back: vLLM keeps it for as long as the process lives where nobody ends the engine."""
    engine.llm_engine.engine_core.shutdown()
    gc.collect()


def _count(engine: Any) -> tuple[int, list[int]]:
    """Return how often an engine has drafted, and how often the first, the second, … token was accepted."""
    counters = {metric.name: metric for metric in engine.get_metrics()}
    drafts = counters.get("vllm:spec_decode_num_drafts")
    if drafts is None:  # an engine without a draft
        return 0, []
    return drafts.value, list(counters["vllm:spec_decode_num_accepted_tokens_per_pos"].values)


def compare_texts(
    target: Path, dtype: str, prompts: Sequence[list[int]], alone: Sequence[list[int]], drafted: Sequence[list[int]]
) -> list[Differing]:
    """Return the prompts whose greedy tokens differ with a draft, each with its first such token.

    Reading k + 1 tokens at once sums in another order than reading one. In float32 that decides only between logits
    that nearly tie, so a difference between others is a fault: StageFailed. Half precision rounds far coarser, and what
    differs is explained.
    """
    differing: list[Differing] = []
    for i, (one, other) in enumerate(zip(alone, drafted, strict=True)):
        if one != other:
            pairs = enumerate(zip(one, other, strict=False))
            same = next((j for j, (a, b) in pairs if a != b), min(len(one), len(other)))
            differing.append(Differing(prompt=i, token=same))
    if not differing or dtype != "float32":
        return differing
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(target, dtype=dtype).eval()
    explained = []
    for text in differing:
        i, same = text.prompt, text.token
        gap = _gap(network, prompts[i] + alone[i][:same], alone[i][same:], drafted[i][same:])
        if gap >= NEAR_TIE:
            what = f"with a draft token {same} of held-out prompt {i} is another, logits {gap:.2g} apart"
            raise StageFailed(problem("draft", what, "Greedy text must not change: use another version of vLLM"))
        explained.append(text.model_copy(update={"logits_apart": gap}))
    return explained


def _gap(network: Any, ids: list[int], one: list[int], other: list[int]) -> float:
    """Return how far apart the target's logits of the next token of two texts are; infinite where one has ended."""
    import torch

    if not (one and other):
        return float("inf")
    with torch.inference_mode():
        logits = network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    return abs(float(logits[one[0]] - logits[other[0]]))

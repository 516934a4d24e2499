"""Stage `cut`: the base model's files without the chosen blocks.

In: the base model, and what was measured to choose its blocks. Out: a plain Hugging Face directory that any tool loads.
The model is not built: its tensors are copied as bytes under their new names. What was written is then read again and
proven: every kept tensor is the base's bit by bit, and the loader, run without weights, misses none and is left with
none.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from sdft_ray import stages
from sdft_ray.core.choice import Choice
from sdft_ray.core.surgery import (
    BUFFERS,
    BY_POSITION,
    PER_BLOCK,
    block_of,
    count_blocks,
    further_blocks,
    name_blocks,
    prune_config,
    rename_tensor,
    require_blocks,
    require_removable,
)
from sdft_ray.data.readers import read_json
from sdft_ray.errors import UserError, problem
from sdft_ray.models.companions import write_companions
from sdft_ray.models.depth import Depth, blocks_in, depth_settings, settle_depth
from sdft_ray.models.directory import load_config, require_loadable, stored_tensors, tensor_places
from sdft_ray.models.parts import copy_part
from sdft_ray.models.shards import DISK_THREADS, same_bytes
from sdft_ray.progress import log
from sdft_ray.results import Cut, read_candidates, read_choice, read_measured
from sdft_ray.spec.pruning import Prune
from sdft_ray.spec.section import Section
from sdft_ray.stages import Work
from sdft_ray.store.files import write_atomically
from sdft_ray.store.identity import Stage

VERSION, NEEDS, UNIT = 3, None, "parts"


class Settings(Depth):
    """How the blocks to remove are chosen."""

    optional: ClassVar[tuple[str, ...]] = (*Depth.optional, "rank")
    metric: str
    contiguous: bool
    rank: int = 0
    """Which of the candidates by loss, the best one being 0."""


class Named(Section):
    """The blocks to remove."""

    remove: tuple[int, ...]


CutStage = Stage[Settings] | Stage[Named]


class Summary(Cut, stages.Summary):
    """Which blocks are removed, and what is left."""

    blocks: int
    """That are left."""
    parameters: int
    """Of the pruned model."""


def stage(prune: Prune, base: Stage, score: Stage | None, loss: Stage | None, rank: int = 0) -> CutStage:
    """Return the stage; loss: that of the candidates, where it decides; rank: which of them is cut."""
    if prune.remove:
        slug = f"{base.slug}-{len(prune.remove)}"
        return Stage("cut", slug, VERSION, Named(remove=prune.remove), {"model": base})
    settings = Settings(metric=prune.metric, contiguous=prune.contiguous, rank=rank, **dict(depth_settings(prune)))
    inputs = {name: stage for name, stage in (("model", base), ("score", score), ("loss", loss)) if stage}
    return Stage("cut", settings.slug(base.slug), VERSION, settings, inputs)


def name_cut(settings: Settings | Named) -> str:
    """Return in words what a cut removes."""
    return f"without {name_blocks(settings.remove)}" if isinstance(settings, Named) else settings.name


def build(work: Work[Settings | Named]) -> Summary:
    """Write the pruned model and its card."""
    base, place = work.stage.model, work.input("model")
    reasons = _choose(work)
    parameters = remove_blocks(place, work.directory, reasons.removed)
    blocks = blocks_in(work.directory)
    summary = Summary(**reasons.plain(), blocks=blocks, parameters=parameters.after)
    _report_target(work, summary)
    repo, inputs = getattr(base.settings, "repo", None), work.stage.inputs
    measured = inputs.get("score") or inputs.get("loss")
    recipe = work.settings.hashed() | (measured.settings.hashed() if measured else {})
    corpora = ", ".join(corpus.name for corpus in measured.settings.calibration) if measured else ""
    chosen = _explain(reasons) | ({"calibration": corpora} if corpora else {})
    whole = blocks + len(summary.removed)
    card = model_card(repo or base.slug, whole, summary.removed, parameters, chosen, recipe, repo)
    write_atomically(work.directory / "README.md", card)
    return summary


def _choose(work: Work[Settings | Named]) -> Cut:
    """Return the blocks to remove, and why these."""
    settings, blocks = work.settings, blocks_in(work.input("model"))
    if isinstance(settings, Named):
        require_removable(settings.remove, blocks, "prune.remove")
        return Cut(removed=settings.remove, metric="remove")
    aim = {"target": settings.target.parameters} if settings.target else {}
    if settings.metric == "tail":
        end = blocks - settings.protect.last
        size = settle_depth(settings, "tail", work.input("model"))
        return Cut(removed=tuple(range(end - size, end)), metric="tail", **aim)
    if settings.rank:
        return Cut(metric=settings.metric, **_read_ranked(work.input("loss"), settings.rank), **aim)
    choice = choose_removed(work)
    return Cut(
        removed=choice.blocks,
        metric=settings.metric,
        cost=choice.value,
        agreement=choice.agreement,
        runner_up=choice.runner_up,
        **aim,
    )


def _read_ranked(directory: Path, rank: int) -> dict[str, Any]:
    """Return which blocks a candidate removes, and its loss."""
    candidates = read_candidates(directory)
    if rank >= len(candidates):
        what = f"asks for {rank + 1} cuts or more, and {len(candidates)} were tried"
        raise UserError(problem("prune.finalists", what, "Lower prune.finalists"))
    return {"removed": candidates[rank].blocks, "cost": candidates[rank].loss}


def _report_target(work: Work[Settings | Named], summary: Summary) -> None:
    """Log how many blocks a target means; raise RuntimeError where it is missed after all."""
    if summary.target is None:
        return
    count, whole = len(summary.removed), summary.blocks + len(summary.removed)
    if summary.parameters > summary.target:
        raise RuntimeError(f"{work.directory}: has {summary.parameters} parameters (expected {summary.target} or less)")
    log(f"cut: {count} of {whole} blocks go, and {summary.parameters:,} parameters are left of {summary.target:,.0f}")


def _explain(cut: Cut) -> dict[str, str]:
    """Return for people why these blocks."""
    if cut.cost is None:
        return {"metric": "tail, the last ones"} if cut.metric == "tail" else {"named by": "the recipe"}
    if cut.agreement is None:
        return {"metric": f"{cut.metric}, but not the best", "cost": f"{cut.cost:.4f}"}
    return {
        "metric": cut.metric,
        "cost": f"{cut.cost:.4f}",
        "runner-up": name_blocks(cut.runner_up) if cut.runner_up else "none",
        "bootstrap samples that agree": f"{cut.agreement:.0%}",
    }


def choose_removed(work: Work[Any]) -> Choice:
    """Return the blocks that the recipe's metric gives up, and how sure that is; its settings choose."""
    from sdft_ray.core.similarity import choose_blocks, choose_span, span_distances, span_influences

    settings = work.settings
    size = settle_depth(settings, "span" if settings.contiguous else "anywhere", work.input("model"))
    if settings.metric == "loss":
        return read_choice(work.input("loss"))
    first, last = settings.protect.first, settings.protect.last
    distances, influences = read_measured(work.input("score"))
    match settings.metric:
        case "influence" if not settings.contiguous:
            return choose_blocks(influences, size, first, last)
        case "influence":
            return choose_span([span_influences(each, size) for each in influences], size, first, last)
        case _:
            return choose_span([span_distances(each, size) for each in distances], size, first, last)


class Parameters(NamedTuple):
    """How many parameters the base and the pruned model have."""

    before: int
    after: int


def remove_blocks(base: Path, directory: Path, removed: Sequence[int]) -> Parameters:
    """Write the model at `base` without the `removed` blocks into `directory`, and prove that it is that model.

    Raises UserError for a base that cannot be cut, and RuntimeError that names the tensor or field which is wrong in
    what was written.
    """
    held = stored_tensors(base)
    config = explicit_config(base)
    require_blocks(base, (name for tensors in held.values() for name in tensors), config)
    pruned = prune_config(config, removed)
    dropped = [*removed, *further_blocks(config)]
    before = require_loadable(base)
    same = copy_part(base, directory, lambda name: rename_tensor(name, dropped))
    write_atomically(directory / "config.json", json.dumps(pruned, indent=2) + "\n")
    write_companions(base, directory)
    require_same_tensors(base, directory, dropped, same)
    _require_per_block_lists(directory)
    after = require_loadable(directory)
    gone = sum(
        tensor.elements
        for tensors in held.values()
        for name, tensor in tensors.items()
        if block_of(name) in removed and rename_tensor(name, ()) and not name.endswith(BUFFERS)
    )
    if after != before - gone:
        raise RuntimeError(f"{directory}: has {after} parameters (expected {before} of the base less {gone})")
    return Parameters(before, after)


def require_same_tensors(
    base: Path, directory: Path, removed: Sequence[int], same: Container[tuple[Any, ...]] = ()
) -> None:
    """Raise RuntimeError unless the written files hold the kept tensors of `base`, bit by bit, and nothing else.

    same: places whose bytes were compared as they were written. A tensor is read again unless both headers, which are
    read anew, have it at two of these.
    """
    written = tensor_places(directory)
    kept = {new: place for name, place in tensor_places(base).items() if (new := rename_tensor(name, removed))}
    if differing := sorted(written.keys() ^ kept.keys()):
        raise RuntimeError(f"{directory}: {differing[0]} is {'missing' if differing[0] in kept else 'surplus'}")
    unread = [name for name, place in kept.items() if (*place, *written[name]) not in same]
    with ThreadPoolExecutor(DISK_THREADS) as pool:
        equal = pool.map(lambda name: same_bytes(*kept[name], *written[name]), unread)
        if differing := [name for name, is_equal in zip(unread, equal, strict=True) if not is_equal]:
            raise RuntimeError(f"{directory}: {differing[0]} differs from the base's")


def _require_per_block_lists(directory: Path) -> None:
    config = read_json(directory / "config.json")
    blocks = count_blocks(config)
    for key in PER_BLOCK:
        if config.get(key) is not None and len(config[key]) != blocks:
            what = f"{key} has {len(config[key])} entries for {blocks} blocks"
            raise RuntimeError(f"{directory}/config.json: {what}")


def model_card(
    base: str,
    blocks: int,
    removed: Sequence[int],
    parameters: Parameters,
    chosen: Mapping[str, Any],
    prune: Mapping[str, Any],
    repo: str | None = None,
) -> str:
    """Return README.md of a pruned model.

    `base` is what people call the base, of `blocks` blocks, and `repo` its name on the hub where it has one; `chosen`
    says in plain values how the blocks were chosen, `prune` is that section of the recipe.
    """
    import yaml
    from huggingface_hub import ModelCardData

    tags = ["depth-pruning", "layer-pruning", "sdft-ray"]
    data = ModelCardData(base_model=repo, library_name="transformers", pipeline_tag="text-generation", tags=tags)
    reasons = "\n".join(f"| {name} | {value} |" for name, value in chosen.items())
    recipe = yaml.safe_dump({"prune": dict(prune)}, sort_keys=False)
    return f"""---
{data.to_yaml()}
---
# {base} without blocks {name_blocks(removed)}

This is {base} without {len(removed)} of its {blocks} decoder blocks: {name_blocks(removed)}, counted from 0. Every
other weight is the base's, bit by bit.

**Its quality is not restored.** Removing blocks harms a model; this one is meant to be fine-tuned before use.

| | base | this model |
|---|---|---|
| blocks | {blocks} | {blocks - len(removed)} |
| parameters | {parameters.before:,} | {parameters.after:,} |

## How the blocks were chosen

| | |
|---|---|
{reasons}

## Recipe

```yaml
{recipe}```
"""


def explicit_config(base: Path) -> dict[str, Any]:
    """Return a model's config.json with what depends on a block's number and is left to its config class to compute."""
    config: dict[str, Any] = read_json(base / "config.json")
    computed = load_config(base).to_dict()
    blocks = count_blocks(config)
    return config | {
        key: value
        for key, value in computed.items()
        if config.get(key) in (None, [])  # Llama 4's no_rope_layers is empty where its class computes it
        and value is not None
        and (key in BY_POSITION or (isinstance(value, list) and len(value) == blocks))
    }

"""Stage `patch`: the pruned model with a linear map folded in before each gap, fitted without any training.

In: the base model, the cut of it, and the calibration corpora. Out: the pruned model with one projection changed for
each run of removed blocks. One pass of the base over the texts that were measured, up to the block behind the last gap,
gives the sums that the map needs; texts that were held back choose how far it may go. Everything that is not named in
the manifest's `changed` is the cut's, byte by byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from sdft_ray import stages
from sdft_ray.data.calibration import Corpus, CorpusSettings, Text
from sdft_ray.data.readers import read_json
from sdft_ray.errors import UserError, problem
from sdft_ray.models.companions import copy_all_but_weights
from sdft_ray.models.directory import DTYPES, require_dtype, require_loadable, stored_tensors
from sdft_ray.models.shards import StoredTensor, write_tensors
from sdft_ray.progress import log
from sdft_ray.results import Cut
from sdft_ray.spec.compute import Needs
from sdft_ray.spec.pruning import Prune
from sdft_ray.spec.section import Section
from sdft_ray.stages import Work
from sdft_ray.store.files import remember_hash
from sdft_ray.store.identity import Stage
from sdft_ray.store.record import Record
from sdft_ray.text_pool import is_streamed, read_texts, stream

if TYPE_CHECKING:
    from sdft_ray.core.patch import Sums
    from sdft_ray.core.walking import Walk

VERSION, NEEDS, UNIT = 2, Needs("score", alone=True), "texts"


class Settings(Section):
    """What the map is fitted on."""

    dtype: str
    calibration: tuple[CorpusSettings, ...]


class Errors(Record):
    """Mean squares on held-back tokens of one corpus, relative to what should be added there."""

    patched: float
    without: float
    """Of no patch."""


class Patched(Record):
    """The map at one gap. Errors are mean squares on held-back tokens, relative to what should be added there."""

    block: int
    """The block of the base before the gap, whose projection is changed."""
    weight: float
    """Of the pull towards no patch: see core/patch.py."""
    error: float
    error_without: float
    """Of no patch."""
    tokens: int
    held_back_tokens: int
    corpora: dict[str, Errors] = Field(default_factory=dict)
    """The errors on each: a map that helps on the whole can do harm to one of them."""


class Summary(stages.Summary):
    """What was changed, and what it brought."""

    patches: tuple[Patched, ...]
    changed: tuple[str, ...]
    """Names of the changed tensors, as the pruned model has them."""
    parameters: int
    removed: tuple[int, ...] = Field(default=())
    """Of the base."""


def stage(
    prune: Prune,
    corpora: tuple[CorpusSettings, ...],
    base: Stage[Any],
    pruned: Stage[Any],
    corpus_rows: Mapping[str, Stage[Any]],
) -> Stage[Settings]:
    """Return the stage; corpus_rows: the rows of corpora that are rows, by `rows_N` for the corpus N."""
    settings = Settings(dtype=prune.dtype, calibration=corpora)
    return Stage("patch", f"{pruned.slug}-patched", VERSION, settings, {"model": base, "pruned": pruned, **corpus_rows})


def build(work: Work[Settings]) -> Summary:
    """Fit a map at each gap, and write the pruned model with the maps in it."""
    from sdft_ray.core.patch import gaps, require_foldable

    base, pruned, wanted = work.input("model"), work.input("pruned"), work.settings.calibration
    removed = Cut.model_validate(work.storage.manifest(work.stage.inputs["pruned"]).summary).removed
    architecture = read_json(base / "config.json")["model_type"]
    for before, _ in gaps(removed):
        require_foldable(architecture, before)
    corpora = read_texts(base, wanted, work.numbered_inputs("rows", len(wanted)))
    for corpus in corpora:
        if not corpus.loss_texts:
            what = f"{corpus.name} has no text left to hold back, on which a patch is chosen"
            raise UserError(problem("prune.calibration", what, "Give 3 texts of two tokens or more"))
    patches, maps = _fit_on_ray(work, removed, corpora)
    for patched in patches:
        for name, errors in patched.corpora.items():
            if errors.patched > errors.without:
                shown = f"error {errors.patched:.3g}, {errors.without:.3g} without"
                log(f"patch: the map in block {patched.block} does harm on {name} ({shown}). Give more of its texts")
    changed = write_patched(pruned, work.directory, removed, maps, architecture)
    parameters = require_loadable(work.directory)
    return Summary(patches=tuple(patches), changed=tuple(changed), parameters=parameters, removed=removed)


def _fit_on_ray(
    work: Work[Settings], removed: Sequence[int], corpora: Sequence[Corpus]
) -> tuple[list[Patched], dict[int, Any]]:
    """Return what is to be known of each patch, and the map (D, D) of each block before a gap."""
    plan, dtype = work.compute.score, work.settings.dtype
    texts = sum(len(corpus.measured) + len(corpus.loss_texts) for corpus in corpora)
    work.progress.begin(texts)
    work.progress.enter("loading the model")
    streamed = is_streamed(work.input("model"), dtype, work.compute, alone=True)
    given = work.handle("model"), dtype, "cuda" if plan.gpus else "cpu", streamed, removed, corpora
    for [found] in stream(fit_patches, [given], plan):
        if isinstance(found, float):
            work.progress.update(int(found * texts))
    patches, maps = found
    return patches, maps


def fit_patches(
    model: Callable[[], Path],
    dtype: str,
    device: str,
    streamed: bool,
    removed: Sequence[int],
    corpora: Sequence[Corpus],
) -> Iterator[Any]:
    """Yield the share that is done, then what is to be known of each patch with the maps (D, D) by block.

    Corpora count the same, whatever their length.
    """
    from sdft_ray.core.patch import Sums, gaps
    from sdft_ray.models.streamed import open_walk

    walk, around = open_walk("AutoModel", model(), dtype, device, streamed), gaps(tuple(removed))
    width = walk.model.config.hidden_size
    groups = [(corpus.name, texts) for corpus in corpora for texts in (corpus.measured, corpus.loss_texts)]
    todo = [(text, number) for number, (_, texts) in enumerate(groups) for text in texts]
    sums = {before: [Sums.none(width) for _ in groups] for before, _ in around}
    rounds, shown = [todo] if streamed else [[each] for each in todo], 0.0
    for done, some in enumerate(rounds):
        for share, seen in see_gaps(walk, [text for text, _ in some], around):
            for i, before, added, wanted in seen:
                sums[before][some[i][1]].add(added, wanted)
            if (done + share) / len(rounds) > shown + 0.01:
                shown = (done + share) / len(rounds)
                yield shown
    names = [name for name, _ in groups[::2]]
    fits = {before: _fit(before, names, own[::2], own[1::2]) for before, own in sums.items()}
    yield [patched for patched, _ in fits.values()], {before: found for before, (_, found) in fits.items()}


def _fit(before: int, names: Sequence[str], measured: Sequence[Sums], held_back: Sequence[Sums]) -> tuple[Patched, Any]:
    """Return what is to be known of the patch in a block, and its map (D, D); sums: of each corpus by its name."""
    import torch

    from sdft_ray.core.patch import fit

    found, weight, errors = fit(measured, held_back)
    nothing = torch.eye(len(found), dtype=found.dtype)
    return Patched(
        block=before,
        weight=weight,
        error=errors[weight],
        error_without=errors[float("inf")],
        tokens=sum(each.tokens for each in measured),
        held_back_tokens=sum(each.tokens for each in held_back),
        corpora={
            name: Errors(patched=each.error(found), without=each.error(nothing))
            for name, each in zip(names, held_back, strict=True)
        },
    ), found


def see_gaps(
    walk: Walk, texts: Sequence[Text], around: Sequence[tuple[int, int]]
) -> Iterator[tuple[float, list[tuple[int, int, Any, Any]]]]:
    """Yield the share that is done, with what was seen since: the number of a text, the block before a gap, what its
    MLP adds (T, D), and what it should add (T, D), so that the stream is that behind the removed blocks."""
    from sdft_ray.core.patch import last_parts
    from sdft_ray.core.walking import pad

    config = walk.model.config
    scale = float(getattr(config, "residual_multiplier", 1.0))  # of granite
    added: list[Any] = []  # by the last parts of the block that runs
    kept: dict[tuple[int, int], tuple[Any, Any]] = {}

    def keep(_module: Any, _args: Any, output: Any) -> None:
        added.append((output[0] if isinstance(output, tuple) else output).reshape(-1, config.hidden_size))

    parts = [part for before, _ in around for part in last_parts(walk.blocks[before], config.model_type)]
    hooks = [part.register_forward_hook(keep) for part in parts]
    last = around[-1][1]
    try:
        for number, i, _, (state,) in walk.states([pad([text.ids], walk.device) for text in texts], until=last):
            seen = []
            for before, behind in around:
                if number == before + 1:
                    kept[i, before] = sum(added[1:], added[0]).to(walk.keep), state.to(walk.keep)
                    added.clear()
                if number == behind:
                    adds, output = (each.to(walk.device).float() for each in kept.pop((i, before)))
                    seen.append((i, before, adds * scale, state.float() - (output - adds * scale)))
            yield (number * len(texts) + i) / (last * len(texts)), seen
    finally:
        for hook in hooks:
            hook.remove()


def write_patched(
    pruned: Path, directory: Path, removed: Sequence[int], maps: Mapping[int, Any], architecture: str
) -> list[str]:
    """Write the pruned model with maps folded into it; return the names of the tensors that changed.

    maps: by the block of the base before each gap.
    """
    import torch

    from sdft_ray.core.patch import find_patched, fold

    by_block = {before - sum(block < before for block in removed): patch for before, patch in maps.items()}
    stored_in = stored_tensors(pruned)
    block_of = find_patched([name for tensors in stored_in.values() for name in tensors], by_block)
    changed: list[str] = []

    def contents(shard: Path, tensors: Mapping[str, StoredTensor]) -> Iterator[Any]:
        with shard.open("rb") as file:
            for name, tensor in tensors.items():
                file.seek(tensor.start)
                data = file.read(tensor.bytes)
                if name not in block_of:
                    yield data
                    continue
                require_dtype(pruned, name, tensor)
                stored = torch.frombuffer(bytearray(data), dtype=getattr(torch, DTYPES[tensor.dtype]))
                folded = (
                    fold(by_block[block_of[name]], name, stored.view(tensor.shape), architecture).contiguous().view(-1)
                )
                if not torch.equal(folded, stored):
                    changed.append(name)
                yield folded.view(torch.uint8).numpy()

    for shard, tensors in stored_in.items():
        sha256 = write_tensors(directory / shard.name, list(tensors.items()), contents(shard, tensors))
        remember_hash(directory / shard.name, sha256)
    copy_all_but_weights(pruned, directory)
    return changed

"""Stage `merge`: one model from several that were tuned from the same pruned model.

In: plain model directories. Out: a plain directory in the layout of the first, with tensors merged in float32, and in
the manifest how similar the tensors were. Adapters are merged into their models already. A tensor is compared while the
one before it is merged and written, each in pieces that fit a processor's cache: memory does not grow with the model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sdft_ray import stages
from sdft_ray.core.surgery import EMBEDDINGS, block_of
from sdft_ray.errors import UserError, problem
from sdft_ray.models.companions import copy_all_but_weights
from sdft_ray.models.directory import (
    DTYPES,
    load_config,
    require_dtype,
    require_loadable,
    stored_tensors,
    tensor_places,
)
from sdft_ray.models.shards import StoredTensor, write_tensors
from sdft_ray.models.tokens import load_tokenizer
from sdft_ray.spec.recipe import Linear, Slerp
from sdft_ray.stages import Work
from sdft_ray.store.files import remember_hash
from sdft_ray.store.identity import Stage

if TYPE_CHECKING:
    import torch

    from sdft_ray.core.merging import Blend, Similarity

A = TypeVar("A")
B = TypeVar("B")
VERSION, NEEDS, UNIT = 2, None, "tensors"
# Weights of models that grew out of one have cosines above 0.9; those of two unlike blocks are near 0.
_SAME_ORIGIN = 0.5
_LONGEST = 200  # characters of a value that is shown
_BEFORE_BLOCKS = (*EMBEDDINGS, "model.decoder.embed_positions.weight", "model.decoder.project_in.weight")
_NO_MATTER = ("dtype", "torch_dtype", "transformers_version", "use_cache", "_name_or_path")


class SlerpSettings(Slerp):
    """Two models, merged along the arc."""

    unhashed = ("parents",)
    method: Literal["slerp"] = "slerp"
    parents: tuple[str, ...] = ()
    """What the report calls the models, in the order of the inputs."""


class LinearSettings(Linear):
    """Models, merged into their mean."""

    unhashed = ("parents",)
    method: Literal["linear"] = "linear"
    parents: tuple[str, ...] = ()
    """What the report calls the models, in the order of the inputs."""


Settings = SlerpSettings | LinearSettings


class Summary(stages.Summary):
    """How similar the merged tensors were."""

    parameters: int
    tensors: int
    identical: int
    """Tensors that are the same in all models."""
    fell_back_to_linear: int
    """Tensors too similar for an arc."""
    least_cosine: float
    """Of those that are not identical."""
    least_alike: str | None
    """Name of the tensor with that cosine."""
    cosines: dict[str, tuple[float, ...]]
    """By tensor, one for each pair of models."""


def stage(how: Slerp | Linear, pruned: Stage, parents: Mapping[str, Stage]) -> Stage[Settings]:
    """Return the stage; parents: the models that are merged, by their names."""
    names = tuple(parents)
    settings: Settings = (
        SlerpSettings(t=how.t, parents=names)
        if isinstance(how, Slerp)
        else LinearSettings(weights=how.weights, parents=names)
    )
    inputs = {f"model_{i}": parent for i, parent in enumerate(parents.values())}
    return Stage("merge", f"{pruned.slug}-{settings.method}", VERSION, settings, inputs)


def build(work: Work[Settings]) -> Summary:
    """Write the merged model."""
    directories = work.numbered_inputs("model", len(work.settings.parents))
    parents = {name: directories[i] for i, name in enumerate(work.settings.parents)}
    return merge_models(parents, work.directory, work.settings, work.progress.begin, work.progress.update)


def merge_models(
    parents: Mapping[str, Path],
    directory: Path,
    settings: Settings,
    begin: Callable[[int], None] = lambda total: None,
    update: Callable[[int], None] = lambda done: None,
) -> Summary:
    """Write the merge of models, by their names, into `directory`; return what is to be known about it.

    Raises UserError that names what differs where they are not of one origin.
    """
    import torch

    from sdft_ray.core.merging import combine, compare, mean, slerp

    require_same_kind(parents)
    first = next(iter(parents.values()))
    held = stored_tensors(first)
    places = [tensor_places(parent) for parent in parents.values()]
    facts: dict[str, Similarity] = {}
    begin(len(places[0]))

    def blend(name: str) -> Blend:
        similarity = compare(_pieces([place[name] for place in places]))
        if isinstance(settings, SlerpSettings):
            return slerp(similarity, _t_of(name, settings.t))
        return mean(similarity, settings.weights or [1.0] * len(places))

    def merged(names: Iterable[str]) -> Iterator[Any]:
        for name in names:
            shares, facts[name] = next(blends)
            _require_same_origin(name, places[0][name][1], facts[name], list(parents))
            for piece in _pieces([place[name] for place in places[: len(shares)]]):
                yield combine(piece, shares).view(torch.uint8).numpy()
            update(len(facts))

    # The pool compares a tensor while the one before it is combined and written. torch counts threads by thread.
    with _one_torch_thread(), ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        blends = _one_ahead(pool, blend, [name for tensors in held.values() for name in tensors])
        for shard, tensors in held.items():
            path = directory / shard.name
            remember_hash(path, write_tensors(path, list(tensors.items()), merged(tensors)))
    copy_all_but_weights(first, directory)
    changed = {name: min(similarity.cosines) for name, similarity in facts.items() if not similarity.identical}
    return Summary(
        parameters=require_loadable(directory),
        tensors=len(facts),
        identical=len(facts) - len(changed),
        fell_back_to_linear=sum(similarity.fell_back for similarity in facts.values()),
        least_cosine=min(changed.values(), default=1.0),
        least_alike=min(changed, key=lambda name: changed[name], default=None),
        cosines={name: tuple(similarity.cosines) for name, similarity in facts.items()},
    )


def _one_ahead(pool: Executor, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """Yield what a function makes of each item, while a pool makes the next."""
    made: Future[B] | None = None
    for item in items:
        last, made = made, pool.submit(function, item)
        if last:
            yield last.result()
    if made:
        yield made.result()


def _t_of(name: str, t: float | Sequence[float]) -> float:
    """Return how far along the arc a tensor is merged."""
    if not isinstance(t, Sequence):
        return t
    block = block_of(name)
    return t[(0 if name in _BEFORE_BLOCKS else -1) if block is None else block]


def _pieces(places: Sequence[tuple[Path, StoredTensor]]) -> Iterator[list[torch.Tensor]]:
    """Yield one piece (N) after the other of tensors of one kind, of each tensor its own.

    All lie in the same memory: new memory would cost more than reading, and a map would keep all that was read.
    """
    import torch

    from sdft_ray.core.merging import PIECE

    buffers = [torch.empty(PIECE, dtype=getattr(torch, DTYPES[tensor.dtype])) for _, tensor in places]
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path, _ in places]
        for file, (_, tensor) in zip(files, places, strict=True):
            file.seek(tensor.start)
        elements = places[0][1].elements
        for start in range(0, max(1, elements), PIECE):  # of an empty tensor one, too
            piece = [buffer[: elements - start] for buffer in buffers]
            for file, each in zip(files, piece, strict=True):
                file.readinto(each.view(torch.uint8).numpy().data)
            yield piece


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Keep torch from splitting small pieces among threads: these would wait for each other most of the time, and the
    sums behind a cosine would depend on their number."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- what may be merged ---------------------------------------------------------------------------------------


def require_one_for_each(t: float | Sequence[float], blocks: int) -> None:
    """Raise UserError where a list has not one number for each block."""
    if isinstance(t, Sequence) and len(t) != blocks:
        what = f"has {len(t)} numbers for the {blocks} blocks of the pruned model"
        raise UserError(problem("merge.slerp.t", what, "Give one for each, or one number for all"))


def require_same_kind(models: Mapping[str, Path]) -> None:
    """Raise UserError that names the first field of config, tokenizer or weights in which models differ."""
    for (name, model), (other_name, other) in itertools.pairwise(models.items()):
        for what, mine, theirs in zip(
            ("config.json: ", "the tokenizer: ", ""), _facts(model), _facts(other), strict=True
        ):
            for key in [*mine, *(theirs.keys() - mine.keys())]:
                if mine.get(key) != theirs.get(key):
                    ours, others = (str(facts.get(key, "missing")) for facts in (mine, theirs))
                    fault = f"{what}{key} is {ours}, in {other_name} {others}"
                    if "\n" in fault or len(fault) > _LONGEST:  # a chat template
                        fault = f"{what}{key} is another one in {other_name}"
                    do = "Merge models that were tuned from the same pruned model"
                    raise UserError(problem(f"merge: {name}", fault, do))


def _facts(model: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the fields of a model's config, its tokenizer's tokens and chat template, and the kinds of its tensors.

    Configs are compared as transformers reads them: each version of it, and each trainer, writes other fields.
    """
    fields = load_config(model).to_dict()
    config = {key: value for key, value in fields.items() if key not in _NO_MATTER and not key.endswith("token_id")}
    tokenizer = load_tokenizer(model)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])  # it comes in another order each time
    tokens = {f"the id of {token!r}": number for token, number in vocabulary}
    tensors = {}
    for name, (_, tensor) in tensor_places(model).items():
        require_dtype(model, name, tensor)
        tensors[name] = f"{tensor.dtype} {list(tensor.shape)}"
    return config, {**tokens, "chat_template": tokenizer.chat_template}, tensors


def _require_same_origin(name: str, tensor: StoredTensor, similarity: Similarity, models: Sequence[str]) -> None:
    """Raise UserError for matrices that share nothing: of other blocks, or of another base; and for values that are no
    numbers.

    Shapes do not show which spans two pruned models lack, and metadata is not there for every tool's.
    """
    if any(math.isnan(cosine) for cosine in similarity.cosines):
        what = f"{name} of {' or '.join(models)} holds values that are no numbers"
        raise UserError(problem("merge", what, "Look at both with `sdft verify`, and train the broken one anew"))
    if len(tensor.shape) < 2:  # the norms of all blocks look similar
        return
    for (one, other), cosine in zip(itertools.combinations(models, 2), similarity.cosines, strict=True):
        if cosine < _SAME_ORIGIN:
            what = (
                f"{name} has cosine {cosine:.2f} with that of {other}: other blocks were removed, or the bases differ"
            )
            raise UserError(problem(f"merge: {one}", what, "Merge models that were tuned from the same pruned model"))

"""Match the blocks of a model to those of its base by the bytes of their tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdft_ray.core.surgery import BLOCK, PER_BLOCK, further_blocks, rename_tensor
from sdft_ray.data.readers import read_json
from sdft_ray.models.directory import load_config, weight_files
from sdft_ray.verify.models import Model

if TYPE_CHECKING:
    import torch


Blocks = dict[int | None, dict[str, str]]
"""For each block, the hashes of its tensors by their names within the block; None holds the rest."""
Block = tuple[int, dict[str, str]]


class Failed(Exception):
    """A check failed; the message names the fault."""


def tensors(directory: Path, only: Sequence[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor, one in memory at a time."""
    from safetensors import safe_open

    for shard in weight_files(directory):
        with safe_open(shard, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if not only or name in only:
                    yield name, tensors.get_tensor(name)


def fingerprints(directory: Path) -> Blocks:
    """Return the hashes of all tensors of a model."""
    import torch

    tied = load_config(directory).tie_word_embeddings
    further = further_blocks(read_json(directory / "config.json"))
    blocks: Blocks = {None: {}}
    for name, tensor in tensors(directory):
        # No part of the model; and `ties` has compared the second copy of tied embeddings.
        if rename_tensor(name, further) is None or (name == "lm_head.weight" and tied):
            continue
        digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        match = BLOCK.match(name)
        block, name = (int(match[1]), match[2]) if match else (None, name)
        blocks.setdefault(block, {})[name] = digest.hexdigest()
    return blocks


def match_blocks(model: Model, whole: Blocks, cut: Blocks, claimed: list[int] | None) -> tuple[list[int], bool]:
    """Return the base's number of each block, and whether equal blocks of the base allow another reading.

    The manifest's reading counts first, if the bytes allow it, then one that gives each block its kind in the config.
    Raises Failed for a block that is none of the base's, or out of order.
    """
    assert model.base
    base, blocks = _in_order(whole), _in_order(cut)
    first = _align(blocks, base)
    if len(first) < len(blocks):
        raise Failed(_explain_mismatch(base, blocks, first))
    others = _align(blocks[::-1], base[::-1])[::-1] != first
    kept = [(number, hashes) for number, hashes in base if number not in (claimed or ())]
    if claimed is not None and [hashes for _, hashes in kept] == [hashes for _, hashes in blocks]:
        return [number for number, _ in kept], others
    of_kind = _align(_in_order(_add_kinds(cut, model.directory)), _in_order(_add_kinds(whole, model.base)))
    return of_kind if len(of_kind) == len(blocks) else first, others


def _in_order(blocks: Blocks) -> list[Block]:
    numbered = [(number, hashes) for number, hashes in blocks.items() if number is not None]
    return sorted(numbered, key=lambda block: block[0])


def _align(blocks: Sequence[Block], base: Sequence[Block]) -> list[int]:
    """Return, for each block up to the first without one, the next block of the base that equals it.

    >>> _align([(0, {"w": "a"}), (1, {"w": "a"})], [(0, {"w": "a"}), (1, {"w": "b"}), (2, {"w": "a"})])
    [0, 2]
    """
    rest = iter(base)
    numbers = (next((number for number, other in rest if other == hashes), None) for _, hashes in blocks)
    return [number for number in numbers if number is not None]


def _explain_mismatch(base: Sequence[Block], blocks: Sequence[Block], kept: Sequence[int]) -> str:
    """Return the fault of the first block that was not matched."""
    block, hashes = blocks[len(kept)]
    if equal := [number for number, other in base if other == hashes]:
        what = f"block {block} is the base's block {' or '.join(map(str, equal))}"
        return f"{what}, behind block {block - 1}, its block {kept[-1]}: out of order, at model.layers.{block}"
    nearest, other = max(base, key=lambda candidate: len(candidate[1].items() & hashes.items()))
    where = f"model.layers.{block}.{min(name for name, _ in other.items() ^ hashes.items())}"
    if not any(own == other for _, own in blocks for _, other in base):
        return f"no block equals any of the base's: block {block} differs in {where}"
    return f"{where} differs; block {block} is nearest to the base's block {nearest}"


def _add_kinds(blocks: Blocks, directory: Path) -> Blocks:
    """Return the blocks, each with its entries of the config's per-block lists."""
    config = load_config(directory).to_dict()
    lists = {key: config[key] for key in PER_BLOCK if isinstance(config.get(key), list)}
    return {
        number: hashes if number is None else hashes | {key: str(kinds[number]) for key, kinds in lists.items()}
        for number, hashes in blocks.items()
    }

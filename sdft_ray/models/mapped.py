"""The tensors of a model, made out of its mapped files as transformers' own loader makes them.

In: a model directory, and a model that has shapes alone. Out: for each tensor the tensors of the files that it is made
of, and the conversion. The files are mapped: what is only looked at takes no memory that is not the file's own.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft_ray.models.directory import tensor_places

if TYPE_CHECKING:
    import torch


class MappedFiles:
    """The weight files of a model; they stay mapped as long as this object lives."""

    def __init__(self, directory: Path) -> None:
        from safetensors import safe_open

        self._paths = {name: path for name, (path, _) in tensor_places(directory).items()}
        self._files = {path: safe_open(path, framework="pt") for path in {*self._paths.values()}}
        self.names = list(self._paths)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor by its name in the files, mapped."""
        tensor: torch.Tensor = self._files[self._paths[name]].get_tensor(name)
        return tensor


@dataclasses.dataclass
class Source:
    """The tensors of the files that one tensor of a model is made of."""

    converter: Any
    """transformers' conversion; None where the files hold the tensor as it is."""
    names: dict[str, list[str]]
    """Of these tensors, by the pattern of the conversion that they match, in order."""

    def pieces(self) -> list[dict[str, list[str]]]:
        """Return groups of the names, each of which makes one contiguous range of the tensor.

        Experts that the files hold one by one are fused along the first dimension: each makes a range by itself.
        """
        from transformers.core_model_loading import MergeModulelist

        first, *rest = self.converter.operations if self.converter else [None]
        counts = {len(names) for names in self.names.values()}
        by_expert = isinstance(first, MergeModulelist) and first.dim == 0 and len(counts) == 1
        if not (by_expert and all(getattr(operation, "dim", 0) >= 1 for operation in rest)):
            return [self.names]
        return [{pattern: [names[i]] for pattern, names in self.names.items()} for i in range(*counts)]

    def convert(
        self, piece: Mapping[str, list[str]], target: str, outline: Any, read: Callable[[str], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the tensors of a model that a piece makes, by name: one, or what a fused tensor is split into."""
        if not self.converter:
            return {target: read(next(iter(piece.values()))[0])}
        converter = copy.deepcopy(self.converter)
        for pattern, names in piece.items():
            for name in names:
                converter.add_tensor(target, name, pattern, read(name))
        made = converter.convert(target, model=outline, config=outline.config)
        return {name: values[0] if isinstance(values, list) else values for name, values in made.items()}


def find_sources(outline: Any, names: Iterable[str]) -> dict[str, Source]:
    """Return what each tensor of a model is made of, by the rules of transformers' own loader.

    Names that the model does not know are left out, as its loader does: files also hold what a config determines.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(outline)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known, prefix = outline.state_dict(), outline.base_model_prefix
    sources: dict[str, Source] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:  # its name only looks like one to change
            target, pattern = name, None
        if target in known:
            source = sources.setdefault(target, Source(by_pattern[pattern] if pattern else None, {}))
            source.names.setdefault(pattern or name, []).append(name)
    return sources

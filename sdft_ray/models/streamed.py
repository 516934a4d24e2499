"""Open a model to be run block by block: whole, or with the weights of one part at a time.

In: a model directory. Out: a `Walk`. Streamed, the model has no weights of its own; those of a part are read from the
mapped files before it runs and dropped behind it, so that a small device runs a model of any size.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft_ray.core.surgery import decoder_of
from sdft_ray.core.walking import Walk
from sdft_ray.errors import UserError, problem
from sdft_ray.models.mapped import MappedFiles, Source, find_sources

if TYPE_CHECKING:
    import torch


def open_walk(kind: str, directory: Path, dtype: str, device: str, streamed: bool) -> Walk:
    """Return a model as a walk; kind: the class of transformers that makes it, such as AutoModelForCausalLM."""
    import torch
    import transformers

    auto = getattr(transformers, kind)
    if not streamed:
        return Walk(auto.from_pretrained(directory, dtype=getattr(torch, dtype)).to(device).eval())
    model = _Streamed(auto, directory, getattr(torch, dtype), device)
    return Walk(model.model, torch.device(device), model.hold, "cpu")


class _Streamed:
    """A model without weights, but for the few that belong neither to its blocks nor to embeddings and head."""

    def __init__(self, auto: Any, directory: Path, dtype: torch.dtype, device: str) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoConfig
        from transformers.initialization import no_init_weights

        with init_empty_weights(include_buffers=False), no_init_weights():
            self.model: Any = auto.from_config(AutoConfig.from_pretrained(directory), dtype=dtype).eval()
        self.model.tie_weights()
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(device)
        self._device, self._directory, self._files = device, str(directory), MappedFiles(directory)
        self._sources = find_sources(self.model, self._files.names)
        self._empty = dict(self.model.named_parameters(remove_duplicate=False))
        self._parameters = {*self._empty}
        self._empty |= dict(self.model.named_buffers())
        # transformers keeps some tensors of half precision in float32; its own loader asks the same.
        exact = self.model._get_dtype_plan(dtype)
        self._exact = {
            name: kind for name in self._empty for key, kind in exact.items() if fnmatch.fnmatch(name, f"*{key}*")
        }
        self._names = {id(module): name for name, module in self.model.named_modules(remove_duplicate=False)}
        parts = [self.model.get_input_embeddings(), self.model.get_output_embeddings(), *decoder_of(self.model).layers]
        apart = {name for part in parts if part is not None for name in self._inside(part)}
        self._fill(self._empty.keys() - apart)

    @contextlib.contextmanager
    def hold(self, *modules: Any) -> Iterator[None]:
        """Have the weights of some modules on the device meanwhile."""
        filled = self._fill({name for module in modules for name in self._inside(module)})
        try:
            yield
        finally:
            for name in filled:
                self._put(name, self._empty[name])

    def _inside(self, module: Any) -> list[str]:
        """Return the names of a module's parameters: its buffers, which are small, stay."""
        return [f"{self._names[id(module)]}.{name}" for name, _ in module.named_parameters(remove_duplicate=False)]

    def _fill(self, names: Set[str]) -> list[str]:
        """Read tensors of the model, and return the names of all that are there now."""
        import torch

        wanted, filled = {id(self._empty[name]) for name in names}, list[str]()
        for target, source in self._sources.items():
            if id(self._empty[target]) in wanted:
                for made, values in self._make(target, source).items():
                    value = torch.nn.Parameter(values, requires_grad=False) if made in self._parameters else values
                    tied = [name for name, empty in self._empty.items() if empty is self._empty[made]]
                    for name in tied:
                        self._put(name, value)
                    filled += tied
        if missing := sorted(names & self._parameters - {*filled}):
            raise UserError(problem(self._directory, f"has no {missing[0]}", "Copy or download it again"))
        return filled

    def _make(self, target: str, source: Source) -> dict[str, torch.Tensor]:
        """Return the tensors of the model that a source makes, by name, on the device."""
        import torch

        made: dict[str, torch.Tensor] = {}
        pieces = source.pieces()
        for number, piece in enumerate(pieces):
            for name, values in source.convert(piece, target, self.model, self._files.read).items():
                empty = self._empty[name]
                dtype = self._exact.get(name, empty.dtype)
                if len(pieces) == 1:
                    made[name] = values.to(self._device, dtype)
                    continue
                if name not in made:
                    made[name] = torch.empty(empty.shape, dtype=dtype, device=self._device)
                size = empty.numel() // len(pieces)
                made[name].view(-1)[number * size : (number + 1) * size] = values.reshape(-1)
        return made

    def _put(self, name: str, value: torch.Tensor) -> None:
        owner, _, own = name.rpartition(".")
        setattr(self.model.get_submodule(owner), own, value)

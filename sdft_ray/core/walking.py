"""A causal LM run block by block, over any number of batches, by its own code.

In: a model, and batches of token ids. Out: the states between its blocks. For each block and batch the model's forward
is entered with stand-ins in place of all blocks: it makes masks, positions and whatever else that block is given, and
is left there. So only the block that runs needs its weights, and no family's forward is written again here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from sdft_ray.core.surgery import decoder_of

Hold = Callable[..., contextlib.AbstractContextManager[Any]]
"""Has the weights of some modules of a model there for a while."""


def hold_nothing(*_modules: Any) -> contextlib.AbstractContextManager[Any]:
    """Do nothing, for a model whose weights are all there."""
    return contextlib.nullcontext()


class Batch(NamedTuple):
    """Texts of one forward pass, padded behind their ends."""

    ids: torch.Tensor
    """(B, T)"""
    real: torch.Tensor
    """(B, T), false at padding."""


def pad(ids: Sequence[Sequence[int]], device: Any) -> Batch:
    """Return texts as a batch."""
    lengths = torch.tensor([len(row) for row in ids], device=device)
    width = int(lengths.max())
    padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids], device=device)
    return Batch(padded, torch.arange(width, device=device)[None] < lengths[:, None])


class _Reached(Exception):
    """Raised where a model's forward is left."""


class _StandIn(torch.nn.Module):
    """Gives back what it gets, or a state; passes for the block in whose place it stands."""

    def __init__(self, block: Any, in_tuple: bool) -> None:
        super().__init__()
        self.in_tuple = in_tuple
        self.given: Any = None
        for name in ("attention_type", "layer_type", "block_type"):  # by which model code picks a block's mask
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))

    def forward(self, hidden_states: Any, *_args: Any, **_kwargs: Any) -> Any:
        given = hidden_states if self.given is None else self.given
        return (given,) if self.in_tuple else given


class Walk:
    """A model that is run block by block."""

    def __init__(self, model: Any, device: Any = None, hold: Hold = hold_nothing, keep: Any = None) -> None:
        """hold: has the weights of modules there; keep: the device on which states wait for the next block."""
        self.model, self.hold = model, hold
        self.device = model.device if device is None else device
        self.keep = self.device if keep is None else keep
        self.blocks = [*decoder_of(model).layers]
        self.embeddings, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        with hold(self.embeddings, self.blocks[0]):
            in_tuple = self._returns_tuples()
        self._stand_ins = torch.nn.ModuleList(_StandIn(block, in_tuple) for block in self.blocks)

    @torch.inference_mode()
    def states(
        self, batches: Sequence[Batch], until: int | None = None
    ) -> Iterator[tuple[int, int, Any, torch.Tensor]]:
        """Yield l, the number of a batch, x(l - 1) and x(l) of it, (B, T, D) on the device: l from 0 (before which
        there is nothing) to L, or `until`, and for each all batches."""
        kept = self.first_states(batches)
        for i, state in enumerate(kept):
            yield 0, i, None, state.to(self.device)
        for number, block in enumerate(self.blocks[:until]):
            with self.hold(block):
                for i, batch in enumerate(batches):
                    before = kept[i].to(self.device)
                    state = self.enter(number, batch)(before)
                    kept[i] = state.to(self.keep)
                    yield number + 1, i, before, state

    @torch.inference_mode()
    def first_states(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Return x(0) of every batch, (B, T, D), where states wait."""
        with self.hold(self.embeddings):
            inputs = [{"input_ids": batch.ids, "attention_mask": batch.real.long()} for batch in batches]
            return [_hidden(*self._given_to(0, each)).to(self.keep) for each in inputs]

    def enter(self, number: int, batch: Batch) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return what runs a block on states of a batch, with what the model itself gives the block beside them."""
        args, kwargs = self._given_to(number, self._without_embeddings(batch))

        def run(state: torch.Tensor) -> torch.Tensor:
            state = state.to(self.device)
            if args:
                output = self.blocks[number](state, *args[1:], **kwargs)
            else:
                output = self.blocks[number](**kwargs | {"hidden_states": state})
            return output[0] if isinstance(output, tuple) else output

        return run

    def logits(self, batch: Batch, state: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, T, V) of x(L)."""
        last: Any = self._stand_ins[-1]
        last.given = state.to(self.device)
        try:
            with self._hollow():
                return self.model(**self._without_embeddings(batch), use_cache=False).logits
        finally:
            last.given = None

    def _without_embeddings(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return inputs of the batch's shape, for passes whose own embeddings do not matter."""
        weight = self.embeddings.weight
        empty = torch.zeros((), dtype=weight.dtype, device=self.device).expand(*batch.ids.shape, weight.shape[-1])
        return {"inputs_embeds": empty, "attention_mask": batch.real.long()}

    def _given_to(self, number: int, inputs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with which the model's forward calls a block."""
        found: list[Any] = []

        def leave(_module: Any, args: Any, kwargs: Any) -> None:
            found.extend((args, kwargs))
            raise _Reached

        hook = self._stand_ins[number].register_forward_pre_hook(leave, with_kwargs=True)
        try:
            with self._hollow():
                self.model(**inputs, use_cache=False)
        except _Reached:
            return found[0], found[1]
        finally:
            hook.remove()
        raise AssertionError(f"block {number} was not called")

    @contextlib.contextmanager
    def _hollow(self) -> Iterator[None]:
        """Put the stand-ins in the blocks' places, so that masks and kinds that are picked by place stay theirs."""
        decoder = decoder_of(self.model)
        blocks = decoder.layers
        decoder.layers = self._stand_ins
        try:
            yield
        finally:
            decoder.layers = blocks

    def _returns_tuples(self) -> bool:
        """Return whether blocks return tuples, as those of falcon_h1, by a look at one token."""
        found: list[bool] = []

        def leave(_module: Any, _args: Any, output: Any) -> None:
            found.append(isinstance(output, tuple))
            raise _Reached

        hook = self.blocks[0].register_forward_hook(leave)
        try:
            with torch.inference_mode(), contextlib.suppress(_Reached):
                self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)
        finally:
            hook.remove()
        return found[0]


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs["hidden_states"]

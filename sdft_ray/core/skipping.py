"""The loss of a model without some of its blocks, with nothing copied and the model's own code in charge.

In: a causal LM, token ids, and candidates: blocks to leave out. Out: a loss for each text and candidate. The model runs
once, some blocks at a time, and each candidate goes on from the state before its first block, with stand-ins where
blocks are out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def skipped_losses(
    model: Any,
    ids: Sequence[list[int]],
    first: Sequence[int],
    candidates: Sequence[Sequence[int]],
    gone: Sequence[int] = (),
) -> Any:
    """Return the mean next-token loss in nats of each text with each candidate's blocks skipped, (B, C).

    Counted are the tokens from `first` of each text on (never its very first, which nothing predicts). An empty
    candidate is the whole model; `gone` blocks are skipped in all of them. Of the states between blocks one is held at
    a time, (B, T, D): candidates take their turns in the order of their first blocks.
    """
    device = model.device
    lengths = [len(row) for row in ids]
    width = max(lengths)
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=device)  # (B, T)
    position = torch.arange(width, device=device)[None]
    real = position < torch.tensor(lengths, device=device)[:, None]
    counted = (real & (position >= torch.tensor(first, device=device)[:, None]))[:, 1:]  # (B, T-1)
    inputs = {"input_ids": input_ids, "attention_mask": real.long(), "use_cache": False}
    starts = [min(removed, default=len(model.get_decoder().layers)) for removed in candidates]
    losses: dict[int, Any] = {}
    at, state = 0, None  # x(at), where a block stands before it
    in_tuple = _returns_tuples(model)
    with torch.inference_mode():
        for i in sorted(range(len(candidates)), key=lambda i: starts[i]):
            if candidates[i] and starts[i] > at:
                at, state = starts[i], _state_before(model, starts[i], inputs, gone, at, state, in_tuple)
            with standing_in(model, {*gone, *candidates[i]}, at, state, in_tuple):
                losses[i] = _losses(model(**inputs).logits, input_ids, counted)
    return torch.stack([losses[i] for i in range(len(candidates))], dim=1).cpu()


class _Reached(Exception):
    """Raised where a state was asked for: what comes behind it is not computed."""

    def __init__(self, state: Any) -> None:
        self.state = state


def _returns_tuples(model: Any) -> bool:
    """Return whether the blocks of a model return tuples, as those of falcon_h1, by a look at one token."""

    def stop(_module: Any, _args: Any, output: Any) -> None:
        raise _Reached(output)

    hook = model.get_decoder().layers[0].register_forward_hook(stop)
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    except _Reached as reached:
        return isinstance(reached.state, tuple)
    finally:
        hook.remove()
    raise AssertionError("the first block did not run")


def _state_before(
    model: Any, block: int, inputs: Mapping[str, Any], gone: Sequence[int], at: int, state: Any, in_tuple: bool
) -> Any:
    """Return x(block) of the model without the blocks that are gone, from its state x(at)."""

    def stop(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    hook = model.get_decoder().layers[block].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with standing_in(model, gone, at, state, in_tuple):
            model(**inputs)
    except _Reached as reached:
        return reached.state
    finally:
        hook.remove()
    raise AssertionError(f"block {block} did not run")


@contextmanager
def standing_in(model: Any, removed: Collection[int], start: int, state: Any, in_tuple: bool) -> Iterator[None]:
    """Make the model begin at `state`, x(start), and skip the removed blocks behind it; at 0 it begins as ever.

    Blocks keep their places, so that masks and kinds that the model's code picks by place stay theirs.
    in_tuple: whether its blocks return a tuple.
    """

    class StandIn(torch.nn.Module):
        """Gives back what it gets, or a state; passes for the block in whose place it stands."""

        def __init__(self, block: Any, given: Any = None) -> None:
            super().__init__()
            self.given = given
            for name in ("attention_type", "layer_type", "block_type"):  # by which model code picks a block's mask
                if hasattr(block, name):
                    setattr(self, name, getattr(block, name))

        def forward(self, hidden_states: Any, *_args: Any, **_kwargs: Any) -> Any:
            given = hidden_states if self.given is None else self.given
            return (given,) if in_tuple else given

    decoder = model.get_decoder()
    blocks = decoder.layers
    decoder.layers = torch.nn.ModuleList(
        StandIn(block, state if i == start - 1 else None) if i < start or i in removed else block
        for i, block in enumerate(blocks)
    )
    try:
        yield
    finally:
        decoder.layers = blocks


def _losses(logits: Any, input_ids: Any, counted: Any) -> Any:
    """Return each text's mean loss, (B), of logits (B, T, V); a text at a time, to hold no second (B, T, V)."""
    return torch.stack(
        [
            torch.nn.functional.cross_entropy(row[:-1][some].float(), ids[1:][some])
            for row, ids, some in zip(logits, input_ids, counted, strict=True)
        ]
    )

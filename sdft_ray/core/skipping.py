"""The loss of a model without some of its blocks, with nothing copied and the model's own code in charge.

In: a causal LM that is run block by block, token ids, and candidates: blocks to leave out. Out: a loss for each text
and candidate. All candidates advance together, and those that have lost the same blocks so far share their state.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch

from sdft_ray.core.losses import cross_entropy
from sdft_ray.core.walking import Batch, Walk, pad

_LOGITS = 2**27
"""That are held at once, or those of one text: with 256,000 tokens in a vocabulary a batch's would be the largest part
of an actor's memory."""


@torch.inference_mode()
def skipped_losses(
    walk: Walk,
    batches: Sequence[Sequence[tuple[list[int], int]]],
    candidates: Sequence[Sequence[int]],
    gone: Sequence[int] = (),
) -> Generator[float, None, list[torch.Tensor]]:
    """Return the losses of each batch, (B, C): the mean next-token loss in nats of each text with each candidate's
    blocks skipped. Yield the share that is done.

    batches: of texts, each with the first of its tokens that counts (never its very first, which nothing predicts).
    An empty candidate is the whole model; `gone` blocks are skipped in all of them. A state (B, T, D) is kept for each
    batch and each candidate that has begun.
    """
    padded = [pad([ids for ids, _ in texts], walk.device) for texts in batches]
    removed = [frozenset({*gone, *candidate}) for candidate in candidates]
    states: list[dict[frozenset[int], Any]] = [{frozenset(): state} for state in walk.first_states(padded)]
    for number, block in enumerate(walk.blocks):
        reached = {frozenset(each for each in blocks if each <= number) for blocks in removed}
        runs = any(number not in blocks for blocks in reached)
        with walk.hold(*[block] if runs else []):
            for i, batch in enumerate(padded):
                before, run = states[i], walk.enter(number, batch)
                states[i] = {
                    blocks: before[blocks - {number}] if number in blocks else run(before[blocks]).to(walk.keep)
                    for blocks in reached
                }
        yield (number + 1) / (len(walk.blocks) + 1)
    losses = []
    with walk.hold(walk.head):
        for texts, batch, last in zip(batches, padded, states, strict=True):
            position = torch.arange(batch.ids.shape[1], device=walk.device)[None]
            first = torch.tensor([first for _, first in texts], device=walk.device)
            counted = (batch.real & (position >= first[:, None]))[:, 1:]  # (B, T-1)
            found = {blocks: _losses(walk, batch, state, counted) for blocks, state in last.items()}
            losses.append(torch.stack([found[blocks] for blocks in removed], dim=1).cpu())
    return losses


def _losses(walk: Walk, batch: Batch, state: Any, counted: Any) -> Any:
    """Return each text's mean loss, (B), of states x(L), (B, T, D)."""
    texts = max(1, _LOGITS // (batch.ids.shape[1] * walk.model.config.vocab_size))
    losses = []
    for start in range(0, len(batch.ids), texts):
        some = slice(start, start + texts)
        logits = walk.logits(Batch(batch.ids[some], batch.real[some]), state[some])
        # A text at a time, to hold no second (B, T, V).
        each = zip(logits, batch.ids[some], counted[some], strict=True)
        losses += [cross_entropy(row[:-1][kept], ids[1:][kept]).mean() for row, ids, kept in each]
        del logits  # before the next are there
    return torch.stack(losses)

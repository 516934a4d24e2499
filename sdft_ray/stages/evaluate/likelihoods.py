"""Log-likelihoods of continuations, each context read once for all of its choices.

In: (context, continuation) pairs of token ids. Out: their log-likelihoods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def score_requests(
    model: Any, requests: Sequence[tuple[list[int], list[int]]], max_length: int, batch_size: int
) -> list[tuple[float, bool]]:
    """Return (log-likelihood, is greedy) of each (context, continuation), both lists of token ids.

    The choices of an item share its context, and about `batch_size` requests go through the model as one sequence
    without padding. Too long ones lose context from the left, as in lm-eval. Those longer than a model's sliding
    window, and all of a model that carries a state on, go alone: only the model knows how each of its layers masks.
    """
    from sdft_ray.core.rowwise import may_share_a_sequence

    window = getattr(model.config, "sliding_window", None) or max_length + 1
    window = window if may_share_a_sequence(model.config) else 0
    groups: dict[tuple[int, ...], list[int]] = {}
    likelihoods: dict[int, tuple[float, bool]] = {}
    for i, (context, continuation) in enumerate(requests):
        assert context and len(continuation) <= max_length, f"request {i} fits no model of {max_length} tokens"
        context = context[-(max_length + 1 - len(continuation)) :]
        if len(context) + len(continuation) > window + 1:
            (likelihoods[i],) = _score_trees(model, [(context, [continuation])])
        else:
            groups.setdefault(tuple(context), []).append(i)
    batch: list[tuple[tuple[int, ...], list[int]]] = []
    waiting = list(groups.items())
    while waiting or batch:
        if waiting and sum(len(members) for _, members in batch) < batch_size:
            batch.append(waiting.pop())
            continue
        trees = [(list(context), [requests[i][1] for i in members]) for context, members in batch]
        scores = iter(_score_trees(model, trees))
        likelihoods.update((i, next(scores)) for _, members in batch for i in members)
        batch = []
    return [likelihoods[i] for i in range(len(requests))]


def _score_trees(model: Any, trees: Sequence[tuple[list[int], list[list[int]]]]) -> list[tuple[float, bool]]:
    """Return (log-likelihood, is greedy) of every continuation of every (context, continuations), in order.

    All of them are one sequence of S tokens: contexts, each followed by its continuations, which see their context
    and themselves but not each other. Only the K predicted positions go through the head.
    """
    import torch

    ids: list[int] = []
    positions: list[int] = []
    tree_of: list[int] = []
    branch_of: list[int] = []  # 0 is the context
    keep: list[int] = []
    targets: list[int] = []
    for tree, (context, continuations) in enumerate(trees):
        last_of_context = len(ids) + len(context) - 1
        for branch, tokens in enumerate([context, *(c[:-1] for c in continuations)]):
            if branch:  # the first token of a continuation is predicted from the context, the rest from itself
                keep += [last_of_context, *range(len(ids), len(ids) + len(tokens))]
                targets += continuations[branch - 1]
            begin = len(context) if branch else 0
            positions += range(begin, begin + len(tokens))
            tree_of += [tree] * len(tokens)
            branch_of += [branch] * len(tokens)
            ids += tokens
    mask = None  # one continuation is a plain sequence
    if len(trees) > 1 or len(trees[0][1]) > 1:
        where, branches = torch.tensor(tree_of), torch.tensor(branch_of)
        sees = (where[:, None] == where[None]) & ((branches[None] == 0) | (branches[:, None] == branches[None])).tril()
        hidden = torch.zeros(len(ids), len(ids), dtype=model.dtype)  # (S, S)
        mask = hidden.masked_fill(~sees, torch.finfo(model.dtype).min)[None, None].to(model.device)
    with torch.inference_mode():
        logits = (
            model(
                input_ids=torch.tensor([ids], device=model.device),
                position_ids=torch.tensor([positions], device=model.device),
                attention_mask=mask,
                logits_to_keep=torch.tensor(keep, device=model.device),
                use_cache=False,
            )
            .logits[0]
            .float()
        )  # (K, V)
        target = torch.tensor(targets, device=model.device)
        at = logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(dim=1)  # (K,)
        greedy = logits.argmax(dim=1) == target
    sizes = [len(continuation) for _, continuations in trees for continuation in continuations]
    return [(float(a.sum()), bool(g.all())) for a, g in zip(at.split(sizes), greedy.split(sizes), strict=True)]

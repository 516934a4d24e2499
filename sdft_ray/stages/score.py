"""Stage `score`: the angular distance of every span of blocks, measured in one pass.

In: the base model and calibration texts. Out: distances.json, d(l, n) for all l and n, and the choice for every n.
It knows nothing of how many blocks will go, so a depth sweep scores once. Hooks on the blocks take x(0)..x(L) at
each text's last token as they pass by: `hidden_states[-1]` of transformers lies behind the final norm and is not x(L).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from sdft_ray.artifacts import write_atomically
from sdft_ray.errors import UserError, problem
from sdft_ray.sources import read_calibration
from sdft_ray.stages import Work

VERSION = 1


def build(work: Work) -> dict[str, Any]:
    """Write distances.json."""
    import numpy as np
    import ray
    import torch

    from sdft_ray.core.similarity import choose_span

    calibration, plan = work.settings["calibration"], work.compute.score
    texts = read_calibration(Path(work.stage.where["texts"]), calibration["field"], calibration["limit"])
    work.progress.begin(len(texts))
    dataset = ray.data.from_items(
        [{"index": i, "text": text} for i, text in enumerate(texts)], override_num_blocks=plan.actors
    ).map_batches(
        Scorer,
        fn_constructor_kwargs={
            "model": str(work.input("model")),
            "dtype": work.settings["dtype"],
            "max_tokens": calibration["max_tokens"],
            "device": "cuda" if plan.gpus else "cpu",
        },
        batch_size=plan.batch_size,
        compute=ray.data.ActorPoolStrategy(size=plan.actors),
        num_cpus=plan.cpus,
        num_gpus=plan.gpus or None,
    )
    found: dict[int, Any] = {}
    for batch in dataset.iter_batches(batch_size=None):
        found.update(zip(batch["index"].tolist(), batch["distances"], strict=True))
        work.progress.update(len(found))
    assert sorted(found) == list(range(len(texts))), "every text is measured once"
    # In the order of the texts, so that neither actors nor batches move the mean.
    distances = torch.from_numpy(np.stack([found[i] for i in range(len(texts))]))  # (B, L+1, L+1)
    if not torch.isfinite(distances).all():
        raise UserError(problem("model", "gives NaN activations on the calibration texts", "Try prune.dtype: float32"))
    blocks = distances.shape[1] - 1
    choices = {str(n): dataclasses.asdict(choose_span(distances, n)) for n in range(1, blocks)}
    result = {"blocks": blocks, "texts": len(texts), "distances": distances.mean(dim=0).tolist(), "choices": choices}
    write_atomically(work.directory / "distances.json", json.dumps(result))
    return {"blocks": blocks, "texts": len(texts), "choices": choices}


class Scorer:
    """An actor that measures texts: holds the base model without its head."""

    def __init__(self, model: str, dtype: str, max_tokens: int, device: str) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModel.from_pretrained(model, dtype=getattr(torch, dtype)).to(device).eval()
        self.max_tokens = max_tokens

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the distances (b, L+1, L+1) of a batch of b texts."""
        from sdft_ray.core.similarity import angular_distances

        ids = [self.tokenizer(text)["input_ids"][: self.max_tokens] for text in batch["text"]]
        states = last_token_states(self.model, ids)
        return {"index": batch["index"], "distances": angular_distances(states).cpu().numpy()}


def last_token_states(model: Any, ids: list[list[int]]) -> Any:
    """Return x(0)..x(L) at the last token of each sequence, shape (B, L+1, D), float32."""
    import torch

    lengths = torch.tensor([len(row) for row in ids], device=model.device)
    width = int(lengths.max())
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=model.device)  # (B, T)
    mask = torch.arange(width, device=model.device)[None] < lengths[:, None]
    states: list[Any] = []

    def take(hidden: Any) -> None:
        states.append(hidden[torch.arange(len(ids)), lengths - 1].float())  # (B, D)

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(args[0] if args else kwargs["hidden_states"])

    def after(_module: Any, _args: Any, output: Any) -> None:
        take(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in model.layers]
    hooks.append(model.layers[-1].register_forward_hook(after))
    try:
        with torch.inference_mode():
            model(input_ids=input_ids, attention_mask=mask.long(), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(states, dim=1)

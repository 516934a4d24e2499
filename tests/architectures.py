"""Which architectures can be pruned, and how that was checked: `python tests/architectures.py > docs/architectures.md`.

In: a tiny random model of each. Out: a table of architectures x checks. The oracle is independent of the code that is
checked: the base model, told by hooks to give back the input of some of its blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from sdft_ray.core.surgery import ARCHITECTURES

# Blocks that differ in kind, so that a wrong order of layer_types changes the result.
WINDOWED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((architecture, {}) for architecture in ARCHITECTURES),
    ("mistral", {"sliding_window": 4}),
    ("qwen2", WINDOWED),
    ("qwen3", WINDOWED),
    ("llama", {"tie_word_embeddings": False, "rope_theta": 5e5}),
]
BLOCKS = 6
REMOVED = {"start": (0, 1), "middle": (2, 3), "end": (4, 5), "scattered": (0, 2, 5)}


def some_ids(rows: int = 2, tokens: int = 24) -> Any:
    """Return token ids (B, T) of the tiny tokenizer's bytes."""
    import torch

    return torch.randint(3, 250, (rows, tokens), generator=torch.Generator().manual_seed(1))


def logits_of(model: Any, ids: Any, skipped: Sequence[int] = ()) -> Any:
    """Return logits (B, T, V) of a model whose `skipped` blocks give back their input."""
    import torch

    with torch.inference_mode(), _skipping(model, skipped):
        return model(input_ids=ids, use_cache=False).logits


def generated_by(model: Any, ids: Any, use_cache: bool) -> list[list[int]]:
    """Return prompts and 16 greedy tokens."""
    import torch

    lengths = {"max_new_tokens": 16, "min_new_tokens": 16}
    with torch.inference_mode():
        made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=use_cache, **lengths)
    return made.tolist()


@contextlib.contextmanager
def _skipping(model: Any, skipped: Sequence[int]) -> Iterator[None]:
    def give_back_input(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> Any:
        return args[0] if args else kwargs["hidden_states"]

    hooks = [model.model.layers[block].register_forward_hook(give_back_input, with_kwargs=True) for block in skipped]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

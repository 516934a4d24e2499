"""Keep attention and the randomness of dropout within the rows of a packed sequence.

In: a causal LM, and the rows of the current sequence. Out: the same model, which treats each row as if it stood alone.
This module does both itself: not every model of transformers makes its mask from the positions (gpt_oss does not), and
PyTorch's dropout draws from the state of the process, which differs with the number of workers, with packing and after
a resume.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch

_ATTENTION = "sdft_rows"  # the name of attend_within_rows in transformers


def may_share_a_sequence(config: Any) -> bool:
    """Return whether several rows of a model can be one sequence: blocks of other kinds than attention (state-space,
    linear attention, convolution) carry a state on, and llama4's attention counts from a sequence's start."""
    kinds = set(getattr(config, "layer_types", None) or ())
    return kinds <= {"full_attention", "sliding_attention"} and not getattr(config, "attn_temperature_tuning", False)


class CurrentRows:
    """The rows (R) of the current sequence; one object, which all layers of a model read."""

    starts: Sequence[int] = ()
    """(R + 1) where each row starts, and the length of the sequence."""
    keys: Sequence[str] = ()
    """The key of each row's dropout: seed, step and row."""


def keep_within_rows(model: Any) -> CurrentRows:
    """Make a model attend within rows only, and return the object from which it reads the rows.

    A model whose rows may not share a sequence is left as it is: each of its sequences is to be one row.
    """
    from transformers import AttentionInterface

    rows, usual = CurrentRows(), str(model.config._attn_implementation)
    if not may_share_a_sequence(model.config):
        return rows
    AttentionInterface.register(_ATTENTION, attend_within_rows)  # without a mask function: transformers makes no mask
    for module in model.modules():
        module.sdft_rows, module.sdft_usual = rows, usual
    model.set_attn_implementation(_ATTENTION)
    return rows


def attend_within_rows(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Return causal attention of each row on its own: query (1, H, T, C) -> (1, T, H, C).

    A mask over the whole sequence would cost T x T where the rows need the sum of their squares.
    """
    assert attention_mask is None, "rows carry no padding"
    starts = module.sdft_rows.starts
    assert starts[-1] == query.shape[2], f"{tuple(query.shape)} is not a sequence of rows that end at {starts}"
    same_size = query.shape[-1] == value.shape[-1]  # not so in deepseek_v3
    if module.sdft_usual == "sdpa" and query.is_cuda and query.dtype != torch.float32 and same_size:
        return _attend_at_once(query, key, value, starts, sliding_window, options.get("scaling")), None
    parts = []
    for begin, end in itertools.pairwise(starts):
        q, k, v = (tensor[:, :, begin:end] for tensor in (query, key, value))
        parts.append(_attend(module, q, k, v, sliding_window, options))
    return torch.cat(parts, dim=1), None


def _attend(module: Any, query: Any, key: Any, value: Any, window: int | None, options: dict[str, Any]) -> Any:
    """Return one row's attention by the model's usual means."""
    length = query.shape[2]
    if module.sdft_usual == "sdpa":
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        mask = None if window is None or length <= window else _window(length, window, query.device)
        return sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    # Models with sinks or soft caps have their own.
    usual = sys.modules[type(module).__module__].eager_attention_forward
    seen = _window(length, window or length, query.device)
    mask = torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, torch.finfo(query.dtype).min)
    return usual(module, query, key, value, mask, **options)[0]


def _window(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Return (1, 1, T, T), true where a token sees another: itself and those less than `window` before it."""
    places = torch.arange(length, device=device)
    back = places[:, None] - places[None]
    return ((back >= 0) & (back < window))[None, None]


def _attend_at_once(
    query: Any, key: Any, value: Any, starts: Sequence[int], window: int | None, scale: float | None
) -> torch.Tensor:
    """Return all rows' attention in one call of FlashAttention, which PyTorch has for half precision on a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor(starts, dtype=torch.int32, device=query.device)
    longest = max(end - begin for begin, end in itertools.pairwise(starts))
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, H, C)
    reach = (-1 if window is None else window - 1, 0)
    grouped = query.shape[1] != key.shape[1]
    mixed = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale, window_size=reach, enable_gqa=grouped)
    assert isinstance(mixed, torch.Tensor), "a tuple comes only where more is asked for"
    return mixed[None]


def switch_own_noise_off(model: Any) -> None:
    """Switch off what a model's own config makes random in training: dropout, skipped blocks (opt), jitter (mixtral).

    It draws from the state of the process, and FlashAttention's path knows none.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


class RowDropout(torch.nn.Module):
    """Dropout of packed rows (1, T, D): a row's mask is a pure function of its key and the layer."""

    def __init__(self, p: float, layer: int, rows: CurrentRows) -> None:
        super().__init__()
        self.p, self.layer, self.rows = p, layer, rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x with a share p of it zero and the rest scaled up; x itself outside training."""
        if not self.training:
            return x
        starts = self.rows.starts
        assert starts[-1] == x.shape[-2], f"{tuple(x.shape)} is not a sequence of rows that end at {starts}"
        masks = []
        for key, (begin, end) in zip(self.rows.keys, itertools.pairwise(starts), strict=True):
            generator = torch.Generator(x.device).manual_seed(_seed(f"{key}/{self.layer}"))
            empty = torch.empty((end - begin, x.shape[-1]), dtype=x.dtype, device=x.device)
            masks.append(empty.bernoulli_(1 - self.p, generator=generator))
        return x * (torch.cat(masks) / (1 - self.p))


def drop_by_row(model: Any, p: float, rows: CurrentRows) -> None:
    """Put RowDropout in the place of every LoRA layer's dropout."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for number, layer in enumerate(layers):
        for name in layer.lora_dropout:
            layer.lora_dropout[name] = RowDropout(p, number, rows)


def _seed(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest())

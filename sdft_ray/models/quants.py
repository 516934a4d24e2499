"""How the weights of a GGUF file are stored: which tensor in which kind of number, and how far off it may be.

In: a form such as q4_k_m, and the name and weights of a tensor. Out: its kind, its bytes, its bounds. The `gguf`
package decodes every kind and encodes the simple ones; 4 and 6 bits in groups that share scales are encoded by libgguf,
which makes the bytes of llama.cpp, and decoded by another library than the one that wrote them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from sdft_ray.errors import UserError, problem

FORMS = {"f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0, "q4_k_m": Kind.Q4_K}
"""How matrices may be stored, each with the kind of most of them."""
_SIMPLER = {Kind.Q4_K: Kind.Q5_0, Kind.Q6_K: Kind.Q8_0, Kind.Q5_0: Kind.F16, Kind.Q8_0: Kind.F16}
"""For rows that are no multiple of a kind's block."""
_TORCH = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
LARGEST = {
    Kind.F16: 65504.0,
    Kind.Q4_K: 63 * 65504.0,
    Kind.Q5_0: 16 * 65504.0,
    Kind.Q6_K: 32 * 127 * 65504.0,
    Kind.Q8_0: 127 * 65504.0,
}
"""The largest weight that a kind holds: scales are float16, times the largest code and the largest scale of a group."""
_LIBGGUF = (Kind.Q4_K, Kind.Q6_K)
_AT_ONCE = 2**22  # weights that are compared


class _Codes(NamedTuple):
    """Where the codes of a block's weights lie among its bytes."""

    place: slice
    least: int
    """A byte of the least codes."""
    largest: int
    steps: int
    """From the least code to the largest."""


_CODES = {
    Kind.Q4_K: _Codes(slice(16, None), 0x00, 0xFF, 15),
    Kind.Q5_0: _Codes(slice(2, None), 0x00, 0xFF, 31),
    Kind.Q6_K: _Codes(slice(0, 192), 0x00, 0xFF, 63),
    Kind.Q8_0: _Codes(slice(2, None), 0x81, 0x7F, 254),
}


def require_library(form: str, where: str) -> None:
    """Raise UserError at `where` for a form whose library is not installed."""
    if form == "q4_k_m" and importlib.util.find_spec("libgguf") is None:
        what = "q4_k_m needs libgguf, which is not installed"
        raise UserError(problem(where, what, "Do: pip install 'sdft-ray[q4]'"))


def kind_of(name: str, shape: Sequence[int], form: str, blocks: int, tied: bool) -> Kind:
    """Return how a tensor of a model with so many blocks is stored; tied: its embeddings are its head, too.

    Vectors keep float32, which llama.cpp expects of them.
    """
    if len(shape) < 2:
        return Kind.F32
    kind = FORMS[form]
    if kind == Kind.Q4_K and _needs_more_bits(name, blocks, tied):
        kind = Kind.Q6_K
    while kind in _SIMPLER and shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = _SIMPLER[kind]
    return kind


def _needs_more_bits(name: str, blocks: int, tied: bool) -> bool:
    """Return whether a matrix has 6 bits in q4_k_m, as llama.cpp chooses: the head, and of the first and the last
    eighth of the blocks and of every third between them what attention adds up and what the MLP gives."""
    if name == ("token_embd.weight" if tied else "output.weight"):
        return True
    if not name.endswith((".attn_v.weight", ".ffn_down.weight")):
        return False
    block, eighth = int(name.split(".")[1]), blocks // 8
    return block < eighth or block >= 7 * blocks // 8 or (block - eighth) % 3 == 2


def encode(weights: np.ndarray, kind: Kind) -> np.ndarray:
    """Return float32 weights as they are stored: numbers of the kind, or bytes."""
    if kind not in _LIBGGUF:
        stored: np.ndarray = gguf.quants.quantize(weights, kind)
        return stored
    import libgguf  # an extra

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # it works beside Python
        parts = np.array_split(weights, min(len(weights), 4 * torch.get_num_threads()))
        return np.concatenate(list(pool.map(lambda rows: libgguf.quantize_rows(rows, kind), parts)))


def error_of(weights: np.ndarray, stored: np.ndarray, kind: Kind) -> float | None:
    """Return how far stored weights are from a tensor's at most, beyond the rounding of float16 and bfloat16; None
    where they are not that tensor's."""
    rows = max(1, _AT_ONCE // weights.shape[-1])
    largest = 0.0
    for start in range(0, len(weights), rows):
        part, data = weights[start : start + rows], stored[start : start + rows]
        values = gguf.quants.dequantize(data, kind)
        if kind in _TORCH:  # rounded by torch: it is not what rounded them for the file
            right = np.array_equal(torch.from_numpy(part).to(_TORCH[kind]).float().numpy(), values)
        else:
            errors = np.abs(values - part)
            right, largest = bool((errors <= allowed_errors(part, data, kind)).all()), max(largest, float(errors.max()))
        if not right:
            return None
    return largest


def allowed_errors(weights: np.ndarray, stored: np.ndarray, kind: Kind) -> np.ndarray:
    """Return how far each stored weight may be off: half a step of its group, or what lies beyond the group's range.

    Steps and ranges are read from what is stored, with the least code and the largest in place of each weight's. A
    scale is a float16, of 11 bits, or a multiple of 2^-24 where it is below 2^-14, and some encoders round by it before
    it is rounded itself.
    """
    codes = _CODES[kind]
    ends = []
    for code in (codes.least, codes.largest):
        filled = stored.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1]).copy()
        filled[:, codes.place] = code
        ends.append(gguf.quants.dequantize(filled.reshape(stored.shape), kind))
    low, high = np.minimum(*ends), np.maximum(*ends)
    allowed: np.ndarray = np.maximum((high - low) / codes.steps * 0.5001, np.maximum(low - weights, weights - high))
    return allowed + np.abs(weights) * 2.0**-11 + codes.steps * 2.0**-25

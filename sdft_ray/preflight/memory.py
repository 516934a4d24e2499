"""The memory of a training, by arithmetic.

In: the shape of a model and how it is trained. Out: bytes of one worker, by purpose. Every formula is the sum of the
tensors that PyTorch and DeepSpeed keep; `benchmarks/memory.py` compares it with measurements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

# Elements of DeepSpeed's `stage3_max_live_parameters` and `reduce_bucket_size` where its JSON does not set them.
LIVE_PARAMETERS = 1_000_000_000
REDUCE_BUCKET = 500_000_000
PROCESS_BYTES = 800_000_000
"""Python, PyTorch, transformers, DeepSpeed and Ray in one worker (measured: docs/results.md)."""
ENGINE_BYTES = 1_500_000_000
"""A process with vLLM, besides weights and KV cache: 1.3 to 1.9 GB were measured on a CPU (docs/results.md)."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The facts of a model that the arithmetic needs."""

    blocks: int
    width: int
    """D"""
    kv_width: int
    """Key heads x head size."""
    feed_forward: int
    """F, for one token: in a mixture of experts, of those that it takes."""
    vocabulary: int
    """V"""
    parameters: int
    """All parameters, tied ones once."""
    block_parameters: int
    """Parameters of one block, on average."""
    linear: tuple[tuple[str, int, int], ...]
    """Names of the linear layers of blocks, and how many inputs and outputs those of a name have in a block, on
    average."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one worker at its peak."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    process: int = PROCESS_BYTES

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.process


def prune(shape: Shape, blocks: int) -> Shape:
    """Return the shape without some blocks."""
    gone = blocks * shape.block_parameters
    return dataclasses.replace(shape, blocks=shape.blocks - blocks, parameters=shape.parameters - gone)


def trainable_parameters(shape: Shape, method: str, rank: int, targets: str | Sequence[str]) -> int:
    """Return how many parameters are trained: all, or rank x (inputs + outputs) of each layer with an adapter."""
    if method == "full":
        return shape.parameters
    layers = [layer for layer in shape.linear if targets == "all-linear" or layer[0] in targets]
    return shape.blocks * sum(rank * (inputs + outputs) for _, inputs, outputs in layers)


def training_memory(
    shape: Shape,
    trained: int,
    *,
    workers: int,
    zero_stage: int,
    half: bool,
    tokens: int,
    loss_tokens: int,
    gradient_checkpointing: bool = False,
) -> Memory:
    """Return the peak of one worker: P parameters, t of them trained, W workers, b bytes a number, T tokens a pass.

    weights      b P; under ZeRO-3 b P / W and what is live in a pass, at most LIVE_PARAMETERS
    gradients    b t, and b t once more while they are summed over the workers; from ZeRO-2 on only 4 t / W of the sum
    optimizer    8 t of moments; a float32 copy of 4 t under ZeRO 1 to 3; spread over W from ZeRO-1 on
    activations  see `activation_bytes`
    """
    number = 2 if half else 4
    spread = workers if zero_stage else 1
    weights = number * shape.parameters
    if zero_stage == 3:
        weights = weights // workers + number * min(shape.parameters, LIVE_PARAMETERS)
    summed = min(trained, REDUCE_BUCKET)
    if zero_stage == 0:
        gradients = number * trained + (number * summed if workers > 1 else 0)
    elif zero_stage == 1:
        gradients = number * (trained + summed) + 4 * trained // workers
    else:
        gradients = number * summed + 2 * 4 * trained // workers
    optimizer = (8 + (4 if zero_stage else 0)) * trained // spread
    activations = activation_bytes(shape, tokens, loss_tokens, half, gradient_checkpointing)
    return Memory(weights, gradients, optimizer, activations)


def loading_memory(shape: Shape, number: int, shares: int, on_gpu: bool) -> int:
    """Return the bytes of main memory of one worker while it loads the weights, by b bytes each.

    b P where a worker holds them all. Under ZeRO-3 (`shares` is then W, else 0) b P / W, unless a GPU keeps them, and
    the largest module, which is made whole: the embeddings, or one block's experts.
    """
    if not shares:
        return number * shape.parameters + PROCESS_BYTES
    largest = number * max(shape.vocabulary * shape.width, shape.block_parameters)
    return (0 if on_gpu else number * shape.parameters // shares) + largest + PROCESS_BYTES


def activation_bytes(shape: Shape, tokens: int, loss_tokens: int, half: bool, gradient_checkpointing: bool) -> int:
    """Return the bytes that one forward pass keeps for its backward pass.

    A block keeps, of each token: two norms' inputs and outputs (4 D) and the input of what follows them (2 D), queries
    and mixed values (2 D), keys and values (2 KV), the residual stream (2 D), and of the feed-forward layer gate, its
    activation, up and their product (4 F). The head keeps, of each token with loss, the logits and their gradient (2 V;
    core/losses.py). With checkpointing a block keeps its input, and one block is there whole.
    """
    number = 2 if half else 4
    block = number * tokens * (10 * shape.width + 2 * shape.kv_width + 4 * shape.feed_forward)
    kept = block * shape.blocks if not gradient_checkpointing else number * tokens * shape.width * shape.blocks + block
    return kept + 2 * number * loss_tokens * shape.vocabulary


def holding_memory(shape: Shape, number: int, tokens: int, streamed: bool = False) -> int:
    """Return the bytes of a process that holds a model for forward passes of T tokens: b P, and one block's values.

    streamed: it holds b times the parameters of the embeddings and one block instead.
    """
    block = number * tokens * (10 * shape.width + 2 * shape.kv_width + 4 * shape.feed_forward)
    held = shape.vocabulary * shape.width + shape.block_parameters if streamed else shape.parameters
    return number * held + block + PROCESS_BYTES


def state_bytes(shape: Shape, number: int, tokens: int) -> int:
    """Return the bytes of the residual stream between two blocks, b T D."""
    return number * tokens * shape.width

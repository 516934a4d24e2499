import dataclasses

import pytest

from sdft_ray.preflight.memory import Shape, activation_bytes, prune, trainable_parameters, training_memory

SHAPE = Shape(
    blocks=4,
    width=8,
    kv_width=4,
    feed_forward=16,
    vocabulary=100,
    parameters=2_000_000_000,
    block_parameters=400_000_000,
    linear=(("q_proj", 8, 8), ("k_proj", 8, 4), ("down_proj", 16, 8)),
)


def memory(zero_stage, workers=4, **more):
    options = {"half": False, "tokens": 0, "loss_tokens": 0} | more
    return training_memory(SHAPE, 1_000_000_000, workers=workers, zero_stage=zero_stage, **options)


def test_prune_takes_parameters_and_blocks():
    assert dataclasses.replace(prune(SHAPE, 1), blocks=4, parameters=2_000_000_000) == SHAPE
    assert (prune(SHAPE, 1).blocks, prune(SHAPE, 1).parameters) == (3, 1_600_000_000)


def test_trainable_parameters_are_rank_times_both_ends_of_each_layer():
    assert trainable_parameters(SHAPE, "lora", 2, "all-linear") == 4 * 2 * (16 + 12 + 24)
    assert trainable_parameters(SHAPE, "lora", 2, ["q_proj"]) == 4 * 2 * 16
    assert trainable_parameters(SHAPE, "full", 2, "all-linear") == SHAPE.parameters


def test_training_memory_spreads_what_the_zero_stage_says():
    moments = [memory(stage).optimizer / 1e9 for stage in range(4)]
    assert moments == [8, 3, 3, 3]
    weights = [memory(stage).weights / 1e9 for stage in range(4)]
    assert weights == [8, 8, 8, 2 + 4], "under ZeRO-3 a quarter, and what is live in a pass"
    gradients = [memory(stage).gradients for stage in range(4)]
    assert gradients[0] > gradients[2] and gradients[1] > gradients[2] == gradients[3]
    assert memory(0, workers=1).gradients == 4e9
    assert memory(2, half=True).weights == 4e9


def test_activation_bytes_grow_with_tokens_and_shrink_with_checkpointing():
    whole = activation_bytes(SHAPE, 1000, 0, half=False, gradient_checkpointing=False)
    assert activation_bytes(SHAPE, 2000, 0, half=False, gradient_checkpointing=False) == 2 * whole
    assert activation_bytes(SHAPE, 1000, 0, half=True, gradient_checkpointing=False) == whole / 2
    assert activation_bytes(SHAPE, 1000, 0, half=False, gradient_checkpointing=True) < whole / 2
    with_loss = activation_bytes(SHAPE, 1000, 10, half=False, gradient_checkpointing=False)
    assert with_loss - whole == pytest.approx(2 * 4 * 10 * 100)

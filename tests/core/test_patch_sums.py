"""The patch at a cut, against dense least squares and the model itself."""

import pytest
import torch

from sdft_ray.core.patch import Sums, fit, fold, gaps, is_patched, require_foldable, solve
from sdft_ray.errors import UserError

WIDTH = 6


def draw(tokens: int, seed: int = 0, noise: float = 0.1):
    """Return what an MLP adds, and what it should add: a map of it, and noise."""
    source = torch.Generator().manual_seed(seed)
    added = torch.randn(tokens, WIDTH, generator=source, dtype=torch.float64)
    true = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return added, added @ true + noise * torch.randn(tokens, WIDTH, generator=source, dtype=torch.float64)


def sums_of(added, wanted, pieces: int = 1) -> Sums:
    sums = Sums.none(WIDTH)
    for some in zip(added.chunk(pieces), wanted.chunk(pieces), strict=True):
        sums.add(*some)
    return sums


@pytest.mark.parametrize("weight", [1e-6, 0.1, 10.0])
def test_solve_is_the_dense_least_squares_with_rows_for_the_pull(weight):
    added, wanted = draw(40)
    pull = (weight * added.square().sum(dim=0).mean()).sqrt() * torch.eye(WIDTH, dtype=torch.float64)
    dense = torch.linalg.lstsq(torch.cat([added, pull]), torch.cat([wanted, pull])).solution
    torch.testing.assert_close(solve(sums_of(added, wanted, pieces=7), weight), dense)


def test_error_is_that_of_the_tokens_themselves():
    added, wanted = draw(40)
    patch = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = (wanted - added @ patch).square().sum() / wanted.square().sum()
    assert sums_of(added, wanted, pieces=3).error(patch) == pytest.approx(float(expected))


def test_fit_of_few_noisy_tokens_pulls_harder_and_of_none_that_help_patches_nothing():
    held_back = sums_of(*draw(400, seed=1, noise=2.0))
    _, few, _ = fit([sums_of(*draw(8, noise=2.0))], [held_back])
    patch, many, errors = fit([sums_of(*draw(4000, noise=2.0))], [held_back])
    assert few > many
    assert errors[many] == pytest.approx(held_back.error(patch)) and errors[many] == min(errors.values())
    added, _ = draw(40)
    nothing, weight, _ = fit([sums_of(added, -added)], [sums_of(added, added)])
    assert weight == float("inf") and torch.equal(nothing, torch.eye(WIDTH, dtype=torch.float64))
    silent, _, _ = fit([sums_of(0 * added, added)], [sums_of(0 * added, added)])
    assert torch.equal(silent, nothing)


@pytest.mark.parametrize(
    ("name", "shape", "architecture"),
    [
        ("model.layers.3.mlp.down_proj.weight", (WIDTH, 9), "llama"),
        ("model.layers.3.mlp.c_proj.bias", (WIDTH,), "starcoder2"),
        ("model.layers.3.mlp.experts.down_proj", (2, WIDTH, 9), "qwen3_moe"),
        ("model.layers.3.mlp.experts.down_proj", (2, 9, WIDTH), "gpt_oss"),
        ("model.layers.3.mlp.experts.down_proj_bias", (2, WIDTH), "gpt_oss"),
        ("model.layers.3.block_sparse_moe.experts.1.w2.weight", (WIDTH, 9), "mixtral"),
        ("model.layers.3.mlp.shared_expert.down_proj.weight", (WIDTH, 9), "qwen2_moe"),
    ],
)
def test_fold_multiplies_what_the_projection_gives_by_the_map(name, shape, architecture):
    source = torch.Generator().manual_seed(0)
    patch, tensor, inner = (
        torch.randn(*s, generator=source, dtype=torch.float64) for s in ((WIDTH, WIDTH), shape, (9,))
    )

    def output(tensor):
        if name.endswith("bias"):
            return tensor
        return inner @ tensor if architecture == "gpt_oss" else tensor @ inner

    assert is_patched(name, 3) and not is_patched(name, 2)
    torch.testing.assert_close(output(fold(patch, name, tensor, architecture)), output(tensor) @ patch)


@pytest.mark.parametrize(
    "name", ["mlp.up_proj.weight", "self_attn.o_proj.weight", "mlp.gate.weight", "input_layernorm.weight"]
)
def test_is_patched_leaves_other_tensors(name):
    assert not is_patched(f"model.layers.3.{name}", 3)


def test_gaps_name_the_blocks_around_each_run():
    assert gaps((1, 2, 3)) == [(0, 4)]
    assert gaps((0, 2, 5, 6)) == [(-1, 1), (1, 3), (4, 7)]


@pytest.mark.parametrize(("architecture", "before"), [("gemma2", 3), ("llama", -1)])
def test_require_foldable_refuses_by_name(architecture, before):
    with pytest.raises(UserError, match="prune"):
        require_foldable(architecture, before)
    require_foldable("llama", 0)

"""SLERP and the mean of tensors."""

import math

import pytest
import torch

from sdft_ray.core.merging import PIECE, combine, compare, mean, slerp


def pieces(tensors):
    return zip(*(tensor.split(PIECE) for tensor in tensors), strict=True)


def merged(how, rest, tensors):
    """Return the merged tensor, and how similar the tensors were."""
    shares, similarity = how(compare(pieces(tensors)), rest)
    return torch.cat([combine(piece, shares) for piece in pieces(tensors)]), similarity


def test_slerp_of_orthogonal_tensors_lies_on_the_arc_and_keeps_the_length():
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    third, alike = merged(slerp, 1 / 3, [a, b])
    assert torch.allclose(third, 2 * torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))
    assert alike.cosines == (0.0,) and not alike.fell_back and not alike.identical


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_slerp_at_its_ends_is_a_parent(t):
    a, b = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(merged(slerp, t, [a, b])[0], b if t else a, atol=1e-6)


def test_slerp_of_nearly_parallel_tensors_is_the_mean_and_says_so():
    a, step = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    found, alike = merged(slerp, 0.25, [a, a + 0.01 * step])
    assert alike.fell_back and 0.9995 < alike.cosines[0] < 1
    assert torch.allclose(found, a + 0.0025 * step, atol=1e-6)
    assert not merged(slerp, 0.25, [a, a + 0.1 * step])[1].fell_back


def test_identical_tensors_stay_what_they_are_to_the_bit():
    a = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for how, rest, count in ((slerp, 0.3, 2), (mean, [1, 1, 1], 3)):
        found, alike = merged(how, rest, [a.clone() for _ in range(count)])
        assert torch.equal(found, a) and alike.identical and not alike.fell_back


def test_mean_divides_weights_by_their_sum_and_compares_every_pair():
    tensors = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])]
    found, alike = merged(mean, [1, 2, 1], tensors)
    assert torch.allclose(found, torch.tensor([0.5, 0.75]))
    assert alike.cosines == pytest.approx((0.0, math.sqrt(0.5), math.sqrt(0.5)))


@pytest.mark.parametrize("last", [0.0, 1.0])
def test_compare_of_many_numbers_is_the_cosine_in_double_precision(last):
    a, b = torch.randn(2, 3_000_001, generator=torch.Generator().manual_seed(0)) + 0.5
    expected = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0)
    assert compare(pieces([a, b])).cosines == (pytest.approx(float(expected), abs=5e-7),)
    assert compare(pieces([a, torch.zeros_like(a)])).cosines == (0.0,)
    (c := a.clone())[-1] += last  # one number of the last piece makes them differ
    assert compare(pieces([a, c])).identical == (not last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combine_is_the_sum_rounded_once(dtype):
    a, b = torch.randn(2, 1001, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(combine([a, b], (0.3, 0.7)), (a.float() * 0.3).add_(b.float(), alpha=0.7).to(dtype))

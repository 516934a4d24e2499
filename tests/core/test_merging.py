"""SLERP and the mean of tensors."""

import math

import pytest
import torch

from sdft_ray.core.merging import combine, cosine, mean, slerp


def merged(how, tensors):
    """Return the merged tensor, and how similar the tensors were."""
    return torch.cat(list(combine(tensors, how.shares))), how.similarity


def test_slerp_of_orthogonal_tensors_lies_on_the_arc_and_keeps_the_length():
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    third, alike = merged(slerp(a, b, 1 / 3), [a, b])
    assert torch.allclose(third, 2 * torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))
    assert alike.cosines == (0.0,) and not alike.fell_back and not alike.identical


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_slerp_at_its_ends_is_a_parent(t):
    a, b = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(merged(slerp(a, b, t), [a, b])[0], b if t else a, atol=1e-6)


def test_slerp_of_nearly_parallel_tensors_is_the_mean_and_says_so():
    a, step = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    found, alike = merged(slerp(a, a + 0.01 * step, 0.25), [a, a + 0.01 * step])
    assert alike.fell_back and 0.9995 < alike.cosines[0] < 1
    assert torch.allclose(found, a + 0.0025 * step, atol=1e-6)
    assert not slerp(a, a + 0.1 * step, 0.25).similarity.fell_back


def test_identical_tensors_stay_what_they_are_to_the_bit():
    a = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for how in (slerp(a, a.clone(), 0.3), mean([a, a.clone(), a.clone()], [1, 1, 1])):
        found, alike = merged(how, [a, a.clone(), a.clone()])
        assert torch.equal(found, a) and alike.identical and not alike.fell_back


def test_mean_divides_weights_by_their_sum_and_compares_every_pair():
    tensors = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])]
    found, alike = merged(mean(tensors, [1, 2, 1]), tensors)
    assert torch.allclose(found, torch.tensor([0.5, 0.75]))
    assert alike.cosines == pytest.approx((0.0, math.sqrt(0.5), math.sqrt(0.5)))


def test_cosine_of_many_numbers_is_that_in_double_precision():
    a, b = torch.randn(2, 3_000_001, generator=torch.Generator().manual_seed(0)) + 0.5
    expected = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0)
    assert cosine(a, b) == pytest.approx(float(expected), abs=5e-7)
    assert cosine(a, torch.zeros_like(a)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combine_in_pieces_is_the_whole_sum_rounded_once(dtype):
    a, b = torch.randn(2, 200_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    pieces = list(combine([a, b], (0.3, 0.7)))
    assert len(pieces) > 1
    assert torch.equal(torch.cat(pieces), (a.float() * 0.3).add_(b.float(), alpha=0.7).to(dtype))

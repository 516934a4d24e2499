"""KL and agreement, against other ways to compute them."""

import math

import pytest
import torch

from sdft_ray.core.retention import Measured, Nearness, Probe, compare, read_lines, write_lines

torch.set_num_threads(1)


def some_logits(seed: int, tokens: int = 9, vocabulary: int = 301) -> torch.Tensor:
    return 4 * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed))


def test_compare_is_what_full_distributions_in_float64_say():
    base, model, targets = some_logits(0), some_logits(1), torch.arange(9)
    found = compare(base, model, targets)
    p, q = (torch.distributions.Categorical(logits=logits.double()) for logits in (base, model))
    assert found.kl == pytest.approx(float(torch.distributions.kl_divergence(p, q).sum()), rel=1e-6)
    assert found.nll == pytest.approx(-float(q.log_prob(targets).sum()), rel=1e-6)
    # KL is not symmetric.
    assert found.kl != pytest.approx(compare(model, base, targets).kl, rel=1e-2)


def test_compare_has_the_gradient_that_a_divergence_from_the_base_has():
    """d KL(p || q) / d logits of q = q - p, which autograd knows nothing of: the sums are moved, and compared."""
    base, model = some_logits(2, tokens=3).double(), some_logits(3, tokens=3).double().requires_grad_()
    p, q = base.softmax(-1), model.softmax(-1)
    torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(probs=each) for each in (p, q))
    ).sum().backward()
    step = 1e-2 * torch.randn(3, 301, generator=torch.Generator().manual_seed(4)).double()
    with torch.no_grad():
        up, down = (compare(base, model + sign * step, torch.zeros(3, dtype=torch.long)).kl for sign in (0.5, -0.5))
    assert torch.allclose(model.grad, (q - p).detach(), atol=1e-9)
    assert up - down == pytest.approx(float((model.grad * step).sum()), rel=1e-2)


def test_compare_agrees_where_both_have_the_same_likeliest_token():
    base, model = some_logits(5, tokens=40, vocabulary=3), some_logits(6, tokens=40, vocabulary=3)
    same = sum(
        max(range(3), key=lambda i, a=a: float(a[i])) == max(range(3), key=lambda i, b=b: float(b[i]))
        for a, b in zip(base, model, strict=True)
    )
    assert 0 < same < 40
    assert compare(base, model, torch.zeros(40, dtype=torch.long)).agreed == same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compare_of_the_same_logits_is_exactly_nothing(dtype):
    logits = some_logits(7).to(dtype)
    found = compare(logits, logits.clone(), torch.zeros(9, dtype=torch.long))
    assert (found.kl, found.agreed) == (0.0, 9)


def test_sums_of_pieces_are_those_of_the_whole():
    base, model, targets = some_logits(8), some_logits(9), torch.arange(9)
    pieces = [compare(base[some], model[some], targets[some]) for some in (slice(0, 4), slice(4, 9))]
    whole = compare(base, model, targets)
    assert pieces[0].plus(pieces[1]) == pytest.approx(whole, rel=1e-6)
    assert Nearness(0.0, 0, 0.0).plus(whole) == whole


def test_lines_hold_what_was_written():
    probes = [Probe("text", "7", [1, 2, 3], 1), Probe("reference", "é", [4, 5], 1, 9)]
    assert read_lines(write_lines(probes), Probe) == probes
    measured = [Measured("response", "a", 0, 3, 0.1, 2, math.pi)]
    assert read_lines(write_lines(measured), Measured) == measured
    assert measured[0].bits == pytest.approx(math.log2(math.exp(math.pi)))

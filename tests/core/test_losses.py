import pytest
import torch
import torch.nn.functional as F

from sdft_ray.core import losses as in_pieces
from sdft_ray.core.losses import cross_entropy, tokens_at_once

PIECE, V = 7, 17
K = 3 * PIECE + 5


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(in_pieces, "_CACHED", PIECE * V)


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(K, V, generator=generator), torch.randint(V, (K,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_autograd_in_float64(logits, dtype):
    given, targets = logits[0].to(dtype), logits[1]
    weights = torch.rand(K) + 0.5  # tokens need not count the same
    exact = given.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    (expected * weights).sum().backward()
    own = given.clone().requires_grad_()
    losses = cross_entropy(own, targets)
    (losses * weights).sum().backward()
    assert losses.dtype == torch.float32 and own.grad.dtype == dtype
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(own.grad.double(), exact.grad, rtol=rounding, atol=1e-6)
    assert torch.equal(own.detach(), given), "logits are left as they are"


def test_nothing_as_large_as_the_logits_is_kept_but_their_gradient(logits):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        losses = cross_entropy(logits[0].bfloat16().requires_grad_(), logits[1])
    assert losses.requires_grad and [(tensor.shape, tensor.dtype) for tensor in kept] == [((K, V), torch.bfloat16)]


def test_without_a_gradient_nothing_is_kept(logits):
    losses = cross_entropy(*logits)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, F.cross_entropy(*logits, reduction="none"))


def test_a_piece_has_a_token_at_least_and_on_a_cpu_what_its_cache_holds(monkeypatch):
    assert tokens_at_once(torch.empty(K, V)) == PIECE
    assert tokens_at_once(torch.empty(K, 2 * PIECE * V)) == 1
    monkeypatch.undo()
    assert tokens_at_once(torch.empty(0, 128_256)) == 4 and tokens_at_once(torch.empty(0, 49_152)) == 10

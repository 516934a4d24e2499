import pytest
import torch
import torch.nn.functional as F

from sdft_ray.core.soft_targets import Likeliest, find_likeliest, soft_loss

K, V = 300, 17  # more tokens than one piece has


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(K, V, generator=generator) for _ in range(2))
    return student, teacher, torch.randint(V, (K,), generator=generator)


def by_autograd(student, log_p, tokens, temperature, share):
    """Return loss and gradient in float64, by PyTorch's own divergence; log_p: (K, V) at the temperature."""
    student = student.double().requires_grad_()
    log_q = (student / temperature).log_softmax(-1)
    divergence = F.kl_div(log_q, log_p.double(), reduction="sum", log_target=True)
    loss = (1 - share) * temperature**2 * divergence + share * F.cross_entropy(student, tokens, reduction="sum")
    loss.backward()
    return loss.detach(), student.grad


def of(student, teacher, tokens, temperature, share):
    student = student.clone().requires_grad_()
    loss = soft_loss(student, teacher, tokens, temperature, share).sum()
    (2 * loss).backward()  # a factor from outside passes through
    return loss.detach().double(), student.grad.double() / 2


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("stored", [False, True])
def test_loss_and_gradient_over_the_vocabulary_are_those_of_autograd(logits, temperature, share, stored):
    student, teacher, tokens = logits
    expected = by_autograd(student, (teacher / temperature).log_softmax(-1), tokens, temperature, share)
    given = find_likeliest(teacher, V, temperature) if stored else teacher
    loss, gradient = of(student, given, tokens, temperature, share)
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_likeliest_tokens_count_all_others_as_one_outcome(logits, temperature):
    student, teacher, tokens = logits
    log_p = (teacher / temperature).double().log_softmax(-1)
    top = log_p.topk(4)
    student64 = student.double().requires_grad_()
    log_q = (student64 / temperature).log_softmax(-1)
    p_rest = 1 - top.values.exp().sum(-1)
    log_q_rest = torch.log(1 - log_q.gather(-1, top.indices).exp().sum(-1))
    outcomes = (top.values.exp() * (top.values - log_q.gather(-1, top.indices))).sum(-1)
    expected = temperature**2 * (outcomes + p_rest * (p_rest.log() - log_q_rest)).sum()
    expected.backward()
    loss, gradient = of(student, find_likeliest(teacher, 4, temperature), tokens, temperature, 0.0)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, student64.grad, rtol=1e-4, atol=1e-5)
    whole = by_autograd(student, log_p, tokens, temperature, 0.0)[0]
    assert 0 < loss < whole, "joining outcomes loses divergence"


def test_a_teacher_that_is_sure_makes_the_cross_entropy(logits):
    student, _, tokens = logits
    sure = torch.full((K, V), -1e4).scatter(-1, tokens[:, None], 0.0)
    one = Likeliest(tokens[:, None], torch.zeros(K, 1))
    expected = F.cross_entropy(student, tokens, reduction="sum").double()
    for given in (sure, one):
        loss, gradient = of(student, given, tokens, 1.0, 0.0)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        assert gradient.isfinite().all()


def test_equal_models_have_no_loss_and_no_gradient(logits):
    student, _, tokens = logits
    for given in (student, find_likeliest(student, 5, 1.0)):
        loss, gradient = of(student, given, tokens, 1.0, 0.0)
        assert abs(loss) < 1e-3 and gradient.abs().max() < 1e-6

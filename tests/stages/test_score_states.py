"""Residual-stream states at the last token, and the distances of all spans made of them."""

import math

import pytest
import torch
from tiny import make_tiny_model

from sdft_ray.core.similarity import angular_distances
from sdft_ray.core.surgery import ARCHITECTURES
from sdft_ray.stages.score import last_token_states

torch.set_num_threads(1)

TEXTS = [
    list(range(10, 40)),
    [7, 7, 200],
    [100, 3, 50, 60, 61, 62, 63, 9],
    [42],
    list(range(250, 200, -2)),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from transformers import AutoModel

    made = {}

    def model(architecture: str):
        if architecture not in made:
            directory = make_tiny_model(tmp_path_factory.mktemp(architecture) / "model", architecture)
            made[architecture] = AutoModel.from_pretrained(directory).eval()
        return made[architecture]

    return model


def states_alone(model, ids: list[int]) -> torch.Tensor:
    """x(0)..x(L) of one text, (L+1, D): transformers' own hidden states, and the last block's output by a hook."""
    last = []
    hook = model.layers[-1].register_forward_hook(
        lambda _module, _args, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.inference_mode():
        hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    hook.remove()
    return torch.stack([*(x[0, -1] for x in hidden[:-1]), last[0][0, -1]])


def distances_alone(states: torch.Tensor) -> list[list[float]]:
    """d(l, m) of one text by definition, one pair of states at a time."""
    found = []
    for a in states.double():
        line = []
        for b in states.double():
            cos = sum(a * b) / (math.sqrt(sum(a * a)) * math.sqrt(sum(b * b)))
            line.append(math.acos(max(-1.0, min(1.0, float(cos)))) / math.pi)
        found.append(line)
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_last_token_states_of_a_padded_batch_are_those_of_each_text_alone(models, architecture):
    model = models(architecture)
    found = last_token_states(model, TEXTS)
    assert found.shape == (len(TEXTS), 7, 64)
    torch.testing.assert_close(found, torch.stack([states_alone(model, ids) for ids in TEXTS]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_angular_distances_of_all_spans_equal_the_naive_double_loop(models, architecture):
    model = models(architecture)
    found = angular_distances(last_token_states(model, TEXTS))
    expected = torch.tensor([distances_alone(states_alone(model, ids)) for ids in TEXTS], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert found[:, 0, -1].min() > 0.01, "a random model moves its stream"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_last_token_states_do_not_depend_on_how_texts_are_batched(models, size):
    model = models("llama")
    split = torch.cat([last_token_states(model, TEXTS[i : i + size]) for i in range(0, len(TEXTS), size)])
    torch.testing.assert_close(split, last_token_states(model, TEXTS), atol=1e-4, rtol=1e-4)


def test_last_token_states_end_before_the_final_norm(models):
    model = models("llama")
    with torch.no_grad():
        # A trained norm has weights that turn the vector; a fresh one would only rescale it.
        model.norm.weight.copy_(torch.linspace(-2, 2, 64))
    last = last_token_states(model, TEXTS[:1])[0, -1]
    with torch.inference_mode():
        behind = model(torch.tensor(TEXTS[:1]), output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(model.norm(last), behind, atol=1e-4, rtol=1e-4)
    assert angular_distances(torch.stack([last, behind])[None])[0, 0, 1] > 0.1


def test_last_token_states_are_float32_for_a_model_of_less(models, tmp_path):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(make_tiny_model(tmp_path / "model"), dtype=torch.bfloat16).eval()
    assert last_token_states(model, TEXTS).dtype == torch.float32

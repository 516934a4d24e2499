"""Log-likelihoods with shared contexts against one-by-one teacher forcing and against lm-eval itself."""

import pytest
import torch
from architectures import each_architecture
from tiny import make_tiny_model

from sdft_ray.stages.evaluate.likelihoods import score_requests

torch.set_num_threads(1)

MAX_LENGTH = 40


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    made = {}

    def model(architecture: str, **overrides):
        key = (architecture, *overrides.items())
        if key not in made:
            directory = make_tiny_model(tmp_path_factory.mktemp(architecture) / "model", architecture, **overrides)
            made[key] = AutoModelForCausalLM.from_pretrained(directory).eval()
        return made[key]

    return model


def greedy(model, context: list[int], tokens: int) -> list[int]:
    ids = list(context)
    for _ in range(tokens):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(context) :]


def score_alone(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Teacher forcing of one request, as the definition says."""
    ids = (context + continuation)[-(MAX_LENGTH + 1) :]
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids[:-1]])).logits[0].float().log_softmax(-1)[-len(continuation) :]
    total = sum(float(line[token]) for line, token in zip(logprobs, continuation, strict=True))
    return total, logprobs.argmax(-1).tolist() == continuation


def some_requests(model) -> list[tuple[list[int], list[int]]]:
    """Shared contexts not next to each other, single tokens, greedy ones, repeats, and too long ones."""
    first, second, long = list(range(20, 32)), [9, 8, 7], list(range(50, 110))
    return [
        (first, [5, 6, 7]),
        (second, [5]),
        (first, [5]),
        (first, greedy(model, first, 4)),
        (second, [200, 201, 202, 203, 204, 205]),
        (long, [11, 12, 13]),
        (first, [5, 6, 8]),
        (long, [11]),
        (long, [13, 12, 11]),
        ([77], [78, 79]),
        (second, greedy(model, second, 1)),
        (first, [5, 6, 7]),
        (list(range(100, 130)), list(range(130, 150))),
        ([77], list(range(30, 30 + MAX_LENGTH))),
    ]


def assert_same(found, expected):
    assert [likelihood for likelihood, _ in found] == pytest.approx([x for x, _ in expected], abs=1e-4, rel=1e-5)
    assert [is_greedy for _, is_greedy in found] == [x for _, x in expected]


@pytest.mark.heavy
@pytest.mark.parametrize("architecture", each_architecture())
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_score_requests_equals_teacher_forcing_one_by_one(models, architecture, batch_size):
    model = models(architecture)
    requests = some_requests(model)
    expected = [score_alone(model, *request) for request in requests]
    assert {is_greedy for _, is_greedy in expected} == {True, False}
    assert_same(score_requests(model, requests, MAX_LENGTH, batch_size), expected)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_score_requests_equals_lm_eval(models, batch_size):
    from lm_eval.models.huggingface import HFLM
    from tiny import make_tokenizer

    model = models("llama")
    requests = some_requests(model)
    harness = HFLM(pretrained=model, tokenizer=make_tokenizer(), max_length=MAX_LENGTH, batch_size=3, device="cpu")
    expected = harness._loglikelihood_tokens([(("", ""), *request) for request in requests], disable_tqdm=True)
    assert_same(score_requests(model, requests, MAX_LENGTH, batch_size), expected)


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("mistral", {"sliding_window": 6}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3}),
    ],
)
def test_score_requests_of_a_model_with_a_sliding_window_respects_it(models, architecture, overrides):
    model = models(architecture, **overrides)
    requests = some_requests(model)
    assert_same(score_requests(model, requests, MAX_LENGTH, 4), [score_alone(model, *request) for request in requests])


def test_score_requests_does_not_depend_on_the_order_of_requests(models):
    model = models("llama")
    requests = some_requests(model)
    forward = score_requests(model, requests, MAX_LENGTH, 4)
    assert_same(score_requests(model, requests[::-1], MAX_LENGTH, 4)[::-1], forward)


def test_score_requests_of_nothing_is_nothing(models):
    assert score_requests(models("llama"), [], MAX_LENGTH, 4) == []


@pytest.mark.parametrize(
    "request_",
    [([77], list(range(30, 31 + MAX_LENGTH))), (list(range(9)), list(range(30, 40 + MAX_LENGTH))), ([], [5, 6])],
    ids=["fills-the-model-and-one-more", "far-too-long", "no-context"],
)
def test_score_requests_that_no_model_could_score_is_refused_as_in_lm_eval(models, request_):
    with pytest.raises(AssertionError):
        score_requests(models("llama"), [([9, 8, 7], [5]), request_], MAX_LENGTH, 4)

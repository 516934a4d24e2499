import math

import pytest
import torch

from sdft_ray.core.similarity import angular_distances, choose_span, span_distances


def test_angular_distances_known_vectors_have_known_distances():
    states = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]])  # x(0)..x(3)
    d = angular_distances(states)[0]
    assert d[0, 1] == pytest.approx(0.0, abs=1e-7)
    assert d[0, 2] == pytest.approx(0.5)
    assert d[0, 3] == pytest.approx(1.0)


def test_angular_distances_matrix_equals_the_double_loop():
    torch.manual_seed(0)
    states = torch.randn(3, 6, 8)
    got = angular_distances(states)
    for b in range(3):
        for i in range(6):
            for j in range(6):
                x, y = states[b, i].tolist(), states[b, j].tolist()
                dot = sum(p * q for p, q in zip(x, y, strict=True))
                cos = dot / math.sqrt(sum(p * p for p in x) * sum(q * q for q in y))
                assert got[b, i, j] == pytest.approx(math.acos(max(-1, min(1, cos))) / math.pi, abs=1e-6)


def test_span_distances_of_a_size_are_the_entries_that_far_apart():
    matrix = torch.arange(25.0).reshape(1, 5, 5)
    assert span_distances(matrix, 2).tolist() == [[2.0, 8.0, 14.0]]  # (0,2), (1,3), (2,4)


def distances_with_best_at(start: int, size: int, rows: int = 20, blocks: int = 8) -> torch.Tensor:
    matrix = torch.full((rows, blocks + 1, blocks + 1), 0.5)
    matrix[:, start, start + size] = 0.1
    return matrix


@pytest.mark.parametrize("start", [0, 3, 6])
def test_choose_span_finds_the_least_distance_at_start_middle_and_end(start):
    choice = choose_span(distances_with_best_at(start, 2), 2)
    assert (choice.start, choice.stop, choice.agreement) == (start, start + 2, 1.0)
    assert choice.distance == pytest.approx(0.1)
    assert choice.runner_up not in (None, start)


def test_choose_span_near_tie_is_reported_as_unsure():
    torch.manual_seed(0)
    matrix = torch.full((16, 6, 6), 0.9)
    noise = torch.rand(16)
    matrix[:, 0, 2], matrix[:, 3, 5] = noise, noise.flip(0)
    choice = choose_span(matrix, 2)
    assert {choice.start, choice.runner_up} == {0, 3}
    assert 0.2 < choice.agreement < 0.9


def test_choose_span_is_the_same_every_time():
    torch.manual_seed(0)
    matrix = torch.rand(12, 7, 7)
    assert choose_span(matrix, 3) == choose_span(matrix, 3)

import math

import pytest
import torch

from sdft_ray.core.similarity import (
    angular_distances,
    choose,
    choose_blocks,
    choose_span,
    span_distances,
    span_influences,
)


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


def best(matrix: torch.Tensor, size: int, **options):
    return choose_span([span_distances(matrix, size)], size, **options)


@pytest.mark.parametrize("start", [0, 3, 6])
def test_choose_span_finds_the_least_cost_at_start_middle_and_end(start):
    choice = best(distances_with_best_at(start, 2), 2)
    assert (choice.blocks, choice.agreement) == ((start, start + 1), 1.0)
    assert choice.value == pytest.approx(0.1)
    assert choice.runner_up not in (None, choice.blocks)


def test_choose_span_near_tie_is_reported_as_unsure():
    torch.manual_seed(0)
    matrix = torch.full((16, 6, 6), 0.9)
    noise = torch.rand(16)
    matrix[:, 0, 2], matrix[:, 3, 5] = noise, noise.flip(0)
    choice = best(matrix, 2)
    assert {choice.blocks, choice.runner_up} == {(0, 1), (3, 4)}
    assert 0.2 < choice.agreement < 0.9


def test_choose_span_is_the_same_every_time():
    torch.manual_seed(0)
    matrix = torch.rand(12, 7, 7)
    assert best(matrix, 3) == best(matrix, 3)


@pytest.mark.parametrize(
    ("first", "last", "expected"), [(0, 0, (0, 1)), (1, 0, (6, 7)), (1, 1, (5, 6)), (0, 1, (0, 1))]
)
def test_choose_span_leaves_protected_blocks(first, last, expected):
    matrix = torch.full((4, 9, 9), 0.9)
    for start, distance in ((0, 0.1), (6, 0.2), (5, 0.3)):
        matrix[:, start, start + 2] = distance
    assert best(matrix, 2, first=first, last=last).blocks == expected


def test_choose_span_with_one_place_left_has_no_runner_up_and_is_sure():
    choice = best(torch.rand(5, 7, 7), 4, first=1, last=1)
    assert (choice.blocks, choice.runner_up, choice.agreement) == ((1, 2, 3, 4), None, 1.0)


def test_choose_span_counts_corpora_the_same_whatever_their_sizes():
    small, large = distances_with_best_at(1, 2, rows=2), distances_with_best_at(5, 2, rows=200)
    small[:, 1, 3] = 0.0  # 0.5 less than elsewhere, against 0.4 less
    assert choose_span([span_distances(small, 2), span_distances(large, 2)], 2).blocks == (1, 2)


def test_span_influences_are_the_sums_of_their_blocks():
    influences = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    assert span_influences(influences, 2).tolist() == [[3.0, 6.0, 12.0]]
    assert span_influences(influences, 1).tolist() == influences.tolist()


def test_choose_blocks_takes_the_least_influential_ones_anywhere():
    influences = torch.tensor([[0.0, 5.0, 1.0, 5.0, 2.0, 0.5]]).repeat(6, 1)
    choice = choose_blocks([influences], 3)
    assert (choice.blocks, choice.value, choice.runner_up, choice.agreement) == ((0, 2, 5), 1.5, (0, 4, 5), 1.0)
    assert choose_blocks([influences], 3, first=1, last=1).blocks == (1, 2, 4)


def test_choose_blocks_that_texts_disagree_on_is_reported_as_unsure():
    torch.manual_seed(0)
    choice = choose_blocks([torch.rand(8, 6)], 2)
    assert 0 < choice.agreement < 1


def test_choose_gives_the_alternative_of_least_cost():
    costs = torch.tensor([[3.0, 1.0, 2.0]]).repeat(4, 1)
    choice = choose([costs], [(0, 1), (4, 7), (2, 3)])
    assert (choice.blocks, choice.runner_up, choice.value, choice.agreement) == ((4, 7), (2, 3), 1.0, 1.0)

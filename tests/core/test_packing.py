import numpy as np
import pytest

from sdft_ray.core.packing import Schedule, assign_passes, in_passes, pack_rows
from sdft_ray.core.rows import TrainingRow


def test_pack_rows_places_targets_one_behind_their_position():
    packed = pack_rows([TrainingRow([5, 6, 7], 1), TrainingRow([8, 9], 1)])
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert packed.starts == [0, 3, 5]
    assert packed.keep.tolist() == [0, 1, 3]
    assert packed.targets.tolist() == [6, 7, 9]


def test_pack_rows_refuses_a_row_with_only_trained_tokens():
    with pytest.raises(AssertionError, match="tokens without"):
        pack_rows([TrainingRow([1, 2], 0)])
    with pytest.raises(AssertionError, match="tokens without"):
        pack_rows([TrainingRow([1, 2], 2)])


def test_schedule_takes_every_row_once_an_epoch():
    steps = Schedule(10, 3, 4, seed=0)
    order = [i for step in steps for i in step]
    assert [len(step) for step in steps] == [4] * 7 + [2]
    assert all(sorted(order[e * 10 : e * 10 + 10]) == list(range(10)) for e in range(3))
    assert order[:10] != order[10:20]


def test_schedule_is_a_function_of_its_seed():
    assert list(Schedule(10, 2, 4, seed=1)) == list(Schedule(10, 2, 4, seed=1)) != list(Schedule(10, 2, 4, seed=2))


def draw_at_once(rows: int, epochs: int, global_batch_size: int, seed: int) -> list[list[int]]:
    """Return the steps as lists, drawn all at once: trainings that were begun with this order must go on in it."""
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(rows) for epoch in range(epochs)])
    return [order[i : i + global_batch_size].tolist() for i in range(0, len(order), global_batch_size)]


@pytest.mark.parametrize(
    "size", [(1, 1, 1), (3, 7, 8), (10, 3, 4), (12, 2, 6), (700, 2, 16), (300, 3, 299), (70_000, 2, 64)]
)
@pytest.mark.parametrize("seed", [0, 7])
def test_schedule_drawn_by_the_step_is_the_one_drawn_at_once(size, seed):
    steps, expected = Schedule(*size, seed), draw_at_once(*size, seed)
    assert list(steps) == expected
    assert (len(steps), steps[len(steps) - 1], steps[:2]) == (len(expected), expected[-1], expected[:2])
    with pytest.raises(IndexError):
        steps[len(steps)]


@pytest.mark.parametrize(("workers", "micro_batch"), [(1, 8), (2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("size", [1, 7, 8])
def test_assign_passes_covers_the_step_once_with_equally_many_passes(workers, micro_batch, size):
    lengths = [3 + i * 5 % 11 for i in range(size)]
    assigned = assign_passes(lengths, workers, micro_batch, pass_tokens=20)
    assert len({len(passes) for passes in assigned}) == 1
    assert sorted(i for passes in assigned for rows in passes for i in rows) == list(range(size))
    assert all(len(rows) <= micro_batch for passes in assigned for rows in passes)
    assert all(sum(lengths[i] for i in rows) <= 20 for passes in assigned for rows in passes)


def test_assign_passes_needs_no_more_passes_than_best_fit():
    # Taking rows as they come would leave 6 + 3, 5 + 2, 4 apart: three passes of ten tokens where two do.
    assert [len(passes) for passes in assign_passes([6, 5, 4, 3, 2], 1, 5, pass_tokens=10)] == [2]


def test_assign_passes_gives_workers_equal_shares():
    lengths = [100, 1, 90, 2, 80, 3, 70, 4]
    loads = [sum(lengths[i] for rows in passes for i in rows) for passes in assign_passes(lengths, 2, 8, 10_000)]
    assert max(loads) - min(loads) < 30


@pytest.mark.parametrize(
    ("most", "expected"), [(0, [[3], [4], [9], [1]]), (8, [[3, 4], [9], [1]]), (99, [[3, 4, 9, 1]])]
)
def test_rows_in_passes_keep_their_order_and_fill_them(most, expected):
    rows = [TrainingRow([0] * length, 1) for length in (3, 4, 9, 1)]
    assert [[len(row.ids) for row in some] for some in in_passes(rows, most)] == expected

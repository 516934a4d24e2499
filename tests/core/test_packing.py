import pytest
import torch
from tiny import make_tokenizer

from sdft_ray.core.packing import pack_rows, schedule, share_of
from sdft_ray.core.prompts import TrainingRow, encode_row


def test_pack_rows_places_targets_one_behind_their_position():
    packed = pack_rows([TrainingRow([5, 6, 7], 1), TrainingRow([8, 9], 1)])
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert packed.keep.tolist() == [0, 1, 3]
    assert packed.targets.tolist() == [6, 7, 9]


def test_pack_rows_losses_equal_those_of_the_rows_alone(tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    tokenizer = make_tokenizer()
    rows = [encode_row(tokenizer, f"What is {i}?", "It is " + "so " * i + str(i)) for i in range(5)]

    def losses(packed):
        with torch.no_grad():
            logits = model(
                input_ids=packed.input_ids,
                position_ids=packed.position_ids,
                logits_to_keep=packed.keep,
                use_cache=False,
            ).logits[0]
        return torch.nn.functional.cross_entropy(logits, packed.targets, reduction="none")

    alone = torch.cat([losses(pack_rows([row])) for row in rows])
    assert torch.allclose(losses(pack_rows(rows)), alone, atol=1e-5)
    # Without restarted positions rows do see each other: the test above can fail.
    packed = pack_rows(rows)
    packed.position_ids.copy_(torch.arange(packed.input_ids.shape[1])[None])
    assert not torch.allclose(losses(packed), alone, atol=1e-3)


def test_pack_rows_refuses_a_row_with_only_trained_tokens():
    with pytest.raises(AssertionError, match="tokens without"):
        pack_rows([TrainingRow([1, 2], 0)])
    with pytest.raises(AssertionError, match="tokens without"):
        pack_rows([TrainingRow([1, 2], 2)])


def test_schedule_takes_every_row_once_an_epoch():
    steps = schedule(10, 3, 4, seed=0)
    order = [i for step in steps for i in step]
    assert [len(step) for step in steps] == [4] * 7 + [2]
    assert all(sorted(order[e * 10 : e * 10 + 10]) == list(range(10)) for e in range(3))
    assert order[:10] != order[10:20]


def test_schedule_is_a_function_of_its_seed():
    assert schedule(10, 2, 4, seed=1) == schedule(10, 2, 4, seed=1) != schedule(10, 2, 4, seed=2)


@pytest.mark.parametrize(("workers", "micro_batch"), [(1, 8), (2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("size", [1, 7, 8])
def test_share_of_covers_the_step_once_with_equal_rounds(workers, micro_batch, size):
    shares = [share_of(range(size), worker, workers, micro_batch) for worker in range(workers)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for group in share for i in group) == list(range(size))
    assert all(len(group) <= micro_batch for share in shares for group in share)

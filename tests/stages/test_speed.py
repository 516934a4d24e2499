import torch
from tiny import make_tiny_model

from sdft_ray.stages import speed

torch.set_num_threads(1)


def test_measure_tells_both_speeds_and_the_range_of_their_ratio(tiny_model, tmp_path):
    pruned = make_tiny_model(tmp_path / "pruned", num_hidden_layers=1)
    settings = speed.Settings(dtype="float32", prompt_tokens=128, new_tokens=8, runs=3)
    found = speed.measure(lambda: tiny_model, lambda: pruned, settings, "cpu")
    assert set(found.plain()) == {"prefill", "decode"}
    for pace in (found.prefill, found.decode):
        assert pace.base_tokens_per_second > 0 and pace.pruned_tokens_per_second > 0
        assert pace.ratio_min <= pace.ratio <= pace.ratio_max
    assert found.decode.ratio > 1, "one block is faster than six"

"""Prompt lookup in real vLLM: the texts are the teacher's own, whatever is proposed; and a row that is refused."""

import pytest

from sdft_ray.engine import Request, VllmEngine
from sdft_ray.errors import UserError
from sdft_ray.spec.compute import EngineOptions
from sdft_ray.spec.recipe import Distill
from sdft_ray.spec.wording import validate

SETTINGS = {"temperature": 0.0, "max_new_tokens": 24, "dtype": "float32"}


def test_lookup_leaves_greedy_text_temperature_and_refusals_as_they_are(ray_cluster, tiny_model):
    import ray

    def generate(*of) -> list[dict[str, str]]:
        """Return the texts of each of some settings, by request."""
        prompt = [*range(5, 25)] * 3
        requests = [Request(str(i), 0, prompt[i:], sampling_seed=i) for i in range(6)]
        requests.insert(2, Request("long", 0, prompt * 3, sampling_seed=9))  # than the context
        engines = [VllmEngine(str(tiny_model), validate(Distill, settings), options, alone=True) for settings in of]
        return [{request.id: made for request, made in engine.generate(requests)} for engine in engines]

    options = EngineOptions(kv_cache_gib=0.1, max_num_seqs=8, max_model_len=128)
    looked_up = SETTINGS | {"lookup": {"tokens": 3, "min": 1, "max": 3}}
    # The lowest temperature of vLLM: a token that is not the likeliest is drawn only where two nearly tie.
    cold = looked_up | {"temperature": 0.01, "top_p": 1.0}
    work = ray.remote(max_calls=1)(generate)
    # After an engine with a lookup none starts in the same process (docs/footguns.md).
    (alone, *others), (last,) = ray.get([work.remote(SETTINGS, looked_up), work.remote(cold)])
    refused = [made.pop("long") for made in (alone, *others, last)]
    assert all(each.finish_reason == "error" and "context length is 128" in each.text for each in refused)
    plain, greedy, sampled = ({id: each.text for id, each in made.items()} for made in (alone, *others, last))
    assert len({*plain.values()}) > 1
    assert greedy == plain
    assert sum(sampled[request] == text for request, text in plain.items()) >= 4, "of 6; a lost temperature leaves none"


def test_lookup_of_an_endpoint_or_an_empty_range_is_refused():
    with pytest.raises(UserError, match=r"lookup: the endpoint proposes .* Remove lookup"):
        validate(Distill, {"lookup": {}, "teacher": {"endpoint": "http://127.0.0.1:1/v1", "model": "some/one"}})
    with pytest.raises(UserError, match=r"min: 6 is above max\. Lower it to 5"):
        validate(Distill, {"lookup": {"min": 6}})

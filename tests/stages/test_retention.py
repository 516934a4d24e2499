"""Retention on tiny models: what is measured, against whole logits in float64; and on what."""

import json
import math

import pytest
import torch
from architectures import load, prune
from tiny import make_tiny_model

from sdft_ray.core.retention import Probe
from sdft_ray.core.rows import PLAIN, Row
from sdft_ray.data.chat import encode_row, render_prompt
from sdft_ray.stages import probes, retention

torch.set_num_threads(1)

SCALED = ("llama", "gemma2", "cohere", "granite")  # the last three cap or scale their logits
PROBES = [Probe("text", "0", list(range(5, 40)), 1), Probe("reference", "1", [*range(9, 30), 7, 9], 12, 20)]


def logits_of(model, ids):
    with torch.inference_mode():
        return model.double()(torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("architecture", SCALED)
def test_retention_is_that_of_whole_logits_in_float64_whatever_the_pieces(architecture, tmp_path):
    base = make_tiny_model(tmp_path / "base", architecture)
    cut = prune(base, tmp_path / "cut", (2, 3))
    models = load(base), load(cut)
    forward = models[0].model.forward
    found = {size: [retention.compare_models(*models, probe, size) for probe in PROBES] for size in (1, 1000, 2**25)}
    assert models[0].model.forward == forward, "the model is itself again"
    for place, probe in enumerate(PROBES):
        seen = slice(probe.first - 1, len(probe.ids) - 1)
        p, q = (torch.distributions.Categorical(logits=logits_of(load(each), probe.ids)[seen]) for each in (base, cut))
        targets = torch.tensor(probe.ids[probe.first :])
        for sums in (each[place] for each in found.values()):
            assert sums.kl == pytest.approx(float(torch.distributions.kl_divergence(p, q).sum()), rel=1e-4)
            assert sums.nll == pytest.approx(-float(q.log_prob(targets).sum()), rel=1e-4)
            pairs = zip(p.probs.tolist(), q.probs.tolist(), strict=True)
            assert sums.agreed == sum(a.index(max(a)) == b.index(max(b)) for a, b in pairs)


def test_retention_of_the_base_itself_is_nothing_lost(tiny_model):
    alone, seconds = retention.measure(lambda: tiny_model, None, PROBES, "float32", "cpu")
    again, _ = retention.measure(lambda: tiny_model, lambda: tiny_model, PROBES, "float32", "cpu")
    assert alone == again and seconds >= 0
    assert [(each.kl, each.agreed, each.tokens) for each in alone] == [(0.0, 34, 34), (0.0, 11, 11)]
    summary = retention.summarise(alone, seconds=1.5)
    assert summary.responses is None and summary.seconds == 1.5
    assert (summary.texts.kl.value, summary.texts.agreement.value) == (0.0, 1.0)
    assert summary.bits_per_byte.value == pytest.approx(alone[1].nll / math.log(2) / 20)
    assert list(summary.figures) == ["kl_texts", "agreement_texts", "bits_per_byte"]
    assert "responses" not in summary.plain() and json.dumps(summary.plain())


def test_difference_of_two_models_is_paired_text_by_text():
    texts = [retention.Measured("text", str(i), 0, 10, 5.0 + i, 5, 30.0) for i in range(20)]
    worse = [each._replace(kl=each.kl + 1, agreed=4) for each in texts]
    figures = retention.summarise(retention.subtract(worse, texts)).figures
    assert {name: (each.low, each.value, each.high) for name, each in figures.items()} == {
        "kl_texts": pytest.approx((0.1,) * 3), "agreement_texts": pytest.approx((-0.1,) * 3)
    }  # fmt: skip
    with pytest.raises(AssertionError, match="other probes"):
        retention.subtract(worse, texts[::-1])


@pytest.fixture
def settings():
    texts = {"sha256": "0" * 64, "field": "text", "skip": 40, "limit": 2, "max_tokens": 6, "path": "x.txt"}
    return probes.Settings(dtype="float32", rows=9, max_new_tokens=5, texts=probes.FurtherTexts(**texts))


CALL = json.dumps({"messages": [{"role": "user", "content": "Call."}], "calls": [{"function": {"name": "look"}}]})
ROWS = [
    Row("What is 2 + 2?", "It is é.", "4", id="sum"),
    Row("", "A plain text.", conversation=PLAIN, id="plain"),
]


def test_probes_are_the_bases_greedy_responses_the_references_and_texts_cut_to_their_length(tiny_model, settings):
    from transformers import AutoTokenizer

    made, _ = probes.make_probes(lambda: tiny_model, settings, ROWS, ["A text of ten.", "B", "Text"], 4, "cpu")
    kinds = [(probe.kind, probe.id) for probe in made]
    assert kinds == [
        *(("response", "sum"), ("reference", "sum"), ("reference", "plain"), ("text", "40"), ("text", "42"))
    ], "a text of one token has nothing to predict"
    by = {(probe.kind, probe.id): probe for probe in made}
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), load(tiny_model)
    prompt = render_prompt(tokenizer, "What is 2 + 2?")
    response = by["response", "sum"]
    assert response.ids[: response.first] == prompt and len(prompt) < len(response.ids) <= len(prompt) + 5
    for place in range(len(prompt), len(response.ids)):
        assert response.ids[place] == int(logits_of(model, response.ids[:place])[-1].argmax())
    reference = by["reference", "sum"]
    assert reference.ids == encode_row(tokenizer, "What is 2 + 2?", "It is é.").ids[:-1]
    assert tokenizer.decode(reference.ids[reference.first :]) == "It is é." and reference.bytes == 9
    assert tokenizer.decode(by["reference", "plain"].ids).endswith("A plain text.")
    assert tokenizer.decode(by["text", "40"].ids) == "A text" and by["text", "40"].first == 1


def test_probes_of_nothing_but_texts_load_no_weights(settings, tmp_path, tiny_model):
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).symlink_to(file)
    made, _ = probes.make_probes(lambda: tmp_path, settings, [], ["A text"], 4, "cpu")
    assert [(probe.kind, len(probe.ids)) for probe in made] == [("text", 6)]

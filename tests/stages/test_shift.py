"""The shift between references and rewrites: which rows it is measured on, and that the measure is the usual loss."""

import random

import pytest
import torch

from sdft_ray.stages import shift

torch.set_num_threads(1)

ROWS = [
    {
        "id": f"{i:016x}",
        "prompt": f"What is {i}?",
        "reference": f"It is {i}." * (1 + i % 3),
        "response": f"{i}, simply.",
    }
    for i in range(40)
]


def test_sample_depends_on_the_rows_and_not_on_their_order():
    picked = []
    for order in (ROWS, random.Random(0).sample(ROWS, len(ROWS))):
        sample = shift.Sample(5, seed=0)
        for row in order:
            sample.offer(row)
        picked.append(sample.rows)
    assert picked[0] == picked[1] and len(picked[0]) == 5
    fewer = shift.Sample(3, seed=0)
    for row in ROWS:
        fewer.offer(row)
    assert fewer.rows == picked[0][:3]


def test_measure_equals_the_models_own_loss_row_by_row(tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = shift.measure(lambda: tiny_model, "float32", "cpu", ROWS)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    for name, column in (("reference", "reference"), ("distilled", "response")):
        total = tokens = 0
        for row in ROWS:
            prompt = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
            before = len(tokenizer(prompt)["input_ids"])
            ids = torch.tensor([tokenizer(f"{prompt}{row[column]}<|im_end|>")["input_ids"]])
            labels = ids.clone()
            labels[0, :before] = -100
            with torch.inference_mode():
                loss = model(input_ids=ids, labels=labels).loss.item()
            total += loss * (ids.shape[1] - before)
            tokens += ids.shape[1] - before
        assert found[name]["nll_per_token"] == pytest.approx(total / tokens, abs=1e-4)
        assert found[name]["mean_tokens"] == tokens / len(ROWS)

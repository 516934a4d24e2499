"""TRL's SFTTrainer as the other side of benchmarks/train.py, in an environment of its own.

In: a JSON file with model, rows, settings; then a line on stdin for each run that is asked for. Out: a line of JSON
with the setting that was the fastest on a CPU, then the seconds of each run. It imports nothing of sdft_ray, so TRL may
have whatever versions it likes. Model, optimizer and data loader stand before the clock starts.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

SETTINGS: tuple[dict[str, Any], ...] = (
    {"micro_batch": 4, "padding_free": False},
    {"micro_batch": 2, "padding_free": False},
    {"micro_batch": 4, "padding_free": True},
)


class Clock(TrainerCallback):
    """Seconds from the first step's begin to the last step's end."""

    begun = ended = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun = self.begun or time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ended = time.perf_counter()


def main() -> None:
    """Choose a setting, print it, then train as often as asked."""
    import logging

    import transformers

    given = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(given["threads"])
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    answers, sys.stdout = sys.stdout, sys.stderr  # where the trainer prints, too
    train(given, given["steps"][:1], SETTINGS[0])  # to warm up
    tried = [setting | {"seconds": round(train(given, given["steps"][:1], setting), 2)} for setting in SETTINGS]
    best = min(tried, key=lambda setting: setting["seconds"])
    print(json.dumps({"best": best, "tried": tried}), file=answers, flush=True)
    for _ in sys.stdin:
        print(train(given, given["steps"], best), file=answers, flush=True)


def train(given: dict[str, Any], steps: list[list[dict[str, Any]]], setting: dict[str, Any]) -> float:
    """Return the seconds that some optimizer steps take; each step's rows are sorted by length, so padding is least."""
    rows = [row for step in steps for row in sorted(step, key=lambda row: len(row["input_ids"]))]
    model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            max_length=None,
            per_device_train_batch_size=setting["micro_batch"],
            gradient_accumulation_steps=len(steps[0]) // setting["micro_batch"],
            padding_free=setting["padding_free"],
            max_steps=len(steps),
            train_sampling_strategy="sequential",
            optim="adamw_torch",
            learning_rate=1e-4,
            max_grad_norm=1.0,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **given["lora"])
        clock = Clock()
        SFTTrainer(
            model,
            config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(given["model"]),
            peft_config=lora,
            callbacks=[clock],
        ).train()
    return clock.ended - clock.begun


if __name__ == "__main__":
    main()

"""What workers leave behind of a training: shares of its weights, its time, and its teacher's likeliest tokens."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sdft_ray.core.rows import TrainingRow
from sdft_ray.core.soft_targets import Likeliest
from sdft_ray.results import Step
from sdft_ray.stages.train import state, worker
from sdft_ray.stages.train.encoded import EncodedRow, EncodedRows, write_shard
from sdft_ray.stages.train.likeliest import LikeliestTokens, sum_probabilities, write_likeliest
from sdft_ray.stages.train.state import LOGITS, PROGRESS, Checkpoint, share_file
from sdft_ray.stages.train.tuned import load_tuned


def test_load_tuned_reads_the_shares_of_the_last_workers_alone(tmp_path):
    model = torch.nn.Linear(2, 2)
    weight, bias = torch.eye(2), torch.ones(2)
    save_file({"weight": weight, "bias": bias, LOGITS: torch.zeros(1, 3)}, share_file(tmp_path, 0))
    save_file({"bias": bias + 1}, share_file(tmp_path, 1))  # of a worker that was lost while all wrote
    assert load_tuned(model, tmp_path, 1).shape == (1, 3)
    assert torch.equal(model.weight, weight) and torch.equal(model.bias, bias)
    save_file({"weight": weight, LOGITS: torch.zeros(1, 3)}, share_file(tmp_path, 0))
    load_tuned(model, tmp_path, 2)
    assert torch.equal(model.bias, bias + 1)


@pytest.fixture
def one_worker(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_resume_knows_the_seconds_of_the_steps_before(one_worker, tmp_path, monkeypatch):
    monkeypatch.setattr(state, "load_state", lambda _engine, folder, steps: {folder.name: torch.tensor(steps)})
    assert worker._resume(None, tmp_path, 0, lambda _: None) == ([], 0.0, {})
    history = tuple(Step(step=i, loss=1.0, lr=0.1, grad_norm=1.0) for i in (1, 2))
    for name, steps, seconds in (("checkpoint_a", 1, 12.5), ("checkpoint_b", 2, 20.25)):
        folder = tmp_path / "ray_train" / name
        folder.mkdir(parents=True)
        save_file({"weight/x": torch.ones(1)}, folder / "state-00000.safetensors")
        Checkpoint(stage="1", workers=1, history=history[:steps], seconds=seconds).to_file(folder / PROGRESS)
    assert worker._resume(None, tmp_path, 0, lambda _: None) == ([*history], 20.25, {"checkpoint_b": torch.tensor(2)})


def test_likeliest_tokens_are_summed_and_read_without_a_file_in_memory(tmp_path):
    random = np.random.default_rng(0)
    tokens, k = 40_000, 32
    log_probs = np.log(random.dirichlet(np.ones(k + 1), tokens)[:, :k]).astype(np.float32)
    ids = random.integers(0, 300, (tokens, k))
    write_shard(tmp_path, "train", 0, [EncodedRow(TrainingRow([1] * (tokens // 4 + 2), 2), i, 0, 9) for i in range(4)])
    part = Likeliest(torch.from_numpy(ids), torch.from_numpy(log_probs))
    _, file = write_likeliest(tmp_path, "train-00000", [part], (tokens, k), 300)
    tracemalloc.start()
    total = sum_probabilities(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == pytest.approx(np.exp(log_probs.astype(np.float64)).sum(), rel=1e-12)
    assert peak < 8 * 1.1 * 2**20 < 8 * tokens * k
    rows = EncodedRows(tmp_path, "train", LikeliestTokens(tmp_path, "train"))
    for i in range(4):
        own = slice(i * tokens // 4, (i + 1) * tokens // 4)
        assert np.array_equal(rows[i].likeliest.ids, ids[own])
        assert np.array_equal(rows[i].likeliest.log_probs, log_probs[own])
    assert resident(tmp_path, "tokens.npy") + resident(tmp_path, "log_probs.npy") == 0


def resident(folder, end: str) -> int:
    """Return how many kB of mapped files with an end of name this process holds."""
    held, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            inside = str(folder) in line and line.endswith(end)
        elif inside and line.startswith("Rss:"):
            held += int(line.split()[1])
    return held

"""The command as a process of its own that can be killed: a tiny model, sums, and a fake where the engine would be."""

import contextlib
import json
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from command import Command

SCRIPT = textwrap.dedent(
    """
    import sys, time
    from sdft_ray import cli
    from sdft_ray.store import lease
    from sdft_ray.core.selection import Generation

    class FakeEngine:
        def __init__(self, model, settings, options, alone):
            pass

        def generate(self, requests):
            for request in requests:
                with open(ASKED, "a") as asked:
                    asked.write(request.id + "\\n")
                time.sleep(SECONDS_A_ROW)
                yield request, Generation(f"seed {request.sampling_seed}", "stop", len(request.prompt_ids), 2)

    lease.BEAT_SECONDS, lease.EXPIRE_SECONDS = 0.5, 8.0
    sys.exit(cli.main(sys.argv[1:], engine=FakeEngine))
    """
)


def make_folder(
    folder: Path, model: Path, compute: dict[str, Any], rows: int = 48, seconds_a_row: float = 0.1, **sections: Any
) -> Path:
    """Write recipe.yaml, compute.yaml, what they need and the command into a folder; sections replace the recipe's."""
    sums = [{"q": f"What is {i} + {i}?", "a": f"{i} + {i} = {2 * i}"} for i in range(rows + 5)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    (folder / "texts.txt").write_text("One text.\n\nAnother text.\n\nA third text.")
    fields = {"prompt": "q", "response": "a"}
    recipe = {
        "model": {"path": str(model)},
        "rows": {"path": "sums.jsonl", "fields": fields, "held_out": 1, "validation": 4, "answer": "none"},
        "prune": {"blocks": 2, "metric": "angular", "candidates": 0, "calibration": {"text": "texts.txt", "limit": 3}},
        "distill": {"shift_rows": 0},
        "evaluate": {"tasks": ["arc_easy"], "limit": 20, "dtype": "float32"},
        **sections,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "compute.yaml").write_text(yaml.safe_dump(compute))
    asked = repr(str(folder / "asked.txt"))
    (folder / "script.py").write_text(SCRIPT.replace("SECONDS_A_ROW", str(seconds_a_row)).replace("ASKED", asked))
    return folder


def count_asked(folder: Path) -> int:
    """Return how often engines were asked for a row."""
    return len((folder / "asked.txt").read_text().splitlines())


def start(folder: Path, *arguments: str, **environment: str) -> Command:
    """Return `sdft ARGUMENTS --compute compute.yaml` at work in the folder."""
    environment["PYTHONPATH"] = str(Path.cwd())
    return Command(*arguments, "--compute", "compute.yaml", cwd=folder, script=folder / "script.py", **environment)


def wait_for(process: Command, there: Callable[[], Any]) -> None:
    """Return once something is there, which must be while the process lives."""
    while not there():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
            raise AssertionError(f"it ended before: {process.communicate()[1]}")


def kill(process: Command) -> None:
    process.kill()
    process.communicate()


def fill_disk(folder: Path) -> Path:
    """Write a file until the file system has no room left; return it."""
    with contextlib.suppress(OSError), (folder / "fill").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return folder / "fill"


def finish(process: Command) -> str:
    """Return what a process that succeeds has told people."""
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return errors


def outcome(root: Path) -> dict[str, Any]:
    """Return what must not depend on what died: ids, rows with seeds and text, and the losses of every step."""
    (distilled,) = (root / "distill").iterdir()
    (tuned,) = (root / "train").iterdir()
    return {
        "ids": (distilled.name, tuned.name),
        "rows": pq.read_table(distilled / "train.parquet").to_pylist(),
        "losses": json.loads((tuned / "losses.json").read_text()),
    }


def require_same(again: dict[str, Any], alone: dict[str, Any]) -> None:
    """Assert that two outcomes differ by no more than the rounding of losses."""
    assert again["ids"] == alone["ids"]
    assert again["rows"] == alone["rows"]
    assert [step["step"] for step in again["losses"]] == [step["step"] for step in alone["losses"]]
    for got, expected in zip(again["losses"], alone["losses"], strict=True):
        assert got == pytest.approx(expected, abs=1e-6)

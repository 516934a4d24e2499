"""No stage is silent: a line comes by itself, whatever the stage does."""

import io
import pickle
import sys
import time
from collections.abc import Callable

import pytest

from sdft_ray import progress
from sdft_ray.progress import Progress, log


@pytest.fixture
def wait_for(monkeypatch, capsys) -> Callable[[int], list[str]]:
    """Return what waits for so many lines on standard error; progress is shown without a pause."""
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.01)

    def wait(count: int) -> list[str]:
        lines: list[str] = []
        give_up = time.monotonic() + 30
        while len(lines) < count and time.monotonic() < give_up:
            lines += capsys.readouterr().err.splitlines()
        return lines

    return wait


def test_results_on_a_terminal_without_a_character_have_a_question_mark(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    progress.open_console(80).print("80.0 ±1.0")
    sys.stdout.flush()
    assert raw.getvalue() == b"80.0 ?1.0\n"


def test_progress_of_a_stage_that_counts_nothing_is_shown_by_itself(wait_for):
    with Progress("loss"):
        assert wait_for(2)[0] == "loss: 0s"


def test_progress_names_the_phase_until_something_is_counted(wait_for):
    with Progress("train", "steps", total=9) as shown:
        shown.enter("starting the workers")
        assert wait_for(2)[-1].startswith("train: 0/9 steps, starting the workers, ")  # a first line may be from before
        shown.update(3, "loss 1.2")
        assert shown.line().startswith("train: 3/9 steps, ") and shown.line().endswith(" left, loss 1.2")


def test_progress_keeps_quiet_while_others_write(capsys):
    with Progress("score"):
        log("model: 3s")
    assert capsys.readouterr().err == "model: 3s\n"


def test_progress_says_what_an_earlier_run_finished(capsys):
    shown = Progress("distill", "rows")
    shown.begin(288, done=100)
    assert capsys.readouterr().err == "distill: 100 of 288 rows are done already\n"
    assert shown.line() == "distill: 100/288 rows, 0s"


def test_progress_can_be_written_down_while_it_is_shown(capsys):
    with Progress("sweep", "trials", total=3) as shown:
        assert pickle.loads(pickle.dumps(shown)).line() == "sweep: 0/3 trials, 0s"

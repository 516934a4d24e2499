"""What README and guide show to type exists and is understood."""

import re
import shlex
from pathlib import Path

import pytest

from sdft_ray import cli

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text() + (ROOT / "docs" / "guide.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
LINES = [line.partition("  #")[0].partition(" > ")[0].strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = [shlex.split(line) for line in LINES if line.startswith("sdft ")]


def test_readme_shows_every_command():
    assert {words[1] for words in COMMANDS} == {
        *("check", "run", "sweep", "submit", "report", "verify", "doctor", "show", "diff", "init", "explain", "schema"),
        *("push", "export", "completion"),
    }


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_readme_commands_are_understood_and_their_files_exist(words):
    options = cli._parser().parse_args(words[1:])
    assert callable(options.command)
    for word in words:
        assert not word.startswith("configs/") or (ROOT / word).is_file()


def test_readme_make_targets_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [line.split()[1] for line in LINES if line.startswith("make ")]
    assert named == ["demo", "test"]
    assert set(named) <= set(targets)


def test_readme_job_is_the_command_run():
    (line,) = [line for line in LINES if line.startswith("ray job submit")]
    words = shlex.split(line)
    script = words[words.index("python") + 1]
    assert (ROOT / script).is_file()
    assert cli._parser().parse_args(["run", *words[words.index(script) + 1 :]]).root == "/shared/artifacts"

"""Completion scripts, asked as the shells ask them."""

import shutil
import subprocess

import pytest

from sdft_ray import cli, completion


def script(shell: str) -> str:
    return completion.render(shell, cli._parser().parse_args(["schema"]).parsers)


def ask(shell: str, code: str) -> list[str]:
    """Return the words that a shell prints."""
    if not (path := shutil.which(shell)):
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ch"], ["check"]),
        (["run", "--co"], ["--compute"]),
        (["run", "recipe.yaml", "--u"], ["--until"]),
        (["schema", ""], ["recipe", "compute", "sweep"]),
        (["completion", "z"], ["zsh"]),
        (["run", ""], []),  # bash itself completes files
    ],
)
def test_completion_in_bash(words, expected):
    typed = " ".join(f"'{word}'" for word in ["sdft", *words])
    code = f'{script("bash")}\nCOMP_WORDS=({typed}); COMP_CWORD={len(words)}; _sdft; echo "${{COMPREPLY[@]}}"'
    assert ask("bash", code) == expected


def test_completion_in_fish():
    code = f"{script('fish')}\ncomplete -C 'sdft sche'; complete -C 'sdft schema co'; complete -C 'sdft run --unt'"
    words = ask("fish", code)
    assert {"schema", "compute", "--until"} <= {*words} and "sweep" not in words[: words.index("compute")]


def test_completion_in_zsh_is_a_script_that_zsh_reads():
    assert ask("zsh", f"compdef() {{ echo $1 $2 }}\n{script('zsh')}") == ["_sdft", "sdft"]


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completion_knows_every_command_and_option(shell):
    text = script(shell)
    for name, parser in cli._parser().parse_args(["schema"]).parsers.items():
        assert name in text
        for action in parser._actions:
            for option in action.option_strings:
                assert option in text or f"-l {option.lstrip('-')}" in text or option == "-h"

"""Completion of `sdft` in bash, zsh and fish: commands, options and choices; anything else completes as a file.

In: the parsers of the commands. Out: a script for one shell, which runs nothing of this package: a completion that
started Python would be slower than typing.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

Parsers = Mapping[str, argparse.ArgumentParser]


class _Option(NamedTuple):
    name: str
    help: str
    value: bool
    """Whether one follows."""


class _Command(NamedTuple):
    name: str
    help: str
    options: tuple[_Option, ...]
    choices: tuple[str, ...]
    """Of its argument; none where that is a file or a name."""


def render(shell: str, parsers: Parsers) -> str:
    """Return the script for a shell of SHELLS."""
    return SHELLS[shell]([_describe(name, parser) for name, parser in parsers.items()])


def _describe(name: str, parser: argparse.ArgumentParser) -> _Command:
    options, choices = [], []
    for action in parser._actions:
        text = (action.help or "") % {"default": action.default, "prog": parser.prog}
        if action.option_strings:
            options.append(_Option(action.option_strings[-1], text, action.nargs != 0))
        else:
            choices += list(map(str, action.choices or ()))
    return _Command(name, parser.description or "", tuple(options), tuple(choices))


def _for_bash(commands: Iterable[_Command]) -> str:
    commands = list(commands)
    cases = [
        f'    {one.name}) options="{" ".join(o.name for o in one.options)}"; choices="{" ".join(one.choices)}" ;;'
        for one in commands
    ]
    return "\n".join(
        [
            "_sdft() {",
            '  local word="${COMP_WORDS[COMP_CWORD]}" options="" choices=""',
            '  case "$COMP_CWORD:${COMP_WORDS[1]}" in',
            f'    1:*) choices="{" ".join(one.name for one in commands)}" ;;',
            *(case.replace("    ", "    *:", 1) for case in cases),
            "  esac",
            '  [[ "$word" == -* ]] && choices="$options"',
            '  COMPREPLY=($(compgen -W "$choices" -- "$word"))',
            "}",
            "complete -o default -F _sdft sdft",
            "",
        ]
    )


def _for_zsh(commands: Iterable[_Command]) -> str:
    commands = list(commands)
    names = " ".join(shlex.quote(f"{one.name}:{_zsh_text(one.help)}") for one in commands)
    cases = []
    for one in commands:
        specs = [shlex.quote(f"{o.name}[{_zsh_text(o.help)}]{':value:_files' * o.value}") for o in one.options]
        rest = f"({' '.join(one.choices)})" if one.choices else "_files"
        cases.append(f"    {one.name}) _arguments {' '.join(specs)} '*:argument:{rest}' ;;")
    return "\n".join(
        [
            "#compdef sdft",
            "_sdft() {",
            f"  local -a commands=({names})",
            "  if (( CURRENT == 2 )); then _describe command commands; return; fi",
            "  shift words; (( CURRENT-- ))",
            '  case "$words[1]" in',
            *cases,
            "  esac",
            "}",
            '[[ "$funcstack[1]" == _sdft ]] && _sdft "$@" || compdef _sdft sdft',
            "",
        ]
    )


def _zsh_text(text: str) -> str:
    return re.sub(r"([\[\]:\\])", r"\\\1", text)


def _for_fish(commands: Iterable[_Command]) -> str:
    lines = []
    for one in commands:
        inside = f"-n '__fish_seen_subcommand_from {one.name}'"
        lines.append(f"complete -c sdft -n __fish_use_subcommand -f -a {one.name} -d {_fish(one.help)}")
        for option in one.options:
            value = " -r" if option.value else ""
            lines.append(f"complete -c sdft {inside} -l {option.name.lstrip('-')}{value} -d {_fish(option.help)}")
        if one.choices:
            lines.append(f"complete -c sdft {inside} -f -a '{' '.join(one.choices)}'")
    return "\n".join([*lines, ""])


def _fish(text: str) -> str:
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{quoted}'"


SHELLS: dict[str, Callable[[Iterable[_Command]], str]] = {"bash": _for_bash, "zsh": _for_zsh, "fish": _for_fish}

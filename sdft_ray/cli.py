"""The command `sdft`: check, run, sweep, submit, report, verify, doctor, show, diff, push, export, init, explain,
schema, completion.

In: arguments. Out: results on stdout, progress on stderr, exit code 0 (done), 1 (a stage failed) or 2 (bad recipe or
usage). Nothing heavy is imported at the top: `sdft --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sdft_ray import commands, environment, inspection
from sdft_ray.errors import StageFailed, UserError, nearest, problem
from sdft_ray.publish import commands as publishing

if TYPE_CHECKING:
    from sdft_ray.engine import EngineFactory

Action = Callable[[argparse.Namespace], int | None]


def main(arguments: Sequence[str] | None = None, engine: EngineFactory | None = None) -> int:
    """Run one command and return the exit code of the process; `engine` replaces vLLM's."""
    environment.for_command()
    options, unknown = _parser().parse_known_args(arguments)
    if unknown:
        options.parsers[options.name].refuse(unknown)
    options.engine = engine
    code = 130

    def end(number: int, frame: Any) -> None:
        """End as Ctrl-C does, for Kubernetes, Slurm and `ray job stop`."""
        nonlocal code
        code = 128 + number
        on_interrupt = signal.getsignal(signal.SIGINT)  # Ray Train has its own
        if callable(on_interrupt):
            on_interrupt(number, frame)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    try:
        done = options.command(options) or 0
        sys.stdout.flush()
        return done
    except (UserError, StageFailed) as error:
        from sdft_ray.data.copies import name_addresses

        print(name_addresses(str(error)), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries once more as it ends
        return 1
    except OSError as error:  # a disk that is full or not there, a file where a directory should be
        where = error.filename or "the disk"
        print(problem(str(where), error.strerror or str(error), "Fix this; finished work is kept"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped. Finished work is kept; the same command goes on from there.", file=sys.stderr)
        return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print a usage mistake as one line, with the nearest command or word."""
        what, _, choices = message.partition(" (choose from ")
        wrong = what.partition("invalid choice: '")[2].removesuffix("'")
        self._end(what, nearest(wrong, re.findall("'(.*?)'", choices)) if choices else f"See {self.prog} --help")

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Print arguments that no option takes as one line, with the nearest option."""
        option = unknown[0].partition("=")[0]
        known = [name for name in self._option_string_actions if name.startswith("--")]
        do = nearest(option, known) if option.startswith("-") else f"See {self.prog} --help"
        if option in known:  # it stood before the command
            do = f"Write {self.prog} {option}"
        self._end(f"unknown argument {' '.join(unknown)}", do)

    def _end(self, what: str, do: str) -> NoReturn:
        print(problem(self.prog, what, do), file=sys.stderr)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sdft", description="Prune an LLM in depth and recover its quality by self-data distillation."
    )
    subparsers = parser.add_subparsers(dest="name", required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, action: Action, help_text: str, artifacts: bool = True) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = subparsers.add_parser(name, help=help_text, description=help_text)
        command.set_defaults(command=action)
        if artifacts:
            place = "directory or address of the artifacts (default: %(default)s)"
            command.add_argument("--root", default="./artifacts", metavar="D", help=place)
            command.add_argument("--json", action="store_true", help="print JSON instead of a table")
        return command

    _add_builders(add)
    _add_readers(add)
    _add_publishers(add)
    _add_writers(add)
    parser.set_defaults(parsers=subparsers.choices)
    return parser


def _add_builders(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands that plan and build."""

    def add_file(command: argparse.ArgumentParser, name: str, kind: str, **several: Any) -> None:
        command.add_argument("recipe", type=Path, metavar=name, help=kind, **several)
        command.add_argument("--compute", type=Path, metavar="F", help="a compute file, see configs/compute")

    def add_recipe(command: argparse.ArgumentParser, or_sweep: str = " or sweep", **several: Any) -> None:
        add_file(command, "RECIPE", f"a recipe{or_sweep} file, see configs", **several)
        override = "override a recipe value, e.g. train.lr=2e-4; may be repeated"
        command.add_argument("--set", action="append", default=[], metavar="K=V", help=override)

    check = "validate a recipe or a sweep and show what is done, partial or missing"
    add_recipe(add("check", commands.check, check))
    add_recipe(run := add("run", commands.run, "build what a recipe lacks, then report"), "")
    run.add_argument("--until", metavar="STAGE", help="stop after this stage, for example distill")
    sweep = add("sweep", commands.sweep, "build what a sweep over recipes lacks, shared parts once, then report")
    add_file(sweep, "SWEEP", "a sweep file, see configs/sweeps")
    submit = add("submit", commands.submit, "run a recipe or a sweep as a Ray job, follow it, and end as it ends")
    add_file(submit, "RECIPE", "a recipe or sweep file")
    submit.add_argument("--until", metavar="STAGE", help="stop after this stage")
    submit.add_argument("--no-wait", action="store_true", help="print the job's id and leave it alone")
    how = submit.add_mutually_exclusive_group()
    how.add_argument("--address", metavar="A", help="the cluster's dashboard, e.g. http://127.0.0.1:8265")
    how.add_argument("--print-manifest", action="store_true", help="submit nothing; print a RayJob for KubeRay")
    how.add_argument("--print-slurm", action="store_true", help="submit nothing; print a job script for sbatch")
    submit.add_argument("--image", metavar="I", default="sdft-ray:0.1.0", help="its image (default: %(default)s)")
    report = add("report", commands.report, "show the results of recipes and sweeps; those of several side by side")
    add_recipe(report, nargs="+")
    for command in (run, sweep, report):
        command.add_argument("--html", type=Path, metavar="F", help="also write one self-contained HTML page")
    for command in (sweep, report):
        command.add_argument("--csv", type=Path, metavar="F", help="of a sweep, or of several: also write its lines")


def _add_readers(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands that look at what there is."""
    whole = "prove that a model is whole, and the cut of its base that it claims to be"
    verify = add("verify", inspection.verify, whole)
    verify.add_argument("target", metavar="TARGET", help="a model directory, an artifact's id, or a recipe file")
    verify.add_argument("--against", metavar="BASE", help="directory or id of the model that TARGET was cut from")
    verify.add_argument("--vllm", action="store_true", help="also compare greedy tokens of vLLM and transformers")
    doctor = add("doctor", inspection.doctor, "look for what would keep a recipe from running, here or on a cluster")
    doctor.add_argument(
        "recipe", type=Path, nargs="?", metavar="RECIPE", help="a recipe file: also look at what it needs"
    )
    doctor.add_argument("--compute", type=Path, metavar="F", help="a compute file, see configs/compute")
    show = add("show", inspection.show, "show one artifact")
    show.add_argument("artifact", metavar="ID_OR_DIR", help="an artifact: its id, or its directory")
    show.add_argument("--plot", type=Path, metavar="F", help="of a score: also draw its distances, as .svg or .png")
    diff = add("diff", inspection.diff, "show which recipe values differ between two recipes or artifacts")
    for name, first in (("a", "a recipe file, or the id of an artifact"), ("b", "another of the same kind")):
        diff.add_argument(name, metavar=name.upper(), help=first)


def _add_publishers(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands that hand models on."""
    push = add("push", publishing.push, "publish a model, its rewritten data set or both on a hub, each with its card")
    push.add_argument("artifacts", nargs="+", metavar="ID", help="a model, its exports, a distill artifact")
    push.add_argument("--to", required=True, metavar="OWNER/NAME", help="the name there; key: HF_TOKEN")
    push.add_argument("--base", metavar="M", help="the base's name on the hub, if the recipe has a path or a file")
    push.add_argument("--private", action="store_true", help="create private repositories")
    push.add_argument("--dry-run", action="store_true", help="publish nothing; list the files and print the cards")
    export = add(
        "export", publishing.export, "write a model as a GGUF file for llama.cpp, and compare it with the model"
    )
    export.add_argument("model", metavar="ID_OR_DIR", help="a model: the id of an artifact, or a directory")
    export.add_argument("--format", default="f16", metavar="F", help="f16, bf16, q8_0 or q4_k_m (default: %(default)s)")
    export.add_argument("--out", type=Path, metavar="FILE", help="default: under exports/ of the root")


def _add_writers(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands that help to write files."""
    init = add("init", commands.init, "write a starter recipe, with comments, for a model and a file of rows", False)
    init.add_argument("--model", required=True, metavar="M", help="a model directory, a .gguf file or a hub name")
    init.add_argument("--rows", required=True, metavar="F", help="rows: a file, a directory or a quoted glob")
    init.add_argument("--out", type=Path, default="recipe.yaml", metavar="F", help="recipe file (default: %(default)s)")
    for column in ("prompt", "response", "context", "answer"):
        init.add_argument(f"--{column}", metavar="COL", help=f"column of the {column}; else guessed from the names")
    explain = add("explain", commands.explain, "explain a key of a recipe, compute or sweep file", False)
    explain.add_argument("key", metavar="KEY", help="a dotted key, e.g. train.lr; or recipe, compute or sweep for all")
    explain.add_argument("--json", action="store_true", help="print JSON instead of text")
    schema = add("schema", commands.schema, "print the JSON Schema of a recipe, compute or sweep file", False)
    schema.add_argument("kind", nargs="?", default="recipe", choices=("recipe", "compute", "sweep"))
    completion = add("completion", commands.completion, "print the completion of this command for a shell", False)
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))


if __name__ == "__main__":
    sys.exit(main())

"""The commands that hand models on: `sdft push` to a hub, `sdft export` to GGUF.

Heavy imports stand inside functions, as in the other commands.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from sdft_ray import environment
from sdft_ray.errors import UserError, problem

if TYPE_CHECKING:
    from pathlib import Path

    from sdft_ray.models.gguf import Written
    from sdft_ray.publish.hub import Publication


def push(options: argparse.Namespace) -> None:
    """Publish a model, a data set or both under one name of a hub."""
    environment.for_upload()
    from huggingface_hub import HfApi, get_token

    from sdft_ray.progress import Progress
    from sdft_ray.publish import hub
    from sdft_ray.store.storage import Storage

    hub.require_name(options.to)
    publications = hub.gather(options.artifacts, options.to, options.base, Storage(options.root))
    if options.dry_run:
        _show(publications, options)
        return
    if not (token := get_token()):
        do = "Set it to a token that may write, or do: hf auth login"
        raise UserError(problem("HF_TOKEN", "is not set, and nobody is logged in", do))
    with Progress("push") as progress:
        addresses = hub.push(publications, options.to, options.private, HfApi(token=token), progress)
    print(json.dumps(addresses) if options.json else "\n".join(addresses))


def _show(publications: list[Publication], options: argparse.Namespace) -> None:
    """Print what would be published."""
    if options.json:
        print(json.dumps([{"kind": each.kind, "files": each.sizes, "card": each.card} for each in publications]))
        return
    for each in publications:
        size = sum(each.sizes.values()) / 1e6
        print(f"{each.kind} {options.to}, {'private' if options.private else 'public'}: {size:.1f} MB in")
        for name, count in each.sizes.items():
            print(f"{count:>14,}  {name}")
        print(f"\n{each.card}")


def export(options: argparse.Namespace) -> None:
    """Write a model as a GGUF file."""
    from sdft_ray.models import gguf
    from sdft_ray.progress import Progress, quiet_transformers
    from sdft_ray.store.manifest import read_manifest
    from sdft_ray.store.storage import Storage

    gguf.require_format(options.format)
    if options.out and options.out.is_dir():
        raise UserError(problem("--out", f"{options.out} is a directory", "Give the name of a file in it"))
    quiet_transformers()
    storage = Storage(options.root)
    model = storage.find_model(options.model)
    manifest = read_manifest(model)
    name = f"{manifest.slug}-{manifest.id}" if manifest else model.resolve().name
    file = options.out or storage.root / "exports" / f"{name}-{options.format}.gguf"
    with Progress("export", "tensors") as progress:
        written = gguf.write_gguf(model, file, options.format, name, progress)
    if not options.out:
        storage.publish(file)
    _show_written(written, model, options)


def _show_written(written: Written, model: Path, options: argparse.Namespace) -> None:
    serve = [
        f"llama-server --model {written.file} --ctx-size {written.context} --jinja",
        f"vllm serve {model}  # the directory itself",
    ]
    if options.json:
        print(json.dumps({**written._asdict(), "file": str(written.file), "serve": serve}))
        return
    exact = f"within {written.largest_error:.2g}" if written.largest_error else "exact after rounding"
    print(f"{written.file}: {written.bytes / 1e6:.1f} MB, {written.tensors} tensors, read back and {exact}")
    print("\n".join(serve))

"""Publish finished artifacts on a hub: a model with its card and its adapter, and the data set that it was trained on.

In: artifacts and a name. Out: one commit in a repository for each, a model's and a data set's. Large files are uploaded
before the first commit, so that a connection that breaks leaves nothing published; what was uploaded is not uploaded
again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from sdft_ray.data.readers import read_json, read_refusal
from sdft_ray.data.text import first_line
from sdft_ray.errors import StageFailed, UserError, problem
from sdft_ray.progress import Progress
from sdft_ray.publish.card import STAGES, write_card
from sdft_ray.publish.origin import find_origin
from sdft_ray.store.manifest import Manifest, check_files, read_manifest
from sdft_ray.store.storage import Storage

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
_ADAPTER = "adapter/adapter_config.json"
# Not for others: names of machines (TensorBoard's files), and peft's card, which names a path of this machine.
_KEPT_BACK = ("tensorboard/*", "adapter/README.md", CARD)
# Weights of what a repository held before: beside others they would be loaded, or taken for a part of the model.
_REPLACED = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.gguf", "adapter/*")


class Publication(NamedTuple):
    """What becomes one repository."""

    kind: Literal["model", "dataset"]
    artifact: Manifest
    files: Mapping[str, Path | bytes]
    """By their paths in the repository; the card among them."""

    @property
    def card(self) -> str:
        text = self.files[CARD]
        assert isinstance(text, bytes), "a card is written here"
        return text.decode()

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in self.files.items()
        }


# --- what is published ----------------------------------------------------------------------------------------


def require_name(name: str) -> None:
    """Raise UserError for what cannot be the name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(problem("--to", f"{name} cannot be a name ({first_line(error)})", "Give OWNER/NAME")) from None
    if "/" not in name:
        raise UserError(problem("--to", f"{name} has no owner", f"Give OWNER/{name}"))


def gather(targets: Sequence[str], name: str, base: str | None, storage: Storage) -> list[Publication]:
    """Return what is to be published under a name, the data set first; raises UserError for what cannot be.

    base: the name on a hub of the model that was pruned, where the manifests do not have it. GGUF files go beside the
    model that they were made of.
    """
    found: dict[str, tuple[Path, Manifest]] = {}
    beside: dict[str, tuple[Path, Manifest]] = {}
    for target in targets:
        directory = storage.find(target)
        manifest = read_manifest(directory)
        assert manifest, "an artifact is found by its manifest"
        check_files(directory, manifest, hashes=True)
        if manifest.stage == "export":
            beside[target] = directory, manifest
            continue
        kind = _kind(target, manifest)
        if kind in found:
            what = f"is a {kind}, and so is {found[kind][1].id}; one name holds one of each"
            raise UserError(problem(target, what, "Push it under another name"))
        found[kind] = directory, manifest
    dataset, model = found.get("dataset"), found.get("model")
    forms = _require_forms(beside, model[1].id if model else None)
    publications = []
    if dataset:
        directory, manifest = dataset
        publications.append(
            Publication("dataset", manifest, _files(directory, manifest, (directory / CARD).read_bytes()))
        )
    if model:
        directory, manifest = model
        names = [*(file.path for file in manifest.files), *forms]
        card = write_card(find_origin(manifest, storage), name, base, names, name if dataset else None)
        files = _files(directory, manifest, card.encode()) | forms
        publications.append(Publication("model", manifest, files))
    return publications


def _require_forms(exports: Mapping[str, tuple[Path, Manifest]], model: str | None) -> dict[str, Path | bytes]:
    """Return the GGUF files of exports of a model; raises UserError for others."""
    forms: dict[str, Path | bytes] = {}
    for target, (directory, manifest) in exports.items():
        of, files = manifest.identity.model, [file.path for file in manifest.files if ".gguf" in file.path]
        if of != model:
            raise UserError(problem(target, f"was made of {of}, which is not pushed with it", f"Give {of}, too"))
        if not files:
            what = "holds safetensors of 8 bits, and only GGUF files go beside a model"
            raise UserError(problem(target, what, "Leave it out"))
        forms |= {file: directory / file for file in files}
    return forms


def _kind(target: str, manifest: Manifest) -> str:
    if manifest.stage == "distill":
        return "dataset"
    if manifest.stage in STAGES:
        return "model"
    do = f"Give the id of a {', '.join(STAGES)}, export or distill artifact"
    raise UserError(problem(target, f"is of stage {manifest.stage}: neither a model nor a data set made here", do))


def _files(directory: Path, manifest: Manifest, card: bytes) -> dict[str, Path | bytes]:
    names = [file.path for file in manifest.files if not any(fnmatch(file.path, kept) for kept in _KEPT_BACK)]
    files: dict[str, Path | bytes] = {CARD: card, **{name: directory / name for name in names}}
    if _ADAPTER in files:  # peft writes the path of the pruned model, which nobody else has
        settings = dict(read_json(directory / _ADAPTER)) | {"base_model_name_or_path": None}
        files[_ADAPTER] = (json.dumps(settings, indent=2) + "\n").encode()
    return files


# --- how it is published --------------------------------------------------------------------------------------


def push(publications: Sequence[Publication], name: str, private: bool, api: HfApi, progress: Progress) -> list[str]:
    """Publish under a name and return the address of each commit; a second time it commits what changed.

    Raises UserError where the hub does not let us, and StageFailed where the connection breaks.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    addresses: list[str] = []
    with _explained(name, addresses):
        stale = []
        for each in publications:
            progress.enter(f"preparing the {each.kind} {name}")
            api.create_repo(name, repo_type=each.kind, private=private, exist_ok=True)
            stale.append(_stale(api, name, each, private))
        added = []
        for each in publications:
            progress.enter(f"uploading the {each.kind} {name}, {sum(each.sizes.values()) / 1e6:.1f} MB")
            files = [CommitOperationAdd(file, content) for file, content in each.files.items()]
            api.preupload_lfs_files(name, files, repo_type=each.kind, free_memory=False)
            added.append(files)
        for each, files, old in zip(publications, added, stale, strict=True):
            progress.enter(f"committing the {each.kind} {name}")
            operations: list[CommitOperationAdd | CommitOperationDelete] = [*files, *map(CommitOperationDelete, old)]
            message = f"{each.artifact.stage} {each.artifact.id} of sdft_ray"
            done = api.create_commit(name, operations, commit_message=message, repo_type=each.kind)
            addresses.append(done.commit_url)
    return addresses


def _stale(api: HfApi, name: str, publication: Publication, private: bool) -> list[str]:
    """Return the files of a repository that its new content replaces; raises UserError for one that others can read."""
    info = api.model_info(name) if publication.kind == "model" else api.dataset_info(name)
    if private and not info.private:
        what = f"the {publication.kind} {name} is there and public"
        raise UserError(problem("--private", what, "Make it private on its page, or give another --to"))
    there = [sibling.rfilename for sibling in info.siblings or ()]
    replaced = [file for file in there if any(fnmatch(file, pattern) for pattern in _REPLACED)]
    return sorted(set(replaced) - publication.files.keys()) if publication.kind == "model" else []


@contextmanager
def _explained(name: str, published: Sequence[str]) -> Iterator[None]:
    """Raise what the hub's client raises as one line, which says what is published by then."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.HTTPError, errors.OfflineModeIsEnabled, RuntimeError, ValueError) as error:
        raise _explain(error, name, f"{' and '.join(published) or 'nothing'} was published") from None


def _explain(error: Exception, name: str, so_far: str) -> UserError | StageFailed:
    """Return the line for an error of the hub's client, whose threads wrap what they raise."""
    from huggingface_hub import errors

    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
    match status:
        case 401:
            return UserError(problem(name, "the hub refuses your token", "Set HF_TOKEN to one that may write"))
        case 403:
            what = "belongs to others, or your token may not write there"
            return UserError(problem(name, what, "Give another --to, or set HF_TOKEN to one that may write"))
        case None if isinstance(cause, errors.OfflineModeIsEnabled):
            return UserError(problem(name, *read_refusal(cause)))
        case None if isinstance(cause, ValueError):
            what = f"the hub does not take the card ({first_line(cause)})"
            return StageFailed(problem(name, what, "See it with --dry-run"))
        case None:
            where = f" in {match[1]}" if (match := re.match("Error while uploading '(.+)' to", str(error))) else ""
            what = f"the connection to the hub broke{where} ({first_line(cause)}); {so_far}"
            return StageFailed(problem(name, what, "Run the same command again: whole files are not uploaded twice"))
        case _:
            what = f"the hub answers {status} ({first_line(cause)}); {so_far}"
            return StageFailed(problem(name, what, "Run the same command again later"))

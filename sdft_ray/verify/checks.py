"""Run the checks of `sdft verify`: they prove a model directory by its own files and against its base.

In: a model directory, of this package or any other tool, and perhaps the base that it was cut from. Out: one `Check`
each: ok with its figure, FAILED with the tensor or field, skipped with the reason. The checks trust nothing: they read
the removed blocks from the bytes, and the oracle, the base with those blocks skipped by hooks, shares no code with
`cut`. Equal blocks of the base allow several readings, of which the manifest may choose.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from sdft_ray.core.surgery import (
    BLOCK,
    BY_POSITION,
    EMBEDDINGS,
    PER_BLOCK,
    count_blocks,
    decoder_of,
    name_blocks,
    older_rope,
)
from sdft_ray.data.chat import render_prompt
from sdft_ray.data.readers import read_json
from sdft_ray.engine import NEAR_TIE
from sdft_ray.errors import UserError, problem
from sdft_ray.models.directory import WEIGHTS_INDEX, load_config, require_generation, require_loadable, weight_files
from sdft_ray.models.tokens import find_outside, load_tokenizer
from sdft_ray.progress import open_console, quiet_transformers
from sdft_ray.store.manifest import check_files, read_manifest
from sdft_ray.verify.agreement import (
    PROMPTS,
    compare_tokens,
    compare_with_vllm,
    compute_logits,
    continue_greedily,
    load_in_float32,
    render_prompts,
)
from sdft_ray.verify.blocks import Blocks, Failed, fingerprints, match_blocks, tensors
from sdft_ray.verify.models import Model

# Largest difference of logits that are the same sums in float32 in the same order: in fact 0 on one machine.
SAME_LOGITS = 1e-4
_OLDER_ROPE = ("rope_theta", "rope_local_base_freq", "partial_rotary_factor", "rope_scaling")
# Config fields that may differ from the base's: counts of blocks (tensors and per-block lists are compared instead),
# and fields that move no logit.
_OWN_FIELDS = (*BY_POSITION, "transformers_version", "dtype", "use_cache")


@dataclasses.dataclass(frozen=True)
class Check:
    """The result of one check."""

    check: str
    status: Literal["ok", "FAILED", "skipped"]
    says: str
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class _Skipped(Exception):
    """The check does not apply; the message says why."""


Finding = tuple[str, dict[str, Any]]


# --- the checks -----------------------------------------------------------------------------------------------


def verify(model: Model, vllm: bool = False) -> Iterator[Check]:
    """Yield the result of each check, in order; a check that needs a failed one is skipped."""
    if vllm and importlib.util.find_spec("vllm") is None:
        raise UserError(problem("--vllm", "vllm is not installed", "Install requirements/cpu.txt or gpu.txt"))
    quiet_transformers()
    status: dict[str, str] = {}
    for name, (examine, needs) in _CHECKS.items():
        lacking = next((need for need in needs if status[need] != "ok"), None)
        if name == "vllm" and not vllm:
            check = Check(name, "skipped", "not asked for: --vllm")
        elif name.startswith("base") and not model.base:
            check = Check(name, "skipped", model.no_base)
        elif lacking:
            check = Check(name, "skipped", f"{lacking} is not ok")
        else:
            check = _examine(name, examine, model)
        status[name] = check.status
        yield check


def _examine(name: str, examine: Callable[[Model], Finding], model: Model) -> Check:
    try:
        says, figures = examine(model)
        return Check(name, "ok", says, figures)
    except _Skipped as reason:
        return Check(name, "skipped", str(reason))
    except (Failed, UserError) as wrong:
        return Check(name, "FAILED", str(wrong))
    except Exception as error:  # noqa: BLE001 - whatever a library says of files that it cannot read is the finding
        lines = str(error).strip().splitlines() or ["no reason given"]
        return Check(name, "FAILED", f"{type(error).__name__}: {lines[0]}")


def _check_hashes(model: Model) -> Finding:
    """The files are those of the manifest."""
    manifest = read_manifest(model.directory)
    if manifest is None:
        raise _Skipped("there is no manifest.json")
    check_files(model.directory, manifest, hashes=True)
    says = f"{len(manifest.files)} files, {manifest.bytes / 1e6:.1f} MB, as in the manifest"
    return says, {"bytes": manifest.bytes}


def _check_tensors(model: Model) -> Finding:
    """The files hold exactly the tensors that the config asks for, each once and in the file that the index names."""
    from safetensors import safe_open

    file_of: dict[str, str] = {}
    for shard in weight_files(model.directory):
        with safe_open(shard, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if name in file_of:
                    raise Failed(f"{name} is in {file_of[name]} and in {shard.name}")
                file_of[name] = shard.name
    index = model.directory / WEIGHTS_INDEX
    if index.is_file():
        listed = read_json(index)["weight_map"]
        for name in sorted(file_of.keys() | listed.keys()):
            if listed.get(name) != file_of.get(name):
                raise Failed(f"{name} is in {file_of.get(name, 'no file')}, {index.name} has {listed.get(name)}")
    try:
        parameters = require_loadable(model.directory)
    except RuntimeError as error:
        raise Failed(str(error).removeprefix(f"{model.directory}: ")) from None
    blocks = {int(match[1]) for name in file_of if (match := BLOCK.match(name))}
    says = f"{len(file_of)} tensors, {parameters / 1e6:.1f}M parameters, blocks 0 to {max(blocks)}"
    return says, {"tensors": len(file_of), "parameters": parameters, "blocks": len(blocks)}


def _check_config(model: Model) -> Finding:
    """Every per-block list has an entry a block; the RoPE base stands where transformers 4 and 5 look for it."""
    config = read_json(model.directory / "config.json")
    blocks = count_blocks(config)
    lists = [key for key in PER_BLOCK if isinstance(config.get(key), list)]
    for key in lists:
        if len(config[key]) != blocks:
            raise Failed(f"{key} has {len(config[key])} entries, num_hidden_layers is {blocks}")
    newer = {key: value for key, value in config.items() if key not in _OLDER_ROPE}
    older = older_rope(newer)
    for key, value in older.items():
        if config.get(key) != value:
            state = f"is {config[key]}" if key in config else "is missing"
            raise Failed(f"{key} {state}, rope_parameters has {value}: transformers 4 reads only the first")
    load_config(model.directory)
    says = [f"{blocks} blocks", *(f"{key} has {blocks} entries" for key in lists)]
    says += [f"{key} {value} in both spellings" for key, value in older.items()]
    return "; ".join(says), {"blocks": blocks, "per_block": lists, "rope": older}


def _check_ties(model: Model) -> Finding:
    """`tie_word_embeddings` agrees with the files."""
    import torch

    tied = bool(load_config(model.directory).tie_word_embeddings)
    ends = dict(tensors(model.directory, (*EMBEDDINGS, "lm_head.weight")))
    head = ends.pop("lm_head.weight", None)
    if head is None and not tied:
        raise Failed("tie_word_embeddings is false, but there is no lm_head.weight")
    for name, embeddings in ends.items():
        if head is not None and tied and not torch.equal(head, embeddings):
            raise Failed(f"tie_word_embeddings is true, but lm_head.weight differs from {name}")
    stored = "no lm_head.weight" if head is None else "lm_head.weight stored" + (", equal" if tied else "")
    return f"tie_word_embeddings {str(tied).lower()}, {stored}", {"tied": tied}


def _check_finite(model: Model) -> Finding:
    """No tensor holds NaN or infinity."""
    import torch

    count = 0
    for name, tensor in tensors(model.directory):
        count += 1
        if wrong := int((~torch.isfinite(tensor)).sum()):
            raise Failed(f"{name} has {wrong} values that are NaN or infinite")
    return f"no NaN or infinity in {count} tensors", {"tensors": count}


def _check_tokenizer(model: Model) -> Finding:
    """The tokenizer loads, has a chat template, and every id that it or the generation config names is embedded."""
    tokenizer = load_tokenizer(model.directory)
    if not tokenizer.chat_template:
        raise Failed("there is no chat template")
    rows, question = load_config(model.directory).vocab_size, render_prompt(tokenizer, PROMPTS[0])
    if PROMPTS[0] not in tokenizer.decode(question):
        raise Failed(f"the tokenizer does not give {PROMPTS[0]!r} back from its tokens")
    if outside := find_outside(tokenizer, rows, question):
        raise Failed(f"token {outside[0]!r} has id {outside[1]}, model.embed_tokens.weight has {rows} rows")
    require_generation(path := model.directory / "generation_config.json")
    generation = read_json(path) if path.is_file() else read_json(model.directory / "config.json")
    ids = {}
    for key in ("eos_token_id", "pad_token_id"):
        ids[key] = generation.get(key)
        for number in ids[key] if isinstance(ids[key], list) else [ids[key]]:
            if number is not None and not 0 <= number < rows:
                raise Failed(f"{key} {number} is outside the vocabulary of {rows}")
    highest = max(tokenizer.get_vocab().values())
    says = f"ids up to {highest} of {rows}; eos {ids['eos_token_id']}, pad {ids['pad_token_id']}"
    return says, {"highest_id": highest, "vocabulary": rows, **ids}


def _check_cache(model: Model) -> Finding:
    """Greedy generation is the same with and without the KV cache: the same tokens from the same logits."""
    network = load_in_float32(model.directory)
    prompts = render_prompts(model.directory)
    new_tokens, cached = continue_greedily(network, prompts)
    model.generated = [
        (ids := prompt + new, compute_logits(network, ids)) for prompt, new in zip(prompts, new_tokens, strict=True)
    ]
    difference = max(
        float((logits[len(prompt) - 1 : -1] - own).abs().max())
        for (_, logits), prompt, own in zip(model.generated, prompts, cached, strict=True)
    )
    agreement = compare_tokens(prompts, new_tokens, [logits for _, logits in model.generated])
    if agreement.differing:
        raise Failed(f"with the cache {agreement.differing[0]}; {agreement.describe()}")
    if not difference < NEAR_TIE:
        raise Failed(f"logits with and without cache differ by {difference:.2g} (limit {NEAR_TIE:g})")
    return f"{agreement.describe()}; logits differ by {difference:.2g}", {
        "tokens": agreement.tokens,
        "near_ties": list(agreement.near_ties),
        "max_abs_difference": difference,
    }


def _check_base_tensors(model: Model) -> Finding:
    """Every block is, bit by bit, one of the base's, in the same order; every other tensor is the base's too."""
    assert model.base
    whole, cut = (fingerprints(directory) for directory in (model.base, model.directory))
    manifest = read_manifest(model.directory)
    claimed = manifest.summary.get("removed") if manifest else None
    changed = manifest.summary.get("changed", []) if manifest else []
    _take_back(changed, claimed or [], whole, cut)
    model.kept, others = match_blocks(model, whole, cut, claimed)
    for name in sorted(whole[None].keys() | cut[None].keys()):
        if whole[None].get(name) != cut[None].get(name):
            in_base, in_model = name in whole[None], name in cut[None]
            fault = "is not in the base" if not in_base else "differs from the base's" if in_model else "is missing"
            raise Failed(f"{name} {fault}")
    removed = _removed(model, len(whole) - 1)
    if claimed not in (None, removed):
        raise Failed(f"blocks {removed} of the base are removed, the manifest has {claimed}")
    tensors = sum(map(len, cut.values()))
    change = f"blocks {name_blocks(removed)} are removed" if removed else "no block is removed"
    change += ", or equal ones" if others else ""
    if changed:
        change += f"; changed by the patch: {', '.join(changed)}"
    figures = {"tensors": tensors - len(changed), "removed": removed} | ({"changed": changed} if changed else {})
    return f"{tensors - len(changed)} tensors bitwise equal; {change}", figures


def _take_back(changed: Sequence[str], removed: Sequence[int], whole: Blocks, cut: Blocks) -> None:
    """Give tensors that a patch has changed the base's hashes; raises Failed for one that it has not changed."""
    kept = [block for block in sorted(block for block in whole if block is not None) if block not in removed]
    for name in changed:
        match = BLOCK.match(name)
        if match is None or cut.get(block := int(match[1]), {}).get(match[2]) in (
            None,
            whole[kept[block]].get(match[2]),
        ):
            raise Failed(f"{name} is the base's, and the manifest has it among the changed ones")
        cut[block][match[2]] = whole[kept[block]][match[2]]


def _check_base_config(model: Model) -> Finding:
    """Every per-block list is the base's at the kept blocks, every other field the base's: short prompts test few."""
    assert model.base
    whole, cut = (load_config(path).to_dict() for path in (model.base, model.directory))
    compared = [
        key for key in whole if key not in _OWN_FIELDS and not key.startswith("_") and not key.endswith("token_id")
    ]
    for key in compared:
        expected = whole[key]
        if key in PER_BLOCK and isinstance(expected, list):
            expected = [expected[block] for block in model.kept]
        if cut.get(key) != expected:
            raise Failed(f"{key} is {cut.get(key)}, expected {expected}")
    return f"{len(compared)} fields as in the base", {"fields": len(compared)}


def _check_base_logits(model: Model) -> Finding:
    """The base with the removed blocks skipped by hooks computes the same logits."""
    assert model.base
    if (manifest := read_manifest(model.directory)) and manifest.stage == "patch":
        raise _Skipped("a patched model computes other logits")
    network = load_in_float32(model.base)
    with _skipping(network, _removed(model, len(decoder_of(network).layers))):
        difference = max(float((compute_logits(network, ids) - logits).abs().max()) for ids, logits in model.generated)
    says = f"logits differ by {difference:.2g} from the base's with these blocks skipped (limit {SAME_LOGITS:g})"
    if not difference <= SAME_LOGITS:
        raise Failed(says)
    return says, {"max_abs_difference": difference, "limit": SAME_LOGITS}


def _check_vllm(model: Model) -> Finding:
    """vLLM loads the directory and generates the greedy tokens of transformers, both in float32."""
    agreement = compare_with_vllm(model.directory)
    if agreement.differing:
        raise Failed(f"in vLLM {agreement.differing[0]}; {agreement.describe()}")
    return agreement.describe(), {"tokens": agreement.tokens, "near_ties": list(agreement.near_ties)}


# Each check with those that must be ok before it makes sense.
_CHECKS: dict[str, tuple[Callable[[Model], Finding], tuple[str, ...]]] = {
    "hashes": (_check_hashes, ()),
    "tensors": (_check_tensors, ()),
    "config": (_check_config, ()),
    "ties": (_check_ties, ()),
    "finite": (_check_finite, ()),
    "tokenizer": (_check_tokenizer, ()),
    "cache": (_check_cache, ("tensors", "finite", "tokenizer")),
    "base tensors": (_check_base_tensors, ()),
    "base config": (_check_base_config, ("base tensors",)),
    "base logits": (_check_base_logits, ("cache", "base tensors")),
    "vllm": (_check_vllm, ("tensors", "finite", "tokenizer")),
}


# --- tensors and blocks ---------------------------------------------------------------------------------------


def _removed(model: Model, blocks: int) -> list[int]:
    return [block for block in range(blocks) if block not in model.kept]


@contextlib.contextmanager
def _skipping(network: Any, removed: Sequence[int]) -> Iterator[None]:
    """Make the `removed` blocks return their input."""

    def return_input(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given,) if isinstance(output, tuple) else given

    layers = decoder_of(network).layers
    hooks = [layers[block].register_forward_hook(return_input, with_kwargs=True) for block in removed]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# --- on the terminal ------------------------------------------------------------------------------------------


def describe(model: Model, checks: Sequence[Check]) -> dict[str, Any]:
    """Return the `--json` output for a model."""
    return {
        "model": model.name,
        "directory": str(model.directory),
        "base": str(model.base) if model.base else None,
        "ok": all(check.status != "FAILED" for check in checks),
        "checks": [dataclasses.asdict(check) for check in checks],
    }


def show(model: Model, checks: Sequence[Check]) -> None:
    """Print a model and one line for each check."""
    from rich.table import Table
    from rich.text import Text

    console = open_console(160)
    console.print(Text(f"{model.name}: {model.directory}" + (f"\nagainst {model.base}" if model.base else "")))
    table = Table("check", "result", "finding", box=None, pad_edge=False)
    colours = {"ok": "green", "FAILED": "bold red", "skipped": "yellow"}
    for check in checks:
        table.add_row(check.check, Text(check.status, colours[check.status]), Text(check.says, overflow="fold"))
    console.print(table)

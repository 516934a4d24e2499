"""A comparison of metrics for choosing blocks: the blocks that each removes, and their cost in loss and in accuracy.

    python -m benchmarks.metrics --corpus boolq --corpus texts.jsonl --root /tmp/metrics

Every metric chooses on every corpus for several sizes; the loss of every span on every corpus is measured, which
also shows the choice among fewer candidates. Each distinct set of blocks is removed once, and the untrained model is
evaluated on four benchmarks. The last line is JSON: for each metric the mean accuracy over sizes and corpora.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"

from benchmarks.report import print_figures
from sdft_ray import pipeline
from sdft_ray.core.surgery import name_blocks
from sdft_ray.data.readers import read_json
from sdft_ray.results import CANDIDATES, read_measured
from sdft_ray.spec.compute import load_compute
from sdft_ray.spec.loading import load_recipe
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.wording import validate
from sdft_ray.stages.cut import remove_blocks
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage

SIZES = (2, 3, 4, 6)
TASKS = ("arc_easy", "sciq", "piqa", "hellaswag")
EVERY = 1000  # candidates: more than there are spans


def main() -> None:
    """Build the missing artifacts under the root and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("configs/recipes/demo.yaml"))
    parser.add_argument("--corpus", action="append", metavar="TEXT", help="boolq or a file (default: boolq)")
    parser.add_argument("--limit", type=int, default=200, help="items of a task (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of scores and losses")
    parser.add_argument("--root", default="./artifacts")
    options = parser.parse_args()
    corpora = options.corpus or ["boolq"]
    storage, compute = Storage(options.root), load_compute()
    base = load_recipe(options.recipe).model_dump(mode="json")

    def chain_of(corpus: str, size: int) -> pipeline.Chain:
        calibration = {"text": corpus, "held_back": 16}
        prune: dict[str, Any] = {"blocks": size, "metric": "loss", "candidates": EVERY, "calibration": calibration}
        prune["dtype"] = options.dtype
        tasks = {"tasks": list(TASKS), "limit": options.limit}
        return pipeline.chain(validate(Recipe, base | {"prune": prune, "evaluate": tasks}))

    chains = {(corpus, size): chain_of(corpus, size) for corpus in corpora for size in SIZES}
    tried = {key: chain.loss for key, chain in chains.items() if chain.loss}
    scores = {key: chain.score for key, chain in chains.items() if chain.score}
    needed = [stage for key, loss in tried.items() for stage in (chains[key].base, scores[key], loss)]
    pipeline.build(list({stage.id: stage for stage in needed}.values()), compute, storage)

    losses = {key: read_json(storage.place(loss) / CANDIDATES) for key, loss in tried.items()}
    chosen = {
        (corpus, size, way): blocks
        for corpus, size in chains
        for way, blocks in _choices(losses[corpus, size], storage.place(scores[corpus, size]), size).items()
    }
    first = chains[corpora[0], SIZES[0]]
    model = first.base
    evaluations = [*first.tasks_of("base").values()]
    by_removed = {"nothing": evaluations}
    for removed in sorted({tuple(blocks) for blocks in chosen.values()}):
        directory = Path(options.root) / "cut" / "-".join(map(str, removed))
        if not directory.exists():
            directory.mkdir(parents=True)
            remove_blocks(storage.place(model), directory, removed)
        cut = Stage("model", directory.name, 1, {"removed": list(removed)}, {"model": model}, location=directory)
        by_removed[name_blocks(removed)] = [
            dataclasses.replace(stage, slug=f"{stage.settings.task}-{directory.name}", inputs={"model": cut})
            for stage in evaluations
        ]
    pipeline.build([stage for stages in by_removed.values() for stage in stages], compute, storage)
    accuracy = {
        blocks: statistics.mean(storage.manifest(stage).summary["value"] for stage in stages)
        for blocks, stages in by_removed.items()
    }

    heads = [f"loss on {Path(corpus).stem}" for corpus in corpora]
    print(f"| blocks | corpus | chosen by | removed | {' | '.join(heads)} | mean accuracy |")
    print("|---" * (5 + len(corpora)) + "|")
    whole = [f"{losses[corpus, SIZES[0]]['base_loss']:.2f}" for corpus in corpora]
    print(f"| 0 | | | nothing | {' | '.join(whole)} | {100 * accuracy['nothing']:.1f} |")
    for (corpus, size, way), blocks in sorted(chosen.items(), key=lambda item: (item[0][1], item[0][0])):
        cells = [
            next((f"{c['loss']:.2f}" for c in losses[other, size]["candidates"] if c["blocks"] == blocks), "-")
            for other in corpora
        ]
        name = name_blocks(blocks)
        print(f"| {size} | {Path(corpus).stem} | {way} | {name} | {' | '.join(cells)} | {100 * accuracy[name]:.1f} |")
    figures = {"accuracy of the base": round(accuracy["nothing"], 4)}
    for way in dict.fromkeys(way for _, _, way in chosen):
        values = [accuracy[name_blocks(blocks)] for key, blocks in chosen.items() if key[2] == way]
        figures[f"accuracy by {way}"] = round(statistics.mean(values), 4)
    print_figures("metrics", figures)


def _choices(losses: dict[str, Any], score: Path, size: int) -> dict[str, list[int]]:
    """Return the blocks that each way to choose removes."""
    from sdft_ray.core.similarity import choose_blocks

    candidates = losses["candidates"]  # by loss, the best first
    _, influences = read_measured(score)
    ways = {
        "angular": next(c for c in candidates if c["distance_rank"] == 1)["blocks"],
        "influence": next(c for c in candidates if c["influence_rank"] == 1)["blocks"],
        "influence, anywhere": list(choose_blocks(influences, size).blocks),
    }
    for few in (3, 5):
        tried = (c for c in candidates if min(c["distance_rank"], c["influence_rank"]) <= few)
        ways[f"loss, {few} candidates of each"] = next(tried)["blocks"]
    return ways | {"loss, every span": candidates[0]["blocks"]}


if __name__ == "__main__":
    main()

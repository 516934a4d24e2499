"""How many depths a sweep with a goal trains, over many made curves: `python -m benchmarks.goal`.

In: nothing; curves are drawn by a seed. Out: for 7 and 15 depths the share of a grid's trainings, by halving alone and
where the loss of every depth is known, and the last line in JSON: `goal_over_grid`, the mean over curves. What a nat of
loss costs is drawn between a third and three times what the search expects, and the loss says it only roughly.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
from collections.abc import Sequence

from benchmarks.report import print_figures
from sdft_ray.core.searching import SLOPE, following


def main() -> None:
    """Print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=int, default=1000)
    options = parser.parse_args()
    figures: dict[str, float] = {}
    for depths, is_even in itertools.product((7, 15), (False, True)):
        source = random.Random(depths)
        counts: dict[str, list[int]] = {"halving": [], "guided": []}
        for _ in range(options.curves):
            signals, kept = draw_curve(source, depths)
            # A goal as people set it, or one that puts the boundary behind every depth alike.
            goal = source.choice([kept[0] + 1, *kept]) if is_even else source.choice([90.0, 95.0, 97.0])
            for name, known in (("halving", None), ("guided", signals)):
                counts[name].append(count_trainings(known, kept, goal)[1])
        where = "boundary anywhere" if is_even else "goals of 90, 95, 97 %"
        shares = {name: statistics.mean(each) / depths for name, each in counts.items()}
        shown = ", ".join(f"{name} {share:.3f} (at most {max(counts[name])})" for name, share in shares.items())
        print(f"{depths} depths, {where}: {shown}")
        figures[f"goal_over_grid {depths}{' anywhere' if is_even else ''}"] = round(shares["guided"], 4)
    print_figures("goal", figures)


def draw_curve(source: random.Random, depths: int) -> tuple[list[float], list[float]]:
    """Return the loss that each depth costs untrained, in nats a token, and what a trained one keeps in percent."""
    most, bend = math.exp(source.uniform(math.log(0.5), math.log(5))), source.uniform(1.0, 2.2)
    losses = [most * ((i + 1) / depths) ** bend * math.exp(source.gauss(0, 0.05)) for i in range(depths)]
    slope, power = SLOPE * math.exp(source.uniform(-math.log(3), math.log(3))), source.uniform(0.7, 1.3)
    start = 100 - source.uniform(1, 3)
    kept = [start - slope * loss**power + source.gauss(0, 0.5) for loss in losses]
    return [*itertools.accumulate(losses, max)], [*itertools.accumulate(kept, min)]


def count_trainings(signals: Sequence[float] | None, kept: Sequence[float], goal: float) -> tuple[int | None, int]:
    """Return the number of the deepest depth that meets the goal, and how many were trained to know it."""
    trained: dict[int, float] = {}
    while (number := following(signals, trained, goal, len(kept))) is not None:
        assert number not in trained, "no depth is trained twice"
        trained[number] = kept[number]
    return max((i for i, each in trained.items() if each >= goal), default=None), len(trained)


if __name__ == "__main__":
    main()

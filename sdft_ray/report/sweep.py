"""Gathers what the report of a sweep shows, and shows it on the terminal.

In: a sweep's plan and the storage. Out: one plain structure that the tables, `--json`, `--csv` and the HTML page are
views of. Trials that are not there are listed too, with the reason where one failed: it is looked at while it grows.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from sdft_ray import pipeline
from sdft_ray.core.speculation import acceptance_error, best_measured, worth
from sdft_ray.errors import UserError, problem
from sdft_ray.report import collect as one
from sdft_ray.report.table import cut_line, interval, ratio, speed_line
from sdft_ray.spec.loading import leaves
from sdft_ray.stages.cut import Settings as CutSettings
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage
from sdft_ray.sweep import notes
from sdft_ray.sweep.planning import DEPTH, RECIPE, SIZE, Plan, Trial, describe_stopped, is_done, is_seed, name_draft


def collect(plan: Plan, name: str, storage: Storage) -> dict[str, Any]:
    """Return everything that the report of a sweep shows; raises UserError where there is no base to compare with."""
    untuned = _Untuned.of(plan)
    untuned.require_done(name, storage)
    with storage.survey():
        entries = [_describe_trial(trial, plan.name, untuned.base_of(trial), storage) for trial in plan.trials]
        tried, untried = _read_drafts(plan, storage)
    groups = _group(entries)
    for entry in entries:
        entry["draft"] = _join_drafts(tried[entry["id"]]) if entry["id"] in tried else None
    depths = [(cut.settings.depth, key) for key, cut in untuned.cuts.items()]
    return {
        "sweep": name,
        "axes": list(dict.fromkeys(path for cell in plan.cells for path in cell.values)),
        "tasks": list(plan.cells[0].recipe.evaluate.tasks),
        "models": untuned.describe(storage),
        "trials": entries,
        "groups": groups,
        "comparisons": _compare(groups, plan.trials, storage),
        "drafts": _drafts(groups, entries, depths, tried),
        "untried": untried,
        "maps": _maps(untuned.cuts.values(), storage),
        "flops_tokens": one.FLOPS_TOKENS,
    }


@dataclasses.dataclass(frozen=True)
class _Untuned:
    """The bases and pruned models of a sweep, by id, with what was measured of them."""

    chains: tuple[pipeline.Chain, ...]

    @classmethod
    def of(cls, plan: Plan) -> _Untuned:
        return cls(tuple(pipeline.chain(cell.recipe) for cell in plan.cells))

    @functools.cached_property
    def cuts(self) -> dict[str, Stage[CutSettings]]:
        """The pruned models."""
        return {chain.pruned.id: chain.pruned for chain in self.chains}

    @functools.cached_property
    def evaluations(self) -> dict[str, dict[str, Stage[Any]]]:
        """For each base and pruned model its evaluations, by task."""
        return {chain.models[name].id: chain.tasks_of(name) for chain in self.chains for name in ("base", "pruned")}

    @functools.cached_property
    def bases(self) -> dict[str, Stage[Any]]:
        """For each pruned model its base."""
        return {chain.pruned.id: chain.base for chain in self.chains}

    @functools.cached_property
    def speeds(self) -> dict[str, Stage[Any]]:
        """For each pruned model that was timed, the stage."""
        return {chain.pruned.id: chain.speed for chain in self.chains if chain.speed}

    def base_of(self, trial: Trial) -> dict[str, Stage[Any]]:
        """Return the evaluations of the base that a trial's model came from."""
        return self.evaluations[self.bases[trial.train.inputs["model"].id].id]

    def require_done(self, name: str, storage: Storage) -> None:
        """Raise UserError where something is missing that trials are compared with."""
        needed = {stage.id: stage for chain in self.chains for stage in (chain.rows, chain.score, chain.pruned)}
        needed |= {stage.id: stage for stage in self.speeds.values()}
        needed |= {stage.id: stage for each in self.evaluations.values() for stage in each.values()}
        if missing := {stage.name for stage in pipeline.survey(needed.values(), storage)[0]}:
            what = f"has nothing to compare with yet (missing: {', '.join(sorted(missing))})"
            raise UserError(problem(name, what, f"Do: sdft sweep {name}"))

    def describe(self, storage: Storage) -> list[dict[str, Any]]:
        """Return one entry for each base, and for each pruned model."""
        bases = {base.id: base for base in self.bases.values()}
        return [
            *(self._describe(base, base, "base", {"blocks": 0}, storage) for base in bases.values()),
            *(
                self._describe(cut, self.bases[key], "pruned", _describe_cut(cut, storage), storage)
                for key, cut in self.cuts.items()
            ),
        ]

    def _describe(
        self, stage: Stage[Any], base: Stage[Any], name: str, more: Mapping[str, Any], storage: Storage
    ) -> dict[str, Any]:
        scores = one.scores_of(self.evaluations[base.id], storage)
        return {
            "model": name,
            "slug": stage.slug,
            **more,
            "speed": storage.manifest(self.speeds[stage.id])["summary"] if stage.id in self.speeds else None,
            **one.describe_model(stage, self.evaluations[stage.id], scores, storage),
            **one.count_cost(storage.files(stage, "config.json")),
        }


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a report that `--json` prints: all but what only pictures need."""
    return {key: value for key, value in report.items() if key != "maps"}


def _describe_trial(trial: Trial, sweep: str, base: Mapping[str, Stage], storage: Storage) -> dict[str, Any]:
    """Return where a trial lies in the sweep, how far it is and, where it is done, what came of it."""
    pruned, cell = trial.train.inputs["model"], trial.cell
    stopped, reason = notes.read_stopped(storage, sweep, trial.train), notes.read_failure(storage, trial.train)
    status = "done" if is_done(trial, storage) else "stopped" if stopped else "failed" if reason else "missing"
    entry = {
        "arm": trial.arm,
        "blocks": cell.recipe.prune.blocks,
        "rows": cell.recipe.train.rows or _all_rows(trial, storage),
        "values": {path: value for path, value in trial.values.items() if path not in (DEPTH, SIZE)},
        "id": trial.train.id,
        "directory": storage.where(trial.train),
        "status": status,
        "reason": describe_stopped(stopped) if stopped else reason,
        "pruned": pruned.id,
    }
    if entry["status"] != "done":
        return entry
    manifest = storage.manifest(trial.train)
    return {
        **entry,
        "reason": None,
        "validation_loss": manifest["summary"]["validation_loss"],
        "seconds": manifest["provenance"]["wall_seconds"],
        **one.describe_model(trial.train, trial.evaluations, one.scores_of(base, storage), storage),
        **one.count_cost(storage.files(pruned, "config.json")),
    }


def _all_rows(trial: Trial, storage: Storage) -> int:
    return int(storage.manifest(trial.train.inputs["rows"])["summary"]["rows"]["train"])


def _describe_cut(stage: Stage, storage: Storage) -> dict[str, Any]:
    found = storage.manifest(stage)["summary"]
    kept = ("removed", "metric", "cost", "agreement", "runner_up")
    return {"blocks": len(found["removed"]), "directory": storage.where(stage)} | {
        key: found[key] for key in kept if key in found
    }


def _group(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the finished trials, those that differ in seeds alone as one, with the mean and the spread over seeds.

    Chosen among those of one recipe, arm, depth and size is the one of the lowest validation loss, never of the best
    score.
    """
    found: dict[str, list[int]] = {}
    for i, entry in enumerate(entries):
        if entry["status"] == "done":
            values = {path: value for path, value in entry["values"].items() if not is_seed(path)}
            key = json.dumps([entry["arm"], entry["blocks"], entry["rows"], values])
            found.setdefault(key, []).append(i)
    groups = []
    for key, members in found.items():
        arm, blocks, rows, values = json.loads(key)
        each = [entries[i] for i in members]
        losses = [entry["validation_loss"] for entry in each if entry["validation_loss"] is not None]
        groups.append(
            {
                "arm": arm,
                "blocks": blocks,
                "rows": rows,
                "values": values,
                "trials": members,
                "mean": _mean([entry["mean"] for entry in each]),
                "recovery": _mean([entry["recovery"] for entry in each]),
                "recovery_sd": _spread([entry["recovery"] for entry in each]),
                "recovery_over_chance": _mean([entry["recovery_over_chance"] for entry in each]),
                "validation_loss": _mean(losses),
                "parameters": each[0]["parameters"],
                "pruned": each[0]["pruned"],
                "limited": any(entry["limited"] for entry in each),
            }
        )
    for group in groups:
        rivals = [other for other in groups if _point(other) == _point(group)]
        group["chosen"] = group is min(
            rivals, key=lambda other: float("inf") if other["validation_loss"] is None else other["validation_loss"]
        )
    return sorted(groups, key=lambda group: (group["blocks"], group["rows"], group["arm"] != "sft"))


def _point(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return group["values"].get(RECIPE), group["arm"], group["blocks"], group["rows"]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _spread(values: Sequence[float | None]) -> float | None:
    """Return the standard deviation over seeds, None for a single one."""
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) > 1 else None


def _compare(groups: Sequence[Mapping[str, Any]], trials: Sequence[Trial], storage: Storage) -> list[dict[str, Any]]:
    """Return, for each depth and size that both arms have, how much better the distilled one does on the same items."""
    found = []
    chosen = {_point(group): group for group in groups if group["chosen"]}
    for recipe, _, blocks, rows in dict.fromkeys((point[0], None, *point[2:]) for point in chosen):
        points = {arm: (recipe, arm, blocks, rows) for arm in ("sft", "distilled")}
        both = {arm: chosen[point] for arm, point in points.items() if point in chosen}
        evaluations = {arm: [trials[i].evaluations for i in group["trials"]] for arm, group in both.items()}
        if compared := one.compare_arms(evaluations, storage):
            seeds = {arm: len(group["trials"]) for arm, group in both.items()}
            found.append({"recipe": recipe, "blocks": blocks, "rows": rows, "seeds": seeds, **compared})
    return found


def _read_drafts(plan: Plan, storage: Storage) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """Return what was measured of each model as a draft, by its id; and the drafts that are still to be tried, where
    their model is there."""
    tried: dict[str, list[dict[str, Any]]] = {}
    untried = []
    for stage in plan.drafts:
        model = stage.inputs["draft"]
        if storage.status(stage) == "done":
            tried.setdefault(model.id, []).append(storage.manifest(stage)["summary"])
        elif storage.status(model) == "done":
            reason = notes.read_failure(storage, stage)
            status = "failed" if reason else "missing"
            untried.append({"draft": name_draft(stage, plan), "status": status, "reason": reason})
    return tried, untried


def _drafts(
    groups: Sequence[Mapping[str, Any]],
    entries: Sequence[Mapping[str, Any]],
    cuts: Sequence[tuple[int, str]],
    tried: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[dict[str, Any]]:
    """Return what each pruned model and each group of trials is worth as a draft of the base, by depth.

    cuts: blocks removed and id of each pruned model.
    """
    models = [({"arm": "pruned", "blocks": n, "rows": None, "values": {}, "chosen": True}, [key]) for n, key in cuts]
    models += [
        (
            {key: group[key] for key in ("arm", "blocks", "rows", "values", "chosen")},
            [entries[i]["id"] for i in group["trials"]],
        )
        for group in groups
    ]
    found = [
        {**who, "drafts": len(each), **_join_drafts(each)}
        for who, ids in models
        if (each := [summary for key in ids for summary in tried.get(key, ())])
    ]
    return sorted(found, key=lambda draft: draft["blocks"])


def _join_drafts(drafts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of a draft, or of several that differ in their seeds: their tokens are counted together.

    Acceptance is that of the largest number of drafted tokens, which is the same for all models; speeds are those of
    the best measured number.
    """
    cost = statistics.fmean(draft["cost"] for draft in drafts)
    found: dict[str, Any] = {"cost": cost}
    for text in ("greedy", "sampled"):
        measured = []
        for same in zip(*(draft[text]["measured"] for draft in drafts), strict=True):
            accepted = [sum(each) for each in zip(*(one["accepted"] for one in same), strict=True)]
            counts = sum(one["drafts"] for one in same), accepted
            measured.append(
                {
                    "tokens": same[0]["tokens"],
                    "speedup": statistics.fmean(one["speedup"] for one in same),
                    "speedup_min": min(one["speedup_min"] for one in same),
                    "speedup_max": max(one["speedup_max"] for one in same),
                    **worth(*counts, cost),
                    "acceptance_error": acceptance_error(*counts),
                }
            )
        counted = {key: measured[-1][key] for key in ("acceptance", "acceptance_error")}
        found[text] = {**best_measured(measured), **counted}
    return found


def _removed(cut: Stage, storage: Storage) -> list[int]:
    return list(storage.manifest(cut)["summary"]["removed"])


def _maps(cuts: Iterable[Stage], storage: Storage) -> list[dict[str, Any]]:
    """Return the distances of every scoring, each with the blocks that were removed by it."""
    found: dict[str, dict[str, Any]] = {}
    for cut in cuts:
        score = cut.inputs["score"]
        if score.id not in found:
            distances = json.loads((storage.files(score, "distances.json") / "distances.json").read_text())
            found[score.id] = {"distances": distances, "removed": []}
        found[score.id]["removed"].append(_removed(cut, storage))
    return list(found.values())


# --- on the terminal ------------------------------------------------------------------------------------------


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print the tables of a sweep."""
    console.print(recovery_table(report))
    if report["comparisons"]:
        console.print(comparison_table(report))
    if report["drafts"]:
        console.print(draft_table(report))
    for model in report["models"]:
        if model["model"] == "pruned":
            console.print(cut_line(model) + (f" {speed_line(model['speed'])}" if model["speed"] else ""))
    for trial in report["trials"]:
        if trial["status"] != "done":
            console.print(f"{trial['status']}: {name_trial(trial)}{': ' + trial['reason'] if trial['reason'] else ''}")
    for draft in report["untried"]:
        console.print(f"{draft['status']}: {draft['draft']}{': ' + draft['reason'] if draft['reason'] else ''}")


def recovery_table(report: Mapping[str, Any]) -> Table:
    """Return the base, the pruned models and the trained ones, those that differ in seeds alone as one line."""
    table = Table(box=box.SIMPLE_HEAD, title=f"{report['sweep']}: quality kept, in %", title_justify="left")
    table.caption, table.caption_justify = caption(report), "left"
    columns = ("blocks", "rows", "model", "seeds", "mean", "recovery", "over chance", "validation loss", "parameters")
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    for model in report["models"]:
        figures = (_number(100 * model["mean"]), _number(model["recovery"]), _number(model["recovery_over_chance"]))
        table.add_row(str(model["blocks"]), "", model["model"], "", *figures, "", _millions(model))
    for group in report["groups"]:
        table.add_row(
            str(group["blocks"]),
            str(group["rows"]),
            name_group(group) + ("" if group["chosen"] else " (not chosen)"),
            str(len(group["trials"])),
            _number(100 * group["mean"]),
            _number(group["recovery"]) + (f" ±{group['recovery_sd']:.1f}" if group["recovery_sd"] is not None else ""),
            _number(group["recovery_over_chance"]),
            "-" if group["validation_loss"] is None else f"{group['validation_loss']:.3f}",
            _millions(group),
        )
    return table


def comparison_table(report: Mapping[str, Any]) -> Table:
    """Return how much better the distilled arm does than sft on the same items, with 95 % intervals."""
    title = "distilled - sft on the same items, in points, with 95 % intervals (paired bootstrap)"
    table = Table("blocks", "rows", box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column in (*report["tasks"], "mean"):
        table.add_column(column, justify="right")
    for compared in report["comparisons"]:
        cells = [interval(compared["tasks"][task]) for task in report["tasks"]]
        rows = " ".join([str(compared["rows"]), *([compared["recipe"]] if compared["recipe"] else [])])
        table.add_row(str(compared["blocks"]), rows, *cells, interval(compared["mean"]))
    return table


DRAFT_COLUMNS = (
    "blocks",
    "rows",
    "draft",
    "text",
    "a",
    "c",
    "drafted",
    "measured speed",
    "expected speed",
    "pays below c",
)
DRAFT_NOTE = (
    "a: a drafted token is accepted where all before it were, ± one standard error as if tokens were independent, "
    "counted with the largest number of drafted tokens; c: a draft's time for a token over the base's. Speeds: with "
    "the best measured number of drafted tokens, the base alone is 1."
)


def draft_table(report: Mapping[str, Any]) -> Table:
    """Return what each model is worth as a draft of the base, greedy and sampled."""
    title = f"{report['sweep']}: as drafts of the base"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", caption=DRAFT_NOTE, caption_justify="left")
    for column in DRAFT_COLUMNS:
        table.add_column(column, justify="left" if column in ("draft", "text") else "right")
    for row in draft_rows(report):
        table.add_row(*row)
    return table


def draft_rows(report: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield a row under DRAFT_COLUMNS for each draft and kind of text."""
    for draft in report["drafts"]:
        for text in ("greedy", "sampled"):
            found = draft[text]
            yield [
                str(draft["blocks"]),
                str(draft["rows"] or ""),
                name_group(draft) + ("" if draft["chosen"] else " (not chosen)"),
                text,
                f"{found['acceptance']:.2f} ±{found['acceptance_error']:.2f}",
                f"{draft['cost']:.2f}",
                str(found["tokens"]),
                ratio(found, "speedup"),
                f"{found['expected_speedup']:.2f}",
                f"{found['break_even_cost']:.2f}",
            ]


def name_group(group: Mapping[str, Any]) -> str:
    """Return the arm, and what else it was trained with."""
    return ", ".join([group["arm"], *(f"{path} {value}" for path, value in group["values"].items())])


def name_trial(trial: Mapping[str, Any]) -> str:
    """Return a trial in words."""
    return f"{trial['blocks']} blocks, {trial['rows']} rows, {name_group(trial)}"


def caption(report: Mapping[str, Any]) -> str:
    """Return what a reader must know to read the figures."""
    first = report["models"][0]["tasks"]
    sizes = ", ".join(f"{task} {score['n']}" for task, score in first.items())
    text = f"± over seeds: one standard deviation. Items: {sizes}."
    if any(model["limited"] for model in report["models"]):
        text = f"LIMITED: scores are of a part of each task, not comparable with published ones. {text}"
    if any(not group["chosen"] for group in report["groups"]):
        text += " Of one arm, depth and size the setting of the lowest validation loss is chosen."
    return text


def as_csv(report: Mapping[str, Any]) -> str:
    """Return one line a trial."""
    values = [path for path in report["axes"] if path not in (DEPTH, SIZE)]
    figures = (
        "mean",
        "recovery",
        "recovery_over_chance",
        "validation_loss",
        "parameters",
        "flops_per_token",
        "seconds",
    )
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    tasks = [column for task in report["tasks"] for column in (task, f"{task}_stderr")]
    drafts = [dict(leaves({"draft": trial["draft"]})) if trial["draft"] else {} for trial in report["trials"]]
    drafted = max(drafts, key=len)
    lines.writerow(["arm", "blocks", "rows", *values, "status", "id", *figures, "limited", *tasks, *drafted, "reason"])
    for trial, draft in zip(report["trials"], drafts, strict=True):
        found = trial.get("tasks", {})
        scores = [found[task][field] if found else None for task in report["tasks"] for field in ("value", "stderr")]
        lines.writerow(
            [
                *(trial[key] for key in ("arm", "blocks", "rows")),
                *(trial["values"].get(path) for path in values),
                *(trial.get(key) for key in ("status", "id", *figures, "limited")),
                *scores,
                *(draft.get(path) for path in drafted),
                trial["reason"],
            ]
        )
    return file.getvalue()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _millions(model: Mapping[str, Any]) -> str:
    return f"{model['parameters'] / 1e6:.1f}M"

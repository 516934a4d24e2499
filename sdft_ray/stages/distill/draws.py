"""Which sample of a row is drawn next, and which one it keeps: functions of what was generated already.

In: rows, and the lines that a ledger holds of them. Out: the next draw, or the selected response. Other settings select
again and generate nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sdft_ray.core.prompts import rewriting_template
from sdft_ray.core.rows import Row
from sdft_ray.core.selection import COMPLETE, Rules, reason_not_to_rewrite, select_response
from sdft_ray.data.checkers import CHECKERS
from sdft_ray.results import DistilledRow
from sdft_ray.spec.recipe import Distill
from sdft_ray.spec.section import Section
from sdft_ray.spec.sources import Filters
from sdft_ray.store.ledger import Line

_NOT_ASKED = Line("", 0, "", "", 0, 0, 0)


class Source(Section):
    """How the rows of one of several sources are rewritten and judged."""

    unhashed, optional = ("name",), ("filters",)
    name: str
    """For people."""
    answer: str
    template: str | None
    filters: Filters | None = None
    """Where they are not the common ones."""


class Settings(Distill):
    """How rows are rewritten and judged."""

    optional = (*Distill.optional, "sources")
    answer: str | None
    """How their answers are checked; None where each source has its own way."""
    rows: int | None
    """How many training rows, the first ones; all where absent."""
    sources: tuple[Source, ...] | None = None
    """Where there are several: each with the answers, template and filters of its own."""

    def answer_of(self, origin: int) -> str:
        """Return how the answers of a source's rows are checked."""
        answer = self.sources[origin].answer if self.sources else self.answer
        assert answer, "one source has its answer here"
        return answer

    def filters_of(self, origin: int) -> Filters:
        """Return the filters of a source's rewrites."""
        own = self.sources[origin].filters if self.sources else None
        return own or self.filters


def instruction_template(settings: Settings, origin: int = 0) -> str:
    """Return the rewriting instruction of a source's rows: its own, else the one that suits how they are checked."""
    own = settings.sources[origin].template if settings.sources else settings.template
    return rewriting_template(settings.answer_of(origin), own)


def instruction_templates(settings: Settings) -> list[str]:
    """Return the rewriting instructions of all sources, each once."""
    return list(dict.fromkeys(instruction_template(settings, i) for i, _ in enumerate(settings.sources or [None])))


def rules_of(settings: Settings, rows: Iterable[Row]) -> dict[int, Rules]:
    """Return the rules that rewrites are judged by, by the source of a row."""
    return {
        origin: Rules(
            CHECKERS.get(settings.answer_of(origin)), settings.filters_of(origin).model_dump(), settings.strip_thinking
        )
        for origin in {row.origin for row in rows}
    }


def select_rows(
    rows: Sequence[Row], generations: Mapping[str, Sequence[Line]], settings: Settings
) -> list[DistilledRow]:
    """Return every row with its selected response.

    rows in = rows out, in the same order: each is trained on, with the first of its samples that passes, or with its
    reference. A function of what is there already: other settings select again and generate nothing.
    """
    rules, selected = rules_of(settings, rows), []
    for row in rows:
        samples = generations[row.id]
        chosen = select_response(row, samples, rules[row.origin])
        made = samples[chosen.sample] if samples else _NOT_ASKED
        selected.append(
            DistilledRow(
                **row._asdict(),
                **vars(chosen),
                generated=made.text,
                finish_reason=made.finish_reason,
                prompt_tokens=made.prompt_tokens,
                generated_tokens=made.tokens,
                sampling_seed=made.sampling_seed,
            )
        )
    return selected


def next_draw(row: Row, lines: Sequence[Line], samples: int, rules: Rules, first: int = 0) -> tuple[int, int] | None:
    """Return the sample of a row that is to be drawn next and how often that failed; None where nothing is left.

    One of `samples` is drawn only where none before it passes. `first`: the samples before it are known not to pass.
    """
    if reason_not_to_rewrite(row):
        return None
    for sample in range(first, samples):
        mine = [line for line in lines if line.sample == sample]
        complete = [line for line in mine if line.finish_reason in COMPLETE]
        if not complete:
            return sample, len(mine)
        # Whether the last one passes decides nothing here, and selection is most of what a row costs.
        if sample == samples - 1 or keeps(row, complete[:1], rules):
            return None
    return None


def keeps(row: Row, lines: Sequence[Line], rules: Rules) -> bool:
    """Return whether a row keeps one of its rewrites."""
    return select_response(row, lines, rules).reason == "kept"


def best_lines(lines: Sequence[Line], count: int) -> list[Line]:
    """Return one line for each of the first `count` samples of a row, in order: what was generated, else an error."""
    best: dict[int, Line] = {}
    for line in lines:
        if line.sample >= count:  # of a recipe that drew more
            continue
        if line.sample not in best or line.finish_reason in COMPLETE:
            best[line.sample] = line
    return [best[sample] for sample in sorted(best)]

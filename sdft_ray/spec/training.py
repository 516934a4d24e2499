"""How models are fine-tuned: the common settings, and what an arm changes of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from sdft_ray.spec.section import Name, Section, Seed


class Lora(Section):
    """Low-rank adapters (peft)."""

    rank: int = Field(8, gt=0)
    """Rank of the two matrices of an adapter."""
    alpha: int = Field(16, gt=0)
    """Numerator of the adapters' scale, which is alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that an input of an adapter is set to 0. The masks depend on seed, step and row alone, so no
    compute setting and no kill changes them."""
    targets: Literal["all-linear"] | Annotated[tuple[Name, ...], Field(min_length=1)] = "all-linear"
    """`all-linear` (every linear layer but the head, and in some mixtures those beside the experts) or the names of
    modules. A line of the log says which got an adapter."""


class Train(Section):
    """How the pruned model is fine-tuned; the same for every arm unless one overrides it."""

    unhashed, optional = ("max_too_long_fraction",), ("scope",)

    method: Literal["lora", "full"] = "lora"
    """What is trained: adapters, which are merged into the weights afterwards (`lora`), or all weights (`full`)."""
    lora: Lora = Lora()
    """The adapters; used where method is lora."""
    scope: Literal["all", "beside_cut", "last"] = "all"
    """Where weights or adapters are trained: everywhere; in the blocks on both sides of each gap that the removed
    ones leave (after arXiv 2510.23652); or in the last three blocks (after arXiv 2411.15558)."""
    rows: int | None = Field(None, gt=0)
    """Training rows: a prefix of the one seeded order; all where absent."""
    lr: float = Field(1e-4, gt=0)
    """Learning rate of AdamW at its highest, after the warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """The learning rate after the warm-up: down to 0 along a cosine or a line, or constant."""
    warmup_fraction: float = Field(0.03, ge=0, lt=1)
    """Fraction of all optimizer steps in which the learning rate rises linearly to lr."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """A longer gradient of a step is scaled down to this norm."""
    epochs: int = Field(1, gt=0)
    """Passes over the training rows."""
    global_batch_size: int = Field(16, gt=0)
    """Rows of one optimizer step, over all workers."""
    max_tokens: int = Field(1024, gt=1)
    """Tokens of the longest sequence (prompt and response)."""
    too_long: Literal["leave_out", "truncate"] = "leave_out"
    """Longer rows are left out, or keep their first max_tokens tokens (and are left out where these are all prompt).
    Both are counted."""
    max_too_long_fraction: float = Field(0.01, ge=0, le=1)
    """The command stops where a larger fraction of rows is over max_tokens. A gate, as in `distill`."""
    validate_every_steps: int = Field(10, gt=0)
    """Optimizer steps between two measurements of the validation loss."""
    patience: int | None = Field(None, gt=0)
    """Validations without a new lowest loss after which training stops; it goes on to the end where absent."""
    keep: Literal["last", "best"] = "last"
    """Which weights become the model: those of the last step, or those of the lowest validation loss."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of forward and backward pass."""
    seed: Seed = 0
    """Seed of the order of rows, of fresh adapters, and of dropout."""

    def count_steps(self, rows: int) -> int:
        """Return the optimizer steps over so many rows, if nothing stops them early; the last one may be short."""
        return -(-rows * self.epochs // self.global_batch_size)


class ArmOverrides(Section):
    """Settings of one arm that replace the common ones: any field of `train` but its rows."""

    method: Literal["lora", "full"] | None = None
    """Instead of train.method."""
    lora: Lora | None = None
    """Instead of train.lora, as a whole: fields that are left out take their defaults."""
    lr: float | None = Field(None, gt=0)
    """Instead of train.lr."""
    schedule: Literal["cosine", "linear", "constant"] | None = None
    """Instead of train.schedule."""
    warmup_fraction: float | None = Field(None, ge=0, lt=1)
    """Instead of train.warmup_fraction."""
    weight_decay: float | None = Field(None, ge=0)
    """Instead of train.weight_decay."""
    max_grad_norm: float | None = Field(None, gt=0)
    """Instead of train.max_grad_norm."""
    epochs: int | None = Field(None, gt=0)
    """Instead of train.epochs."""
    global_batch_size: int | None = Field(None, gt=0)
    """Instead of train.global_batch_size."""


class Finalists(Section):
    """The best cuts by the loss, each patched as the recipe says and briefly trained before one is chosen."""

    count: int = Field(ge=2)
    """How many cuts; a plain number in place of this section is the same."""
    rows: int = Field(64, gt=0)
    """Training rows of each: the first ones, with their references, once; the same for every size, arm and seed."""
    lr: float = Field(1e-4, gt=0)
    """Learning rate; the other settings are those of `train`."""

    def settings(self, train: Train) -> Train:
        """Return how each is trained in a recipe whose models are trained so."""
        own = {"rows": self.rows, "lr": self.lr, "epochs": 1, "seed": 0, "patience": None, "keep": "last"}
        return train.model_copy(update=own)


def _as_section(given: Any) -> Any:
    return {"count": given} if isinstance(given, int) else given


OneOfFinalists = Annotated[
    Finalists, BeforeValidator(_as_section, json_schema_input_type=Annotated[int, Field(ge=2)] | Finalists)
]


class Soft(Section):
    """How the base's own distribution is the target of each token, instead of the token."""

    temperature: float = Field(1.0, gt=0)
    """Temperature at which the distributions of base and pruned model are compared; higher ones weigh unlikely tokens
    more."""
    cross_entropy: float = Field(0.0, ge=0, lt=1)
    """Share of the loss that is the cross-entropy of the rewrite's own tokens."""
    likeliest: int | None = Field(None, gt=0)
    """Store the base's distribution once, over this many of its likeliest tokens and all others together; where absent
    the base runs beside the pruned model in every step, over the whole vocabulary."""


class SoftArm(ArmOverrides, Soft):
    """The settings of an arm with soft targets."""

    @property
    def soft(self) -> Soft:
        """Its part that other arms do not have."""
        return Soft(**{name: getattr(self, name) for name in Soft.model_fields})


Arm = Literal["sft", "distilled", "logits"]
ARMS: tuple[str, ...] = get_args(Arm)
"""Every arm, in the order of reports. The second trains on rewrites; the third on these, too, with soft targets."""


class Arms(Section):
    """Which models are trained: on the references (`sft`), on the rewrites (`distilled`), or towards the unpruned
    model's distribution on the rewrites (`logits`)."""

    optional = ("logits",)

    sft: ArmOverrides | None = None
    """Train on the references, the baseline; {} trains it with the settings of `train`."""
    distilled: ArmOverrides | None = None
    """Train on the rewrites of the unpruned model; {} trains it with the settings of `train`."""
    logits: SoftArm | None = None
    """Train towards the unpruned model's distribution at each token of its rewrites; {} trains it with the settings
    of `train`."""

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.names:
            raise ValueError(f"names no arm. Give at least one of {', '.join(ARMS)}")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The arms that are trained, the baseline first."""
        return tuple(name for name in ARMS if getattr(self, name) is not None)

    @property
    def need_rewrites(self) -> bool:
        """Whether an arm is trained on the rewrites."""
        return any(is_on_rewrites(name) for name in self.names)


def is_on_rewrites(arm: str) -> bool:
    """Return whether an arm is trained on the rewrites, not on the references."""
    return arm != "sft"

"""The frozen base as the teacher of soft targets: beside the student in a worker, or alone.

In: the base's directory. Out: its logits at the trained positions of packed rows. Under LoRA most of the student's
weights are the base's own and frozen: the teacher then reads the student's, and holds only the removed blocks and what
a patch changed by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft_ray.core.surgery import rename_tensor
from sdft_ray.models.exporting import load_causal
from sdft_ray.spec.training import Soft

if TYPE_CHECKING:
    import torch

    from sdft_ray.core.packing import Packed


class Teacher:
    """A model that is not trained."""

    def __init__(self, directory: Path, dtype: str, device: Any) -> None:
        from sdft_ray.core.rowwise import keep_within_rows

        model = load_causal(directory, dtype)
        self.model = model.to(device).requires_grad_(False).eval()
        self._rows = keep_within_rows(self.model)

    def logits(self, packed: Packed) -> torch.Tensor:
        """Return the logits (K, V) at the trained positions of packed rows."""
        import torch

        self._rows.starts = packed.starts
        with torch.no_grad():  # not inference mode: what it makes may not stand beside what has a gradient
            return packed.logits(self.model)

    def share(self, student: Any, removed: Sequence[int]) -> int:
        """Read the student's frozen weights where they are the same; return how many parameters stay its own.

        Under ZeRO-3 a student's weights are spread over the workers, and nothing can be shared.
        """
        import torch

        frozen = {
            name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter
            for name, parameter in student.named_parameters()
            if not parameter.requires_grad
        }
        own = 0
        for name, parameter in self.model.named_parameters():
            other = frozen.get(rename_tensor(name, removed) or "")
            if other is not None and other.shape == parameter.shape and torch.equal(other, parameter):
                parameter.data = other.data
            else:
                own += parameter.numel()
        return own


class Softener:
    """The loss of packed rows with soft targets: those of a teacher, else those that the rows bring."""

    def __init__(self, soft: Soft, teacher: Teacher | None) -> None:
        self.soft, self.teacher = soft, teacher

    def __call__(self, logits: Any, packed: Packed) -> Any:
        """Return the losses (K) of the trained tokens; logits: (K, V)."""
        from sdft_ray.core.soft_targets import soft_loss

        given: Any = self.teacher.logits(packed) if self.teacher else packed.likeliest
        assert given is not None, "rows without a teacher bring its likeliest tokens"
        tokens, soft = packed.targets.to(logits.device), self.soft
        return soft_loss(logits, given.to(logits.device), tokens, soft.temperature, soft.cross_entropy)

"""Whether the endpoints that are to rewrite rows are there: before anything is built, and not hours later.

In: the stages that are still to be built. Out: nothing, or a UserError in one line.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sdft_ray.endpoint import Client
from sdft_ray.spec.sources import ServedModel
from sdft_ray.stages import distill
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage


def require_endpoints(stages: Iterable[Stage[Any]], storage: Storage | None = None) -> None:
    """Raise UserError unless each endpoint is there and serves its model, in whose context the new tokens fit.

    storage: where generations lie; an endpoint that has given some is not asked, for it may not be needed any more.
    """
    served: dict[str, tuple[ServedModel, int]] = {}
    for stage in stages:
        if not isinstance(settings := stage.settings, distill.Settings):
            continue
        if not isinstance(teacher := settings.teacher, ServedModel):
            continue
        if storage is None or not distill.has_generated(stage, storage):
            key = teacher.model_dump_json()
            _, others = served.get(key, (teacher, 0))
            served[key] = teacher, max(others, settings.max_new_tokens)
    for teacher, new_tokens in served.values():
        Client(teacher).require_model(new_tokens)

"""What a refused call says."""

import pytest

from sdft_ray.errors import UserError


def complaint(call, *arguments, kind: type[Exception] = UserError, **named) -> str:
    """Return the message of the error that a call raises."""
    with pytest.raises(kind) as error:
        call(*arguments, **named)
    return str(error.value)

"""Keeps libraries' progress bars and hints out of the user's terminal; errors still come as exceptions."""

from __future__ import annotations


def quiet_transformers() -> None:
    """Switch off the progress bars and advice of transformers in this process."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

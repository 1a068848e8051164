"""Types of command-line arguments that several commands have."""

from __future__ import annotations

import argparse


def whole_number(text: str, most: int | None = None) -> int:
    """A number from 1 to ``most``.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1 or (most is not None and number > most):
        bounds = ">= 1" if most is None else f"from 1 to {most}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bounds}")
    return number


def whole_numbers(text: str, most: int | None = None) -> list[int]:
    """Numbers from 1 to ``most``, with commas between them."""
    return [whole_number(part, most) for part in text.split(",")]

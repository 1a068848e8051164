"""Types of command-line arguments that several commands have."""

from __future__ import annotations

import argparse


def whole_number(text: str) -> int:
    """A number from 1.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
    return number


def whole_numbers(text: str) -> list[int]:
    """Numbers from 1, with commas between them."""
    return [whole_number(part) for part in text.split(",")]

"""Command-line arguments, and types of them, that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path


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


def add_counts_file(parser: argparse.ArgumentParser) -> None:
    """Declares ``--output`` of a command that writes a file of counts."""
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("counts.safetensors"),
        metavar="FILE",
        help="file of counts to write, 4 bytes a row; replaced if it exists (default: %(default)s)",
    )

"""Command-line arguments, and types of them, that several commands have."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def whole_number(text: str, most: int | None = None) -> int:
    """A number from 1 to ``most``."""
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


def number_below(text: str, end: float = math.inf) -> float:
    """A number above 0 and below ``end``."""
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number < end:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and below {end}")
    return number


def names(text: str) -> list[str]:
    """Names with commas between them."""
    found = [part.strip() for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name")
    return found


def one_each(option: str, values: Sequence[T], what: str, of: Sequence[str]) -> dict[str, T]:
    """The values of an option by name, where one stands for all of them, or each has its own.

    Raises:
        ValueError: another number of values.
    """
    if len(values) not in (1, len(of)):
        raise ValueError(
            f"{option}: {len(values)} for {len(of)} {what} ({', '.join(of)}): give one for each, "
            "or one for all."
        )
    return dict(zip(of, values if len(values) > 1 else [*values] * len(of), strict=True))


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

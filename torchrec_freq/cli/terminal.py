"""What the commands print: names from files may hold anything, also what a terminal would obey."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def visible(text: str) -> str:
    r"""``text`` with escapes in place of what cannot be printed, a line break too.

    >>> print(visible("a\x1b[2J\n\u202eb"))
    a\x1b[2J\n\u202eb
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def progress(total: int, unit: str) -> tqdm[Any]:
    """A progress bar, where there is a terminal."""
    return tqdm(total=total, unit=f" {unit}", unit_scale=True, disable=None)

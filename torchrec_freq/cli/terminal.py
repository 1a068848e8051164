"""What the commands print: names from files may hold anything, also what a terminal would obey."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm


def visible(text: str) -> str:
    r"""``text`` with escapes in place of what cannot be printed, a line break too.

    >>> print(visible("a\x1b[2J\n\u202eb"))
    a\x1b[2J\n\u202eb
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class VisibleFormatter(logging.Formatter):
    """Formats log messages with every line :func:`visible`."""

    def format(self, record: logging.LogRecord) -> str:
        """As the base class says."""
        return "\n".join(map(visible, super().format(record).split("\n")))


def progress(total: int, unit: str) -> tqdm[Any]:
    """A bar of so many units, where there is a terminal."""
    return tqdm(total=total, unit=f" {unit}", unit_scale=True, disable=None)


def as_json(records: Sequence[Any]) -> str:
    """Dataclasses as a list of objects."""
    return json.dumps([dataclasses.asdict(record) for record in records], indent=1)

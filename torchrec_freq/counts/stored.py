"""Counts where they are stored, block by block: in a file of counts, or in a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from torchrec_freq.counts.dcp_metadata import Checkpoint
from torchrec_freq.counts.files import CountsReader
from torchrec_freq.counts.state import (
    COUNT_CEILING,
    ROW_COUNTER,
    STATE_FORMAT,
    TABLE_TOTALS,
    TOTALS,
    are_totals,
    check_counts,
    table_names,
    totals_of,
)

Blocks = Iterator[tuple[int, Tensor]]
"""First row of a block, and its counts."""


@dataclass(frozen=True)
class StoredTable:
    """A table whose counts are stored.

    Attributes:
        name: as :func:`torchrec_freq.row_counts` gives it.
        rows: number of rows.
        blocks: reads the counts.
        totals: float64 [4], see :mod:`torchrec_freq.counts.state`; None where unknown.
        squares: of a file of counts that has them, from which :meth:`counted` makes totals.
    """

    name: str
    rows: int
    blocks: Callable[[], Blocks]
    totals: Tensor | None = None
    squares: float | None = None

    def counted(self, count: float, rows_seen: float) -> StoredTable:
        """This table, once the sum of its counts and the rows with a count are known."""
        if not self.squares or not count:
            return self
        return replace(self, totals=totals_of(self.squares, count, rows_seen))


def open_stored(path: Path) -> list[StoredTable]:
    """The tables in a file of counts, or in a checkpoint of ``torch.distributed.checkpoint``.

    Only what describes them is read; memory holds a block of the counts at a time, some 16 MB of a
    file, or twice a shard as a rank saved it of a checkpoint. It needs no process group, and runs
    nothing of what is in the folder.

    Args:
        path: a file of :func:`torchrec_freq.save_counts`, or a folder with ``.metadata``.

    Raises:
        ValueError: truncated, damaged, or without counts; the message names the path.
        OSError: missing, or cannot be read.
    """
    if path.is_dir():
        # In the order of their names, whatever plan saved them: cat_2 before cat_10.
        return sorted(_of_checkpoint(Checkpoint(path)), key=lambda table: natural(table.name))
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder.")
    file = CountsReader(path)
    return [
        StoredTable(name, rows, partial(file.blocks, name), squares=file.squares.get(name))
        for name, rows in file.rows.items()
    ]


def natural(name: str) -> list[tuple[int, str]]:
    """Key that sorts numbers in names by their value."""
    parts = re.split(r"(\d+)", name)  # every second one is a number
    return [
        (len(number := part.lstrip("0")), number) if index % 2 else (0, part)
        for index, part in enumerate(parts)
    ]


def _of_checkpoint(checkpoint: Checkpoint) -> Iterator[StoredTable]:
    folder, stems = checkpoint.folder, checkpoint.stems(f".{ROW_COUNTER}")
    if not stems:
        raise ValueError(
            f"{folder} is a checkpoint without row counters: it has no key that ends in "
            f"'.{ROW_COUNTER}'. Save the optimizer's state too: "
            '{"optimizer": model.fused_optimizer.state_dict()}.'
        )
    for stem, name in zip(stems, table_names(stems), strict=True):
        key, key_of_totals = f"{stem}.{ROW_COUNTER}", f"{stem}.{TABLE_TOTALS}"
        parts = checkpoint.parts(key, (torch.int32,), "is no tensor of counts [num_embeddings]")
        totals = torch.zeros(TOTALS, dtype=torch.float64)
        if key_of_totals in checkpoint.stored:  # not in a checkpoint of version 0.1
            checkpoint.load(key_of_totals, totals)
            if not are_totals(totals):
                raise ValueError(f"{folder} is damaged: {key_of_totals} is {totals.tolist()}.")
        known = totals[0] == STATE_FORMAT and min(totals[2:]) > 0
        yield StoredTable(
            name,
            rows=sum(rows for _, rows in parts),
            blocks=partial(_blocks, checkpoint, key, name, parts),
            totals=totals if known else None,
        )


def _blocks(checkpoint: Checkpoint, key: str, name: str, parts: list[tuple[int, int]]) -> Blocks:
    for first, rows in parts:
        counts_R = torch.empty(rows, dtype=torch.int32)
        checkpoint.load(key, counts_R, first, size=sum(rows for _, rows in parts))
        # A counter may be above the ceiling until it is clamped.
        counts_R.clamp_(max=COUNT_CEILING)
        try:
            check_counts(name, counts_R)
        except ValueError as error:
            raise ValueError(f"{checkpoint.folder}: {error} The checkpoint is damaged.") from error
        yield first, counts_R

"""What tables have learned, where it is stored: in a file of counts, or in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from torchrec_freq.counts.adagrad import check_sums
from torchrec_freq.counts.dcp_files import Checkpoint, TableKeys
from torchrec_freq.counts.files import CountsReader
from torchrec_freq.counts.state import (
    COUNT_CEILING,
    MOMENTUM,
    ROW_COUNTER,
    ROW_COUNTER_AGE,
    STATE_FORMAT,
    TABLE_TOTALS,
    TOTALS,
    TableState,
    are_totals,
    check_counts,
    join_columns,
)

Blocks = Iterator[tuple[int, Tensor | None, Tensor | None]]
"""First row of a block, its counts, int32, and its sums of squares, float32; None where unknown."""

BLOCK_ROWS: Final = 1 << 22
"""Rows of a block."""

_FORMAT_2: Final = 2
"""Version 0.2's: a row's sum of squares is its share of the table's, by counts."""

_FLOATS: Final = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_SAVE_BOTH: Final = (
    'Save both: {"model": model.state_dict(), "optimizer": model.fused_optimizer.state_dict()}.'
)


@dataclass(frozen=True)
class StoredTable:
    """A table whose counts, or whose sums of squares, are stored.

    Attributes:
        name: as :func:`torchrec_freq.row_counts` gives it.
        rows: number of rows.
        blocks: reads them, ``BLOCK_ROWS`` rows after another. Where the columns are split, a row's
            sum is that of :func:`torchrec_freq.counts.state.join_columns`.
        totals: float64 [4], see ``TABLE_TOTALS``; None where nothing has been learned, or it is not
            known. The number of steps is 0 where it is not known.
    """

    name: str
    rows: int
    blocks: Callable[[], Blocks]
    totals: Tensor | None = None


def open_stored(path: Path) -> list[StoredTable]:
    """The tables in a file of counts, or in a checkpoint of ``torch.distributed.checkpoint``.

    A checkpoint's are those trained with FrequencySGD or with TorchRec's row-wise Adagrad, under
    any plan; tables of other optimizers are left out. Only what describes them is read here, and
    memory holds a block at a time. It needs no process group, and runs nothing that is in the
    folder.

    Args:
        path: a file of :func:`torchrec_freq.save_counts`, or a folder with ``.metadata``.

    Raises:
        ValueError: truncated, damaged, or without counts and sums; the message names the path.
        OSError: missing, or cannot be read.
    """
    if path.is_dir():
        return [
            StoredTable(t.name, t.rows, t.blocks, t.totals if t.totals[2] else None)
            for t in _tables(path)
        ]
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder.")
    file = CountsReader(path)
    return [_of_file(file, name) for name in file.rows]


def read_table_states(path: str | Path) -> dict[str, TableState]:
    """What the tables of a checkpoint have learned, for :func:`torchrec_freq.load_table_states`.

    The checkpoint holds the state of the model and of its fused optimizer, saved by
    ``torch.distributed.checkpoint`` under any plan, on any number of ranks. The optimizer is
    FrequencySGD, from version 0.2 on, or TorchRec's row-wise Adagrad. The latter has sums of
    squares only: counts and totals are 0 then. Tables of other optimizers are left out.

    Args:
        path: the folder, with ``.metadata``.

    Returns:
        table name -> the state of the whole table. Memory holds them all.

    Raises:
        ValueError: not a checkpoint, damaged, or without such a state; the message names the
            folder, and what is missing.
        OSError: it cannot be read.
    """
    return {table.name: table.state() for table in _tables(Path(path))}


@dataclass(frozen=True)
class _Table:
    """A table of a checkpoint: one of FrequencySGD, or of row-wise Adagrad."""

    checkpoint: Checkpoint
    keys: TableKeys
    rows: int
    widths: tuple[int, ...]
    totals: Tensor

    @property
    def name(self) -> str:
        return self.keys.name

    def blocks(self) -> Blocks:
        for first in range(0, self.rows, BLOCK_ROWS):
            rows_R = torch.arange(first, min(first + BLOCK_ROWS, self.rows))
            counts_R, sums_RS = self._read(rows_R)
            if sums_RS is not None and sums_RS.shape[1] > 1:
                sums_RS = join_columns(sums_RS, self.widths)
            yield first, counts_R, None if sums_RS is None else sums_RS.flatten()

    def state(self) -> TableState:
        folder, states = self.checkpoint.folder, self.keys.states
        if ROW_COUNTER in states and self.totals[0] != STATE_FORMAT:
            raise ValueError(
                f"{folder} was saved by torchrec_freq 0.1: table {self.name!r} has counts but no "
                f"{TABLE_TOTALS}. Read the counts with `python -m torchrec_freq report`, or train "
                "anew."
            )
        counts_R, sums_RS = self._read(torch.arange(self.rows))
        if counts_R is None:
            counts_R = torch.zeros(self.rows, dtype=torch.int32)
        if sums_RS is None:
            sums_RS = torch.zeros(self.rows, 1)
        age = int(self.checkpoint.read(states[ROW_COUNTER_AGE])) if ROW_COUNTER_AGE in states else 0
        widths = self.widths if sums_RS.shape[1] > 1 else ()
        return TableState(counts_R, sums_RS, self.totals, age, widths)

    def _read(self, rows_R: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Counts int32 [rows], and sums float32 [rows, column shards]."""
        states, read = self.keys.states, self.checkpoint.read
        counts_R = sums_RS = None
        if ROW_COUNTER in states:
            # A counter may be above the ceiling until it is clamped.
            counts_R = read(states[ROW_COUNTER], rows_R).clamp_(max=COUNT_CEILING)
        if MOMENTUM in states:
            shards = range(max(len(self.widths), 1))
            sums = [read(states[MOMENTUM], rows_R + self.rows * s).float() for s in shards]
            sums_RS = torch.stack(sums, dim=1)
        elif counts_R is not None and self.totals[2]:
            sums_RS = (counts_R * float(self.totals[1] / self.totals[2])).float().unsqueeze(1)
        try:
            if counts_R is not None:
                check_counts(self.name, counts_R)
            for sums_R in () if sums_RS is None else sums_RS.unbind(1):
                check_sums(self.name, sums_R)
        except ValueError as error:
            raise ValueError(f"{self.checkpoint.folder}: {error}") from error
        return counts_R, sums_RS


def _tables(folder: Path) -> list[_Table]:
    checkpoint = Checkpoint(folder)
    found = [_table(checkpoint, keys) for keys in checkpoint.tables()]
    tables = [table for table in found if table is not None]
    if not tables:
        raise ValueError(
            f"{folder} is a checkpoint without the state of FrequencySGD or row-wise Adagrad: it "
            f"has no key that ends in .{ROW_COUNTER} or .{MOMENTUM}. {_SAVE_BOTH}"
        )
    return tables


def _table(checkpoint: Checkpoint, keys: TableKeys) -> _Table | None:
    """The table of some keys, whose sizes fit each other; None for one of another optimizer."""
    counter, momentum = keys.states.get(ROW_COUNTER), keys.states.get(MOMENTUM)
    if counter is None and (momentum is None or checkpoint.dimensions(momentum) != 1):
        return None
    if counter is None and keys.weight is None:
        raise ValueError(
            f"{checkpoint.folder} has the sums of table {keys.name!r} but not its weights, which "
            f"say how its columns were sharded. {_SAVE_BOTH}"
        )
    rows: dict[str, float] = {}
    widths: tuple[int, ...] = ()
    if keys.weight is not None:
        rows[keys.weight], widths = (
            checkpoint.size(keys.weight, 2)[0],
            checkpoint.widths(keys.weight),
        )
    if counter is not None:
        rows[counter] = checkpoint.size(counter, 1, torch.int32)[0]
    if momentum is not None:  # TorchRec lays the sums of column shards behind each other
        shards = max(len(widths), 1)
        rows[momentum] = checkpoint.size(momentum, 1, *_FLOATS)[0] / shards
    if len(set(rows.values())) > 1:
        raise ValueError(
            f"{checkpoint.folder}: table {keys.name!r} has {len(widths)} column shards, and these "
            f"numbers of rows: {rows}. They are not of one run."
        )
    totals = _totals(checkpoint, keys.states.get(TABLE_TOTALS), is_adagrad=counter is None)
    return _Table(checkpoint, keys, int(next(iter(rows.values()))), widths, totals)


def _totals(checkpoint: Checkpoint, key: str | None, is_adagrad: bool) -> Tensor:
    """float64 [4], the first one 0 where they are of version 0.1."""
    totals = torch.zeros(TOTALS, dtype=torch.float64)
    totals[0] = STATE_FORMAT if is_adagrad else 0
    if key is None:
        return totals
    stored = torch.zeros(0)
    if checkpoint.size(key, 1, torch.float64) == totals.shape:
        stored = checkpoint.read(key)
    if stored.shape != totals.shape or not are_totals(stored):
        raise ValueError(f"{checkpoint.folder} is damaged: {key} is {stored.tolist()}.")
    if stored[0] > STATE_FORMAT:
        raise ValueError(
            f"{checkpoint.folder} is of a later version: {key} is {stored.tolist()}. Upgrade "
            "torchrec_freq."
        )
    if stored[0] == STATE_FORMAT:
        return stored
    if stored[0] == _FORMAT_2:  # its last number is no number of steps
        totals[:3] = stored[:3]
        totals[0] = STATE_FORMAT
    return totals


def _of_file(file: CountsReader, name: str) -> StoredTable:
    """A table of a file of counts. Where its squares are there, its counts are read here once."""
    squares, totals, per_count = file.squares.get(name), None, None
    if squares and (count := sum(int(counts_R.sum()) for _, counts_R in file.blocks(name))):
        totals = torch.tensor([STATE_FORMAT, squares, count, 0], dtype=torch.float64)
        per_count = squares / count

    def blocks() -> Blocks:
        for first, counts_R in file.blocks(name, BLOCK_ROWS):
            yield first, counts_R, None if per_count is None else (counts_R * per_count).float()

    return StoredTable(name, file.rows[name], blocks, totals)

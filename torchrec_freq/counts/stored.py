"""What tables have learned, where it is stored: in a file of counts, or in a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from torchrec_freq.counts.conversion import with_sums_of_counts
from torchrec_freq.counts.dcp_files import Checkpoint, TableKeys
from torchrec_freq.counts.files import CountsReader
from torchrec_freq.counts.state import (
    COUNT_CEILING,
    MOMENTUM,
    OLD_FORMAT,
    ROW_COUNTER,
    ROW_COUNTER_AGE,
    STATE_FORMAT,
    TABLE_TOTALS,
    TOTALS,
    TableState,
    are_totals,
    check_counts,
    totals_of,
)

Blocks = Iterator[tuple[int, Tensor | None, Tensor | None]]
"""First row of a block, its counts, int32, and its sums of squares, float32; None where unknown."""

BLOCK_ROWS: Final = 1 << 20
"""Rows of a block."""

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
            sum is that of :meth:`torchrec_freq.TableState.row_sums`.
        totals: float64 [4], see ``TABLE_TOTALS``; of version 0.2's, only the format and the sums
            mean the same. None where nothing has been learned, or it is not known.
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
            StoredTable(t.keys.name, t.rows, t.blocks, t.totals if t.totals[2] else None)
            for t in _tables(path)
        ]
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder.")
    file = CountsReader(path)
    return [_of_file(file, name) for name in file.rows]


def read_table_states(path: str | os.PathLike[str]) -> dict[str, TableState]:
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
    return {table.keys.name: table.state() for table in _tables(Path(path))}


@dataclass(frozen=True)
class _Table:
    """A table of a checkpoint: one of FrequencySGD, or of row-wise Adagrad."""

    checkpoint: Checkpoint
    keys: TableKeys
    rows: int
    widths: tuple[int, ...]
    totals: Tensor
    age: int

    def blocks(self) -> Blocks:
        has_counts = ROW_COUNTER in self.keys.states
        has_sums = MOMENTUM in self.keys.states or bool(self.totals[0] == OLD_FORMAT)
        for first, state in self._parts():
            counts_R = state.counts if has_counts else None
            yield first, counts_R, state.row_sums() if has_sums else None

    def state(self) -> TableState:
        if self.totals[0] == 0:
            raise ValueError(
                f"{self.checkpoint.folder} was saved by torchrec_freq 0.1: {self.keys.name!r} has "
                f"no {TABLE_TOTALS}, so the rates of its rows are not known. Train it again."
            )
        parts = [state for _, state in self._parts()]
        counts, sums = ([getattr(part, name) for part in parts] for name in ("counts", "sums"))
        return replace(parts[0], counts=torch.cat(counts), sums=torch.cat(sums))

    def _parts(self) -> Iterator[tuple[int, TableState]]:
        """First row, and the state of ``BLOCK_ROWS`` rows; 0 where it has no counts or sums."""
        states, read = self.keys.states, self.checkpoint.read
        shards = range(len(self.widths) or 1)
        for first in range(0, self.rows, BLOCK_ROWS):
            rows_R = torch.arange(first, min(first + BLOCK_ROWS, self.rows))
            counts_R = torch.zeros(len(rows_R), dtype=torch.int32)
            sums_RS = torch.zeros(len(rows_R), len(shards))
            if ROW_COUNTER in states:
                # A counter may be above the ceiling until it is clamped.
                counts_R = read(states[ROW_COUNTER], rows_R).clamp_(max=COUNT_CEILING)
                try:
                    check_counts(self.keys.name, counts_R)
                except ValueError as error:
                    raise ValueError(f"{self.checkpoint.folder}: {error}") from error
            if MOMENTUM in states:
                for shard in shards:
                    sums_RS[:, shard] = read(states[MOMENTUM], rows_R + self.rows * shard)
            state = TableState(counts_R, sums_RS, self.totals, self.age, self.widths)
            yield first, with_sums_of_counts(state) if self.totals[0] == OLD_FORMAT else state


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
    stored: Any = None if momentum is None else checkpoint.stored[momentum]
    if counter is None and len(getattr(stored, "size", ())) != 1:
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
    totals = _totals(checkpoint, keys.states.get(TABLE_TOTALS))
    if counter is None:  # row-wise Adagrad's
        totals[0] = STATE_FORMAT
    age = keys.states.get(ROW_COUNTER_AGE)
    steps = 0 if age is None else int(checkpoint.read(age))
    return _Table(checkpoint, keys, int(next(iter(rows.values()))), widths, totals, steps)


def _totals(checkpoint: Checkpoint, key: str | None) -> Tensor:
    """float64 [4], of format 0 where there are none, as in version 0.1."""
    if key is None:
        return torch.zeros(TOTALS, dtype=torch.float64)
    checkpoint.size(key, 1, torch.float64)
    totals = checkpoint.read(key)
    if totals.shape != (TOTALS,) or not are_totals(totals):
        raise ValueError(f"{checkpoint.folder} is damaged: {key} is {totals.tolist()}.")
    if totals[0] not in (OLD_FORMAT, STATE_FORMAT):
        raise ValueError(
            f"{checkpoint.folder}: {key} is {totals.tolist()}, neither of format {OLD_FORMAT} nor "
            f"{STATE_FORMAT}. Upgrade torchrec_freq."
        )
    return totals


def _of_file(file: CountsReader, name: str) -> StoredTable:
    """A table of a file of counts. Where its squares are there, its counts are read here once."""
    rows, squares, totals = file.rows[name], file.squares.get(name), None
    if squares and (count := sum(int(counts_R.sum()) for _, counts_R in file.blocks(name))):
        totals = totals_of(squares, count)

    def blocks() -> Blocks:
        for first, counts_R in file.blocks(name, BLOCK_ROWS):
            per_count = None if totals is None else totals[1] / totals[2]
            yield first, counts_R, None if per_count is None else (counts_R * per_count).float()

    return StoredTable(name, rows, blocks, totals)

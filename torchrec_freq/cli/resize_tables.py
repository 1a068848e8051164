"""A table of a checkpoint, written with other rows, one part at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from torchrec_freq.counts.dcp_files import Checkpoint, TableKeys
from torchrec_freq.counts.state import ROW_COUNTER_AGE, TABLE_TOTALS
from torchrec_freq.output import CheckpointWriter

PART_BYTES: Final = 1 << 25
"""Bytes of a table that are read and written at once."""


class StoredRows:
    """All that a checkpoint has of a table: its weights, and its optimizer's state.

    Attributes:
        table: its name within its collection.
        rows: number of rows.
        row_bytes: of what has values for each row.

    Raises:
        ValueError: there are no weights, or there is a state of which it is not known how it
            depends on the rows; the message names the key.
    """

    def __init__(self, checkpoint: Checkpoint, keys: TableKeys) -> None:
        if keys.weight is None:
            raise ValueError(f"{checkpoint.folder} has no weights of table {keys.name!r}.")
        self._checkpoint = checkpoint
        self.table = keys.weight.split(".")[-2]
        self.rows, columns = checkpoint.size(keys.weight, 2)
        self._widths = checkpoint.widths(keys.weight) or (columns,)
        self._weight, states = keys.weight, keys.states.items()
        self._shards = {key: self._shards_of(key, state) for state, key in states}
        for key in checkpoint.stored:
            if f"_managed_collision_modules.{self.table}." in key:
                raise ValueError(
                    f"{checkpoint.folder}: {key} gives ids their rows, so table {keys.name!r} "
                    "cannot be changed without it."
                )
        stored: Any = checkpoint.stored
        per_row = [keys.weight, *(key for key, shards in self._shards.items() if shards)]
        self.row_bytes = sum(
            math.prod(stored[key].size) * stored[key].properties.dtype.itemsize // max(self.rows, 1)
            for key in per_row
        )

    def new_keys(self, name: str) -> dict[str, str]:
        """All keys of the table, and what they are under another name of it."""
        stem = self._weight.removesuffix(f"{self.table}.weight")
        new = {self._weight: f"{stem}{name}.weight"}
        for key in self._shards:
            stem, _, state = key.rpartition(f"{self.table}.weight.{self.table}.")
            new[key] = f"{stem}{name}.weight.{name}.{state}"
        return new

    def write(
        self,
        writer: CheckpointWriter,
        name: str,
        rows: int,
        old_rows: Tensor | None,
        advance: Callable[[int], object],
    ) -> None:
        """Writes the table.

        Args:
            name: of the new table, in the same collection.
            rows: of the new table.
            old_rows: int64 [at most rows] the old row of each new one, -1 for a new id, as are the
                rows behind them; None: the first rows, in their order.
            advance: called with the bytes of each part.
        """
        keys, step = self.new_keys(name), max(PART_BYTES // self.row_bytes, 1)
        for first in range(0, rows, step):
            part = torch.arange(first, min(first + step, rows))
            if old_rows is None:
                part = part.where(part < self.rows, -1)
            else:
                known = old_rows[first : first + step]
                part[: len(known)] = known
                part[len(known) :] = -1
            column, weights = 0, self._weights(part, first, rows)
            # The widths of the parts say of which columns the optimizer's sums are.
            for shard in weights.split(self._widths, dim=1):
                values = shard.clone(memory_format=torch.contiguous_format)
                writer.add(keys[self._weight], values, (first, column), (rows, weights.shape[1]))
                column += shard.shape[1]
            for key, shards in self._shards.items():
                for shard in range(shards):
                    values = self._take(key, part, shard)
                    offsets = [shard * rows + first] + [0] * (values.dim() - 1)
                    writer.add(keys[key], values, offsets, (rows * shards, *values.shape[1:]))
            advance(len(part) * self.row_bytes)
        for key, shards in self._shards.items():
            if not shards:
                writer.copy(keys[key], self._checkpoint.stored[key], self._checkpoint.raw(key))

    def _weights(self, part: Tensor, first: int, rows: int) -> Tensor:
        """Weights of some rows of the new table; new ones as TorchRec makes them."""
        weights = self._take(self._weight, part, 0)
        new = part < 0
        if bool(new.any()):
            random = torch.Generator().manual_seed(first)  # the same in each run
            initial = 2 * torch.rand(int(new.sum()), weights.shape[1], generator=random) - 1
            weights[new] = (initial / math.sqrt(rows)).to(weights.dtype)
        return weights

    def _take(self, key: str, rows: Tensor, shard: int) -> Tensor:
        """Some rows of a tensor, of one of the shards that lie behind each other; 0 for -1."""
        known = rows >= 0
        values = self._checkpoint.read(key, rows[known] + shard * self.rows)
        if len(values) == len(rows):
            return values
        taken = values.new_zeros(len(rows), *values.shape[1:])
        taken[known] = values
        return taken

    def _shards_of(self, key: str, state: str) -> int:
        """How often a state has a value for each row; 0 where it does not depend on the rows."""
        stored, shards = self._checkpoint.stored[key], len(self._widths)
        if state in (TABLE_TOTALS, ROW_COUNTER_AGE):
            return 0
        if not isinstance(stored, TensorStorageMetadata):
            return 0
        size = tuple(stored.size)
        if size[:1] == (self.rows,):
            return 1
        if size == (self.rows * shards,):
            return shards
        if math.prod(size) in (1, shards):  # of the number of steps
            return 0
        raise ValueError(
            f"{self._checkpoint.folder}: {key} is {list(size)}, neither a number for each of "
            f"{self.rows} rows in {shards} column shards nor one for all. It cannot be changed."
        )

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
        self._checkpoint, self._weight = checkpoint, keys.weight
        self.table = keys.weight.split(".")[-2]
        self.rows, columns = checkpoint.size(keys.weight, 2)
        self._widths = checkpoint.widths(keys.weight) or (columns,)
        self._shards = {key: self._shards_of(key, state) for state, key in keys.states.items()}
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

    @property
    def keys(self) -> list[str]:
        """The keys of the checkpoint that are the table's."""
        return [self._weight, *self._shards]

    @property
    def is_split(self) -> bool:
        """Whether there are column shards, and a state of each."""
        return any(shards > 1 for shards in self._shards.values())

    def new_key(self, key: str, name: str) -> str:
        """A key as that of a table of another name."""
        old = f"{self.table}.weight"
        stem, _, state = key.rpartition(f"{old}.{self.table}.")
        return f"{stem}{name}.weight.{name}.{state}" if stem else f"{key[: -len(old)]}{name}.weight"

    def write(
        self,
        writer: CheckpointWriter,
        name: str,
        rows: int,
        old_rows: Tensor | None,
        merge_columns: bool,
        advance: Callable[[int], object],
    ) -> None:
        """Writes the table.

        Args:
            name: of the new table, in the same collection.
            rows: of the new table.
            old_rows: int64 [at most rows] the old row of each new one, -1 for a new id, as are the
                rows behind them; None: the first rows, in their order.
            merge_columns: write a single number a row where each column shard has one.
            advance: called with the bytes of each part.
        """
        step = max(PART_BYTES // self.row_bytes, 1)
        for first in range(0, rows, step):
            part = torch.arange(first, min(first + step, rows))
            if old_rows is None:
                part = part.where(part < self.rows, -1)
            else:
                known = old_rows[first : first + step]
                part[: len(known)] = known
                part[len(known) :] = -1
            self._write_weights(writer, name, rows, first, part, merge_columns)
            for key, shards in self._shards.items():
                values = [self._take(key, part, shard) for shard in range(shards)]
                if shards > 1 and merge_columns:
                    widths = torch.tensor(self._widths, dtype=torch.float32)
                    values = [torch.stack(values, 1) @ (widths / widths.sum())]
                for shard, value in enumerate(values):
                    offsets = [shard * rows + first] + [0] * (value.dim() - 1)
                    size = [len(values) * rows, *value.shape[1:]]
                    writer.add(self.new_key(key, name), value, offsets, size)
            advance(len(part) * self.row_bytes)
        for key, shards in self._shards.items():
            if not shards:
                stored = self._checkpoint.stored[key]
                writer.copy(self.new_key(key, name), stored, self._checkpoint.raw(key))

    def _write_weights(
        self,
        writer: CheckpointWriter,
        name: str,
        rows: int,
        first: int,
        part: Tensor,
        merge_columns: bool,
    ) -> None:
        weights = self._take(self._weight, part, 0)
        new = part < 0
        if bool(new.any()):
            # TorchRec's own; the same in each run.
            random = torch.Generator().manual_seed(first)
            bound = math.sqrt(1 / rows)
            initial = torch.rand(int(new.sum()), weights.shape[1], generator=random)
            weights[new] = ((2 * initial - 1) * bound).to(weights.dtype)
        # The widths of the parts say how many column shards the sums are of.
        widths = [weights.shape[1]] if merge_columns else list(self._widths)
        column, size = 0, (rows, weights.shape[1])
        for shard in weights.split(widths, dim=1):
            values = shard.clone(memory_format=torch.contiguous_format)
            writer.add(self.new_key(self._weight, name), values, (first, column), size)
            column += shard.shape[1]

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
        if not isinstance(stored, TensorStorageMetadata) or state in (
            TABLE_TOTALS,
            ROW_COUNTER_AGE,
        ):
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

"""The tables of one sharded module: this rank's shards, and whole tables over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchrec_freq.config import FrequencyConfig
from torchrec_freq.group import TableGroup
from torchrec_freq.scale import TableScales
from torchrec_freq.tbe import NOT_COMPILED

_CHUNK_ROWS: Final = 1 << 24
"""Rows summed over the ranks at once: bounds the device memory that a large table needs."""


@dataclass(frozen=True)
class Table:
    """A table of the whole model, whatever its shards."""

    name: str
    rows: int
    columns: int
    config: FrequencyConfig


@dataclass(frozen=True)
class LocalShard:
    """A shard of a table on this rank: table ``index`` of ``group``.

    Attributes:
        primary: of the shards that hold the same rows, all but one are replicas of this one.
    """

    table: str
    row_offset: int
    primary: bool
    group: TableGroup
    index: int


@dataclass(frozen=True)
class TableState:
    """What a whole table has learned about its rows.

    Attributes:
        counts: int64 [rows], on the CPU.
        steps: the number of steps that the counts stand for.
        since_halving: steps since they were last halved.
    """

    counts: Tensor
    steps: int
    since_halving: int = 0


class FrequencyTables:
    """The tables of one sharded module that train with FrequencySGD, the same on every rank.

    Attributes:
        tables: by name, in the same order on every rank.
        shards: those of this rank.
        scales: the tables' gradient scales, summed over the ranks.
    """

    def __init__(self, tables: Sequence[Table], process_group: dist.ProcessGroup | None) -> None:
        self.tables = {table.name: table for table in tables}
        self.process_group = process_group
        self.shards: list[LocalShard] = []
        self.scales = TableScales(list(self.tables))
        self._normalized = any(table.config.normalize for table in tables)

    @property
    def rank(self) -> int:
        """This rank in the process group, 0 without one."""
        return 0 if self.process_group is None else self.process_group.rank()

    def attach(self, shards: Sequence[LocalShard], device: torch.device | None) -> None:
        """Takes over this rank's shards, freshly made, and joins their gradient scales."""
        self.shards = list(shards)
        totals = self.scales.flush()
        self.scales = TableScales(list(self.tables), device, self.process_group)
        self.scales.totals.copy_(totals)
        position = {name: index for index, name in enumerate(self.tables)}
        groups = {id(shard.group): shard.group for shard in shards}
        for key, group in groups.items():
            mine = sorted((s for s in shards if id(s.group) == key), key=lambda s: s.index)
            group.share_scales(self.scales, [position[shard.table] for shard in mine])

    @torch.compiler.disable(reason=NOT_COMPILED)
    def before_forward(self, module: nn.Module, inputs: Any) -> None:
        """Forward pre-hook of the sharded module."""
        if self._normalized and torch.is_grad_enabled():
            self.scales.exchange()

    def read(self, name: str) -> TableState:
        """State of a whole table, the same on every rank. All ranks must call it."""
        counts_R = torch.zeros(self.tables[name].rows, dtype=torch.int64)
        steps = torch.zeros(2, dtype=torch.int64)
        for shard in self._shards_of(name):
            counters = shard.group.counters
            steps = torch.tensor([counters.steps[shard.index], counters.since_halving[shard.index]])
            if shard.primary:
                local_R = counters.read(shard.index).cpu()
                counts_R[shard.row_offset : shard.row_offset + local_R.numel()] = local_R
        for chunk_R in counts_R.split(_CHUNK_ROWS):
            self._reduce(chunk_R, dist.ReduceOp.SUM)
        self._reduce(steps, dist.ReduceOp.MAX)
        return TableState(counts_R, int(steps[0]), int(steps[1]))

    def load(self, name: str, state: TableState) -> None:
        """Sets the state of a table's shards on this rank."""
        for shard in self._shards_of(name):
            counters = shard.group.counters
            rows = counters.rows_per_table[shard.index]
            local_R = state.counts[shard.row_offset : shard.row_offset + rows]
            counters.load(shard.index, local_R, state.steps, state.since_halving)

    def steps(self, name: str) -> int:
        """The number of steps that a table's counts stand for. All ranks must call it."""
        local = [s.group.counters.steps[s.index] for s in self._shards_of(name)]
        steps = torch.tensor([max(local, default=0)])
        self._reduce(steps, dist.ReduceOp.MAX)
        return int(steps)

    def _shards_of(self, name: str) -> list[LocalShard]:
        return [shard for shard in self.shards if shard.table == name]

    def _reduce(self, values: Tensor, operation: Any) -> None:
        """Over the ranks, in place, of a tensor on the CPU."""
        if self.process_group is not None and self.process_group.size() > 1:
            reduced = values.to(self.scales.totals.device)
            dist.all_reduce(reduced, operation, group=self.process_group)
            values.copy_(reduced)

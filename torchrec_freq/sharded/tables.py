"""The tables of one sharded module: this rank's shards, and whole tables over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_freq.counts.row_state import RowShard, RowState
from torchrec_freq.counts.state import (
    ROW_COUNTER,
    ROW_COUNTER_AGE,
    TABLE_TOTALS,
    TOTALS,
    TableState,
    totals_of,
)
from torchrec_freq.engine.counting import CountingTBE, Membership, require_counts
from torchrec_freq.engine.totals import TableTotals, TotalsTable

_CHUNK_ROWS: Final = 1 << 24
"""Rows summed over the ranks at once: bounds the device memory that a large table needs."""


@dataclass(frozen=True, kw_only=True)
class Table(TotalsTable):
    """A table of the whole model, whatever its shards.

    Attributes:
        split: whether its rows or columns are spread over ranks.
    """

    name: str
    rows: int
    columns: int
    split: bool


@dataclass(frozen=True)
class LocalShard:
    """A shard of a table on this rank: table ``index`` of ``tbe``.

    Attributes:
        row_offset: its first row.
        columns: number of its columns.
        primary: of the shards that hold the same rows, all but one are replicas of this one.
    """

    table: str
    row_offset: int
    columns: int
    primary: bool
    tbe: CountingTBE
    index: int

    def learning_rate(self) -> float:
        """That of the next update."""
        rate: float = self.tbe.get_learning_rate()  # type: ignore[attr-defined]
        return rate


class FrequencyTables:
    """The tables of one sharded module that train with FrequencySGD, the same on every rank.

    Under 2D parallelism every sharding group has them, and trains and counts by itself. At each
    sync :meth:`average` makes of the groups' counts and totals their mean, as TorchRec does of the
    weights.

    Args:
        process_group: the ranks over which the tables are sharded; None for one process.
        replicas: the ranks that hold the same shards in each of the sharding groups, with 2D
            parallelism; else None.

    Attributes:
        tables: by name, in the same order on every rank.
        positions: number of each in that order.
        shards: those of this rank.
        totals: of the tables, summed over the ranks.
        moving: set while TorchRec moves shards, which must not find our state.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        process_group: dist.ProcessGroup | None,
        replicas: dist.ProcessGroup | None = None,
    ) -> None:
        self.tables = {table.name: table for table in tables}
        self.positions = {table.name: position for position, table in enumerate(tables)}
        self.process_group = process_group
        self._replicas = replicas
        self.shards: list[LocalShard] = []
        self.moving = False
        self._unchecked = any(table.config.count == "frozen" for table in tables)
        self._attach_totals(None)

    @property
    def rank(self) -> int:
        """This rank in the process group, 0 without one."""
        return 0 if self.process_group is None else self.process_group.rank()

    @property
    def ranks(self) -> int:
        """Ranks in the process group, 1 without one."""
        return 1 if self.process_group is None else self.process_group.size()

    def attach(self, shards: Sequence[LocalShard], device: torch.device | None) -> None:
        """Takes over this rank's shards, freshly made, and joins their totals.

        Args:
            device: where the module was told to be; its shards, if there are any, know better.
        """
        self.shards = list(shards)
        self._attach_totals(shards[0].tbe.counts.device if shards else device)
        first = {shard.table: shard for shard in reversed(shards)}
        for tbe in {id(shard.tbe): shard.tbe for shard in shards}.values():
            mine = sorted((s for s in shards if s.tbe is tbe), key=lambda shard: shard.index)
            members = [
                Membership(
                    self.positions[shard.table],
                    shard.columns / self.tables[shard.table].columns,
                    shard.primary,
                    first[shard.table] is shard,
                )
                for shard in mine
            ]
            tbe.join(self.totals, members)

    def begin_step(self) -> None:
        """Starts a step of the totals, in a forward. All ranks must call it.

        Raises:
            RuntimeError: the counts of a table are frozen and none were loaded; on every rank.
        """
        self.totals.advance()
        if self._unchecked:
            counts_T = self.totals.values.select(1, 2).cpu()
            self.reduce(counts_T, dist.ReduceOp.MAX)
            for name, count in zip(self.tables, counts_T.tolist(), strict=True):
                require_counts(self.tables[name].config, name, count)
            self._unchecked = False

    def _attach_totals(self, device: torch.device | None) -> None:
        shared = self.ranks > 1 and any(table.split for table in self.tables.values())
        group = self.process_group if shared else None
        self.totals = TableTotals(list(self.tables.values()), device, group)

    def read(self, name: str) -> TableState:
        """State of a whole table, the same on every rank. All ranks must call it.

        Of several sharding groups it is the mean, counts rounded up.
        """
        self.totals.settle()
        counts_R = torch.zeros(self.tables[name].rows, dtype=torch.int64)
        totals = torch.zeros(TOTALS, dtype=torch.float64)
        age = torch.zeros(1, dtype=torch.int64)
        for shard in self._shards_of(name):
            totals = self.table_totals(name).to("cpu", copy=True)
            age = self.age(name).clone()
            if shard.primary:
                local_R = shard.tbe.settled_counts(shard.index).cpu()
                counts_R[shard.row_offset : shard.row_offset + local_R.numel()] = local_R
        for chunk_R in counts_R.split(_CHUNK_ROWS):
            self.reduce(chunk_R, dist.ReduceOp.SUM)
            if self._replicas is not None:
                self._reduce(chunk_R, dist.ReduceOp.SUM, self._replicas)
                chunk_R.copy_(part_of_sum(chunk_R, 0, self._replicas.size()))
        for numbers in (totals, age):
            self.reduce(numbers, dist.ReduceOp.MAX)
        if self._replicas is not None:
            self._reduce(totals, dist.ReduceOp.SUM, self._replicas)
            totals /= self._replicas.size()
        return TableState(counts_R, totals, int(age))

    @torch.no_grad()
    def average(self) -> None:
        r"""Makes of counts and totals the mean over the sharding groups. All ranks must call it.

        Of the sum :math:`s` of a row's counts, group ``g`` of ``M`` keeps
        :math:`\lfloor (s + M - 1 - g) / M \rfloor`: the mean, rounded so that all together are
        :math:`s`. So a row that one group has seen once is not forgotten, and the first group,
        which checkpoints save, has the mean rounded up. Device memory for it is bounded.
        """
        if self._replicas is None:
            return
        self.totals.settle()
        group, groups = self._replicas.rank(), self._replicas.size()
        values = self.totals.values
        self._reduce(values, dist.ReduceOp.SUM, self._replicas)
        values /= groups
        for shard in self.shards:
            for chunk_R in shard.tbe.counts_of(shard.index).split(_CHUNK_ROWS):
                sums_R = chunk_R.to(torch.int64)
                self._reduce(sums_R, dist.ReduceOp.SUM, self._replicas)
                chunk_R.copy_(part_of_sum(sums_R, group, groups))

    def load(self, name: str, state: TableState) -> None:
        """Sets the state of a table: of its shards on this rank, and its totals."""
        self.load_counts(name, state.counts)
        self.table_totals(name).copy_(state.totals)
        self.age(name).fill_(state.age)

    def load_counts(self, name: str, counts_R: Tensor, squares: float | None = None) -> None:
        """Sets the counts of a table's shards on this rank, and what goes with them.

        Args:
            squares: sum of the squares that the counts stand for; None keeps that of the table.
        """
        self.totals.settle()
        for shard in self._shards_of(name):
            local_R = shard.tbe.counts_of(shard.index)
            local_R.copy_(counts_R[shard.row_offset : shard.row_offset + local_R.numel()])
        totals = self.table_totals(name)
        totals[2] = counts_R.sum(dtype=torch.float64)
        if squares is not None:
            totals.copy_(totals_of(squares, float(totals[2]), int(counts_R.count_nonzero())))
        self.age(name).zero_()

    def table_totals(self, name: str) -> Tensor:
        """float64 [4] view on the device: a row of ``TableTotals.values``."""
        return self.totals.values[self.positions[name]]

    def age(self, name: str) -> Tensor:
        """int64 [1] view on the CPU: steps since the table's counts were last halved."""
        return self.totals.ages.narrow(0, self.positions[name], 1)

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """State of a table that has shards here, by key, as views.

        The counters are one tensor of all rows; the rest is equal on every rank.
        """
        saves = self._replicas is None or self._replicas.rank() == 0
        counts = [
            RowShard(
                shard.row_offset,
                shard.primary and saves,
                shard.tbe.memory_of(shard.index),
                partial(shard.tbe.settled_counts, shard.index),
                partial(shard.tbe.counts_of, shard.index),
            )
            for shard in self._shards_of(name)
        ]
        return {
            f"{name}.{ROW_COUNTER}": RowState(self.tables[name].rows, counts),
            f"{name}.{TABLE_TOTALS}": self.table_totals(name),
            f"{name}.{ROW_COUNTER_AGE}": self.age(name),
        }

    def _shards_of(self, name: str) -> list[LocalShard]:
        return [shard for shard in self.shards if shard.table == name]

    def reduce(self, values: Tensor, operation: Any) -> None:
        """Over the ranks, in place, of a tensor on any device. All ranks must call it."""
        if self.process_group is not None:
            self._reduce(values, operation, self.process_group)

    def _reduce(self, values: Tensor, operation: Any, group: dist.ProcessGroup) -> None:
        if group.size() > 1:
            reduced = values.to(self.totals.values.device)
            dist.all_reduce(reduced, operation, group=group)
            values.copy_(reduced)


def part_of_sum(sums_R: Tensor, group: int, groups: int) -> Tensor:
    """int64 [rows]: what a group keeps of the sum of all, see :meth:`FrequencyTables.average`."""
    return (sums_R + (groups - 1 - group)).div_(groups, rounding_mode="floor")

"""The tables of one sharded module: this rank's shards, and whole tables over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_freq.config import FrequencyConfig
from torchrec_freq.counts.conversion import with_counts_of_sums, with_sums_of_counts
from torchrec_freq.counts.row_state import RowShard, RowState
from torchrec_freq.counts.state import (
    MOMENTUM,
    OLD_FORMAT,
    ROW_COUNTER,
    ROW_COUNTER_AGE,
    TABLE_TOTALS,
    TableState,
    totals_of,
)
from torchrec_freq.engine.counting import CountingTBE, Membership
from torchrec_freq.engine.replicated import ReplicatedTBE
from torchrec_freq.engine.totals import TableTotals

_CHUNK_ROWS: Final = 1 << 24
"""Rows summed over the ranks at once: bounds the device memory that a large table needs."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the whole model, whatever its shards.

    Attributes:
        config: the rule's settings.
        widths: columns of each column shard, in their order; () where the columns are not split.
        split: whether its rows or columns are spread over ranks.
        reset: makes initial weights, in place, of a tensor [rows, columns].
    """

    name: str
    rows: int
    columns: int
    config: FrequencyConfig
    widths: tuple[int, ...]
    split: bool
    reset: Callable[[Tensor], object]


@dataclass(frozen=True)
class LocalShard:
    """A shard of a table on this rank: table ``index`` of ``tbe``.

    Attributes:
        row_offset: its first row.
        column_offset: its first column.
        columns: number of its columns.
        primary: of the shards that hold other columns of the same rows, one is.
        first: of the ranks that hold the same shard, one is: the others have replicas.
    """

    table: str
    row_offset: int
    column_offset: int
    columns: int
    primary: bool
    first: bool
    tbe: CountingTBE
    index: int

    @property
    def counts(self) -> Tensor:
        """int32 [rows of the shard], the memory itself."""
        return self.tbe.rows_of(self.index, self.tbe.counts)

    @property
    def sums(self) -> Tensor:
        """float32 [rows of the shard], the memory itself."""
        return self.tbe.rows_of(self.index, self.tbe.sums)

    def weights(self) -> Tensor:
        """[rows, columns] of the shard, the memory itself."""
        weights: Tensor = self.tbe.split_embedding_weights()[self.index]  # type: ignore[attr-defined]
        return weights.detach().view(-1, self.columns)

    @property
    def cached(self) -> bool:
        """Whether the weights are in host memory, and some rows have copies on the GPU."""
        return bool(getattr(self.tbe, "lxu_cache_weights", self.counts[:0]).numel())

    def learning_rate(self) -> float:
        """That of the next update."""
        rate: float = self.tbe.get_learning_rate()  # type: ignore[attr-defined]
        return rate

    def part_of(self, values_R: Tensor) -> Tensor:
        """[rows of the shard, ...] of a tensor [rows, ...] of the whole table."""
        return values_R[self.row_offset : self.row_offset + self.counts.numel()]


class FrequencyTables:
    """The tables of one sharded module that train with FrequencySGD, the same on every rank.

    Under 2D parallelism every sharding group has them, and trains and counts by itself. At each
    sync :meth:`average` makes of the groups' counts and totals their mean, as TorchRec does of the
    weights and sums.

    Args:
        process_group: the ranks over which the tables are sharded; None for one process.
        replicas: the ranks that hold the same shards in each of the sharding groups, with 2D
            parallelism; else None.

    Attributes:
        tables: by name, in the same order on every rank.
        positions: number of each in that order.
        shards: those of this rank.
        totals: of the tables but the data-parallel ones, which have their own.
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
        self._missing: dict[str, frozenset[str]] = {}
        self._unfinished: list[Callable[[], None]] = []
        self.shards: list[LocalShard] = []
        self._make_totals(None)

    @property
    def rank(self) -> int:
        """This rank in the process group, 0 without one."""
        return 0 if self.process_group is None else self.process_group.rank()

    def _make_totals(self, device: torch.device | None) -> None:
        shared = any(table.split for table in self.tables.values())
        group = self.process_group if shared else None
        configs = [table.config for table in self.tables.values()]
        self.totals = TableTotals(configs, device, group)

    def attach(self, shards: Sequence[LocalShard], device: torch.device | None) -> None:
        """Takes over this rank's shards, freshly made, and joins their totals.

        Args:
            device: where the module was told to be; its shards, if there are any, know better.
        """
        self.shards = list(shards)
        self._make_totals(shards[0].tbe.counts.device if shards else device)
        for tbe in {id(shard.tbe): shard.tbe for shard in shards}.values():
            mine = sorted((s for s in shards if s.tbe is tbe), key=lambda shard: shard.index)
            if isinstance(tbe, ReplicatedTBE):
                continue
            members = [
                Membership(
                    self.positions[shard.table],
                    shard.columns / self.tables[shard.table].columns,
                    shard.primary,
                )
                for shard in mine
            ]
            tbe.join(self.totals, members)

    def shards_of(self, name: str) -> list[LocalShard]:
        """This rank's shards of a table."""
        return [shard for shard in self.shards if shard.table == name]

    def _position(self, name: str) -> tuple[TableTotals, int]:
        for shard in self.shards_of(name):
            if isinstance(shard.tbe, ReplicatedTBE):
                return shard.tbe.totals, shard.index
        return self.totals, self.positions[name]

    def table_totals(self, name: str) -> Tensor:
        """float64 [4] view on the device: a row of ``TableTotals.values``."""
        totals, position = self._position(name)
        return totals.values[position]

    def age(self, name: str) -> Tensor:
        """int64 [1] view on the CPU: steps since the table was last halved."""
        totals, position = self._position(name)
        return totals.ages.narrow(0, position, 1)

    def read(self, name: str) -> TableState:
        """State of a whole table, the same on every rank. All ranks must call it.

        Of several sharding groups it is the mean, counts rounded up.
        """
        table = self.tables[name]
        counts_R = torch.zeros(table.rows, dtype=torch.int32)
        sums_RS = torch.zeros(table.rows, max(1, len(table.widths)))
        totals, age = totals_of(0, 0), torch.zeros(1, dtype=torch.int64)
        for shard in self.shards_of(name):
            # Copies: on a CPU these are the memory itself, and are reduced in place below.
            totals, age = self.table_totals(name).to("cpu", copy=True), self.age(name).clone()
            if shard.first:
                shard.part_of(sums_RS)[:, self._column_shard(shard)] = shard.sums.cpu()
                if shard.primary:
                    shard.part_of(counts_R).copy_(shard.counts)
        for chunk_R in (*counts_R.split(_CHUNK_ROWS), *sums_RS.split(_CHUNK_ROWS)):
            self.reduce(chunk_R, dist.ReduceOp.SUM)
        for numbers in (totals, age):
            self.reduce(numbers, dist.ReduceOp.MAX)
        if self._replicas is not None:
            groups = self._replicas.size()
            for chunk_R in counts_R.split(_CHUNK_ROWS):
                sum_R = chunk_R.to(torch.int64)
                self._reduce(sum_R, dist.ReduceOp.SUM, self._replicas)
                chunk_R.copy_(part_of_sum(sum_R, 0, groups))
            for values in (sums_RS, totals):
                self._reduce(values, dist.ReduceOp.SUM, self._replicas)
                values /= groups
        return TableState(counts_R, sums_RS, totals, int(age), table.widths)

    def _column_shard(self, shard: LocalShard) -> int:
        widths = self.tables[shard.table].widths
        ends = [sum(widths[: number + 1]) for number in range(len(widths))]
        return sum(end <= shard.column_offset for end in ends)

    @torch.no_grad()
    def load(self, name: str, state: TableState) -> None:
        """Sets the state of a table: of its shards on this rank, and its totals.

        The sums of other column shards than the table has become their mean over the columns.
        """
        same = state.sums.shape[1] > 1 and state.widths == self.tables[name].widths
        for shard in self.shards_of(name):
            shard.counts.copy_(shard.part_of(state.counts))
            number = self._column_shard(shard)
            sums_R = state.sums[:, number] if same else state.row_sums()
            shard.sums.copy_(shard.part_of(sums_R))
        self.table_totals(name).copy_(state.totals)
        self.age(name).fill_(state.age)

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
        group, groups = self._replicas.rank(), self._replicas.size()
        for name in self.tables:
            totals = self.table_totals(name)
            self._reduce(totals, dist.ReduceOp.SUM, self._replicas)
            totals /= groups
        for shard in self.shards:
            for chunk_R in shard.counts.split(_CHUNK_ROWS):
                sums_R = chunk_R.to(torch.int64)
                self._reduce(sums_R, dist.ReduceOp.SUM, self._replicas)
                chunk_R.copy_(part_of_sum(sums_R, group, groups))

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """What a table's optimizer state has besides TorchRec's ``momentum1``, by key, as views.

        Counters are one tensor of all rows; the rest is equal on every rank. Data-parallel tables,
        of which TorchRec has no state, have their sums here.
        """
        shards = self.shards_of(name)
        saves = self._replicas is None or self._replicas.rank() == 0
        counts = [RowShard(s.row_offset, saves and s.primary and s.first, s.counts) for s in shards]
        state = {
            ROW_COUNTER: RowState(self.tables[name].rows, counts),
            TABLE_TOTALS: self.table_totals(name),
            ROW_COUNTER_AGE: self.age(name),
        }
        state[ROW_COUNTER].owner = self, name  # type: ignore[attr-defined]
        replicated = isinstance(shards[0].tbe, ReplicatedTBE)
        if replicated and self.tables[name].config.normalize is not None:
            (shard,) = shards
            sums = [RowShard(0, saves and shard.first, shard.sums)]
            state = {MOMENTUM: RowState(self.tables[name].rows, sums), **state}
        return {f"{name}.{key}": value for key, value in state.items()}

    def lacks(self, name: str, keys: frozenset[str]) -> None:
        """Says which keys of a table's state are not in what is being loaded."""
        self._missing[name] = keys

    def finish_later(self, finish: Callable[[], None]) -> None:
        """Calls it when what is being loaded is there."""
        self._unfinished.append(finish)

    @torch.no_grad()
    def finish_load(self) -> None:
        """Completes what was loaded from another optimizer, version or plan.

        All ranks must call it.
        """
        for finish in self._unfinished:
            finish()
        kinds = torch.zeros(len(self.tables), 2, dtype=torch.int64)
        for name, keys in self._missing.items():
            kinds[self.positions[name]] = torch.tensor([ROW_COUNTER in keys, MOMENTUM in keys])
        for shard in self.shards:
            if int(self.table_totals(shard.table)[0]) == OLD_FORMAT:
                kinds[self.positions[shard.table], 1] = 1
        self._unfinished.clear()
        self._missing.clear()
        self.reduce(kinds, dist.ReduceOp.MAX)
        for name, (without_counts, without_sums) in zip(self.tables, kinds.tolist(), strict=True):
            if without_counts:
                self.load(name, with_counts_of_sums(self.read(name)))
            elif without_sums:
                self.load(name, with_sums_of_counts(self.read(name)))

    def from_first(self, values: Tensor, fill: Callable[[Tensor], object]) -> Tensor:
        """What the first rank of all fills in place, on every rank. All ranks must call it."""
        if self.rank == 0 and (self._replicas is None or self._replicas.rank() == 0):
            fill(values)
        else:
            values.zero_()
        for group in (self.process_group, self._replicas):
            self._reduce(values, dist.ReduceOp.SUM, group)
        return values

    def reduce(self, values: Tensor, operation: Any) -> None:
        """Over the ranks, in place, of a tensor on any device. All ranks must call it."""
        self._reduce(values, operation, self.process_group)

    def _reduce(self, values: Tensor, operation: Any, group: dist.ProcessGroup | None) -> None:
        if group is not None and group.size() > 1:
            reduced = values.to(self.totals.values.device)
            dist.all_reduce(reduced, operation, group=group)
            values.copy_(reduced)


def part_of_sum(sums_R: Tensor, group: int, groups: int) -> Tensor:
    """int64 [rows]: what a group keeps of the sum of all, see :meth:`FrequencyTables.average`."""
    return (sums_R + (groups - 1 - group)).div_(groups, rounding_mode="floor")

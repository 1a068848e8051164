"""The tables of one sharded module: this rank's shards, and whole tables over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook

from torchrec_freq.config import FrequencyConfig
from torchrec_freq.group import TableGroup, bag_squares
from torchrec_freq.row_state import RowShard, RowState
from torchrec_freq.scale import SCALE_NUMBERS, TableScales

ROW_COUNTER: Final = "row_counter"
ROW_COUNTER_STEPS: Final = "row_counter_steps"
TABLE_SCALE: Final = "table_scale"
"""Keys of the fused optimizer's state, each behind the table's name and a dot."""

_CHUNK_ROWS: Final = 1 << 24
"""Rows summed over the ranks at once: bounds the device memory that a large table needs."""


@dataclass(frozen=True)
class Table:
    """A table of the whole model, whatever its shards."""

    name: str
    rows: int
    config: FrequencyConfig
    outputs: tuple[str, ...]
    """What the module's output calls the features of the table."""


@dataclass(frozen=True)
class Output:
    """A tensor of a module's output.

    Attributes:
        names: of its features.
        dims: columns of each; they lie side by side.
    """

    names: tuple[str, ...]
    dims: tuple[int, ...]


@dataclass(frozen=True)
class LocalShard:
    """A shard of a table on this rank: table ``index`` of ``group``.

    Attributes:
        primary: of the shards that hold the same rows, all but one are replicas of this one.
        learning_rate: that of the next update.
    """

    table: str
    row_offset: int
    primary: bool
    group: TableGroup
    index: int
    learning_rate: Callable[[], float]


@dataclass(frozen=True)
class TableState:
    """What a whole table has learned about its rows.

    Attributes:
        counts: int64 [rows], on the CPU.
        steps: int64 [2]: the number of steps that the counts stand for, and the steps since they
            were last halved.
        scale: float64 [4]: the row of ``TableScales.totals``.
    """

    counts: Tensor
    steps: Tensor
    scale: Tensor


class FrequencyTables:
    """The tables of one sharded module that train with FrequencySGD, the same on every rank.

    Attributes:
        tables: by name, in the same order on every rank.
        shards: those of this rank.
        scales: the tables' gradient scales, summed over the ranks.
        moving: set while TorchRec moves shards, which must not find our state.
    """

    def __init__(self, tables: Sequence[Table], process_group: dist.ProcessGroup | None) -> None:
        self.tables = {table.name: table for table in tables}
        self.process_group = process_group
        self.shards: list[LocalShard] = []
        self.scales = TableScales(len(self.tables))
        self._normalized = any(table.config.normalize for table in tables)
        self._table_of_output = {
            output: index for index, table in enumerate(tables) for output in table.outputs
        }
        self._layouts: dict[tuple[str, ...], tuple[Tensor, Tensor, Tensor]] = {}
        self._last_backward = -1
        self.moving = False

    @property
    def rank(self) -> int:
        """This rank in the process group, 0 without one."""
        return 0 if self.process_group is None else self.process_group.rank()

    @property
    def ranks(self) -> int:
        """Ranks in the process group, 1 without one."""
        return 1 if self.process_group is None else self.process_group.size()

    def attach(self, shards: Sequence[LocalShard], device: torch.device | None) -> None:
        """Takes over this rank's shards, freshly made, and joins their gradient scales.

        Args:
            device: where the module was told to be; its shards, if there are any, know better.
        """
        self.shards = list(shards)
        if shards:
            device = shards[0].group.counters.counts.device
        self.scales = TableScales(len(self.tables), device, self.process_group)
        position = {name: index for index, name in enumerate(self.tables)}
        groups = {id(shard.group): shard.group for shard in shards}
        for key, group in groups.items():
            mine = sorted((s for s in shards if id(s.group) == key), key=lambda s: s.index)
            group.share_scales(self.scales, [position[shard.table] for shard in mine])

    def watch(self, outputs: Sequence[tuple[Tensor, Output]], factor: float) -> None:
        """Lets each backward through the module's outputs begin and end a step of the scales.

        All ranks have outputs, also those without a shard, so all of them exchange.

        Args:
            outputs: [samples or lookups, columns] tensors, and what is in them.
            factor: what turns a gradient of this rank's loss into one of the global batch's.
        """
        watched = [(values, output) for values, output in outputs if values.requires_grad]
        if not self._normalized or not watched:
            return
        tensors, parts = zip(*watched, strict=True)

        # These run before any table's update: backward goes through what is after the module first.
        # They must not hold the tensors, which hold them.
        if len(tensors) == 1:
            tensors[0].register_hook(lambda grad: self._on_output_grads(parts, [grad], factor))
            return

        def on_grads(grads: Sequence[Tensor | None]) -> None:
            handle.remove()  # torch's own hook holds them
            self._on_output_grads(parts, grads, factor)

        handle = register_multi_grad_hook(tensors, on_grads)

    @torch.no_grad()
    def _on_output_grads(
        self, outputs: Sequence[Output], grads: Sequence[Tensor | None], factor: float
    ) -> None:
        measured = [
            self._measure(output, grad)
            for output, grad in zip(outputs, grads, strict=True)
            if grad is not None
        ]
        if measured:
            tables, squares, elements = (torch.cat(parts) for parts in zip(*measured, strict=True))
            self.scales.add_outputs(tables, squares * factor**2, elements)
        # A number of its own for each backward, which may come through several outputs.
        backward = torch._C._current_graph_task_id()
        if backward != self._last_backward:
            self._last_backward = backward
            torch.autograd.Variable._execution_engine.queue_callback(self.scales.end_step)

    def _measure(self, output: Output, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each feature of our tables: table, sum of squares, number of elements."""
        if output.names not in self._layouts:
            tables = [self._table_of_output.get(name, -1) for name in output.names]
            ours = [position for position, table in enumerate(tables) if table >= 0]
            layout = (ours, [tables[i] for i in ours], [output.dims[i] for i in ours])
            positions, ours_tables, dims = (
                torch.tensor(part, dtype=torch.int64, device=grad.device) for part in layout
            )
            self._layouts[output.names] = positions, ours_tables, dims
        positions, tables_F, dims_F = self._layouts[output.names]
        squares_F = bag_squares(grad, output.dims).sum(dim=1, dtype=torch.float64)
        return tables_F, squares_F.index_select(0, positions), dims_F * grad.shape[0]

    def read(self, name: str) -> TableState:
        """State of a whole table, the same on every rank. All ranks must call it."""
        counts_R = torch.zeros(self.tables[name].rows, dtype=torch.int64)
        steps = torch.zeros(2, dtype=torch.int64)
        scale = torch.zeros(SCALE_NUMBERS, dtype=torch.float64)
        for shard in self._shards_of(name):
            steps, scale = self.shard_steps(shard).clone(), self.scale(name).cpu()
            if shard.primary:
                local_R = shard.group.counters.saturated(shard.index).cpu()
                counts_R[shard.row_offset : shard.row_offset + local_R.numel()] = local_R
        for chunk_R in counts_R.split(_CHUNK_ROWS):
            self.reduce(chunk_R, dist.ReduceOp.SUM)
        self.reduce(steps, dist.ReduceOp.MAX)
        self.reduce(scale, dist.ReduceOp.MAX)
        return TableState(counts_R, steps, scale)

    def load(self, name: str, state: TableState) -> None:
        """Sets the state of a table: of its shards on this rank, and its scale."""
        self.load_counts(name, state.counts, state.steps)
        self.scale(name).copy_(state.scale)

    def load_counts(self, name: str, counts_R: Tensor, steps: Tensor) -> None:
        """Sets the counts of a table's shards on this rank, and the steps they stand for."""
        for shard in self._shards_of(name):
            local_R = shard.group.counters.table(shard.index)
            local_R.copy_(counts_R[shard.row_offset : shard.row_offset + local_R.numel()])
            self.shard_steps(shard).copy_(steps)

    def steps(self, name: str) -> int:
        """The number of steps that a table's counts stand for. All ranks must call it."""
        local = [int(self.shard_steps(shard)[0]) for shard in self._shards_of(name)]
        steps = torch.tensor([max(local, default=0)])
        self.reduce(steps, dist.ReduceOp.MAX)
        return int(steps)

    def shard_steps(self, shard: LocalShard) -> Tensor:
        """int64 [2] view on the host: steps of a shard's counts, and those since the halving."""
        return torch.from_numpy(shard.group.counters.steps[shard.index])

    def scale(self, name: str) -> Tensor:
        """float64 [4] view on the device: a row of ``TableScales.totals``."""
        return self.scales.totals[list(self.tables).index(name)]

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """State of a table that has shards here, by key, as views.

        The counters are one tensor of all rows; the steps and the scale are equal on every rank.
        """
        shards = self._shards_of(name)
        counts = [
            RowShard(shard.row_offset, shard.primary, shard.group.counters.table(shard.index))
            for shard in shards
        ]
        # A replica a shard: what is loaded must reach each of several column shards on a rank.
        steps = [
            RowShard(0, shard.primary and shard.row_offset == 0, self.shard_steps(shard))
            for shard in shards
        ]
        return {
            f"{name}.{ROW_COUNTER}": RowState(self.tables[name].rows, counts),
            f"{name}.{ROW_COUNTER_STEPS}": RowState(steps[0].tensor.numel(), steps),
            f"{name}.{TABLE_SCALE}": self.scale(name),
        }

    def _shards_of(self, name: str) -> list[LocalShard]:
        return [shard for shard in self.shards if shard.table == name]

    def reduce(self, values: Tensor, operation: Any) -> None:
        """Over the ranks, in place, of a tensor on any device. All ranks must call it."""
        if self.process_group is not None and self.process_group.size() > 1:
            reduced = values.to(self.scales.totals.device)
            dist.all_reduce(reduced, operation, group=self.process_group)
            values.copy_(reduced)

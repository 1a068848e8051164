"""What a table's rows have had together: sums of squares and counts, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import threshold

from torchrec_freq.config import FrequencyConfig
from torchrec_freq.counts.state import STATE_FORMAT, TOTALS
from torchrec_freq.engine.fused import fused
from torchrec_freq.engine.turn import Turn, used_here
from torchrec_freq.rule import SQUARE_LIMIT, squares_per_count

HOLD_STEPS: Final = 1 << 22
"""Steps since the last halving from which on float32 does not show a row's square beside what the
row has had: the sums then go on as they went so far."""


@dataclass(frozen=True)
class TotalsTable:
    """A table as :class:`TableTotals` sees it.

    Attributes:
        features: how many look it up.
        config: the rule's settings.
        split_columns: whether shards hold parts of its columns.
    """

    features: int
    config: FrequencyConfig
    split_columns: bool = False


@dataclass
class _Exchange:
    """What the shards added in a step, while it is summed over the ranks.

    Attributes:
        held: tables whose squares are not taken from it.
        due: tables to halve once it is there.
    """

    added: Tensor
    work: dist.Work | None
    held: Sequence[int]
    due: Sequence[int]


class TableTotals:
    r"""For each table :math:`G_t`, :math:`C_t` and the occurrences that :math:`G_t` stands for.

    A step's shards add what they saw; :meth:`advance` starts the next step. The sums over the ranks
    are exchanged while that one runs, and are awaited when its first backward needs them. They are
    those of all earlier steps, whatever the sharding plan.

    Args:
        tables: in the same order on every rank.
        device: where the gradients are.
        process_group: the ranks whose shards add to the same table; None where every table lies
            whole on one rank, or where there is one process.
    """

    def __init__(
        self,
        tables: Sequence[TotalsTable],
        device: torch.device | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._tables = list(tables)
        features = [table.features for table in tables]
        self._values = torch.zeros(len(features), TOTALS, dtype=torch.float64, device=device)
        self._values.select(1, 0).fill_(STATE_FORMAT)
        # Squares, counts and occurrences of each feature; for split columns, whether it had a
        # gradient in any of them.
        self._fractions = any(table.config.count == "batches" for table in tables)
        self._split = any(table.split_columns for table in tables)
        numbers = 4 if self._split else 3
        self._added = self._values.new_zeros(sum(features), numbers)
        self._exchange: _Exchange | None = None
        self._group = process_group
        self._replica = process_group is not None and process_group.rank() > 0
        self._table_of_slot = torch.tensor(
            [index for index, count in enumerate(features) for _ in range(count)],
            dtype=torch.int64,
            device=device,
        )
        self._rates: tuple[Tensor, Tensor] | None = None
        self._turn = Turn()
        self._listeners: list[Callable[[Tensor | None, Sequence[int]], None]] = []
        # numpy: its elements cost a step less.
        self._ages = numpy.zeros(len(features), dtype=numpy.int64)
        self.pending = False

    @property
    def tables(self) -> int:
        """How many they are."""
        return len(self._tables)

    def slots(self, table: int) -> range:
        """Positions, in what is added, of the features of a table."""
        first = sum(other.features for other in self._tables[:table])
        return range(first, first + self._tables[table].features)

    def listen(self, listener: Callable[[Tensor | None, Sequence[int]], None]) -> None:
        """Calls ``listener`` when a step's sums are known, before anybody sees them.

        Args:
            listener: is given bool [slots], true for features that had a gradient in no column
                (None: no table has split columns), and the tables whose counts are to be halved.
        """
        self._listeners.append(listener)

    @property
    def ages(self) -> Tensor:
        """int64 [tables], on the CPU: steps since the counts of each table were last halved.

        May be written.
        """
        return torch.from_numpy(self._ages)

    @property
    def values(self) -> Tensor:
        """float64 [tables, 4]: ``STATE_FORMAT``, :math:`G_t`, :math:`C_t`, occurrences.

        Of all steps before the last :meth:`advance`. May be written.
        """
        with self._turn:
            self._merge()
            self._rates = None  # somebody may write them
            return self._values

    def rates(self) -> tuple[Tensor, Tensor]:
        """float32 [tables] each: ``per_count`` and ``limit``, as :mod:`torchrec_freq.rule` says."""
        with self._turn:
            self._merge()
            if self._rates is None:
                self._rates = fused(_rates)(self._values)
            return self._rates

    def add(
        self,
        slots_F: Tensor,
        squares_F: Tensor,
        counts_F: Tensor,
        occurrences_F: Tensor,
        touched_F: Tensor | None = None,
        *,
        replicated: bool = False,
    ) -> None:
        """Adds what a shard saw in one backward.

        Args:
            slots_F: int64 [features], see :meth:`slots`.
            squares_F: [features] sum over the rows of the mean square, over all columns of the
                table, of the shard's part of the gradient.
            counts_F: [features] what was added to the counts.
            occurrences_F: [features] trained occurrences, as many times as squares have entered.
            touched_F: [features] not 0 where a column had a gradient; for split columns.
            replicated: every rank adds the same.
        """
        if replicated and self._replica:
            return
        if not self._split:
            touched_F = None
        elif touched_F is None:
            touched_F = occurrences_F
        step_F = fused(_step)(squares_F, counts_F, occurrences_F, touched_F)
        with self._turn:
            self.pending |= self._group is None
            self._added.index_add_(0, slots_F, step_F)

    def end_backward(self, tables: Sequence[int]) -> None:
        """Ends a backward of the tables: they are a step older."""
        with self._turn:
            self._ages[tables] += 1

    @torch.inference_mode(False)  # what is made here is trained with, whoever asks for it
    def advance(self) -> None:
        """Starts a step. Where ranks share tables all must call it, in the same order.

        No device and no rank waits for the others here.
        """
        with self._turn:
            self._merge()
            added, self._added = self._added, self._added.new_zeros(self._added.shape)
            work = None
            if self._group is not None:
                work = dist.all_reduce(added, group=self._group, async_op=True)
            held = numpy.flatnonzero(self._ages > HOLD_STEPS).tolist()
            self._exchange = _Exchange(added, work, held, self._due())
            self.pending = True

    def settle(self) -> None:
        """Takes in what was added since the last :meth:`advance`.

        Where ranks share tables all must call it.
        """
        with self._turn:
            # What other ranks have added since, this one does not know.
            if self.pending or self._group is not None:
                self.advance()
                self.pending = False
            self._merge()

    def _merge(self) -> None:
        if self._exchange is None:
            return
        exchange, self._exchange = self._exchange, None
        added = exchange.added
        if exchange.work is not None:
            exchange.work.wait()  # on a GPU this makes the stream wait, not the host
            added = used_here(added)
        untouched_S = None
        if self._split:
            untouched_S = added.select(1, 3) == 0
            added = added.narrow(1, 0, 3).masked_fill(untouched_S.unsqueeze(1), 0.0)
        step_T = added
        if len(added) > len(self._tables):
            step_T = added.new_zeros(len(self._tables), 3).index_add_(0, self._table_of_slot, added)
        if self._fractions:  # a row that occurs k times has added 1/k each time
            step_T.select(1, 1).round_()
        for table in exchange.held:
            _, squares, _, occurrences = self._values.select(0, table).unbind()
            step = step_T.select(0, table)
            step.select(0, 0).copy_(squares_per_count(squares, occurrences) * step.select(0, 2))
        self._values.narrow(1, 1, 3).add_(step_T)
        for table in exchange.due:
            self._values.select(0, table).narrow(0, 1, 3).mul_(0.5)
        self._rates = None
        for listener in self._listeners:
            listener(untouched_S, exchange.due)

    def _due(self) -> list[int]:
        """Tables whose half-life is over; their ages start anew."""
        due = []
        for index, table in enumerate(self._tables):
            age, half_life = self._ages[index], table.config.half_life
            if half_life is not None and age >= half_life:
                self._ages[index] = (age - half_life) % half_life
                due.append(index)
        return due


def _rates(values_T: Tensor) -> tuple[Tensor, Tensor]:
    """``per_count`` and ``limit`` of :attr:`TableTotals.values`; elementwise, few kernels."""
    squares_T1, parts_T2 = values_T.narrow(1, 1, 1), values_T.narrow(1, 2, 2)
    per_count_T, mean_T = squares_per_count(squares_T1, parts_T2).to(torch.float32).unbind(1)
    return per_count_T, threshold(SQUARE_LIMIT * mean_T, 0.0, torch.inf)


def _step(
    squares_F: Tensor, counts_F: Tensor, occurrences_F: Tensor, touched_F: Tensor | None
) -> Tensor:
    """float64 [features, 3], or 4 with ``touched_F``."""
    many_F = occurrences_F.to(torch.float64)
    numbers = [squares_F, counts_F, occurrences_F]
    if touched_F is not None:
        numbers.append(touched_F)
    return torch.stack(
        [many_F if number is occurrences_F else number.to(torch.float64) for number in numbers],
        dim=1,
    )

"""Row counters: count the rows of a batch, age by halving, saturate, read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from torchrec_freq.config import CountMode

COUNT_CEILING: Final = 2**30
"""Largest count. Above it a counter saturates; the rest of int32 is headroom between two clamps."""

_INT32_MAX: Final = 2**31 - 1


class RowCounters:
    """Counters of the rows of one or more tables that lie behind each other in one tensor.

    Nothing here reads the device from the host: overflow is prevented by ``_bound``, a host-side
    upper bound of every counter.

    Args:
        rows_per_table: rows of each table.
        device: where the counters live: that of the tables.

    Attributes:
        counts: int32 [sum of rows], 4 bytes a row. May exceed ``COUNT_CEILING`` between two clamps;
            read it through :meth:`read` or :meth:`gather`, which saturate.
        steps: for each table, the number of steps that its counts stand for.
        since_halving: for each table, the steps since its counts were last halved.
        device_steps: int64 [tables], the same on the device, for the rule.
    """

    def __init__(self, rows_per_table: Sequence[int], device: torch.device | None = None) -> None:
        self.rows_per_table = tuple(rows_per_table)
        tables = len(self.rows_per_table)
        self.counts = torch.zeros(sum(self.rows_per_table), dtype=torch.int32, device=device)
        self.steps = [0] * tables
        self.device_steps = torch.zeros(tables, dtype=torch.int64, device=device)
        self.since_halving = [0] * tables
        self._bound = 0

    def table(self, index: int) -> Tensor:
        """int32 [rows] view of the counters of table ``index``."""
        return self.counts.narrow(0, sum(self.rows_per_table[:index]), self.rows_per_table[index])

    def read(self, index: int) -> Tensor:
        """int64 [rows] copy of the counts of table ``index``."""
        return self.saturated(index).to(torch.int64)

    def load(self, index: int, counts: Tensor, steps: int, since_halving: int = 0) -> None:
        """Replaces the counts and steps of table ``index``.

        Args:
            counts: [rows] whole numbers from 0 to ``COUNT_CEILING``; the caller has checked them.
        """
        self.table(index).copy_(counts)
        self._bound = COUNT_CEILING
        self.steps[index] = steps
        self.device_steps.narrow(0, index, 1).fill_(steps)
        self.since_halving[index] = since_halving

    def begin_step(self, mode: CountMode) -> None:
        """Starts a step of all tables, before :meth:`add`.

        Raises:
            RuntimeError: the counts are frozen and none were loaded.
        """
        if mode == "frozen":
            if 0 in self.steps:
                raise RuntimeError(
                    "count='frozen' but no counts were loaded: call "
                    "torchrec_freq.load_row_counts(model, counts, steps=...) before training"
                )
            return
        self.steps = [steps + 1 for steps in self.steps]
        self.device_steps.add_(1)

    def end_step(self, half_life: int | None) -> None:
        """Ends a step: ages each table that has come to its half-life."""
        if half_life is None:
            return
        for index, since in enumerate(self.since_halving):
            self.since_halving[index] = (since + 1) % half_life
            if self.since_halving[index] == 0:
                self.halve(index)

    def add(self, rows_L: Tensor, mode: CountMode) -> None:
        """Counts a batch.

        Args:
            rows_L: int64 [lookups], positions in ``counts``, with repetitions.
            mode: ``"samples"`` adds 1 for each occurrence, ``"batches"`` 1 for each row that
                occurs, ``"frozen"`` nothing.
        """
        if mode == "frozen" or rows_L.numel() == 0:
            return
        most = rows_L.numel() if mode == "samples" else 1
        if self._bound + most > _INT32_MAX:
            self.counts.clamp_(max=COUNT_CEILING)
            self._bound = COUNT_CEILING
        self._bound += most
        if mode == "samples":
            ones_L = torch.ones_like(rows_L, dtype=torch.int32)
            self.counts.index_add_(0, rows_L, ones_L)
        else:
            # Equal rows write equal values, so the order of the writes does not matter.
            self.counts.index_put_((rows_L,), self.counts.index_select(0, rows_L) + 1)

    def add_occurrences(self, occurrences_R: Tensor, mode: CountMode) -> None:
        """As :meth:`add`, from int32 [rows] numbers of occurrences, at most ``COUNT_CEILING``."""
        if mode == "frozen":
            return
        added_R = occurrences_R if mode == "samples" else occurrences_R.clamp(max=1)
        # Between two counts there is no host-side bound here, so every one is followed by a clamp.
        self.counts.clamp_(max=COUNT_CEILING).add_(added_R).clamp_(max=COUNT_CEILING)
        self._bound = COUNT_CEILING

    def saturated(self, index: int) -> Tensor:
        """int32 [rows], the counts of table ``index``, for use on the device."""
        return self.table(index).clamp(max=COUNT_CEILING)

    def gather(self, rows_L: Tensor) -> Tensor:
        """int32 [lookups], the counts of ``rows_L``."""
        counts_L = self.counts.index_select(0, rows_L)
        return counts_L.clamp_(max=COUNT_CEILING) if self._bound > COUNT_CEILING else counts_L

    def halve(self, index: int) -> None:
        """Halves the counts and the steps of table ``index``, in whole numbers, in place."""
        self.table(index).clamp_(max=COUNT_CEILING).bitwise_right_shift_(1)
        self.steps[index] //= 2
        self.device_steps.narrow(0, index, 1).bitwise_right_shift_(1)

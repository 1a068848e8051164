"""Row counters: count the rows of a batch, age by halving, saturate, read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy
import torch
from torch import Tensor

from torchrec_freq.config import CountMode

COUNT_CEILING: Final = 2**30
"""Largest count. Above it a counter saturates; the rest of int32 is headroom between two clamps."""

_INT32_MAX: Final = 2**31 - 1


def check_counts(table: str, counts_R: Tensor) -> None:
    """Refuses what cannot be the counts of a table.

    Args:
        counts_R: [rows] of any dtype, on any device.

    Raises:
        ValueError: not whole numbers from 0 to ``COUNT_CEILING``; the message names the table.
    """
    if counts_R.dim() != 1:
        raise ValueError(
            f"Table {table!r}: counts must have the shape [num_embeddings]; got "
            f"{list(counts_R.shape)}."
        )
    if counts_R.is_complex() or counts_R.dtype == torch.bool:
        raise ValueError(f"Table {table!r}: counts cannot be {counts_R.dtype}.")
    if counts_R.is_floating_point() and not bool((counts_R.frac() == 0).all()):
        raise ValueError(f"Table {table!r}: counts must be whole numbers, without NaN or infinity.")
    least, most = (int(value) for value in counts_R.aminmax()) if counts_R.numel() else (0, 0)
    if least < 0 or most > COUNT_CEILING:
        raise ValueError(
            f"Table {table!r}: counts must lie in 0 to {COUNT_CEILING}; got {least} to {most}."
        )


def count_occurrences_(counts_R: Tensor, rows_L: Tensor) -> Tensor:
    """Adds 1 to the count of each row for each time it occurs, in place.

    Args:
        counts_R: int32 [rows].
        rows_L: int64 [lookups].

    Returns:
        ``counts_R``.
    """
    # On a CPU faster than index_add_, and than with a one that is expanded.
    return counts_R.scatter_add_(0, rows_L, torch.ones_like(rows_L, dtype=torch.int32))


class RowCounters:
    """Counters of the rows of one or more tables that lie behind each other in one tensor.

    Nothing here reads the device from the host: overflow is prevented by ``_bound``, a host-side
    upper bound of every counter.

    Args:
        rows_per_table: rows of each table.
        device: where the counters live: that of the tables.

    Attributes:
        counts: int32 [sum of rows], 4 bytes a row. May exceed ``COUNT_CEILING`` between two clamps;
            read it through :meth:`saturated` or :meth:`gather`. May be written at any time.
        steps: int64 [tables, 2], on the host: the number of steps that the counts of a table stand
            for, and the steps since they were last halved. May be written at any time.
        device_steps: int64 [tables], ``steps[:, 0]`` on the device, for the rule.
    """

    def __init__(self, rows_per_table: Sequence[int], device: torch.device | None = None) -> None:
        self.rows_per_table = tuple(rows_per_table)
        tables = len(self.rows_per_table)
        self.counts = torch.zeros(sum(self.rows_per_table), dtype=torch.int32, device=device)
        self.steps = numpy.zeros((tables, 2), dtype=numpy.int64)
        self.device_steps = torch.zeros(tables, dtype=torch.int64, device=device)
        self._on_device = [0] * tables
        # Counts may be loaded behind our back, and then be as large as that.
        self._bound = COUNT_CEILING

    def table(self, index: int) -> Tensor:
        """int32 [rows] view of the counters of table ``index``."""
        return self.counts.narrow(0, sum(self.rows_per_table[:index]), self.rows_per_table[index])

    def saturated(self, index: int) -> Tensor:
        """int32 [rows] copy of the counts of table ``index``."""
        return self.table(index).clamp(max=COUNT_CEILING)

    @property
    def common_steps(self) -> int | None:
        """Steps of every table, where they are equal; they differ once counts were loaded."""
        steps = self._on_device[0]
        return steps if all(other == steps for other in self._on_device) else None

    def begin_step(self, mode: CountMode) -> None:
        """Starts a step of all tables, before :meth:`add`.

        Raises:
            RuntimeError: the counts are frozen and none were loaded.
        """
        if self.steps[:, 0].tolist() != self._on_device:
            self._load_device_steps()
        if mode == "frozen":
            if 0 in self._on_device:
                raise RuntimeError(
                    "count='frozen' but no counts were loaded: call "
                    "torchrec_freq.load_row_counts(model, counts, steps=...) before training"
                )
            return
        self.steps[:, 0] += 1
        self.device_steps.add_(1)
        self._on_device = self.steps[:, 0].tolist()

    def end_step(self, half_life: int | None) -> None:
        """Ends a step: ages each table that has come to its half-life."""
        if half_life is None:
            return
        self.steps[:, 1] += 1
        for index, since_halving in enumerate(self.steps[:, 1].tolist()):
            if since_halving >= half_life:
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
            count_occurrences_(self.counts, rows_L)
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

    def gather(self, rows_L: Tensor) -> Tensor:
        """int32 [lookups], the counts of ``rows_L``."""
        return self.counts.index_select(0, rows_L).clamp_(max=COUNT_CEILING)

    def halve(self, index: int) -> None:
        """Halves the counts and the steps of table ``index``, in whole numbers, in place."""
        self.table(index).clamp_(max=COUNT_CEILING).bitwise_right_shift_(1)
        self.steps[index] = self.steps[index, 0] // 2, 0
        self.device_steps.narrow(0, index, 1).bitwise_right_shift_(1)
        self._on_device = self.steps[:, 0].tolist()

    def _load_device_steps(self) -> None:
        self._on_device = self.steps[:, 0].tolist()
        for index, steps in enumerate(self._on_device):
            self.device_steps.narrow(0, index, 1).fill_(steps)

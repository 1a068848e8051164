"""The scale of each table's gradients: a running mean square that is the same on every rank."""

from __future__ import annotations

from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

SCALE_NUMBERS: Final = 4
"""Numbers a table in :attr:`TableScales.totals`."""


class TableScales:
    r"""Root mean square of the gradient with respect to a looked-up row, for each table.

    .. math::
        s_t^2 = \frac{L_{n-1}}{O_{n-1}}\, O_n

    :math:`L_n` is the mean square, over the first ``n`` steps, of the gradient with respect to the
    row as each lookup read it, over all lookups of the table and its columns; for a bag that is the
    gradient of the pooled output times the lookup's weight (``1/length`` under mean pooling).
    :math:`O_n` is that of the gradient of the module's output, over all samples and the table's
    columns. Gradients are those of the mean loss of the global batch.

    The output's gradient is known before any table is updated, so the scale follows this step's:
    where a step too large has blown up the gradients, the next one is divided by them. What the
    lookups make of it changes slowly and may lag; before it is known the ratio is 1.

    Every rank adds what it saw: of the lookups its own rows and columns, of the outputs its own
    samples. The sums over the ranks do not depend on the sharding plan. No device waits for those
    of the lookups, which are exchanged while the next step runs.

    Args:
        tables: how many, in the same order on every rank.
        device: where the gradients are.
        process_group: the ranks that hold shards of the tables; None for a single process.
    """

    def __init__(
        self,
        tables: int,
        device: torch.device | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._totals = torch.zeros(tables, SCALE_NUMBERS, dtype=torch.float64, device=device)
        self._lookups = self._totals.new_zeros(tables, 2)
        self._outputs = self._totals.new_zeros(tables, 2)
        self._lookups_exchange: tuple[Tensor, dist.Work | None] | None = None
        self._outputs_exchanges: list[tuple[Tensor, dist.Work | None]] = []
        distributed = process_group is not None and process_group.size() > 1
        self._group = process_group if distributed else None

    @property
    def totals(self) -> Tensor:
        """float64 [tables, 4]: sums of squares and numbers of elements so far, of lookups, outputs.

        Of all steps that have ended; may be written.
        """
        if self._lookups_exchange is not None:
            step_T2, work = self._lookups_exchange
            self._lookups_exchange = None
            if work is not None:
                # On a GPU this makes the stream wait, not the host.
                work.wait()
            self._totals.narrow(1, 0, 2).add_(step_T2)
        return self._totals

    def add_lookups(self, tables_F: Tensor, squares_F: Tensor, elements_F: Tensor) -> None:
        """Adds what a shard saw in one backward.

        Args:
            tables_F: int64 [features], the number of each feature's table.
            squares_F: [features] sum of squares of the gradient elements.
            elements_F: [features] number of those elements.
        """
        step_F2 = torch.stack((squares_F, elements_F.to(torch.float64)), dim=1)
        self._lookups.index_add_(0, tables_F, step_F2)

    def add_outputs(self, tables_F: Tensor, squares_F: Tensor, elements_F: Tensor) -> None:
        """As :meth:`add_lookups`, of this rank's outputs, and starts to sum them over the ranks.

        All ranks must call it equally often, in the same order with other collectives.
        """
        step_F2 = torch.stack((squares_F, elements_F.to(torch.float64)), dim=1)
        step_T2 = torch.zeros_like(self._outputs).index_add_(0, tables_F, step_F2)
        self._outputs_exchanges.append((step_T2, self._sum_over_ranks(step_T2)))

    def end_step(self) -> None:
        """Ends a step: starts to sum over the ranks what the lookups added; does not wait.

        All ranks must call it equally often, in the same order with other collectives.
        """
        totals = self.totals
        self._wait_for_outputs()
        totals.narrow(1, 2, 2).add_(self._outputs)
        self._outputs.zero_()
        step_T2, self._lookups = self._lookups, torch.zeros_like(self._lookups)
        self._lookups_exchange = (step_T2, self._sum_over_ranks(step_T2))

    def inverse(self) -> Tensor:
        """float32 [tables], ``1 / s_t``; 0 until outputs, and lookups if any, have a gradient."""
        totals_T4 = self.totals
        self._wait_for_outputs()
        # Elementwise, few kernels: this is a cost of every step, however small.
        lookups_T, outputs_T = _mean(totals_T4.view(-1, 2, 2)).unbind(dim=1)
        now_T = _mean(totals_T4.narrow(1, 2, 2) + self._outputs)
        ratio_T = (lookups_T / outputs_T).nan_to_num_(nan=1.0)  # 0 / 0: not known yet
        inverse_T = ratio_T.mul_(now_T).rsqrt_()
        return inverse_T.nan_to_num_(nan=0.0, posinf=0.0).to(torch.float32)

    def _wait_for_outputs(self) -> None:
        for step_T2, work in self._outputs_exchanges:
            if work is not None:
                work.wait()
            self._outputs += step_T2
        self._outputs_exchanges.clear()

    def _sum_over_ranks(self, values: Tensor) -> dist.Work | None:
        if self._group is None:
            return None
        work: dist.Work | None = dist.all_reduce(values, group=self._group, async_op=True)
        return work


def _mean(sums: Tensor) -> Tensor:
    """[...] of [..., 2]: sum over number."""
    return sums.select(-1, 0) / sums.select(-1, 1)

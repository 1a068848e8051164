"""The scale of each table's gradients: a running mean square that is the same on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class TableScales:
    r"""Root mean square of the gradient with respect to a looked-up row, for each table.

    .. math:: s_t = \sqrt{\mathrm{mean}_{l, d} \left(\partial L / \partial x_{l,d}\right)^2}

    over all lookups ``l`` of the table so far and all its columns ``d``, where :math:`x_l` is the
    row as lookup ``l`` read it and ``L`` the mean loss of the global batch. For a bag this is the
    gradient of the pooled output times the lookup's weight (``1/length`` under mean pooling).

    Every shard adds what it saw of its own rows and columns; their sum over the ranks does not
    depend on the sharding plan. So that no device waits for it, the sum of one step is exchanged
    while the next one runs: in step ``n`` the scale is that of the first ``n - 1`` steps. A table
    whose gradients have never been seen has no scale yet, and its first step updates no row.

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
        self._totals = torch.zeros(tables, 2, dtype=torch.float64, device=device)
        self._pending = torch.zeros_like(self._totals)
        self._exchanged: tuple[Tensor, dist.Work | None] | None = None
        distributed = process_group is not None and process_group.size() > 1
        self._group = process_group if distributed else None

    @property
    def totals(self) -> Tensor:
        """float64 [tables, 2]: sum of squares, and number of gradient elements, so far.

        Of all that was exchanged; may be written.
        """
        if self._exchanged is not None:
            step_T2, work = self._exchanged
            self._exchanged = None
            if work is not None:
                # On a GPU this makes the stream wait, not the host.
                work.wait()
            self._totals += step_T2
        return self._totals

    def add(self, tables_F: Tensor, squares_F: Tensor, elements_F: Tensor) -> None:
        """Adds what a shard saw in one backward.

        Args:
            tables_F: int64 [features], the number of each feature's table.
            squares_F: [features] sum of squares of the gradient elements.
            elements_F: [features] number of those elements.
        """
        step_F2 = torch.stack((squares_F.to(torch.float64), elements_F.to(torch.float64)), dim=1)
        self._pending.index_add_(0, tables_F, step_F2)

    def exchange(self) -> None:
        """Starts to sum over the ranks what was added since the last call; does not wait.

        All ranks must call it equally often, in the same order with other collectives.
        """
        _ = self.totals
        step_T2, self._pending = self._pending, torch.zeros_like(self._pending)
        work = None
        if self._group is not None:
            work = dist.all_reduce(step_T2, group=self._group, async_op=True)
        self._exchanged = (step_T2, work)

    def inverse(self) -> Tensor:
        """float32 [tables], ``1 / s_t``; 0 for a table without a gradient so far."""
        squares_T, elements_T = self.totals.unbind(dim=1)
        known_T = squares_T > 0
        inverse_T = (elements_T / squares_T.where(known_T, squares_T.new_ones(()))).sqrt_()
        return (inverse_T * known_T).to(torch.float32)

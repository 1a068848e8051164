"""The scale of each table's gradients: a running mean square that is the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence

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
    during the next forward: in step ``n`` the scale is that of the first ``n - 1`` steps. A table
    whose gradients have never been seen has no scale yet, and its first step updates no row.

    Args:
        names: the tables, in the same order on every rank.
        device: where the gradients are.
        process_group: the ranks that hold shards of the tables; None for a single process.

    Attributes:
        totals: float64 [2, tables]: sum of squares, and number of gradient elements, so far.
    """

    def __init__(
        self,
        names: Sequence[str],
        device: torch.device | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.names = tuple(names)
        self.totals = torch.zeros(2, len(self.names), dtype=torch.float64, device=device)
        self._pending = torch.zeros_like(self.totals)
        self._exchanged: tuple[Tensor, dist.Work | None] | None = None
        distributed = process_group is not None and process_group.size() > 1
        self._group = process_group if distributed else None

    def add(self, tables_F: Tensor, squares_F: Tensor, elements_F: Tensor) -> None:
        """Adds what a shard saw in one backward.

        Args:
            tables_F: int64 [features], the table of each feature, a position in ``names``.
            squares_F: [features] sum of squares of the gradient elements.
            elements_F: [features] number of those elements.
        """
        step_2F = torch.stack((squares_F.to(torch.float64), elements_F.to(torch.float64)))
        self._pending.index_add_(1, tables_F, step_2F)

    def exchange(self) -> None:
        """Starts to sum over the ranks what was added since the last call; does not wait.

        All ranks must call it equally often, in the same order with other collectives.
        """
        self._fold()
        step_2T, self._pending = self._pending, torch.zeros_like(self._pending)
        work = None
        if self._group is not None:
            work = dist.all_reduce(step_2T, group=self._group, async_op=True)
        self._exchanged = (step_2T, work)

    def flush(self) -> Tensor:
        """``totals`` with all that was added so far. A collective, as :meth:`exchange`."""
        self.exchange()
        self._fold()
        return self.totals

    def inverse(self) -> Tensor:
        """float32 [tables], ``1 / s_t``; 0 for a table without a gradient so far."""
        self._fold()
        squares_T, elements_T = self.totals.unbind()
        known_T = squares_T > 0
        inverse_T = (elements_T / squares_T.where(known_T, squares_T.new_ones(()))).sqrt_()
        return (inverse_T * known_T).to(torch.float32)

    def _fold(self) -> None:
        if self._exchanged is not None:
            step_2T, work = self._exchanged
            self._exchanged = None
            if work is not None:
                # On a GPU this makes the stream wait, not the host.
                work.wait()
            self.totals += step_2T

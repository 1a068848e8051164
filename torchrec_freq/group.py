"""The tables of one TBE: their counters and gradient scales, and what a batch does to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_freq.config import FrequencyConfig
from torchrec_freq.counters import RowCounters
from torchrec_freq.rule import row_multiplier
from torchrec_freq.scale import TableScales


@dataclass
class VariableBatch:
    """Where the bags of a variable batch per feature (VBE) lie; F features, R ranks.

    Attributes:
        sizes: [F][R] bags of each feature from each rank.
        starts_FR: [F, R + 1] first bag of each rank among its feature's, on the device.
        outputs_RF: [R, F] element of the flat output where a feature's part from a rank begins.
    """

    sizes: list[list[int]]
    starts_FR: Tensor
    outputs_RF: Tensor


@dataclass
class Batch:
    """What one forward looked up.

    Attributes:
        indices: [lookups] ids, each within its table.
        offsets: [bags + 1] first lookup of each bag, feature-major.
        weights_L: [lookups] what each looked-up row was multiplied by; None for ones.
        variable: set where the features have different batch sizes.
    """

    indices: Tensor
    offsets: Tensor
    weights_L: Tensor | None = None
    variable: VariableBatch | None = None


class TableGroup:
    """Counters, gradient scales and rule of the tables of one TBE.

    Args:
        config: the rule's settings, the same for all tables.
        rows: rows of each table.
        dims: columns of each table.
        feature_table_map: table of each feature.
        pooled: whether the output has a row a bag; else it has a row a lookup.
        device: where the tables are.

    Attributes:
        counters: counts and steps.
        scales: gradient scales; shared by all shards of a sharded module (:meth:`share_scales`).
    """

    def __init__(
        self,
        config: FrequencyConfig,
        rows: Sequence[int],
        dims: Sequence[int],
        feature_table_map: Sequence[int],
        *,
        pooled: bool,
        device: torch.device | None = None,
    ) -> None:
        self.config = config
        self.pooled = pooled
        self.counters = RowCounters(rows, device)
        self.scales = TableScales(len(rows), device)
        self._owns_scales = True
        self.feature_table_map = list(feature_table_map)
        self.dims = [dims[table] for table in feature_table_map]
        first_rows = [sum(rows[:table]) for table in feature_table_map]
        self._table_F = torch.tensor(self.feature_table_map, dtype=torch.int64, device=device)
        self._scale_F = self._table_F
        self._scale_of_table = torch.arange(len(rows), device=device)
        self._first_row_F = torch.tensor(first_rows, dtype=torch.int64, device=device)
        # float64: what it counts, elements of the gradients, adds up exactly.
        self._dim_F = torch.tensor(self.dims, dtype=torch.float64, device=device)

    def share_scales(self, scales: TableScales, positions: Sequence[int]) -> None:
        """Uses ``scales`` from now on; its owner measures the outputs and ends the steps.

        Args:
            positions: number in ``scales`` of each table.
        """
        self.scales = scales
        self._owns_scales = False
        self._scale_of_table = torch.tensor(
            positions, dtype=torch.int64, device=self._table_F.device
        )
        self._scale_F = self._scale_of_table.index_select(0, self._table_F)

    def lookups_of_feature(self, batch: Batch) -> Tensor:
        """[features], of the type of ``offsets``."""
        features, bags = len(self.dims), batch.offsets.numel() - 1
        if batch.variable is None:
            return batch.offsets.as_strided((features + 1,), (bags // features,)).diff()
        ends_F = batch.variable.starts_FR.select(1, -1).cumsum(0)
        return batch.offsets.index_select(0, ends_F).diff(prepend=batch.offsets.narrow(0, 0, 1))

    def feature_of_lookup(self, batch: Batch, lookups_F: Tensor) -> Tensor:
        """[lookups], ascending, of the type of ``offsets``."""
        return torch.repeat_interleave(lookups_F, output_size=batch.indices.numel())

    def rows_of_lookup(self, batch: Batch, feature_L: Tensor) -> Tensor:
        """int64 [lookups], positions in ``counters.counts``."""
        return self._first_row_F.index_select(0, feature_L).add_(batch.indices)

    def inverse_scales(self) -> Tensor:
        """float32 [tables], ``1 / s_t``."""
        return self.scales.inverse().index_select(0, self._scale_of_table)

    def forget(self, feature: int, ids: Tensor) -> None:
        """Sets the counts of evicted rows to 0.

        Args:
            feature: one that looks up the rows' table.
            ids: [...] rows within the table.
        """
        rows = ids.to(torch.int64) + self._first_row_F[feature]
        self.counters.counts.index_fill_(0, rows, 0)

    def step(self, batch: Batch, grad: Tensor) -> Tensor | None:
        """One step of the counters and scales.

        Args:
            grad: gradient of the mean loss of the global batch with respect to the TBE's output.

        Returns:
            float32 [lookups], the multiplier of each lookup's row; None for an empty batch.
        """
        config, counters = self.config, self.counters
        counters.begin_step(config.count)
        multiplier_L = None
        if batch.indices.numel() > 0:
            lookups_F = self.lookups_of_feature(batch)
            feature_L = self.feature_of_lookup(batch, lookups_F)
            rows_L = self.rows_of_lookup(batch, feature_L)
            counters.add(rows_L, config.count)
            counts_L = counters.gather(rows_L)
            del rows_L  # 8 bytes a lookup, of which the rest has less to add to the peak
            steps: Tensor | int | None = None
            inverse_L = None
            if config.coherence:
                steps = counters.common_steps
                if steps is None:
                    steps_F = counters.device_steps.index_select(0, self._table_F)
                    steps = steps_F.index_select(0, feature_L)
            if config.normalize is not None:
                self.measure(batch, lookups_F, feature_L, grad)
                inverse_F = self.scales.inverse().index_select(0, self._scale_F)
                inverse_L = inverse_F.index_select(0, feature_L)
            multiplier_L = row_multiplier(config, counts_L, steps, inverse_L)
        counters.end_step(config.half_life)
        if self._owns_scales:
            self.scales.end_step()
        return multiplier_L

    def measure(
        self,
        batch: Batch,
        lookups_F: Tensor,
        feature_L: Tensor,
        grad: Tensor,
        factor: float = 1.0,
    ) -> None:
        """Adds the gradients of a batch's lookups to the scales.

        Args:
            lookups_F: of :meth:`lookups_of_feature`.
            feature_L: of :meth:`feature_of_lookup`.
            factor: what the gradient is to be multiplied by.
        """
        elements_F = lookups_F * self._dim_F
        if self.pooled:
            squares_B = self._bag_squares(batch, grad)
            if self._owns_scales:
                bags_F = self._bags_of_feature(batch)
                self.scales.add_outputs(
                    self._scale_F, self._sum_by_feature(batch, squares_B), self._dim_F * bags_F
                )
            if batch.weights_L is None:
                lookups_B = batch.offsets.diff()
            else:
                lookups_B = torch.ops.fbgemm.segment_sum_csr(
                    1, batch.offsets, batch.weights_L.square()
                )
            squares_F = self._sum_by_feature(batch, squares_B * lookups_B)
        else:
            squares_L = torch.linalg.vector_norm(grad, dim=1, dtype=torch.float32).square_()
            squares_F = squares_L.new_zeros(len(self.dims)).index_add_(0, feature_L, squares_L)
            if self._owns_scales:
                self.scales.add_outputs(self._scale_F, squares_F, elements_F)
        if factor != 1:
            squares_F = squares_F * factor**2
        self.scales.add_lookups(self._scale_F, squares_F, elements_F)

    def _bags_of_feature(self, batch: Batch) -> int | Tensor:
        """Number of bags of each feature, [features] where it differs."""
        if batch.variable is None:
            return (batch.offsets.numel() - 1) // len(self.dims)
        return batch.variable.starts_FR.select(1, -1)

    def _sum_by_feature(self, batch: Batch, values_B: Tensor) -> Tensor:
        """[features], sums of [bags]."""
        if batch.variable is None:
            return values_B.view(len(self.dims), -1).sum(dim=1)
        parts = values_B.split([sum(sizes) for sizes in batch.variable.sizes])
        return torch.stack([part.sum() for part in parts])

    def _bag_squares(self, batch: Batch, grad: Tensor) -> Tensor:
        """Sum over the columns of the squared gradient of each bag's output.

        Returns:
            float32 [bags].
        """
        variable = batch.variable
        if variable is None:
            return bag_squares(grad, self.dims).flatten()
        # Bags lie feature-major, their outputs rank-major.
        sizes_FR = variable.starts_FR.diff(dim=1)
        features, ranks = sizes_FR.shape
        bags = batch.offsets.numel() - 1
        block_B = torch.repeat_interleave(
            torch.arange(features * ranks, device=grad.device),
            sizes_FR.flatten(),
            output_size=bags,
        )
        first_bag_FR = sizes_FR.flatten().cumsum(0) - sizes_FR.flatten()
        within_B = torch.arange(bags, device=grad.device) - first_bag_FR.index_select(0, block_B)
        dim_B = self._dim_F.to(torch.int64).index_select(0, block_B // ranks)
        output_B = variable.outputs_RF.t().flatten().index_select(0, block_B) + within_B * dim_B
        flat, parts = grad.flatten(), []
        by_feature = output_B.split([sum(sizes) for sizes in variable.sizes])
        for start_B, dim in zip(by_feature, self.dims, strict=True):
            elements_BD = start_B.unsqueeze(1) + torch.arange(dim, device=grad.device)
            part_BD = flat.index_select(0, elements_BD.flatten()).view(-1, dim)
            parts.append(torch.linalg.vector_norm(part_BD, dim=1, dtype=torch.float32))
        return torch.cat(parts).square_()


def bag_squares(grad: Tensor, dims: Sequence[int]) -> Tensor:
    """Sum of squares over the columns of each feature's part of a pooled output's gradient.

    Args:
        grad: [batch, sum of dims].
        dims: columns of each feature.

    Returns:
        float32 [features, batch].
    """
    parts_B = []
    first = column = 0
    while first < len(dims):
        # Neighbours of equal width are one strided view: one kernel instead of one a feature.
        last = first
        while last < len(dims) and dims[last] == dims[first]:
            last += 1
        width = (last - first) * dims[first]
        run_BFD = grad.narrow(1, column, width).unflatten(1, (last - first, dims[first]))
        parts_B.append(torch.linalg.vector_norm(run_BFD, dim=2, dtype=torch.float32).square_())
        first, column = last, column + width
    return (parts_B[0] if len(parts_B) == 1 else torch.cat(parts_B, dim=1)).t()

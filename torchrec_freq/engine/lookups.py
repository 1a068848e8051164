"""What a batch looks up in the tables of one TBE: rows, features, and which lookups are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Batch:
    """The arguments of one forward.

    Attributes:
        indices: [lookups] ids, each within its table.
        offsets: [bags + 1] first lookup of each bag, feature-major.
        weights_L: [lookups] weight of each lookup; None for ones.
        bag_starts_F: int64 [features + 1] first bag of each feature, where the features have
            different batch sizes (VBE); None where they have one.
    """

    indices: Tensor
    offsets: Tensor
    weights_L: Tensor | None = None
    bag_starts_F: Tensor | None = None


@dataclass
class Lookups:
    """What a batch looks up.

    Attributes:
        ends_F: [features + 1] first lookup of each feature, and their number; contiguous.
        feature_L: [lookups] ascending.
        rows_L: int64 [lookups] positions among the rows of all tables of the TBE.
        trained_L: int32 [lookups], 1 where the lookup counts. It does where its gradient is not 0:
            a masked loss or padding trains nothing. (A gradient below 1e-22, whose square is 0 in
            float32, is taken for 0.) Where one shard does not see whether it is 0, it counts.
        touched_F: [features] not 0 where the feature's gradient is not 0 everywhere; None where
            that says nothing new.
    """

    ends_F: Tensor
    feature_L: Tensor
    rows_L: Tensor
    trained_L: Tensor
    touched_F: Tensor | None


class Layout:
    """How the features of one TBE lie in its tables and in its output.

    Args:
        rows: rows of each table.
        dims: columns of each table.
        feature_table_map: table of each feature.
        pooled: whether the output has a row a bag; else it has a row a lookup.
        device: where the tables are.
    """

    def __init__(
        self,
        rows: Sequence[int],
        dims: Sequence[int],
        feature_table_map: Sequence[int],
        *,
        pooled: bool,
        device: torch.device | None = None,
    ) -> None:
        self.pooled = pooled
        self.feature_table_map = list(feature_table_map)
        self.dims = [dims[table] for table in feature_table_map]
        first_rows = [sum(rows[:table]) for table in feature_table_map]
        self.first_row_F = torch.tensor(first_rows, dtype=torch.int64, device=device)
        # Features whose lookups count whatever this shard sees of their gradient.
        self._always_F: Tensor | None = None

    def count_always(self, features: Sequence[bool]) -> None:
        """Marks features of tables of which other shards hold other columns.

        Their shards must not come to different counts, so each counts all lookups; a feature whose
        gradient is 0 in all of them is taken back when that is known.
        """
        if any(features):
            self._always_F = torch.tensor(features, device=self.first_row_F.device)

    def of(self, batch: Batch, grad: Tensor | None) -> Lookups:
        """The lookups of a batch.

        Args:
            grad: gradient of the TBE's output, [bags of a feature, sum of dims], without pooling
                [lookups, dim], under VBE flat; None where it is 0.
        """
        features, lookups = len(self.dims), batch.indices.numel()
        bags = batch.offsets.numel() - 1
        if batch.bag_starts_F is None:
            # Contiguous: segment_sum_csr takes strides for it.
            ends_F = batch.offsets.as_strided((features + 1,), (bags // features,)).contiguous()
        else:
            ends_F = batch.offsets.index_select(0, batch.bag_starts_F)
        feature_L = torch.repeat_interleave(ends_F.diff(), output_size=lookups)
        rows_L = self.first_row_F.index_select(0, feature_L).add_(batch.indices)
        trained_L, touched_F = self._trained(batch, grad, feature_L, ends_F)
        return Lookups(ends_F, feature_L, rows_L, trained_L, touched_F)

    def _trained(
        self, batch: Batch, grad: Tensor | None, feature_L: Tensor, ends_F: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """``trained_L`` and ``touched_F`` of :class:`Lookups`."""
        lookups = batch.indices.numel()
        if grad is None:
            trained_L = torch.zeros(lookups, dtype=torch.int32, device=batch.indices.device)
        elif batch.bag_starts_F is not None:
            # The samples that share a bag have its gradient summed; its place is FBGEMM's secret.
            trained_L = torch.ones(lookups, dtype=torch.int32, device=batch.indices.device)
        elif self.pooled:
            trained_B = has_gradient(grad, self.dims).t().reshape(-1)
            trained_L = torch.repeat_interleave(
                trained_B, batch.offsets.diff(), output_size=lookups
            )
        else:
            trained_L = _nonzero_rows(grad)
        if batch.weights_L is not None:
            trained_L = trained_L * (batch.weights_L != 0)
        if self._always_F is None:
            return trained_L, None
        touched_F = torch.ops.fbgemm.segment_sum_csr(1, ends_F, trained_L.to(torch.float32))
        always_L = self._always_F.index_select(0, feature_L)
        return trained_L.logical_or(always_L).to(torch.int32), touched_F


def has_gradient(grad: Tensor, dims: Sequence[int]) -> Tensor:
    """Whether each feature's part of a pooled output's gradient is not 0.

    Args:
        grad: [batch, sum of dims].
        dims: columns of each feature.

    Returns:
        int32 [batch, features].
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
        parts_B.append(_nonzero_rows(run_BFD))
        first, column = last, column + width
    return parts_B[0] if len(parts_B) == 1 else torch.cat(parts_B, dim=1)


def _nonzero_rows(grad: Tensor) -> Tensor:
    """int32 [...] of [..., columns]: 1 where a column is not 0."""
    # The one reduction that is fast on a CPU, too; NaN and infinity are not 0.
    norm: Tensor = torch.linalg.vector_norm(grad, dim=-1, dtype=torch.float32)
    return norm.ne(0).to(torch.int32)

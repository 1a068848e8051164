"""What a batch looks up in the tables of one TBE: rows, features, and which lookups are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from torchrec_freq.engine.fused import fused

_WHOLE: Final = 1 << 15
"""Lookups a feature, on average, up to which it is not worth some launches to part it."""
_PART: Final = 1 << 12
"""Lookups of a part, on average, at least."""


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


class Spans:
    """Where the lookups of each feature lie: one after the other, in parts of about equal length.

    Kernels on GPUs give a block, or a warp, to a part, and few features leave most of them idle.

    Args:
        ends_F: [features + 1] first lookup of each feature, and their number; contiguous.
        lookups: their number.

    Attributes:
        lengths_F: [features] lookups of each feature.
    """

    def __init__(self, ends_F: Tensor, lookups: int) -> None:
        self.lengths_F = ends_F.diff()
        self._lookups, self._ends_P = lookups, ends_F
        each = lookups // len(self.lengths_F)
        self._log2_parts = (each // _PART).bit_length() - 1 if each > _WHOLE else 0
        if self._log2_parts:
            self._ends_P = fused(_part)(ends_F, self.lengths_F, 1 << self._log2_parts)

    def sum(self, values_L: Tensor) -> Tensor:
        """[features] sums over the lookups of each, in the type of ``values_L``."""
        sums_P: Tensor = torch.ops.fbgemm.segment_sum_csr(1, self._ends_P, values_L)
        if self._log2_parts:
            sums_P = sums_P.unflatten(0, (len(self.lengths_F), -1)).sum(1, dtype=values_L.dtype)
        return sums_P

    def feature_L(self) -> Tensor:
        """[lookups] numbers of the features, ascending."""
        if not self._log2_parts:
            return torch.repeat_interleave(self.lengths_F, output_size=self._lookups)
        part_L = torch.repeat_interleave(self._ends_P.diff(), output_size=self._lookups)
        return part_L.bitwise_right_shift_(self._log2_parts)


@dataclass
class Lookups:
    """What a batch looks up.

    Attributes:
        spans: of each feature.
        feature_L: [lookups] ascending.
        rows_L: int64 [lookups] positions among the rows of all tables of the TBE.
        trained_L: int32 [lookups], 1 where the lookup counts, else 0; None where all do. One does
            where its gradient is not 0: a masked loss or padding trains nothing. (A gradient below
            1e-22, whose square is 0 in float32, is taken for 0.) Where a shard does not see all
            columns, those of a feature count together; where none can be seen (VBE), all do.
        touched_F: int32 [features], not 0 where the feature has a gradient here; None where all
            lookups have one.
    """

    spans: Spans
    feature_L: Tensor
    rows_L: Tensor
    trained_L: Tensor | None
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
        columns = [sum(self.dims[:feature]) for feature in range(len(self.dims))]
        self._first_column_F = torch.tensor(columns, dtype=torch.int64, device=device)
        first_rows = [sum(rows[:table]) for table in feature_table_map]
        self.first_row_F = torch.tensor(first_rows, dtype=torch.int64, device=device)
        self.split_F: Tensor | None = None

    def split(self, features: Sequence[bool]) -> None:
        """Marks features of tables of which other shards hold other columns.

        Their shards must not come to different counts, so the lookups of a feature count together,
        where any of them has a gradient.
        """
        if any(features):
            self.split_F = torch.tensor(features, device=self.first_row_F.device)

    def of(self, batch: Batch, grad: Tensor | None) -> Lookups:
        """The lookups of a batch.

        Args:
            grad: gradient of the TBE's output, [bags of a feature, sum of dims], without pooling
                [lookups, dim], under VBE flat; None where it is 0.
        """
        features, lookups = len(self.dims), batch.indices.numel()
        bags = batch.offsets.numel() - 1
        if batch.bag_starts_F is None:
            # A copy: segment_sum_csr takes strides for contiguous.
            ends_F = batch.offsets.as_strided((features + 1,), (bags // features,)).clone()
        else:
            ends_F = batch.offsets.index_select(0, batch.bag_starts_F)
        spans = Spans(ends_F, lookups)
        feature_L = spans.feature_L()
        rows_L = fused(_rows)(self.first_row_F, feature_L, batch.indices)
        trained_L, touched_F = self._trained(batch, grad, feature_L, spans)
        return Lookups(spans, feature_L, rows_L, trained_L, touched_F)

    def _trained(
        self, batch: Batch, grad: Tensor | None, feature_L: Tensor, spans: Spans
    ) -> tuple[Tensor | None, Tensor | None]:
        """``trained_L`` and ``touched_F`` of :class:`Lookups`."""
        trained_L = None
        if grad is None:
            trained_L = torch.zeros_like(feature_L, dtype=torch.int32)
        elif batch.bag_starts_F is not None:
            pass  # which part of the output a bag is, is FBGEMM's secret
        elif not self.pooled:
            trained_L = fused(_nonzero_rows)(grad)
        elif not self._all_have_gradient(grad):
            trained_B = has_gradient(grad, self.dims).t().reshape(-1)
            lengths_B = batch.offsets.diff()
            trained_L = torch.repeat_interleave(trained_B, lengths_B, output_size=len(feature_L))
        if batch.weights_L is not None:
            weighted_L = batch.weights_L.ne(0).to(torch.int32)
            trained_L = weighted_L if trained_L is None else weighted_L * trained_L
        if self.split_F is None or trained_L is None:
            return trained_L, None
        touched_F = spans.sum(trained_L)
        together_F = self.split_F.logical_and(touched_F > 0)
        together_L = together_F.index_select(0, feature_L)
        return trained_L.logical_or(together_L).to(torch.int32), touched_F

    def _all_have_gradient(self, grad: Tensor) -> bool:
        """True if a look at one column a feature shows that every bag has one; for the CPU.

        There it saves most of the work of looking closer. On a GPU the host would have to wait.
        """
        if grad.device.type != "cpu":
            return False
        return bool(grad.index_select(1, self._first_column_F).all())


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
        parts_B.append(fused(_nonzero_rows)(run_BFD))
        first, column = last, column + width
    return parts_B[0] if len(parts_B) == 1 else torch.cat(parts_B, dim=1)


def _part(ends_F: Tensor, lengths_F: Tensor, parts: int) -> Tensor:
    """int64 [features * parts + 1]: as ``ends_F``, with the lookups of each feature in parts."""
    first_F, end_1 = ends_F.split([len(lengths_F), 1])
    part_P = torch.arange(parts, device=ends_F.device)
    first_FP = first_F.unsqueeze(1) + lengths_F.unsqueeze(1) * part_P // parts
    return torch.cat([first_FP.flatten(), end_1])


def _rows(first_row_F: Tensor, feature_L: Tensor, indices: Tensor) -> Tensor:
    """int64 [lookups] of the ids of each lookup, within its feature's table."""
    return first_row_F.index_select(0, feature_L) + indices


def _nonzero_rows(grad: Tensor) -> Tensor:
    """int32 [...] of [..., columns]: 1 where a column is not 0."""
    # The one reduction that is fast on a CPU, too; NaN and infinity are not 0.
    norm: Tensor = torch.linalg.vector_norm(grad, dim=-1, dtype=torch.float32)
    return norm.ne(0).to(torch.int32)

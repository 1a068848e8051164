"""Which rows a batch looks up in the tables of one TBE, and sums over the lookups of a feature."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Lookups:
    """The lookups of a batch, feature after feature.

    Args:
        ids_L: [lookups] rows within their tables.
        ends_F: [features + 1] first lookup of each feature, and their number.
        first_row_F: int64 [features] first row of each feature's table among those of the TBE.

    Attributes:
        rows_L: int64 [lookups] among the rows of all tables of the TBE.
    """

    def __init__(self, ids_L: Tensor, ends_F: Tensor, first_row_F: Tensor) -> None:
        self._ends_F, self._lengths_F = ends_F, ends_F.diff()
        length = _equal_length(ends_F)
        self._shape = (len(first_row_F), length or 0)
        self._feature_L: Tensor | None = None
        if length is None:
            self._feature_L = torch.repeat_interleave(self._lengths_F, output_size=len(ids_L))
            self.rows_L = first_row_F.index_select(0, self._feature_L).add_(ids_L)
        elif len(first_row_F) == 1:  # its table is the TBE's first
            self.rows_L = ids_L.to(torch.int64)
        else:
            self.rows_L = (ids_L.view(self._shape) + first_row_F.unsqueeze(1)).view(-1)

    def spread(self, values_F: Tensor) -> Tensor:
        """[features, 1] or [lookups]: a value of each feature, to go with :meth:`by_feature`."""
        if self._feature_L is None:
            return values_F.unsqueeze(1)
        return values_F.index_select(0, self._feature_L)

    def by_feature(self, values_L: Tensor) -> Tensor:
        """[features, lookups of each] view where all have equally many, else [lookups]."""
        return values_L if self._feature_L is not None else values_L.view(self._shape)

    def sum(self, values_L: Tensor) -> Tensor:
        """float64 [features] sums over the lookups of each."""
        if self._feature_L is None:
            return values_L.view(self._shape).sum(dim=1, dtype=torch.float64)
        # Unsafe: a check of the offsets would make the host wait.
        return torch.segment_reduce(
            values_L.double(), "sum", offsets=self._ends_F.to(torch.int64).contiguous(), unsafe=True
        )

    def lengths(self) -> Tensor:
        """float64 [features] lookups of each."""
        return self._lengths_F.double()


class Features:
    """The features of a TBE.

    Args:
        rows: rows of each table.
        feature_table_map: table of each feature.
        device: where the tables are.
    """

    def __init__(
        self, rows: Sequence[int], feature_table_map: Sequence[int], device: torch.device | None
    ) -> None:
        self.first_rows = [sum(rows[:table]) for table in range(len(rows))]
        self.tables = list(feature_table_map)
        first_row_F = [self.first_rows[table] for table in feature_table_map]
        self.first_row_F = torch.tensor(first_row_F, dtype=torch.int64, device=device)

    def look_up(self, ids_L: Tensor, offsets_B: Tensor, bags_F: Tensor | None = None) -> Lookups:
        """The lookups of a batch.

        Args:
            ids_L: [lookups] rows within their tables.
            offsets_B: [bags + 1] first lookup of each bag, feature after feature.
            bags_F: int64 [features + 1] first bag of each feature, where the features have
                different batch sizes (VBE); None where they have one.
        """
        features, bags = len(self.tables), offsets_B.numel() - 1
        if bags_F is not None:
            ends_F = offsets_B.index_select(0, bags_F)
        else:
            ends_F = offsets_B.as_strided((features + 1,), (bags // features,)).clone()
        return Lookups(ids_L, ends_F, self.first_row_F)


def _equal_length(ends_F: Tensor) -> int | None:
    """Lookups of each feature where that is known to be one number. A GPU's host cannot look."""
    if len(ends_F) == 2:
        return -1
    if ends_F.device.type != "cpu":
        return None
    ends = ends_F.tolist()
    length: int = ends[1] - ends[0]
    equal = all(after - before == length for before, after in zip(ends, ends[1:], strict=False))
    return length if equal else None

"""Which rows of tables to keep, by how often they were looked up.

>>> import torch
>>> from torchrec_freq import vocabulary
>>> kept = vocabulary.keep_rows({"item": torch.tensor([5, 0, 2, 9])}, {"item": 2})["item"]
>>> kept.rows.tolist(), kept.mapping().tolist(), kept.coverage
([0, 3], [0, -1, -1, 1], 0.875)

``kept.rows`` is for :meth:`torchrec_freq.TableState.take`; ``kept.mapping()`` gives each old id its
new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchrec_freq.counts.state import check_counts, check_rows


@dataclass(frozen=True)
class Selection:
    """Rows of a table that are kept, in their order.

    Attributes:
        rows: int64 [kept] the old row of each new one, ascending.
        old_rows: rows of the table before.
        coverage: share of the lookups counted so far that the kept rows had; 1 where there were
            none.
    """

    rows: Tensor
    old_rows: int
    coverage: float

    def mapping(self) -> Tensor:
        """int64 [old rows]: the new row of each old one; -1 where it is lost."""
        mapping_R = torch.full((self.old_rows,), -1)
        mapping_R[self.rows] = torch.arange(len(self.rows))
        return mapping_R


def keep_rows(counts: Mapping[str, Tensor], rows: Mapping[str, int]) -> dict[str, Selection]:
    """The rows with the largest counts; of equal ones the first.

    Args:
        counts: table name -> [rows] counts, as of :func:`torchrec_freq.row_counts`.
        rows: table name -> how many to keep, of some or all of the tables.

    Raises:
        ValueError: a table without counts, what cannot be counts, less than 1 row, or more than
            the table has; the message names the table.
    """
    kept = {}
    for table, number in rows.items():
        counts_R = _counts_of(table, counts)
        if not 1 <= number <= len(counts_R):
            raise ValueError(
                f"Table {table!r}: cannot keep {number} rows of {len(counts_R)}; give 1 to "
                f"{len(counts_R)}."
            )
        # The least count of a row that is kept.
        lost = len(counts_R) - number
        least = int(np.partition(counts_R.numpy(), lost)[lost])
        kept_R = counts_R > least
        ties_R = (counts_R == least).nonzero().flatten()
        kept_R[ties_R[: number - int(kept_R.sum())]] = True
        kept[table] = _selection(counts_R, kept_R)
    return kept


def keep_counted(counts: Mapping[str, Tensor], least: Mapping[str, int]) -> dict[str, Selection]:
    """The rows with at least so large a count.

    Args:
        counts: table name -> [rows] counts.
        least: table name -> the least count to keep, of some or all of the tables.

    Raises:
        ValueError: a table without counts, what cannot be counts, or no row has such a count; the
            message names the table.
    """
    kept = {}
    for table, number in least.items():
        counts_R = _counts_of(table, counts)
        kept_R = counts_R >= number
        if not bool(kept_R.any()):
            raise ValueError(
                f"Table {table!r}: no row has a count of {number}; the largest is "
                f"{int(counts_R.max())}."
            )
        kept[table] = _selection(counts_R, kept_R)
    return kept


def keep_budget(
    counts: Mapping[str, Tensor], row_bytes: Mapping[str, int], budget: int, admit: int = 1
) -> dict[str, Selection]:
    """The rows that earn their memory, of all tables together.

    Rows are kept in the order of their count per byte until the next one does not fit; of equal
    ones those of the first table, and the first of these. Rows with a count below ``admit`` come
    after all others: they have learned nothing. Each table keeps a row.

    Args:
        counts: table name -> [rows] counts.
        row_bytes: table name -> bytes of a row: weights and the optimizer's state. With float32
            weights and FrequencySGD that is ``4 * embedding_dim + 8``.
        budget: bytes for all tables.
        admit: the optimizer's option.

    Raises:
        ValueError: tables without counts or bytes, what cannot be counts, or no room for a row of
            each table; the message names the table or the bytes.
    """
    if counts.keys() != row_bytes.keys():
        raise ValueError(f"Counts are of {list(counts)}, bytes a row of {list(row_bytes)}.")
    histograms = {table: histogram(_counts_of(table, counts)) for table in counts}
    return keep_rows(counts, budget_rows(histograms, row_bytes, budget, admit))


class Histogram(NamedTuple):
    """The different counts of a table, descending, and how many rows have each."""

    values: NDArray[np.int64]
    rows: NDArray[np.int64]


def histogram(counts_R: Tensor) -> Histogram:
    """See :class:`Histogram`."""
    values, rows = np.unique(counts_R.numpy(), return_counts=True)
    return Histogram(values[::-1].astype(np.int64), rows[::-1].astype(np.int64))


def budget_rows(
    histograms: Mapping[str, Histogram], row_bytes: Mapping[str, int], budget: int, admit: int = 1
) -> dict[str, int]:
    """How many rows each table keeps, as :func:`keep_budget` chooses them."""
    left = budget - sum(row_bytes.values())
    if left < 0:
        raise ValueError(
            f"A budget of {budget} bytes has no room for a row of each table: {dict(row_bytes)}."
        )
    values, rows, tables = [], [], []
    for table, (values_N, rows_N) in enumerate(histograms.values()):
        values.append(values_N)
        rows.append(rows_N - (np.arange(len(rows_N)) == 0))  # the row that each table keeps
        tables.append(np.full(len(rows_N), table))
    value_N, row_N, table_N = map(np.concatenate, (values, rows, tables))
    bytes_N = np.array(list(row_bytes.values()))[table_N]
    order_N = np.lexsort((table_N, -value_N / bytes_N, value_N < admit))
    row_N, table_N, bytes_N = row_N[order_N], table_N[order_N], bytes_N[order_N]
    used_N = (row_N * bytes_N).cumsum()
    first = int(np.searchsorted(used_N, left, side="right"))  # that does not fit as a whole
    if first < len(row_N):
        before = int(used_N[first] - row_N[first] * bytes_N[first])
        row_N[first] = (left - before) // bytes_N[first]
        row_N[first + 1 :] = 0
    kept = 1 + np.bincount(table_N, row_N, len(histograms)).astype(int)
    return dict(zip(histograms, kept.tolist(), strict=True))


def rows_of(mapping: Tensor, rows: int | None = None) -> Tensor:
    """The old row of each new one, from a mapping the other way.

    Args:
        mapping: int64 [old rows] the new row of each old one, -1 where it is lost, as
            :meth:`Selection.mapping` gives it.
        rows: of the new table; None for as many as are kept.

    Returns:
        int64 [rows], -1 for a new id.

    Raises:
        ValueError: no whole numbers, a new row out of range, or one that two old rows have; the
            message names the old row and the value.
    """
    known = mapping >= 0
    rows = int(known.sum()) if rows is None else rows
    check_rows(mapping, rows)
    rows_R = torch.full((rows,), -1)
    rows_R[mapping[known].long()] = known.nonzero().flatten()
    return rows_R


def _counts_of(table: str, counts: Mapping[str, Tensor]) -> Tensor:
    if table not in counts:
        raise ValueError(f"No counts of table {table!r}; there are those of {', '.join(counts)}.")
    check_counts(table, counts[table])
    return counts[table].cpu()


def _selection(counts_R: Tensor, kept_R: Tensor) -> Selection:
    total = int(counts_R.sum())
    coverage = int((counts_R * kept_R).sum()) / total if total else 1.0
    return Selection(kept_R.nonzero().flatten(), len(counts_R), coverage)

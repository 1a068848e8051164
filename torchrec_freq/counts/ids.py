"""Counts of the ids of a data set: batch by batch, wherever they come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchrec_freq.counts.state import COUNT_CEILING

# Ids counted at once: bounds what a large batch needs besides itself.
_CHUNK_IDS: Final = 1 << 22


def count_ids(
    batches: Iterable[Mapping[str, Tensor | NDArray[Any]]],
    rows: Mapping[str, int],
    *,
    modulo: bool = False,
) -> dict[str, Tensor]:
    """Counts ids, batch by batch.

    >>> counts = count_ids([{"item": torch.tensor([2, 0, 2])}], {"item": 4})
    >>> counts["item"].tolist()
    [1, 0, 2, 0]

    Args:
        batches: table name -> [...] ids of any whole-number dtype. Tables may be missing in a
            batch; only one batch is held at a time.
        rows: number of rows of each table, at least 1.
        modulo: takes ids modulo the table's rows (never negative), as TorchRec's Criteo reader
            does with ``hashes``, instead of refusing ids out of range.

    Returns:
        table name -> int32 CPU tensor [rows]: occurrences of each id, at most
        ``torchrec_freq.COUNT_CEILING``.

    Raises:
        ValueError: an unknown table, ids that are not whole numbers, an id out of range, a number
            of rows below 1 or too large for the memory; the message names table and batch.
    """
    tally = Tally(rows, modulo)
    for number, batch in enumerate(batches):
        for table, ids in batch.items():
            tally.add(table, ids, f"batch {number}")
    return tally.counts()


class Tally:
    """Counters of the tables, on the CPU."""

    def __init__(self, rows: Mapping[str, int], modulo: bool) -> None:
        self.rows = dict(rows)
        self.ids = 0
        self._modulo = modulo
        self._added = 0
        self._counts: dict[str, Tensor] = {}
        for table, count in self.rows.items():
            if type(count) is not int or count < 1:
                raise ValueError(f"Table {table!r}: rows must be a whole number >= 1; got {count}.")
            try:
                self._counts[table] = torch.zeros(count, dtype=torch.int32)
            except (RuntimeError, TypeError) as error:  # the latter from 2^63 rows on
                raise ValueError(
                    f"Table {table!r}: no memory for the counts of {count} rows ({4 * count} bytes)"
                    ". Count fewer tables at once."
                ) from error

    def add(self, table: str, ids: Tensor | NDArray[Any], where: str) -> None:
        """Counts ids of any shape; ``where`` says in errors where they come from."""
        if table not in self.rows:
            raise ValueError(f"{where}: no table {table!r}; tables: {', '.join(self.rows)}.")
        ids_L = (ids.detach().cpu().numpy() if isinstance(ids, Tensor) else ids).reshape(-1)
        if ids_L.dtype.kind not in "iu":
            raise ValueError(f"{where}: ids must be whole numbers; got {ids_L.dtype}.")
        for start in range(0, ids_L.size, _CHUNK_IDS):
            rows_L = self._rows(table, ids_L[start : start + _CHUNK_IDS], where)
            if self._added + len(rows_L) >= COUNT_CEILING:  # before int32 ends
                self.counts()
            ones_L = torch.ones(len(rows_L), dtype=torch.int32)
            self._counts[table].scatter_add_(0, torch.from_numpy(rows_L), ones_L)
            self._added += len(rows_L)
        self.ids += ids_L.size

    def counts(self) -> dict[str, Tensor]:
        """int32 [rows] counts of each table so far, the memory itself."""
        for counts_R in self._counts.values():
            counts_R.clamp_(max=COUNT_CEILING)
        self._added = 0
        return dict(self._counts)

    def _rows(self, table: str, ids_L: NDArray[Any], where: str) -> NDArray[np.int64]:
        """int64 [ids] row numbers."""
        rows = self.rows[table]
        # uint64 alone has numbers that int64 has not.
        wide_L = ids_L if ids_L.dtype == np.uint64 else ids_L.astype(np.int64)
        least, most = int(wide_L.min()), int(wide_L.max())
        if least < 0 or most >= rows:
            if not self._modulo:
                raise ValueError(
                    f"{where}: id {least if least < 0 else most} is out of range: table {table!r} "
                    f"has {rows} rows, for ids of 0 to {rows - 1}. Give more rows, or modulo if "
                    "training takes ids modulo the rows."
                )
            wide_L = wide_L % wide_L.dtype.type(rows)
        return wide_L.astype(np.int64, copy=False)

r"""The state of a table whose counts or sums are missing: row-wise Adagrad's, or version 0.2's."""

from __future__ import annotations

import dataclasses
from typing import Final

import torch
from torch import Tensor

from torchrec_freq.config import require_number
from torchrec_freq.counts.state import COUNT_CEILING, TableState, check_form, totals_of

LARGEST_COUNT: Final = COUNT_CEILING // 2
"""A count that comes from a sum is at most this. As much is left for the occurrences to come."""

KNOWN_COUNT: Final = 1000
"""Mean count of the rows that have a sum, where nobody knows how often they occurred. It is so
large beside ``prior_count`` that rows keep the rates that row-wise Adagrad gave them."""

_CHUNK_ROWS: Final = 1 << 22
"""Rows that are float64 at once."""


def check_sums(table: str, sums_R: Tensor) -> None:
    """Refuses what cannot be the sums of squares of a table.

    Args:
        sums_R: [rows] of any dtype, on any device.

    Raises:
        ValueError: not numbers, finite and at least 0; the message names the table.
    """
    check_form(table, "sums", sums_R)
    for number, chunk_R in enumerate(sums_R.split(_CHUNK_ROWS)):
        wrong_R = ~(chunk_R.isfinite() & (chunk_R >= 0))
        if bool(wrong_R.any()):
            row = int(wrong_R.nonzero()[0])
            raise ValueError(
                f"Table {table!r}: sums must be finite and at least 0; got {chunk_R[row].item()} "
                f"in row {number * _CHUNK_ROWS + row}. Take them from a checkpoint before that."
            )


def check_lookups(table: str, lookups: float | None) -> None:
    """Refuses what cannot be the number of a table's occurrences.

    Raises:
        ValueError: not a finite number of at least 1; the message names the table.
    """
    if lookups is not None:
        require_number(f"lookups of {table!r}", lookups, minimum=1)


def with_counts_of_sums(state: TableState, lookups: float | None = None) -> TableState:
    r"""A state with row-wise Adagrad's sums, and the counts that go with them.

    .. math::
        u = \textstyle\sum_i A_i / \mathrm{lookups}, \qquad c_i = \max(1, \mathrm{round}(A_i / u)),
        \qquad G = \textstyle\sum_i A_i, \qquad C = G / u

    so the table predicts for each row about its own sum. Rows without a sum have count 0.

    Args:
        state: its counts and totals are not used.
        lookups: the table's occurrences so far, at least 1; None where unknown: rows with a sum
            then have ``KNOWN_COUNT`` on average. No count is above ``LARGEST_COUNT``.
    """
    sums_R = state.row_sums()
    # What has overflowed, or is no number, says nothing about the others.
    usable_R = sums_R.isfinite() & (sums_R > 0)
    seen_R = sums_R[usable_R].double()
    counts_R = (~usable_R & (sums_R != 0)).to(torch.int32) * KNOWN_COUNT
    total = float(seen_R.sum())
    if total == 0:
        return dataclasses.replace(state, counts=counts_R, totals=totals_of(0, 0), age=0)
    unit = total / (lookups or KNOWN_COUNT * len(seen_R))
    counts_R[usable_R] = (seen_R / unit).round_().clamp_(1, LARGEST_COUNT).to(torch.int32)
    return dataclasses.replace(state, counts=counts_R, totals=totals_of(total, total / unit), age=0)


def with_sums_of_counts(state: TableState) -> TableState:
    r"""A state of version 0.2 with the sums that its rates came from, :math:`A_i = G c_i / C`."""
    _, squares, count, _ = state.totals.tolist()
    sums_R = state.counts.to(torch.float32) * (squares / count if count else 0.0)
    return dataclasses.replace(
        state,
        sums=sums_R.unsqueeze(1).expand_as(state.sums).clone(),
        totals=totals_of(squares, count, state.age),
    )
